"""Image hashes: is it the same picture, byte for byte, or nearly the same after compression and scaling?

The content hash is SHA-256 of the file. The difference hash (dHash, Krawetz 2013) says of 8 x 8
places whether each is brighter than its right neighbour, here in each colour, for grey values are
blind to colour; two pictures are nearly the same if few of the 192 bits differ. It is for photos:
of 294 in shops, saved as JPEG of quality 75 at half the size, 98 % are within 12 bits of themselves,
and no two of them are within 47 of each other. Drawings with flat areas have equal hashes and show
different things.
"""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from utils import data

SIDE = 8  # of the grid of a difference hash
TOLERANCE = 12  # bits of 192 in which two hashes of one picture may differ


def content_hash(path):
    """SHA-256 of a file -> text."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def difference_hash(image):
    """Difference hash of a picture uint8 (3,H,W) -> bool (192,)."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    small = picture.resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    levels = np.asarray(small).astype(int)  # (8,9,3)
    return (levels[:, :-1] > levels[:, 1:]).flatten()


class SimilarImages:
    """Numbers of pictures by difference hash: one within TOLERANCE bits of an earlier one gets its
    number, the nearest first."""

    def __init__(self):
        self.hashes = np.zeros((0, 3 * SIDE * SIDE), bool)

    def number(self, path):
        """A file -> its number. Raises UserError if it cannot be read."""
        found = difference_hash(data.read_image(path, 0))
        distances = (self.hashes != found).sum(1)
        if len(distances) and distances.min() <= TOLERANCE:
            return int(distances.argmin())
        self.hashes = np.concatenate([self.hashes, found[None]])
        return len(self.hashes) - 1
