"""vlm/tile_resampler_study.py: runs that differ in what stands between encoder and language model alone."""

import json
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch

from tests.vlm.test_sparsity_study import fruit as fruit_fixture  # noqa: F401
from tests.vlm.test_sparsity_train import (
    FOUND,
    fruit,  # noqa: F401  (a fixture)
)
from utils.run import UserError
from vlm import sparsity_train, tile_resampler_study
from vlm.train_config import Config as TrainConfig


@pytest.fixture
def studied(fruit, tmp_path, monkeypatch):  # noqa: F811
    """A study without trainings -> configuration, flags of the runs, what was judged."""
    runs = []
    judged = []

    def judge(path, folder, shown, groups, kinds):
        judged.append((path, folder.name, len(kinds)))
        return 0.5, 16, 0.3

    split = torch.arange(12), torch.arange(12)
    monkeypatch.setattr(sparsity_train.train, "main", lambda cfg: runs.append(cfg) or dict(FOUND))
    monkeypatch.setattr(tile_resampler_study, "judge", judge)
    monkeypatch.setattr(sparsity_train.data, "groceries", lambda side: fruit)
    monkeypatch.setattr(sparsity_train.fruit_photos, "split", lambda fruit: split)
    flags = {"pictures": 3, "judged": 4, "steps": 8, "batch": 2, "out": str(tmp_path / "out")}
    return tile_resampler_study.Config(**flags), runs, judged


def test_runs_differ_in_their_model_alone(studied, tmp_path):
    cfg, runs, judged = studied
    found = tile_resampler_study.main(cfg)
    models = [one.model for one in runs]
    assert [m.tiles for m in models] == [0, 4, 4]
    assert [m.connector for m in models] == ["pool3"] * 2 + ["tile_perceiver"]
    assert models[2].perceiver.n_latents == 16 and not any(m.img_size for m in models)
    same = [replace(one, model=TrainConfig().model, out="") for one in runs]
    assert all(one == same[0] for one in same)
    assert same[0].train.steps == 8 and same[0].train.batch_size == 2
    assert same[0].data.data_path == (str(tmp_path / "out/learn/chat.json"),)
    # each is judged by its own weights, on the other pictures
    assert [str(path.parent) for path, _, _ in judged] == [one.out for one in runs]
    assert len({one.out for one in runs}) == 3
    assert {(folder, n) for _, folder, n in judged} == {("judged", 4)}
    row = found["tiles resampled to 16"]
    assert row["accuracy"] == 0.5 and row["tokens"] == 16 and row["standard error"] == 0.25
    assert row["CPU s a step"] == 120 / 8 and row["loss"] == 0.5 and "losses" not in row
    # two rows of two tiles of 7 x 7, newlines, and the whole
    assert found["tokens of tiles, none pooled"] == 49 + 14 * 15
    assert (tmp_path / "out/runs.png").is_file() and not plt.get_fignums()


def test_finished_runs_are_read(studied, tmp_path):
    cfg, runs, _ = studied
    name = "tiles resampled to 16"
    tile_resampler_study.main(replace(cfg, only=(name,)))
    kept = json.loads((tmp_path / "out/tiles-resampled-to-16/row.json").read_text())
    assert kept["row"]["losses"] == FOUND["losses"] and kept["flags"]["steps"] == 8
    assert len(runs) == 1
    tile_resampler_study.main(replace(cfg, reuse=True))
    assert len(runs) == 3
    with pytest.raises(UserError, match="other flags"):
        tile_resampler_study.main(replace(cfg, reuse=True, steps=9))


@pytest.mark.parametrize(
    "flags, says",
    [({"steps": 0}, "above 0"), ({"judged": 0}, "above 0"), ({"only": ("all",)}, "the runs are")],
)
def test_bad_flags(flags, says, tmp_path):
    with pytest.raises(UserError, match=says):
        tile_resampler_study.main(tile_resampler_study.Config(**flags, out=str(tmp_path)))
