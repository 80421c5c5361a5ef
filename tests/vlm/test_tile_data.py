"""vlm/tile_data.py and picture_sizes.py: sizes from headers, features of tiles, unreadable pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests import eyes
from utils.run import UserError
from vlm import anyres, picture_sizes, tile_data, tower, views
from vlm.image_store import ImageStore

GRIDS = [(28, 56), (56, 28), (56, 56), (84, 28)]
SIZES = [(50, 37), (30, 90), (20, 22), (100, 30), (60, 60)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_ACTION_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path):
    """A folder of five pictures of noise -> its store, their names."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    names = []
    for i, size in enumerate(SIZES):
        names.append(f"{i}.png")
        pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / names[-1])
    return ImageStore(folder), names


def test_sizes_are_those_of_the_decoded_pictures(tmp_path):
    """A photo that lies on its side is measured upright, as it is read."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (30, 20)).save(tmp_path / f"{orientation}.jpg", exif=exif)
    for kind in ("png", "webp", "gif", "bmp", "tiff"):
        Image.new("RGB", (30, 20)).save(tmp_path / f"plain.{kind}")
    store = ImageStore(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert len(names) == 13
    found = picture_sizes.picture_sizes(store, names)
    assert found == [tuple(store.image(name).shape[1:]) for name in names]
    assert found[0] == (20, 30) and found[5] == (30, 20)


def test_features_are_those_of_all_tiles_at_once(pictures, monkeypatch):
    """Computed in pieces of four tiles, which begin and end inside of pictures."""
    store, names = pictures
    vision_tower = tower.VisionTower(eyes.tower())
    sizes = picture_sizes.picture_sizes(store, names)
    assert sizes == SIZES
    monkeypatch.setattr(tile_data.feature_cache, "CHUNK_BYTES", 1)
    found = tile_data.tile_features(vision_tower, names, sizes, GRIDS, store)
    assert found.offsets == [0, 5, 8, 11, 15, 20] and found.file.chunk == 4
    for i, name in enumerate(names):
        tiles = anyres.tiles(views.open_picture(store, name, 0), 28, GRIDS)
        right = tower.encode(vision_tower, [tiles])
        torch.testing.assert_close(found(i), right, atol=0.02, rtol=0.02)


def test_a_picture_that_cannot_be_read_has_no_features_and_the_others_theirs(pictures):
    store, names = pictures
    vision_tower = tower.VisionTower(eyes.tower())
    whole = (store.where / names[1]).read_bytes()
    (store.where / names[1]).write_bytes(whole[:2000])  # its header is there
    (store.where / names[3]).write_bytes(b"no picture")
    with pytest.raises(UserError, match="3.png is not a readable image"):
        picture_sizes.picture_sizes(store, names)
    sizes = picture_sizes.picture_sizes(store, names, skip_unreadable=True)
    assert sizes == [(50, 37), (30, 90), (20, 22), (0, 0), (60, 60)]
    with pytest.raises(UserError, match="3.png is not a readable image"):
        picture_sizes.picture_sizes(store, names)
    about = (vision_tower, names, sizes, GRIDS, store)
    with pytest.raises(UserError, match="1.png"):
        tile_data.tile_features(*about)
    found = tile_data.tile_features(*about, skip_unreadable=True)
    assert [found.is_readable(i) for i in range(5)] == [True, False, True, False, True]
    assert not found(1).any() and not found(3).any() and found(4).abs().sum((1, 2)).all()
    with pytest.raises(UserError, match="1.png"):
        tile_data.tile_features(*about)


def test_a_header_that_does_not_tell_the_truth_is_one_line(pictures):
    store, names = pictures
    with pytest.raises(UserError, match="its header says"):
        tile_data.cut(store, names[0], (37, 50), 28, GRIDS)


def test_damaged_headers_are_one_line(pictures):
    store, names = pictures
    whole = (store.where / names[0]).read_bytes()
    for length in (0, 1, 8, 20):
        (store.where / names[0]).write_bytes(whole[:length])
        with pytest.raises(UserError, match="0.png is not a readable image"):
            picture_sizes.picture_size(store, names[0])
