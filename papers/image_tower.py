"""Image tower of CLIP: frozen features of pictures, of EfficientNet-lite0 or of this chapter's masked autoencoder."""

from papers import mae, photos
from papers.mae_evaluation import features


def image_features(images, tower, device):
    """uint8 (N,3,H,W) -> features of the image tower (N,D)."""
    if tower == "efficientnet":
        return photos.imagenet(images, device)
    model, flags = mae.load(mae.WEIGHTS, device)
    return features(model.eval(), images, flags["image_size"])
