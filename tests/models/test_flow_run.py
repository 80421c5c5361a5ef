"""Flow matching, the script: what is trained, kept, sampled, judged and drawn; resumed runs, files and bad flags."""

import copy
import json

import numpy as np
import pytest
import torch

from models import flow, guidance_study
from tests.models.test_ddpm import OneWeight, command, followed, one_line, part_of, same
from utils import checkpoint, data, figures
from utils.run import UserError

SMALL = dict(batch=8, channels=(8, 16), layers=1, samples=10, save_every=2, sampling_steps=(1, 3))


def constant_pairs(noise=3.0, image=-2.0):
    """The same line every time: its velocity is image - noise everywhere."""
    while True:
        y = torch.tensor([0, 1, 2, 3])
        yield torch.full((4, 1, 4, 4), noise), torch.full((4, 1, 4, 4), image), y


def test_training_by_hand():
    """Rate, zeroed gradients, clipping and EMA of every step, towards image - noise = -5."""
    cfg = flow.Config(steps=7, lr=40.0, ema=0.25)

    def train(model, ema, optimizer):
        return flow.train(model, ema, optimizer, constant_pairs(), cfg)

    followed(train, -5.0, cfg, 0.25)


@pytest.mark.parametrize("times", ["uniform", "logit-normal"])
def test_training_asks_at_the_times_of_the_flag(times, monkeypatch):
    asked = []

    class Listening(OneWeight):
        def forward(self, xt, t, y):
            asked.append(t / 1000)
            return super().forward(xt)

    model = Listening()
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters())
    cfg = flow.Config(steps=500, times=times)
    list(flow.train(model, ema, optimizer, constant_pairs(), cfg))
    below = float((torch.cat(asked) < 0.25).float().mean())
    assert below == pytest.approx({"uniform": 0.25, "logit-normal": 0.136}[times], abs=0.03)


def test_training_hides_labels_behind_no_class(monkeypatch):
    """The share of the flag becomes the eleventh class; the others stay with their images."""
    asked = []

    class Listening(OneWeight):
        def forward(self, xt, t, y):
            asked.append(y)
            return super().forward(xt)

    model = Listening()
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters())
    cfg = flow.Config(steps=300, dropout=0.3)
    list(flow.train(model, ema, optimizer, constant_pairs(), cfg))
    y = torch.stack(asked)
    hidden = y == 10
    assert hidden.float().mean() == pytest.approx(0.3, abs=0.05)
    assert torch.equal(y[~hidden], torch.arange(4).expand(300, 4)[~hidden])


class Spy:
    """Stands in for what is slow: the sampler, the scores and the figures; notes what they were given."""

    def __init__(self, monkeypatch, module=flow):
        self.sampled = []
        self.judged = []
        self.drawn = {}
        images, labels = data.mnist("test")
        monkeypatch.setattr(data, "mnist", lambda split: (images[:64], labels[:64]))
        monkeypatch.setattr(flow, "sample", self.sample)
        monkeypatch.setattr(guidance_study, "scorer", self.scorer)
        monkeypatch.setattr(flow, "classifier_free_guidance", self.guide)
        for name in ("grid", "curves", "rows"):
            monkeypatch.setattr(figures, name, self.figure)

    def guide(self, model, y, scale):
        self.asked = (y, scale)
        return model

    def scorer(self, y, device):
        self.wanted = y
        return self.score

    def sample(self, model, x0, n, solver="euler"):
        self.sampled.append((copy.deepcopy(model.state_dict()), x0, n, solver))
        yield from (torch.full_like(x0, i / n + n) for i in range(n + 1))

    def score(self, images):
        self.judged.append(images)
        return {"recognised": float(images.mean())}

    def figure(self, path, content, *_, **__):
        self.drawn[path.name] = content


