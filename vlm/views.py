"""Views of images for training: the middle square and random crops, as vision features kept for the next time.

The features lie in files of the cache (vlm/feature_cache.py), one for each view, under a hash of all
that they depend on: the tower, the content of the pictures, the view, the seed.
"""

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from utils import assets, data, images
from utils.run import UserError
from utils.text import printable
from vlm import anyres, feature_cache, tower

# Of how images become pixels here: raise it with any change, or features of the old ones are read
VERSION = 1
THREADS = min(8, os.cpu_count() or 1)  # that decode pictures
BATCH = 4  # pictures that the tower sees at a time: larger batches are slower on a CPU


def draw_crop(height, width, random):
    """Draws of a random square of half of the area or more: side, top, left, mirrored or not."""
    side = int(height * np.sqrt(random.uniform(0.5, 1)))
    y, x = (random.integers(n - side + 1) for n in (height, width))
    return side, int(y), int(x), bool(random.random() < 0.5)


def cut(image, crop):
    """The square of an image that `draw_crop` drew."""
    side, y, x, mirrored = crop
    image = image[:, y : y + side, x : x + side]
    return image.flip(-1) if mirrored else image


def random_crop(image, random):
    """A random square of an image, half of its area or more, some mirrored: uint8 (3,H,W) ->
    (3,h,w)."""
    height, width = image.shape[1:]
    return cut(image, draw_crop(height, width, random))


def crops_of_view(count, side, view, seed):
    """Crops of `count` square pictures in a view, one after the other: a picture's depends on its
    place among them, not on what was computed before a kill."""
    # one generator for the view: drawn in order, for all pictures, whatever of them is needed
    random = np.random.default_rng([seed, view])
    return [draw_crop(side, side, random) for _ in range(count)]


class Files:
    """Pictures as files, by path: what `features` reads them through, if no store is given."""

    def read(self, path):
        """Bytes of a file. Raises UserError if it is too large, or cannot be read."""
        try:
            return images.whole_file(path, printable(path))
        except OSError as error:
            raise UserError(f"cannot read {printable(path)}: {error.strerror}") from None

    def stamp(self, path):
        """What changes with the content: path, size and time of change, None if it is not there."""
        try:
            found = Path(path).stat()
        except (OSError, ValueError):
            return str(path), None, None
        return str(path), found.st_size, found.st_mtime_ns


def open_picture(store, name, size):
    """A picture of a store, the middle square: uint8 (3,size,size); size 0: as it is. Raises
    UserError, which names it."""
    file = io.BytesIO(store.read(name))
    file.name = str(name)
    return data.square(images.open_image(file), size)


def content_hash(store, names, skip_unreadable=False):
    """A hash of the bytes of all pictures, in order. They are read once; the next time sizes and
    times of change say that they are the same. Raises UserError for one that cannot be read, unless
    it may be skipped."""

    def read():
        found = hashlib.sha256()
        # a hash of hashes: of each picture, then of their list
        for name in names:
            try:
                content = store.read(name)
            except UserError:
                if not skip_unreadable:
                    raise
                content = b""
            found.update(hashlib.sha256(content).digest())
        return {}, found.hexdigest()

    stamps = [store.stamp(name) for name in names]
    key = hashlib.sha256(repr((VERSION, stamps)).encode()).hexdigest()[:16]
    path = assets.cache() / "features" / f"content-{key}.safetensors"
    # one rank reads, the others wait for what it finds
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            return data.cached(path, read)[1]
    except OSError as error:
        moves = "VLM_ACTION_CACHE moves the cache"
        raise UserError(f"cannot write {path}: {error.strerror}; {moves}") from None


