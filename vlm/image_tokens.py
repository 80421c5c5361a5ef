"""Image tokens among the token embeddings of a text: where it says <image>, features are put in.

Liu et al. 2023, arXiv:2304.08485, Sec. 4.1.

Shapes: text embeddings (B,T,E), features of any number of pictures (P,N,E).
"""

from utils.run import check


def merge(text_embeds, image_features, places):
    """Put features into the places of <image>, in order: (B,T,E), (P,N,E), bool (B,T) -> (B,T,E).

    Raises UserError if there are more places than features, or fewer.
    """
    features = image_features.flatten(0, -2)
    asked = int(places.sum())
    check(
        asked == len(features),
        f"the text has {asked} places for a picture's tokens, the pictures have {len(features)}",
    )
    return text_embeds.masked_scatter(places[..., None], features.to(text_embeds.dtype))