def test_main_samples_writes_and_loads_the_ema(monkeypatch, tmp_path):
    """In each number of steps, from the same noises, with the solver of the flag; the last images are judged."""
    spy = Spy(monkeypatch)
    about = dict(ema=0.5, solver="heun", guidance_scale=2.5)
    cfg = flow.Config(steps=3, out=str(tmp_path), **about, **SMALL)
    metrics = flow.main(cfg)
    state, meta = checkpoint.read(tmp_path / "state.safetensors")
    written = checkpoint.read(tmp_path / "model.safetensors")[0]
    assert same(written, part_of(state, "ema")) and not same(written, part_of(state, "model"))
    assert [(n, solver) for _, _, n, solver in spy.sampled] == [(1, "heun"), (3, "heun")]
    for weights, x0, _, _ in spy.sampled:
        assert same(weights, written)
        assert torch.equal(x0, spy.sampled[0][1]) and x0.shape == (10, 1, 28, 28)
    assert metrics["1 steps"] == {"recognised": 2} and metrics["3 steps"] == {"recognised": 4}
    assert torch.equal(spy.asked[0], spy.wanted)
    assert spy.asked[0].tolist() == list(range(10)) and spy.asked[1] == 2.5
    assert [float(x.mean()) for x in spy.judged] == [2, 4]
    assert (spy.drawn["samples.png"] == 4).all() and len(spy.drawn["steps.png"]["1 steps"]) == 10
    assert metrics["final_loss"] == pytest.approx(np.mean(spy.drawn["loss.png"]["loss"]))
    # shipped weights are the file's, whatever the flags say of the network
    monkeypatch.setattr(flow, "WEIGHTS", tmp_path / "model.safetensors")
    flow.main(flow.Config(pretrained=True, samples=10, out=str(tmp_path / "again")))
    assert same(spy.sampled[-1][0], written) and spy.sampled[-1][2:] == (50, "euler")


def test_resume_is_bit_exact(monkeypatch, tmp_path):
    """Six steps in one go, and four steps, a kill after the checkpoint, two more: the same weights to the last bit."""
    Spy(monkeypatch)
    flow.main(flow.Config(steps=6, out=str(tmp_path / "a"), **SMALL))
    save = checkpoint.save_state

    def killed(*args, **parts):
        save(*args, **parts)
        if len(parts["losses"]) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        flow.main(flow.Config(steps=6, out=str(tmp_path / "b"), **SMALL))
    monkeypatch.setattr(checkpoint, "save_state", save)
    flow.main(flow.Config(steps=6, resume=True, out=str(tmp_path / "b"), **SMALL))
    for name in ("model", "state"):
        a, b = (checkpoint.read(tmp_path / out / f"{name}.safetensors")[0] for out in "ab")
        assert same(a, b)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="no distribution"):
        flow.draw_times(3, "normal")


@pytest.mark.long
def test_command(tmp_path):
    tiny = "--steps 2 --batch 8 --channels 8 --layers 1 --samples 10 --sampling-steps 1 2".split()
    done = command(*tiny, "--out", str(tmp_path), script="flow")
    assert done.returncode == 0, done.stderr
    for name in "config.json samples.png steps.png loss.png model.safetensors".split():
        assert (tmp_path / name).stat().st_size > 0, name
    assert {"1 steps", "2 steps"} <= json.loads((tmp_path / "metrics.json").read_text()).keys()


@pytest.mark.parametrize(
    "args, word",
    [
        (["--steps", "0"], "--steps"),
        (["--save-every", "0"], "--save-every"),
        (["--channels", "12"], "--channels"),
        (["--channels", "8", "8", "8"], "--channels"),
        (["--lr", "inf"], "--lr"),
        (["--ema", "1"], "--ema"),
        (["--dropout", "1.1"], "--dropout"),
        (["--guidance-scale", "-1"], "--guidance-scale"),
        (["--samples", "9"], "--samples"),
        (["--sampling-steps", "0"], "--sampling-steps"),
        (["--sampling-steps"], "sampling-steps"),
        (["--times", "normal"], "times"),
        (["--batch", "70000"], "--batch"),
        (["--resume"], "no checkpoint"),
    ],
)
def test_bad_input(args, word, tmp_path, monkeypatch, capsys):
    assert word in one_line(flow, [*args, "--out", str(tmp_path / "x")], monkeypatch, capsys)
    assert not list(tmp_path.rglob("*.safetensors"))