class ViewOfPictures:
    """Features of a view, computed by pieces: view 0 is the middle square, others are random
    crops."""

    def __init__(self, vision_tower, store, names, view, seed, skip_unreadable):
        self.vision_tower = vision_tower
        self.store = store
        self.names = names
        self.view = view
        self.seed = seed
        self.skip_unreadable = skip_unreadable
        self.crops: list = []  # drawn when a chunk must be computed

    def picture(self, number):
        """A picture as the tower sees it: uint8 (3,S,S)."""
        # view 0: the middle square
        size = self.vision_tower.size
        if not self.view:
            return open_picture(self.store, self.names[number], size)
        # from a larger square, so that a crop is not enlarged
        larger = 3 * size // 2
        square = open_picture(self.store, self.names[number], larger)
        return anyres.resize(cut(square, self.crops[number]), (size, size))

    def picture_or_none(self, number):
        """The same; None for a picture that cannot be read, if it may be skipped."""
        try:
            return self.picture(number)
        except UserError:
            if not self.skip_unreadable:
                raise
            return None

    def __call__(self, first, last):
        """-> features bf16 (last - first, N, D), zeros for a picture that cannot be read, and which
        could be."""
        size = self.vision_tower.size
        if self.view and not self.crops:
            self.crops = crops_of_view(len(self.names), 3 * size // 2, self.view, self.seed)
        # decoded by several threads: the decoders let others run
        with ThreadPoolExecutor(THREADS) as pool:
            pictures = list(pool.map(self.picture_or_none, range(first, last)))
        # a black picture in the place of one that cannot be read, and zeros for its features
        readable = torch.tensor([picture is not None for picture in pictures])
        black = torch.zeros(3, size, size, dtype=torch.uint8)
        shown = torch.stack([black if picture is None else picture for picture in pictures])
        found = tower.encode(self.vision_tower, shown.split(BATCH))
        found[~readable] = 0
        return found, readable.tolist()


class MappedFeatures:
    """Vision features of several views on disk: features[view, number] -> bf16 (..., N, D).

    view and number are whole numbers or tensors of them, as with a tensor (views, pictures, N, D);
    what is returned is a copy in memory, the rest stays on the disk.
    """

    def __init__(self, files):
        self.files = list(files)
        self.shape = torch.Size([len(self.files), *self.files[0].shape])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        # one read for each view, of the pictures that are asked for in it
        view, number = torch.broadcast_tensors(*(torch.as_tensor(x) for x in index))
        found = torch.empty(*number.shape, *self.shape[2:], dtype=torch.bfloat16)
        for v in view.unique().tolist():
            chosen = view == v
            found[chosen] = self.files[v].read(number[chosen].numpy())
        return found

    def tensor(self):
        """All of them in memory: bf16 (views, pictures, N, D)."""
        return torch.stack([file.read(range(self.shape[1])) for file in self.files])

    def unreadable(self):
        """Numbers of pictures without features, which are zeros: their rows need others in their
        place."""
        return self.files[0].unreadable()


def features(vision_tower, paths, views=1, seed=0, store=None, skip_unreadable=False):
    """Vision features of images in several views, on disk, computed the first time: features[view,
    number] -> bf16 (..., N, D).

    View 0 is the middle square, the others are random crops. paths: files, or names of pictures in a
    store (vlm/image_store.py). Several processes may call this at once and share the work. Raises
    UserError for an image that cannot be read; with skip_unreadable such an image has zeros, and its
    number is in `unreadable()`.
    """
    # the key: the pictures' bytes and all that the tower's features depend on
    store = store or Files()
    content = content_hash(store, paths, skip_unreadable)
    made_by = tower.fingerprint(vision_tower)
    files = []
    for view in range(views):
        # the key says all that the images depend on
        key = (VERSION, content, view, view and seed)
        name = hashlib.sha256(made_by.encode() + repr(key).encode()).hexdigest()[:16]
        path = assets.cache() / "features" / f"view-{name}.bin"
        # a file for each view; other processes help to fill it
        compute = ViewOfPictures(vision_tower, store, paths, view, seed, skip_unreadable)
        shape = (len(paths), vision_tower.count, vision_tower.width)
        files.append(feature_cache.FeatureFile(path, shape, compute, BATCH))
        files[-1].fill()
    found = MappedFeatures(files)
    # they may have been computed by a run that skips
    if not skip_unreadable:
        for number in found.unreadable()[:1]:
            open_picture(store, paths[number], vision_tower.size)
            raise UserError(f"{printable(paths[number])} could not be read when it was looked at")
    return found
