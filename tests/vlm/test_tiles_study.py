"""vlm/tiles_study.py: pictures with a small emoji, equal rows for both runs, the figure of a photo in tiles."""

import json

import numpy as np
import pytest
import torch

from utils import data
from utils.run import UserError
from vlm import conversations, tiles_study


def cfg(tmp_path, **flags):
    usual = {"pictures": 8, "judged": 8, "steps": 1, "out": str(tmp_path / "out")}
    return tiles_study.Config(**usual | flags)


def test_an_emoji_stands_somewhere_in_the_picture_in_its_size():
    red = torch.zeros(3, 72, 72, dtype=torch.uint8)
    red[0] = 255
    places = set()
    for seed in range(5):
        picture = tiles_study.scene(red, 48, np.random.default_rng(seed))
        assert picture.shape == (3, 448, 448)
        there = (picture == torch.tensor([255, 0, 0])[:, None, None]).all(0)
        rows, columns = there.any(1).nonzero()[:, 0], there.any(0).nonzero()[:, 0]
        assert len(rows) == len(columns) == 48 and int(there.sum()) == 48 * 48
        places.add((int(rows[0]), int(columns[0])))
    assert len(places) == 5


def test_pictures_to_learn_from_and_to_be_judged_by_differ(tmp_path):
    """Each name as often, a row of the format for each picture; the same pictures again with the same seed."""
    flags = cfg(tmp_path)
    shown = tiles_study.write_scenes(tmp_path / "learn", 8, flags, 0)
    assert sorted(shown) == sorted(tiles_study.NAMES)
    tiles_study.write_scenes(tmp_path / "judged", 8, flags, 1)
    tiles_study.write_scenes(tmp_path / "again", 8, flags, 0)
    rows = json.loads((tmp_path / "learn/chat.json").read_text())
    conversations.validate(rows, tmp_path / "learn")
    assert [one["conversations"][1]["value"] for one in rows] == shown
    files = [f"{number:04}.png" for number in range(8)]
    learn, judged, again = (
        [data.read_image(tmp_path / part / file, 0) for file in files]
        for part in ("learn", "judged", "again")
    )
    assert all(torch.equal(a, b) for a, b in zip(learn, again))
    assert not any(torch.equal(a, b) for a, b in zip(learn, judged))


def test_both_runs_have_the_same_flags_but_tiles(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(tiles_study.train, "main", lambda cfg: runs.append(cfg) or FOUND)
    monkeypatch.setattr(tiles_study, "accuracy", lambda path, folder, shown: (len(str(path)), 9))
    monkeypatch.setattr(tiles_study.tower, "load", lambda name: None)
    monkeypatch.setattr(tiles_study, "place_features", lambda *about: torch.zeros(8, 4, 2))
    monkeypatch.setattr(tiles_study, "probe", lambda *about: 0.5)
    found = tiles_study.main(cfg(tmp_path))
    assert [one.model.tiles for one in runs] == [0, 4]
    first, second = (one.data for one in runs)
    assert first == second and first.views == 1
    assert runs[0].train == runs[1].train and runs[0].train.steps == 1
    assert set(found) >= {"--tiles 0", "--tiles 4"}
    assert (tmp_path / "out/tiles.png").stat().st_size > 1000


FOUND = {"final_loss": 1.0, "train_cpu_seconds": 2.0}


@pytest.mark.parametrize(
    "flags, says",
    [({"steps": 0}, "above 0"), ({"tiles": 1}, "2 or more"), ({"emoji": 449}, "--emoji")],
)
def test_bad_flags_are_one_line(tmp_path, flags, says):
    with pytest.raises(UserError, match=says):
        tiles_study.main(cfg(tmp_path, **flags))
    assert not (tmp_path / "out").exists()
