"""vlm/flamingo_data.py: views of emoji, colours, held-out classes, rows of features that belong to their class."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import eyes
from utils import data
from vlm import flamingo_data
from vlm.flamingo_data import COLOUR, NAME, SHAPE


def square(colour, size=72, side=30):
    """A coloured square in the middle of white, uint8 (3,size,size)."""
    image = torch.full((3, size, size), 255, dtype=torch.uint8)
    at = slice((size - side) // 2, (size + side) // 2)
    image[:, at, at] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    return image


def test_the_first_view_is_the_picture_and_others_keep_its_angles():
    images = torch.stack([square((200, 30, 30)), square((0, 0, 0), side=20)])
    plain = flamingo_data.affine_view(images, 0, [0, 1])
    assert plain.shape == (2, 3, 224, 224)
    assert plain[0, :, 112, 112].tolist() == [200, 30, 30] and plain[:, :, 0, 0].min() == 255
    for view in range(1, 6):
        found = flamingo_data.affine_view(images, view, [0, 1])
        assert torch.equal(found, flamingo_data.affine_view(images, view, [0, 1]))
        assert not torch.equal(found, plain)
        # a row's view is its own, whichever others are asked for
        assert torch.equal(found[1:], flamingo_data.affine_view(images, view, [1]))
        # of a black square: turned, not sheared: as wide in both of its own directions
        ys, xs = torch.nonzero(found[1].sum(0) < 60, as_tuple=True)
        spread = torch.cov(torch.stack([xs, ys]).float())
        low, high = torch.linalg.eigvalsh(spread)
        assert 0.9 < float(low / high) <= 1.0
        # what comes in from outside is lit white
        light = found[0, :, 0, 0]
        assert (
            light.min() >= 0.69 * 255
            and (light.float() - found[0, :, 0, -1].float()).abs().max() <= 1
        )


def test_views_are_mirrored_half_of_the_time():
    # a flag: a high block at the left end of a bar
    image = torch.full((3, 72, 72), 255, dtype=torch.uint8)
    image[:, 34:38, 24:50] = 0
    image[:, 26:38, 24:30] = 0
    found = flamingo_data.affine_view(image.expand(80, -1, -1, -1), 1, range(80))
    left = []
    for view in found:
        xs = torch.nonzero(view.sum(0) < 100)[:, 1].float()
        left.append(float(((xs - xs.mean()) ** 3).mean()) > 0)  # the long tail is on the right
    assert 0.3 < np.mean(left) < 0.7


@pytest.mark.parametrize(
    "rgb, word",
    [
        ((221, 46, 68), "red"), ((255, 204, 77), "yellow"), ((85, 172, 238), "blue"), ((120, 177, 89), "green"),
        ((170, 142, 214), "purple"), ((244, 144, 12), "orange"), ((41, 47, 51), "black"), ((153, 170, 181), "gray"),
        ((138, 75, 56), "brown"), ((0, 128, 128), "teal"), ((234, 89, 160), "pink"),
    ],
)  # fmt: skip
def test_dominant_colours(rgb, word):
    assert flamingo_data.dominant_colour(square(rgb)) == word


def test_a_picture_of_many_colours_has_none():
    image = torch.cat(
        [square(c, side=60)[:, :, 6:28] for c in ((221, 46, 68), (85, 172, 238), (120, 177, 89))], 2
    )
    assert flamingo_data.dominant_colour(image) is None
    assert flamingo_data.dominant_colour(torch.full((3, 9, 9), 255, dtype=torch.uint8)) is None


def seen(vision_tower, images, key=None):
    """In the place of `tower.vision_features`: the mean of each picture."""
    images = images() if key else images
    return images.float().mean((1, 2, 3))[:, None, None].expand(-1, 4, 16)


@pytest.fixture
def few(monkeypatch):
    """Eight emoji, grey squares of which every second one is in the held-out block; small photos."""
    images = torch.stack([square((20 * i,) * 3) for i in range(8)])
    names = [f"thing {i}" for i in range(8)]
    codes = [f"{(0x1F680 if i % 2 else 0x1F400) + i:x}-200d" for i in range(8)]
    monkeypatch.setattr(data, "emoji", lambda size: (images, names, codes))
    monkeypatch.setattr(data, "groceries", lambda size: eyes.shop())
    monkeypatch.setattr(flamingo_data.tower, "vision_features", seen)
    return images


def test_emoji_of_the_block_are_held_out_and_views_are_rows_of_their_class(few):
    means = seen(None, flamingo_data.affine_view(few, 2, range(8)))[:, 0, 0]
    for heldout in (False, True):
        features, found = flamingo_data.emoji_classes(None, 3, heldout)
        assert [c.name for c in found] == [f"thing {i}" for i in range(heldout, 8, 2)]
        assert features.shape == (12, 4, 16)
        for n, c in enumerate(found):
            assert c.facts[NAME] == c.name and len(c.pictures) == 3
            assert features[c.pictures[2], 0, 0] == means[2 * n + heldout]
    assert found[0].facts[COLOUR] == "black" and found[3].facts[COLOUR] == "gray"
    some = flamingo_data.emoji_classes(None, 3, False, limit=2)[1]
    assert len(some) == 2 and {c.name for c in some} < {f"thing {i}" for i in range(0, 8, 2)}


def test_every_second_kind_of_fruit_is_held_out(few, monkeypatch):
    fruit = eyes.shop()
    monkeypatch.setattr(flamingo_data.tower, "vision_features", eyes.seen)
    eye = SimpleNamespace(size=8)
    for heldout, kinds in ((False, [0, 2]), (True, [1])):
        for test in (False, True):
            features, found = flamingo_data.fruit_classes(eye, heldout, test)
            assert len(found) == len(kinds)
            for c, kind in zip(found, kinds):
                photos = features[c.pictures, 0, 0].long()
                assert (photos % 3 == kind).all() and ((photos >= 20) == test).all()
                assert c.name == flamingo_data.fruit_photos.NAMES[fruit.fine_names[kind]]
    assert len(flamingo_data.fruit_classes(eye, True, limit=2)[1][0].pictures) == 2


def test_scenes_of_shapes_are_what_the_questions_say(monkeypatch):
    monkeypatch.setattr(flamingo_data.tower, "vision_features", eyes.seen)
    _, found = flamingo_data.shape_classes(None, "test", limit=4)
    images = data.easy_vqa("test").images
    assert {c.facts[SHAPE] for c in found} == {"circle", "rectangle", "triangle"}
    assert sum(len(c.pictures) for c in found) > 80 and all(c.source == "shapes" for c in found)
    checked = 0
    for c in found:
        if c.facts[COLOUR] in ("red", "blue", "green"):
            # the most saturated pixel of the picture
            for i in c.pictures:
                image = images[i].float()
                pixel = (image.max(0).values - image.min(0).values).argmax()
                channel = image.reshape(3, -1)[:, pixel].argmax()
                assert ("red", "green", "blue")[int(channel)] == c.facts[COLOUR]
                checked += 1
    assert checked > 20


def test_rows_of_later_parts_are_counted_on(few):
    one, two = (flamingo_data.emoji_classes(None, 3, heldout) for heldout in (False, True))
    found = flamingo_data.together(one, two)
    assert torch.equal(found.features[found.classes[5].pictures], two[0][two[1][1].pictures])
    assert len(found.of("emoji")) == 8 and not found.of("fruit")


def test_learned_and_held_out_classes_share_nothing(few):
    cfg = SimpleNamespace(views=3, emoji=0, photos=1, seed=0)
    eye = SimpleNamespace(size=8)
    learned, heldout = flamingo_data.training_set(eye, cfg), flamingo_data.heldout_set(eye, cfg)
    for source in ("emoji", "fruit"):
        names = [{c.name for c in part.of(source)} for part in (learned, heldout)]
        assert all(names) and not names[0] & names[1]
    for part in (learned, heldout):
        pictures = np.concatenate([c.pictures for c in part.classes])
        assert len(set(pictures.tolist())) == len(pictures) and pictures.max() < len(part.features)
    ends = flamingo_data.ends_of_sentences()
    for c in learned.classes + heldout.classes:
        assert all(v in ends[k] for k, v in c.facts.items() if k != NAME)
