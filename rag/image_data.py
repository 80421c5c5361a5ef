"""Images with captions for multimodal retrieval: emoji, photos of groceries, or any folder.

Each set holds thumbnails, EfficientNet features, captions, sources and the mask of held-out
images. Features are computed once and cached under a hash of images, weights and settings.

Shapes: N images, D = 1280 features of an image.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import assets, checkpoint, data, pretrained, run

# How `image_features` are made: a part of their name in the cache
FEATURE_SETTINGS = "efficientnet_features, pooled, batches of 4"


class ImageSet(NamedTuple):
    """Images with what is known of each."""

    thumbs: Tensor  # uint8 (N,3,72,72), to look at
    x: Tensor  # (N,D)
    captions: list[str]
    sources: list[str]
    test: Tensor  # bool (N,): held out, nobody trains on these
    coarse: list[str]  # coarse class of a photo, "" for emoji


def image_features(images, device):
    """uint8 (N,3,H,W) -> (N,D) by EfficientNet-lite0, cached by a hash of images and weights."""
    # The name in the cache: other images, weights or settings have another one
    network = pretrained.efficientnet(device)
    weights = {name: w.cpu() for name, w in network.state_dict().items()}
    contents = weights | {"the pictures": images.contiguous()}
    name = checkpoint.digest(contents, FEATURE_SETTINGS)[:16]
    path = assets.cache() / "features" / f"efficientnet-{name}.safetensors"
    # Compute what is not there; larger batches are slower on a CPU
    if not path.exists():
        parts = images.split(32)
        x = []
        for part in run.bar(parts, len(parts), name="features"):
            x.append(pretrained.efficientnet_features(network, part, batch=4).cpu())
        checkpoint.write(path, {"features": torch.cat(x)})
    return checkpoint.read(path)[0]["features"]


def evenly_spaced(count, total):
    """So many indices below `total`, at equal distances: (count,)."""
    return np.linspace(0, total - 1, count).round().astype(int)


def thumbnails(images):
    """uint8 (N,3,H,W) -> uint8 (N,3,72,72)."""
    small = F.interpolate(images.float(), (72, 72), mode="area")
    return small.round().to(torch.uint8)


def emoji(count, device):
    """So many emoji, evenly out of all; one in five is held out, by a hash of its caption."""
    images, captions, codes = data.emoji(72)
    # The same distance between any two that are taken
    pick = evenly_spaced(count, len(images))
    images = images[torch.from_numpy(pick)]
    captions = [captions[i] for i in pick]
    sources = [f"emoji/{codes[i]}.png" for i in pick]
    # The split depends on the caption alone, not on how many emoji there are
    first_bytes = [hashlib.sha256(c.encode()).digest()[0] for c in captions]
    test = torch.tensor([byte % 5 == 0 for byte in first_bytes])
    coarse = [""] * len(captions)
    return ImageSet(images, image_features(images, device), captions, sources, test, coarse)


def photos(count, device):
    """So many photos of fruit, evenly out of all, with their authors' own split.

    Captions are made of class names: "Royal-Gala" is a royal gala apple.
    """
    g = data.groceries()
    pick = evenly_spaced(count, len(g.images))
    images = g.images[torch.from_numpy(pick)]
    # Captions: the fine class, followed by the coarse one if it does not name it
    coarse = [g.coarse_names[g.coarse[i]].lower().removesuffix("s") for i in pick]
    fine = [g.fine_names[g.fine[i]].lower().replace("-", " ").removesuffix("s") for i in pick]
    captions = [f if c in f else f"{f} {c}" for f, c in zip(fine, coarse)]
    sources = [f"groceries/{g.split[i]}/{i}" for i in pick]
    test = torch.tensor([g.split[i] == "test" for i in pick], dtype=torch.bool)
    x = image_features(images, device)
    return ImageSet(thumbnails(images), x, captions, sources, test, coarse)


def folder(path, device):
    """Every image below a folder; its name is its caption.

    Raises UserError as `utils.data.image_folder` does.
    """
    images = data.image_folder(path, 224)
    # The paths in the order of the images
    paths = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in data.IMAGE_SUFFIXES)
    captions = [p.stem.replace("_", " ").replace("-", " ") for p in paths]
    sources = [str(p) for p in paths]
    # Nobody trains on them
    test = torch.ones(len(paths), dtype=torch.bool)
    coarse = [""] * len(paths)
    x = image_features(images, device)
    return ImageSet(thumbnails(images), x, captions, sources, test, coarse)


def concatenate(a, b):
    """Two sets of images as one."""
    fields = []
    for p, q in zip(a, b):
        fields.append(torch.cat([p, q]) if isinstance(p, Tensor) else p + q)
    return ImageSet(*fields)


def subset(images, mask):
    """Those images where the mask (N,) holds."""
    keep = mask.nonzero()[:, 0].tolist()
    fields = []
    for field in images:
        fields.append(field[mask] if isinstance(field, Tensor) else [field[i] for i in keep])
    return ImageSet(*fields)
