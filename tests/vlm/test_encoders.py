"""vlm/encoders.py, two_encoders.py: rows, sizes, held-out photos; connectors of one and two encoders learn."""

from dataclasses import replace

import pytest
import torch

from tests import eyes
from utils import data
from utils.run import UserError
from vlm import encoders, tower, two_encoders
from vlm.spatial_aggregator import ChannelConcat, SpatialAggregator


def test_photos_to_learn_from_and_to_be_judged_by():
    fruit = data.groceries(64)
    learn, judge = encoders.parts(300)
    assert {fruit.split[i] for i in learn} == {"train", "val"} and len(learn) == 732
    assert {fruit.split[i] for i in judge} == {"test"} and len(set(judge.tolist())) == 300
    assert len(fruit.fine[judge].unique()) == 14
    # the data set has each held-out picture twice, the second time 661 later
    assert max(judge.tolist()) < 675 + 661
    pictures = encoders.photos(64, judge[:3])
    # read again from the file, not resized twice
    assert (pictures.float() - fruit.images[judge[:3]].float()).abs().mean() < 1


def test_each_tower_is_probed_at_its_own_size(monkeypatch):
    kinds = data.groceries(64).fine
    shown = []

    def features(one, images):
        shown.append((one.size, len(images)))
        numbers = images[:, 0, 0, 0].long() * 256 + images[:, 1, 0, 0].long()
        known = kinds[numbers] if one.size == 28 else kinds[numbers] * 0
        return torch.nn.functional.one_hot(known, 14).float()[:, None].expand(-1, 3, -1)

    def photos(size, chosen):
        both = torch.stack([chosen // 256, chosen % 256, chosen * 0], 1).to(torch.uint8)
        return both[:, :, None, None].expand(-1, -1, size, size)

    made = {"good 28": eyes.tower(), "blind 42": eyes.tower("vit")}
    sizes = {"good 28": None, "blind 42": 42}
    builders = {
        k: lambda k=k: tower.VisionTower(made[k], size=sizes[k])  # type: ignore[misc]
        for k in made
    }
    monkeypatch.setattr(encoders, "towers", lambda cfg: builders)
    monkeypatch.setattr(encoders, "photos", photos)
    monkeypatch.setattr(tower, "vision_features", features)
    learn, judge = encoders.parts(60)
    rows = encoders.compare(encoders.Config(rounds=1), learn, judge)
    assert shown == [(28, 732), (28, 60), (42, 732), (42, 60)]
    assert rows["good 28"]["accuracy"] == 1 and rows["blind 42"]["accuracy"] < 0.3
    assert rows["good 28"]["tokens"] == 16 and rows["blind 42"]["tokens"] == 36
    for row in rows.values():
        assert row["low"] - 1e-9 <= row["accuracy"] <= row["high"] + 1e-9 and row["CPU ms"] > 0


def test_rows_of_the_default_table():
    cfg = encoders.Config(sizes=(96,), small_sizes=(32, 64), clip="folder")
    assert list(encoders.towers(cfg)) == [
        "EfficientNet 96",
        "MAE 32",
        "MAE 64",
        "MAE's shape, random weights 64",
        "CLIP space 224",
    ]
    assert "CLIP space 224" not in encoders.towers(encoders.Config())
    made = encoders.towers(cfg)
    assert made["EfficientNet 96"]().size == 96 and made["MAE 32"]().size == 32
    # of the same shape, with other weights
    blind, seeing = made["MAE's shape, random weights 64"](), made["MAE 64"]()
    assert (blind.count, blind.width, blind.mean) == (seeing.count, seeing.width, seeing.mean)
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(blind(x), seeing(x), atol=0.1)


def maps(n, seed=0):
    """Two encoders: the first sees a left-right difference, the second another one; three questions of them."""
    torch.manual_seed(seed)
    one, two = torch.randint(2, (n,)), torch.randint(2, (n,))
    first = 0.3 * torch.randn(n, 49, 6)
    second = 0.3 * torch.randn(n, 196, 4)
    first[:, :, 0] += 2 * one[:, None]
    second[:, :, 0] += 2 * two[:, None]
    return [first, second], [one, two]


def test_two_encoders_tell_what_neither_tells_alone():
    cfg = two_encoders.Config(seeds=2, steps=60, batch=32, width=16, lr=3e-3)
    rows = two_encoders.join_study(cfg, maps(200), maps(100, 1))
    assert list(rows) == ["EfficientNet", "MAE", "channels of both", "spatial aggregator"]
    for name, row in rows.items():
        both = name in ("channels of both", "spatial aggregator")
        assert (row["accuracy"] > 0.9) == both, name
        assert row["least"] <= row["accuracy"] <= row["most"]
        assert row["tokens"] == 49 and row["parameters"] > 100 and row["CPU ms"] > 0
        assert both or 0.3 < row["accuracy"] < 0.7
    # scored on the held-out pictures: with the wrong answers there, hardly one is right
    features, truths = maps(100, 1)
    once = replace(cfg, seeds=1)
    rows = two_encoders.join_study(once, maps(200), (features, [1 - y for y in truths]))
    assert rows["spatial aggregator"]["accuracy"] < 0.1


def test_connectors_read_their_own_encoders():
    made = two_encoders.joins([6, 4], 8)
    kinds = {name: (which, type(make())) for name, (which, make) in made.items()}
    assert kinds == {
        "EfficientNet": ((0,), ChannelConcat),
        "MAE": ((1,), ChannelConcat),
        "channels of both": ((0, 1), ChannelConcat),
        "spatial aggregator": ((0, 1), SpatialAggregator),
    }
    features, _ = maps(3)
    for which, make in made.values():
        assert make()([features[k] for k in which]).shape == (3, 49, 8)


def test_the_rows_of_the_table_come_from_held_out_pictures(tmp_path, monkeypatch):
    asked = []

    def fruit_maps(both, chosen):
        asked.append(chosen)
        return "fruit", len(chosen)

    def scene_maps(both, split, count):
        asked.append((split, count))
        return "scenes", count

    def study(cfg, learn, judge):
        asked.append((learn, judge))
        return {"row": {"accuracy": 0.5}}

    monkeypatch.setattr(two_encoders, "pair", lambda: None)
    monkeypatch.setattr(two_encoders, "fruit_maps", fruit_maps)
    monkeypatch.setattr(two_encoders, "scene_maps", scene_maps)
    monkeypatch.setattr(two_encoders, "join_study", study)
    cfg = two_encoders.Config(judged=20, pictures=40, out=str(tmp_path / "out"))
    found = two_encoders.main(cfg)
    assert list(found) == ["fruit: row", "easy-VQA: row"]
    assert len(asked[0]) == 732 and len(asked[1]) == 20
    assert asked[2] == (("fruit", 732), ("fruit", 20))
    assert asked[3:] == [("train", 40), ("test", 20), (("scenes", 40), ("scenes", 20))]


def test_pictures_of_easy_vqa_with_their_scenes(monkeypatch):
    from vlm import easy_vqa_baselines

    monkeypatch.setattr(
        easy_vqa_baselines, "picture_features", lambda one, split, numbers: (one, split, numbers)
    )
    features, (colours, shapes) = two_encoders.scene_maps(["a", "b"], "test", 30)
    assert [x[0] for x in features] == ["a", "b"] and features[0][1] == "test"
    assert len(features[0][2]) == len(colours) == len(shapes) == 30
    assert features[0][2] == features[1][2]
    # colour of the first picture, as a question about it says
    listed = two_encoders.easy_vqa_data.questions("test")
    number = features[0][2][0]
    asked = [q for q in listed if q.image == number and q.text == "what color is the shape?"]
    answers = {q.answer for q in asked} or {two_encoders.COLOURS[colours[0]]}
    assert answers == {two_encoders.COLOURS[colours[0]]}


def test_flags_are_checked(tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        encoders.main(encoders.Config(judged=0, out=str(tmp_path)))
    with pytest.raises(UserError, match="above 0"):
        two_encoders.main(two_encoders.Config(steps=0, out=str(tmp_path)))
