"""Any-resolution tiles as training data: sizes of pictures, their tiles, the vision features of these on disk.

A picture becomes 1 + T of the encoder's size, the whole and its tiles (anyres.py). How many, and so how
many image tokens stand in the text, follows from its size, which is read from the header of its file
before anything is decoded. Features of a frozen tower lie in one file of the cache, the tiles of all
pictures one after the other (feature_cache.py).

Shapes: tiles of a picture uint8 (1+T,3,S,S), their features (1+T,N,D), sizes (height, width).
"""

import hashlib
from bisect import bisect_left, bisect_right
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import torch

from utils import assets
from utils.run import UserError, check
from utils.text import printable
from vlm import anyres, feature_cache, tower, views
from vlm.picture_sizes import picture_size, picture_sizes

# Of how pictures become tiles here: raise it with any change, or features of the old ones are read
VERSION = 1


def cut(store, name, size, side, grids):
    """The whole picture and its tiles: uint8 (1+T,3,side,side). Raises UserError: it cannot be read,
    or is not of the size that its header says."""
    picture = views.open_picture(store, name, 0)
    found = tuple(picture.shape[1:])
    check(
        found == tuple(size), f"{printable(name)}: its header says {size}, its pixels are {found}"
    )
    return anyres.tiles(picture, side, grids)


class TilesOfPictures:
    """Features of the tiles of all pictures, computed by pieces, as feature_cache.py asks for them."""

    def __init__(self, vision_tower, store, names, sizes, grids, skip_unreadable):
        self.vision_tower = vision_tower
        self.store = store
        self.names = names
        self.sizes = sizes
        self.grids = grids
        self.skip_unreadable = skip_unreadable
        self.offsets = tile_offsets(sizes, vision_tower.size, grids)

    def tiles_or_none(self, number):
        """Tiles of a picture; None if it cannot be read and may be skipped."""
        side = self.vision_tower.size
        try:
            return cut(self.store, self.names[number], self.sizes[number], side, self.grids)
        except UserError:
            if not self.skip_unreadable:
                raise
            return None

    def __call__(self, first, last):
        """-> features bf16 (last - first, N, D) of these tiles, zeros where a picture cannot be read,
        and which could be."""
        side = self.vision_tower.size
        # pictures that these tiles are of; the first and the last may lie in other pieces, too
        begin = bisect_right(self.offsets, first) - 1
        end = bisect_left(self.offsets, last)
        with ThreadPoolExecutor(views.THREADS) as pool:
            found = list(pool.map(self.tiles_or_none, range(begin, end)))
        shown = []
        readable = []
        for number, tiles in enumerate(found, begin):
            count = self.offsets[number + 1] - self.offsets[number]
            black = torch.zeros(count, 3, side, side, dtype=torch.uint8)
            shown.append(black if tiles is None else tiles)
            readable += [tiles is not None] * count
        # of these the tiles that are asked for
        start = self.offsets[begin]
        asked = slice(first - start, last - start)
        features = tower.encode(self.vision_tower, torch.cat(shown)[asked].split(views.BATCH))
        features[~torch.tensor(readable[asked])] = 0
        return features, readable[asked]


def tile_offsets(sizes, side, grids):
    """Where the tiles of each picture begin, and behind the last one where they end: [0, ...]. A
    picture without a size has one."""
    counts = []
    for size in sizes:
        counts.append(anyres.count_tiles(size, side, grids) if size[0] else 1)
    return [0, *accumulate(counts)]


class TileFeatures:
    """Features of the tiles of pictures by their number: features(i) -> bf16 (1+T,N,D)."""

    def __init__(self, file, offsets):
        self.file = file
        self.offsets = offsets
        self.unreadable = set(file.unreadable())

    def is_readable(self, number):
        return self.offsets[number] not in self.unreadable

    def __call__(self, number):
        return self.file.read(range(self.offsets[number], self.offsets[number + 1]))


