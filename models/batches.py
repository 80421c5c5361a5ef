"""Shuffled batches for ever, in an order that the seed alone sets: a resumed run goes on in the middle of an epoch."""

import torch

from utils import data, run


def shuffled(items, batch, seed=0, start=0):
    """Batches in a new order every epoch, for ever. The seed alone sets it: `start` goes on where it broke off."""
    per_epoch = len(items) // batch  # batches
    run.check(per_epoch > 0, f"--batch {batch} is more than the {len(items)} images there are")
    while True:
        # where in which epoch is this batch?
        epoch = start // per_epoch
        first = start % per_epoch * batch
        # the order of that epoch, from a generator of its own
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed + epoch))
        yield items[order[first : first + batch]]
        start += 1


def batches(images, batch, seed=0, start=0):
    """Shuffled batches of uint8 images as floats in [-1, 1]."""
    return map(data.to_float, shuffled(images, batch, seed, start))
