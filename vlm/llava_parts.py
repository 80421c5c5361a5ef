"""Parts of a LLaVA: vision tower, connector, language model; LoRA merged into the language model.

Hu et al. 2021, arXiv:2106.09685.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from utils import pretrained
from utils.run import UserError, check
from utils.text import printable
from vlm import anyres, connector, tower
from vlm.prompts import IMAGE, add_words, use_template


class Parts(NamedTuple):
    """What a LLaVA is put together from (llava.py)."""

    vision: Any
    connector: Any
    language: Any
    image_id: int  # of <image> in the vocabulary
    newline: Any = None  # LLaVA-1.6: the vector that ends a row of tiles
    grids: tuple = ()  # LLaVA-1.6: the sizes that a picture is tiled to


def build(
    vision,
    join,
    language,
    tokenizer,
    layer=-2,
    select="patch",
    words=(IMAGE,),
    on="cpu",
    size=None,
    options=None,
    tiles=(),
):
    """Names of a tower and a connector, and a language model -> Parts; the words are added to its
    vocabulary.

    size: side of the pictures, if not that of the tower; options: of the perceiver resampler;
    tiles: at most so many, and sizes to choose from (anyres.grids).
    """
    vision_tower = vision
    if isinstance(vision, str):
        vision_tower = tower.load(vision, layer, select, size, on)
    # the connector, from the width of the tower to that of the language model
    width = language.config.get_text_config().hidden_size
    image_id = add_words(tokenizer, language, words)
    made = connector.build(join, vision_tower.width, width, **options or {}).to(on)
    made.built_as = (join, options or {})  # for the configuration of a saved model
    parts = Parts(vision_tower, made, language, image_id)
    # tiles, and a new vector that ends a row of them
    grids = anyres.grids(vision_tower.size, *tiles)
    if grids:
        check_map(vision_tower, made)
        parts = parts._replace(grids=tuple(grids))
        # a resampler has no rows to end
        if not connector.joins_tiles(made):
            newline = nn.Parameter((torch.randn(width) / width**0.5).to(on))
            parts = parts._replace(newline=newline)
    return parts


def check_map(vision_tower, join):
    """Raises UserError for a connector whose tokens have no place, or a tower that keeps others than
    patches: tiles of such tokens cannot be put together again. A resampler of all tiles need not."""
    tiled = connector.joins_tiles(join)
    check(
        tiled or connector.has_places(join),
        "tiles are put together by place, and a perceiver's latents have none: "
        "leave out --tiles, or take --connector tile_perceiver",
    )
    count = vision_tower.count if tiled else connector.tokens(join, vision_tower.count)
    square = round(count**0.5) ** 2 == count
    check(
        square, f"tiles are put together by place, and {count} tokens are no square: --select patch"
    )


def tile_tokens(model, features, sizes, candidates):
    """Vision features (P,N,D) of pictures of `sizes` (H,W), of each the whole and its tiles, one
    picture after the other -> their image tokens as one sequence (1,N',E): resampled, or through the
    connector and put together by place."""
    weight = next(model.connector.parameters(), features)
    features = features.to(weight.dtype)
    side = model.vision.size
    if connector.joins_tiles(model.connector):
        tokens = model.connector(features, (sizes, side, candidates))  # (B,K,E)
        return tokens.flatten(0, 1)[None]
    tokens = model.connector(features)
    return anyres.pack_all(tokens, sizes, side, candidates, model.newline)[None]


def language_model(name, on="cpu"):
    """-> tokenizer, language model: smollm2, or a folder or hub id."""
    if name != "smollm2":
        return pretrained.language_model(name, on)
    tokenizer, language = pretrained.smollm2(on)
    # without the system message of its own template, as the weights of the book learned it
    use_template(tokenizer, "chatml")
    return tokenizer, language


@torch.no_grad()
def merge_lora(language, tensors, scale):
    """Merge LoRA into the matrices that it was trained beside, in place: W + scale B A."""
    for name in [k.removesuffix(".A") for k in tensors if k.endswith(".A")]:
        try:
            weight = language.get_parameter(f"{name}.weight")
            update = scale * tensors[f"{name}.B"].float() @ tensors[f"{name}.A"].float()
            weight.add_(update.to(weight))
        except (AttributeError, KeyError, RuntimeError):
            raise UserError(
                f"the corrections are for another language model: {name} does not fit"
            ) from None


def first_line(error):
    """Of an error of whatever kind, at most 200 characters."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0])
