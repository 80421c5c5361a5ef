"""Sizes of pictures from the headers of their files: the number of tiles follows from them.

Shapes: a size is (height, width) of the upright picture.
"""

import hashlib
import io

import numpy as np
import torch
from PIL import Image

from utils import assets, data, images
from utils.run import UserError, check
from utils.text import printable

# Of how sizes are read: raise it with any change, or those of the old way are read
VERSION = 1
# EXIF orientations that swap height and width
ON_ITS_SIDE = (5, 6, 7, 8)


def picture_size(store, name):
    """(height, width) of a picture, upright, from its header. Raises UserError: it cannot be read."""
    file = io.BytesIO(store.read(name))
    try:
        with Image.open(file, formats=images.FORMATS) as image:
            width, height = image.size
            large = height * width > images.MEGAPIXELS * 1e6
            turned = images.orientation_of(image) in ON_ITS_SIDE
    except Exception as error:  # the decoders raise what comes
        raise UserError(f"{printable(name)} is not a readable image: {printable(error)}") from None
    check(not large, f"{printable(name)} has more than {images.MEGAPIXELS} megapixels")
    return (width, height) if turned else (height, width)


def picture_sizes(store, names, skip_unreadable=False):
    """Sizes of many pictures, kept for the next time: [(height, width), ...]; (0, 0) of one that
    cannot be read, if it may be skipped. Raises UserError, if it may not."""

    def read():
        found = np.zeros((len(names), 2), dtype=np.int64)
        for number, name in enumerate(names):
            try:
                found[number] = picture_size(store, name)
            except UserError:
                if not skip_unreadable:
                    raise
        return {"sizes": torch.from_numpy(found)}, None

    stamps = [store.stamp(name) for name in names]
    key = hashlib.sha256(repr((VERSION, stamps)).encode()).hexdigest()[:16]
    path = assets.cache() / "features" / f"sizes-{key}.safetensors"
    sizes = data.cached(path, read)[0]["sizes"].tolist()
    unreadable = [name for name, (height, _) in zip(names, sizes) if not height]
    # they may have been read by a run that skips
    for name in [] if skip_unreadable else unreadable[:1]:
        picture_size(store, name)
    return [(height, width) for height, width in sizes]