def tile_features(vision_tower, names, sizes, grids, store, skip_unreadable=False):
    """Features of the tiles of pictures, on disk, computed the first time -> TileFeatures.

    Several processes may call this at once and share the work. Raises UserError for a picture that
    cannot be read, unless it may be skipped.
    """
    content = views.content_hash(store, names, skip_unreadable)
    made_by = tower.fingerprint(vision_tower)
    key = hashlib.sha256(made_by.encode() + repr((VERSION, content, grids)).encode())
    path = assets.cache() / "features" / f"tiles-{key.hexdigest()[:16]}.bin"
    compute = TilesOfPictures(vision_tower, store, names, sizes, grids, skip_unreadable)
    shape = (compute.offsets[-1], vision_tower.count, vision_tower.width)
    file = feature_cache.FeatureFile(path, shape, compute, views.BATCH)
    file.fill()
    found = TileFeatures(file, compute.offsets)
    # they may have been computed by a run that skips
    for number in range(len(names)):
        if not skip_unreadable and not found.is_readable(number):
            cut(store, names[number], sizes[number], vision_tower.size, grids)
            raise UserError(f"{printable(names[number])} could not be read when it was looked at")
    return found


class TiledPhotos:
    """Photos by number, of each the whole and its tiles: features, or pixels if the tower learns.

    sizes: (photos,2), from which the image tokens of each follow.
    """

    def __init__(self, paths, model, frozen):
        self.paths = paths
        self.vision_tower = model.vision
        self.grids = model.grids
        self.store = views.Files()
        self.sizes = picture_sizes(self.store, paths)
        self.features = None
        if frozen and paths:
            about = (self.paths, self.sizes, self.grids, self.store)
            self.features = tile_features(self.vision_tower, *about)

    def __call__(self, numbers, random):
        """-> features (P,N,D) or pixels (P,3,S,S) of the tiles of these photos, one photo after the
        other. Nothing is drawn: a photo is seen as a whole."""
        if self.features is not None:
            return torch.cat([self.features(i) for i in numbers]).float()
        side = self.vision_tower.size
        found = []
        for i in numbers:
            found.append(cut(self.store, self.paths[i], self.sizes[i], side, self.grids))
        return self.vision_tower.pixels(torch.cat(found))


class TiledPictures:
    """Pictures of a store by name, of each the whole and its tiles, read when a batch needs them.

    load(name, random) and image_tokens(name) are what vlm/lazy_data.py asks for.
    """

    def __init__(self, store, model):
        self.store = store
        self.model = model
        self.side = model.vision.size
        self.grids = model.grids
        self.sizes: dict = {}
        self.number: dict = {}
        self.features: Any = None

    def compute_features(self, names):
        """What a frozen tower sees in all of them, from the disk."""
        sizes = picture_sizes(self.store, names, skip_unreadable=True)
        about = (names, sizes, self.grids, self.store)
        self.features = tile_features(self.model.vision, *about, skip_unreadable=True)
        self.sizes = dict(zip(names, sizes))
        self.number = {name: i for i, name in enumerate(names)}

    def size_of(self, name):
        """(height, width). Raises UserError for a picture that cannot be read."""
        if self.features is None:
            return picture_size(self.store, name)
        size = self.sizes[name]
        readable = self.features.is_readable(self.number[name])
        check(readable, f"{name} could not be read when its features were computed")
        return size

    def image_tokens(self, name):
        """As many as its tiles have; of a picture that cannot be read any number: another row will
        stand in for it."""
        if name is None:
            return 0
        try:
            return self.model.count_of(self.size_of(name))
        except UserError:
            return self.model.count

    def __call__(self, name, random):
        """-> features (1+T,N,D) or pixels uint8 (1+T,3,S,S), and the size. Nothing is drawn."""
        size = self.size_of(name)
        if self.features is None:
            return cut(self.store, name, size, self.side, self.grids), size
        return self.features(self.number[name]).float(), size
