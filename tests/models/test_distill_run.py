"""Consistency distillation, the script: what is trained, kept, sampled and drawn; bad flags."""

import copy
import json

import pytest
import torch

from models import ddim, ddpm, distill, quality
from tests.models.test_ddpm import command, one_line, same
from utils import checkpoint, figures

TINY = dict(steps=3, batch=8, levels=4, samples=10, sampling_steps=(1, 3))


def test_main_begins_at_the_teacher_and_keeps_the_ema(monkeypatch, tmp_path):
    cfg = ddpm.Config(channels=(8,), layers=1, predict="x0", schedule="linear")
    teacher = ddpm.build(cfg.channels, cfg.layers)
    meta = {"channels": [8], "layers": 1, "predict": "x0", "schedule": "linear"}
    path = checkpoint.write(tmp_path / "teacher.safetensors", teacher.state_dict(), meta)
    noted = {"drawn": {}, "score": [], "sampled": []}
    train = distill.train

    def spied_train(student, target, teacher, optimizer, schedule, images, cfg, predict):
        noted["begin"] = [copy.deepcopy(m.state_dict()) for m in (student, target, teacher)]
        noted["grad"] = [next(m.parameters()).requires_grad for m in (student, target, teacher)]
        noted["predict"] = predict
        yield from train(student, target, teacher, optimizer, schedule, images[:64], cfg, predict)
        noted["end"] = [copy.deepcopy(m.state_dict()) for m in (student, target, teacher)]

    def note(name, real):
        def sample(model, schedule, xt, n, predict):
            noted["sampled"].append((name, model.state_dict(), xt, n, predict))
            return real(model, schedule, xt, n, predict)

        return sample

    def score(images):
        noted["score"].append(images)
        return {"recognised": 0.5}

    monkeypatch.setattr(distill, "train", spied_train)
    monkeypatch.setattr(distill, "sample", note("student", distill.sample))
    monkeypatch.setattr(ddim, "sample", note("teacher", ddim.sample))
    monkeypatch.setattr(quality, "scorer", lambda device: score)
    for name in ("curves", "rows"):
        monkeypatch.setattr(
            figures,
            name,
            lambda path, content, *_, **__: noted["drawn"].update({path.name: content}),
        )
    distill.main(distill.Config(weights=str(path), out=str(tmp_path), **TINY))
    assert all(same(state, teacher.state_dict()) for state in noted["begin"])
    assert noted["grad"] == [True, False, False] and noted["predict"] == "x0"
    raw, ema, frozen = noted["end"]
    written, kept = checkpoint.read(tmp_path / "model.safetensors")
    assert same(written, ema) and not same(written, raw) and same(frozen, teacher.state_dict())
    assert kept == meta
    names = [(name, n, predict) for name, _, _, n, predict in noted["sampled"]]
    assert names == [(k, n, "x0") for n in (1, 3) for k in ("teacher", "student")]
    for name, state, noise, _, _ in noted["sampled"]:
        assert same(state, frozen if name == "teacher" else ema)
        assert torch.equal(noise, noted["sampled"][0][2]) and noise.shape == (10, 1, 28, 28)
    rows = noted["drawn"]["steps.png"]
    assert list(rows) == ["teacher, 1", "student, 1", "teacher, 3", "student, 3"]
    assert torch.equal(rows["student, 3"], noted["score"][3])
    assert len(noted["drawn"]["loss.png"]["loss"]) == 3


@pytest.mark.long
def test_command(tmp_path):
    tiny = "--pretrained --steps 2 --batch 8 --samples 10 --sampling-steps 1".split()
    done = command(*tiny, "--out", str(tmp_path), script="distill")
    assert done.returncode == 0, done.stderr
    for name in "config.json steps.png loss.png model.safetensors".split():
        assert (tmp_path / name).stat().st_size > 0, name
    assert "student, 1 steps" in json.loads((tmp_path / "metrics.json").read_text())


@pytest.mark.parametrize(
    "args, word",
    [
        (["--steps", "0"], "--steps"),
        (["--batch", "0"], "--batch"),
        (["--levels", "1"], "--levels"),
        (["--levels", "1001"], "--levels"),
        (["--lr", "nan"], "--lr"),
        (["--ema", "1"], "--ema"),
        (["--samples", "9"], "--samples"),
        (["--sampling-steps", "0"], "--sampling-steps"),
        (["--sampling-steps", "1001"], "--sampling-steps"),
        (["--weights", "nowhere"], "no checkpoint"),
    ],
)
def test_bad_input(args, word, tmp_path, monkeypatch, capsys):
    assert word in one_line(distill, [*args, "--out", str(tmp_path / "x")], monkeypatch, capsys)
    assert not list(tmp_path.rglob("*.safetensors"))
