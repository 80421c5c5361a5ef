"""Pictures of your own instead of digits: a folder to train on, and the training picture nearest to each sample.

No classifier knows what they should show, so they get no `recognised` and no Frechet distance. What can be asked of
any set is whether the network draws or copies: a few hundred pictures are soon learned by heart.

Shapes: N samples and M training pictures (C, H, W); C = 3 colours, H = W = 32.
"""

import torch

from utils import data, figures, run

SIDE = 32


def training_set(cfg, no_class=10):
    """Digits and their classes, or the pictures below the folder cfg.data, which have none: uint8 (M, C, H, W), (M,).

    Of a picture the middle square. Raises UserError if they are fewer than a batch, and for shipped weights.
    """
    if not cfg.data:
        return data.mnist("train")
    shipped = "the shipped weights draw digits: leave out --pretrained to train on --data"
    run.check(not getattr(cfg, "pretrained", False), shipped)
    images = data.image_folder(cfg.data, SIDE)
    few = f"{cfg.data} has {len(images)} images, less than a batch: --batch {len(images)} or less"
    run.check(len(images) >= max(cfg.batch, 2), few)
    return images, torch.full((len(images),), no_class)


def distances(x, y):
    """Root mean squared difference of a pixel, of all pairs: (N, C, H, W), (M, C, H, W) in [-1, 1] -> (N, M).

    0 is a copy, 2 is white and black.
    """
    return torch.cdist(x.flatten(1), y.flatten(1)) / x[0].numel() ** 0.5


def score(folder, images, samples):
    """How near samples (N, C, H, W) in [-1, 1] are to the pictures trained on, uint8 (M, C, H, W); draws nearest.png.

    nearest_training: the median distance; between_training: that of a picture to the nearest other one. Much less
    than that is a copy.
    """
    images = data.to_float(images)
    distance, which = distances(samples, images).min(1)
    # each of a hundred pictures against all the others
    others = distances(images[:100], images)
    others[torch.arange(len(others)), torch.arange(len(others))] = torch.inf
    rows = {"drawn": samples[:10], "nearest": images[which[:10]]}
    figures.rows(folder / "nearest.png", rows)
    return {
        "training_images": len(images),
        "nearest_training": float(distance.median()),
        "between_training": float(others.min(1).values.median()),
    }
