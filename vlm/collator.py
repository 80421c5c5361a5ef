"""Collator of a DataLoader: lazy image loading, replacement of undecodable images, padded or packed batches.

A sample is {"ids": [...], "labels": [...], "images": [...]}, as in vlm/packing.py.
"""

import struct
import zlib

import numpy as np
import torch
from PIL import Image

from utils.run import UserError
from utils.text import printable
from vlm.packing import pack, packed, pad

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


class Collator:
    """Samples -> a batch; images are read here, so that workers of a DataLoader do it and none
    waits in memory.

    load(path) -> tensor; samples: where to look for a stand-in; length: pack into rows of so many
    tokens, 0: pad. If a picture cannot be read, the whole sample is replaced by another one with a
    picture: the question was about the picture. Who stands in depends on the broken sample alone,
    so a run can be repeated; the batch keeps its size and modality, so ranks stay in step. `broken`
    counts pictures that failed, over all workers.
    """

    def __init__(self, load, samples, pad_id, length=0, tries=10):
        self.load = load
        self.pad_id = pad_id
        self.length = length
        self.tries = tries
        self.pool = [s for s in samples if s["images"] and (not length or len(s["ids"]) <= length)]
        # one count for each worker: none writes into another's
        self.counts = torch.zeros(256, dtype=torch.long).share_memory_()

    @property
    def broken(self):
        return int(self.counts.sum())

    def candidates(self, sample):
        """The sample itself, then others with images, in an order that depends on nothing else."""
        yield sample
        random = np.random.default_rng(zlib.crc32(repr(sample["images"]).encode()))
        others = (self.pool[i] for i in random.permutation(len(self.pool)))
        yield from (s for s in others if s["images"] != sample["images"])

    def read(self, sample):
        """-> the sample, or who stands in for it, and the pictures. Raises UserError after so many
        tries."""
        worker = torch.utils.data.get_worker_info()
        why = ""
        for one, _ in zip(self.candidates(sample), range(self.tries)):
            try:
                return one, [self.load(path) for path in one["images"]]
            except BROKEN as error:
                self.counts[worker.id % 255 + 1 if worker else 0] += 1
                why = printable(f"{one['images']}: {error}")
        raise UserError(
            f"no picture that can be read in {self.tries} tries or less; the last one was {why}"
        )

    def __call__(self, samples):
        """-> what `pad` or `packed` give, and "images" (N,...) in the order of the rows, or
        None."""
        # samples with their images; an undecodable one is replaced
        found = [self.read(s) for s in samples]
        # a rectangle, padded or packed; the images follow its rows
        if self.length:
            pictures = {id(s): images for s, images in found}
            rows = pack([s for s, _ in found], self.length)
            batch = packed(rows, self.pad_id)
            found = [(s, pictures[id(s)]) for row in rows for s in row]
        else:
            batch = pad([s for s, _ in found], self.pad_id)
        images = [image for _, several in found for image in several]
        return batch | {"images": torch.stack(images) if images else None}
