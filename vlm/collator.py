"""Collator of a DataLoader: lazy image loading, replacement of undecodable images, padded or packed batches.

A sample is {"ids": [...], "labels": [...], "images": [...]}, as in vlm/packing.py.
"""

import struct
import zlib

import numpy as np
import torch
from PIL import Image

from utils.run import UserError, check
from utils.text import printable
from vlm.image_download import DownloadsOff
from vlm.packing import pack, packed, pad

# Samples that are looked at for a stand-in, at most
LOOK_AT = 1000
# What reading a bad file raises; a bug is not among it
BROKEN = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    UserError,
)


class Counter:
    """Counts what happens in the workers of a DataLoader: each worker has a number of its own, in
    memory that all share."""

    def __init__(self):
        self.counts = torch.zeros(256, dtype=torch.long).share_memory_()

    def add(self):
        worker = torch.utils.data.get_worker_info()
        # place 0 is the main process; no two workers write to one place
        self.counts[worker.id % 255 + 1 if worker else 0] += 1

    def total(self):
        return int(self.counts.sum())


def stacked(images):
    """Images of a batch -> {"images": (P,...)}, None if there are none. Of tiled ones, pairs of tiles
    (1+T,...) and size: all tiles one after the other, and "sizes" (P,2)."""
    if not images:
        return {"images": None}
    if not isinstance(images[0], tuple):
        return {"images": torch.stack(images)}
    tiles = torch.cat([part for part, _ in images])
    return {"images": tiles, "sizes": torch.tensor([size for _, size in images])}


class Collator:
    """Samples -> a batch; images are read here, so that workers of a DataLoader do it and none
    waits in memory.

    load(path) -> tensor, or load(path, random) with views=True; samples: where to look for a
    stand-in, any sequence; length: pack into rows of so many tokens, 0: pad; longer=True: rows are
    as long as the longest sample, if that is more. If a picture cannot be read, the whole sample is
    replaced by another one with a picture: the question was about the picture. Who stands in depends
    on the broken sample alone, so a run can be repeated; the batch keeps its size and modality, so
    ranks stay in step. `broken` counts pictures that failed, over all workers.
    """

    def __init__(self, load, samples, pad_id, length=0, tries=10, views=False, longer=False):
        self.load = load
        self.samples = samples
        self.pad_id = pad_id
        self.length = length
        self.tries = tries
        self.views = views
        self.longer = longer
        self.counter = Counter()

    @property
    def broken(self):
        return self.counter.total()

    def may_stand_in(self, one, broken):
        """Has it other images, and does it fit into a row?"""
        fits = self.longer or not self.length or len(one["ids"]) <= self.length
        return fits and one["images"] and one["images"] != broken["images"]

    def candidates(self, sample):
        """The sample itself, then others with images, in an order that depends on nothing else."""
        yield sample
        # drawn by the broken sample alone: a repeated run finds the same stand-in
        random = np.random.default_rng(zlib.crc32(repr(sample["images"]).encode()))
        for i in random.permutation(len(self.samples))[:LOOK_AT]:
            one = self.samples[i]
            if self.may_stand_in(one, sample):
                yield one

    def images(self, one, place):
        """The images of a sample, with the random draws of its place in training."""
        if not self.views or not one["images"]:
            return [self.load(path) for path in one["images"]]
        check(
            place is not None, "views are drawn by the Place of a sample: ask for it by its Place"
        )
        random = place.random()
        return [self.load(path, random) for path in one["images"]]

    def read(self, sample):
        """-> the sample, or who stands in for it, and the pictures. Raises UserError after so many
        tries."""
        why = ""
        placed = not self.views or not sample["images"] or sample.get("place") is not None
        check(placed, "views are drawn by the Place of a sample: ask for it by its Place")
        for one, _ in zip(self.candidates(sample), range(self.tries)):
            try:
                # a copy: a sample that is there twice has its own images each time
                return dict(one), self.images(one, sample.get("place"))
            # no picture is broken where a flag is missing
            except DownloadsOff:
                raise
            except BROKEN as error:
                self.counter.add()
                why = printable(f"{one['images']}: {error}")
        raise UserError(
            f"no picture that can be read in {self.tries} tries or less; the last one was {why}"
        )

    def __call__(self, samples):
        """-> what `pad` or `packed` give, and what `stacked` makes of the images, in the order of the
        rows."""
        # samples with their images; an undecodable one is replaced
        found = [self.read(s) for s in samples]
        # a rectangle, padded or packed; the images follow its rows
        if self.length:
            pictures = {id(s): images for s, images in found}
            chosen = [s for s, _ in found]
            longest = max(len(s["ids"]) for s in chosen) if self.longer else 0
            rows = pack(chosen, max(self.length, longest))
            batch = packed(rows, self.pad_id)
            found = [(s, pictures[id(s)]) for row in rows for s in row]
        else:
            batch = pad([s for s, _ in found], self.pad_id)
        # images in the order of the rows, one behind the other
        return batch | stacked([image for _, several in found for image in several])
