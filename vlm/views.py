"""Views of images for training: the middle square and random crops, as vision features kept for the next time."""

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import torch

from utils import data
from vlm import anyres, tower

# Of how images become pixels here: raise it with any change, or features of the old ones are read
VERSION = 1


def random_crop(image, random):
    """A random square of an image, half of its area or more, some mirrored: uint8 (3,H,W) ->
    (3,h,w)."""
    side = int(image.shape[1] * np.sqrt(random.uniform(0.5, 1)))
    y, x = (random.integers(n - side + 1) for n in image.shape[1:])
    image = image[:, y : y + side, x : x + side]
    return image.flip(-1) if random.random() < 0.5 else image


def features(vision_tower, paths, views=1, seed=0):
    """Vision features of images in several views, kept for the next time -> bf16 (views,
    len(paths), N, D).

    View 0 is the middle square, the others are random crops. Raises UserError for an image that
    cannot be read.
    """
    size = vision_tower.size
    content = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]

    def images(view):
        """Images of a view: called only if their features are not there yet."""
        if not view:
            return torch.stack([data.read_image(Path(p), size) for p in paths])
        random = np.random.default_rng([seed, view])
        crops = []
        for path in paths:
            crop = random_crop(data.read_image(Path(path), 3 * size // 2), random)
            crops.append(anyres.resize(crop, (size, size)))
        return torch.stack(crops)

    found = []
    for view in range(views):
        # the key says all that the images depend on
        key = (VERSION, content, view, view and seed)
        found.append(tower.vision_features(vision_tower, partial(images, view), key))
    return torch.stack(found)
