"""Reflow: straightness in closed form, pairs that stay together, and what the script trains, keeps and measures."""

import json

import pytest
import torch

from models import dit, flow, quality, reflow
from models.ddim import last
from tests.models.gaussian_flow import Gaussian
from tests.models.test_ddpm import command, one_line, same
from utils import checkpoint, figures, run

TINY = dict(pairs=16, pair_steps=3, steps=4, batch=8, samples=10, sampling_steps=(1, 3))


def test_straightness_of_straight_paths_is_zero():
    """Data that is one point: all lines end there, none cross."""
    x0 = torch.randn(20, 1, 2, 2)
    times, values = reflow.straightness(Gaussian(mean=0.5, std=1e-6), x0, 8)
    assert times[0] == 0 and times[-1] == pytest.approx(7 / 8) and len(values) == 8
    assert values.abs().max() < 1e-3


def test_straightness_of_a_gaussian_in_closed_form():
    """x_t = t m + sqrt(var_t) x_0, so v = m + var_t' / (2 sqrt(var_t)) x_0, and the line is m + (s - 1) x_0."""
    std = 0.4
    x0 = torch.randn(400, 1, 4, 4)
    times, values = reflow.straightness(Gaussian(std=std), x0, 400)
    root = (times**2 * std**2 + (1 - times) ** 2).sqrt()
    slope = (times * std**2 - (1 - times)) / root
    expected = (slope - (std - 1)) ** 2 * x0.square().mean()
    torch.testing.assert_close(values, expected, atol=0.01, rtol=0.05)
    assert values.max() > 0.3


def test_couple_ends_where_the_ode_ends():
    x0 = torch.randn(10, 1, 2, 2)
    y = torch.arange(10)
    whole = torch.cat(list(flow.sample(Gaussian(), x0, 7))[-1:])
    torch.testing.assert_close(reflow.couple(Gaussian(), x0, y, 7, batch=4), whole)


def test_couple_guides_each_noise_by_its_class():
    """The velocity of a class is its number, of none 10: guidance goes from 10 towards it, and beyond."""

    class Numbers:
        classes = 10

        def __call__(self, xt, t, y):
            return torch.zeros_like(xt) + y[:, None, None, None]

    x0 = torch.randn(7, 1, 2, 2)
    y = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    moved = reflow.couple(Numbers(), x0, y, 5, guidance_scale=2.0, batch=3) - x0
    expected = (10 + 2 * (y - 10)).float()[:, None, None, None].expand_as(x0)
    torch.testing.assert_close(moved, expected, atol=1e-4, rtol=0)


def test_pairs_stay_together():
    noises = torch.arange(20.0).view(20, 1, 1, 1)
    pairs = reflow.coupled_pairs(noises, 100 + noises, torch.arange(20), 8)
    seen = []
    for _ in range(2):
        x0, x1, y = next(pairs)
        assert torch.equal(x1, 100 + x0) and len(x0) == 8
        assert torch.equal(y, x0.flatten().long())
        seen += x0.flatten().tolist()
    assert len(set(seen)) == 16 and seen != sorted(seen)


def test_reflow_of_a_gaussian_needs_one_step():
    """The velocity of a trained pair is m - (1 - s) x_0, all of it known at t = 0: least squares on pairs finds it."""
    x0 = torch.randn(500, 1, 1, 1)
    y = torch.zeros(500, dtype=torch.long)
    x1 = reflow.couple(Gaussian(mean=0.5, std=0.4), x0, y, 200, batch=500)
    design = torch.stack([x0.flatten(), torch.ones(500)], 1)
    slope, shift = torch.linalg.lstsq(design, flow.velocity(x0, x1).flatten()).solution.tolist()
    assert slope == pytest.approx(-0.6, abs=0.01) and shift == pytest.approx(0.5, abs=0.01)
    one = flow.euler_step(lambda x, t: slope * x + shift, x0, 0.0, 1.0)
    assert float(one.std()) == pytest.approx(0.4 * float(x0.std()), rel=0.05)


class Guided:
    """Classifier-free guidance that can be asked whose it is, of which classes, at which scale."""

    def __init__(self, model, y, scale):
        self.model = model
        self.y = y
        self.scale = scale

    def __call__(self, xt, t):
        return dit.classifier_free_guidance(self.model, self.y, self.scale)(xt, t)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny flow with random weights that are not all zero, as flow.py writes them."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("flow") / "model.safetensors"
    meta = {"channels": [8, 16], "layers": 1}
    model = flow.build((8, 16), 1)
    return checkpoint.write(path, model.state_dict(), meta), model


def test_main_trains_on_its_pairs_and_measures_both(trained, monkeypatch, tmp_path):
    path, model = trained
    noted = {"train": [], "score": [], "straight": [], "drawn": {}}
    train = flow.train
    straightness = reflow.straightness

    def spied_train(network, ema, optimizer, pairs, cfg):
        noted["begin"] = {k: v.clone() for k, v in network.state_dict().items()}
        yield from train(network, ema, optimizer, note(pairs), cfg)
        noted["raw"] = network.state_dict()
        noted["ema"] = ema.state_dict()

    def note(pairs):
        for pair in pairs:
            noted["train"].append(pair)
            yield pair

    def spied_straightness(network, x0):
        noted["straight"].append((network, x0))
        return straightness(network, x0, 3)

    def score(images):
        noted["score"].append(images)
        return {"recognised": 0.5}

    def figure(path, content, *_, **__):
        noted["drawn"][path.name] = content

    monkeypatch.setattr(flow, "train", spied_train)
    monkeypatch.setattr(reflow, "straightness", spied_straightness)
    monkeypatch.setattr(reflow, "classifier_free_guidance", Guided)
    monkeypatch.setattr(quality, "scorer", lambda device: score)
    for name in ("curves", "rows"):
        monkeypatch.setattr(figures, name, figure)
    cfg = reflow.Config(weights=str(path), guidance_scale=2.0, out=str(tmp_path), **TINY)
    metrics = reflow.main(cfg)

    # it begins at the flow's weights, and each pair is a noise and where the flow takes it
    assert same(noted["begin"], model.state_dict())
    assert len(noted["train"]) == 4
    for x0, x1, y in noted["train"]:
        expected = reflow.couple(model, x0, y, 3, 2.0)
        torch.testing.assert_close(x1, expected, atol=0.02, rtol=0.02)
    # the EMA is kept, with the flags of its network
    written, meta = checkpoint.read(tmp_path / "model.safetensors")
    assert same(written, noted["ema"]) and not same(written, noted["raw"])
    assert meta == {"channels": [8, 16], "layers": 1}
    # both are measured from the same noises, which are not those of the training
    (before, first), (after, second) = noted["straight"]
    assert same(before.model.state_dict(), model.state_dict()) and before.scale == 2
    assert same(after.model.state_dict(), written) and after.scale == 1
    assert torch.equal(first, second) and len(first) == 10
    assert after.y.tolist() == before.y.tolist() == list(range(10))
    for network, images in ((before, noted["score"][1]), (after, noted["score"][3])):
        with run.autocast(torch.device("cpu")):
            expected = last(flow.sample(network, first, 3))
        torch.testing.assert_close(images, expected)
    trained_on = torch.cat([x0 for x0, _, _ in noted["train"]])
    assert not any((first[0] == x0).all() for x0 in trained_on)
    assert len(noted["score"]) == 4 and noted["score"][0].shape == (10, 1, 28, 28)
    wanted = {"flow, 1", "reflow, 1", "flow, 3", "reflow, 3"}
    assert noted["drawn"]["steps.png"].keys() == wanted
    assert torch.equal(noted["drawn"]["steps.png"]["reflow, 3"], noted["score"][3])
    for name in ("flow", "reflow"):
        _, values = noted["drawn"]["straightness.png"][name]
        assert metrics[f"{name}: straightness"] == pytest.approx(float(values.mean()))


def test_weights_are_shipped_trained_before_or_trained_now(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(flow, "main", asked.append)
    assert reflow.find_weights(reflow.Config(pretrained=True)) == flow.WEIGHTS
    assert reflow.find_weights(reflow.Config(weights="other")) == "other" and not asked
    assert reflow.find_weights(reflow.Config(seed=5)) == reflow.Config.weights
    assert asked[0].seed == 5 and asked[0].out == "outputs/flow"


@pytest.mark.long
def test_command(trained, tmp_path):
    tiny = "--pairs 8 --pair-steps 2 --steps 2 --batch 8 --samples 10 --sampling-steps 1".split()
    done = command("--weights", str(trained[0]), *tiny, "--out", str(tmp_path), script="reflow")
    assert done.returncode == 0, done.stderr
    for name in "config.json straightness.png steps.png loss.png model.safetensors".split():
        assert (tmp_path / name).stat().st_size > 0, name
    assert "reflow: straightness" in json.loads((tmp_path / "metrics.json").read_text())


@pytest.mark.parametrize(
    "args, word",
    [
        (["--steps", "0"], "--steps"),
        (["--pair-steps", "0"], "--pair-steps"),
        (["--pairs", "63"], "--pairs"),
        (["--lr", "nan"], "--lr"),
        (["--ema", "-0.1"], "--ema"),
        (["--dropout", "-0.1"], "--dropout"),
        (["--guidance-scale", "nan"], "--guidance-scale"),
        (["--samples", "9"], "--samples"),
        (["--sampling-steps", "0"], "--sampling-steps"),
        (["--weights", "nowhere"], "no checkpoint"),
    ],
)
def test_bad_input(args, word, tmp_path, monkeypatch, capsys):
    assert word in one_line(reflow, [*args, "--out", str(tmp_path / "x")], monkeypatch, capsys)
    assert not list(tmp_path.rglob("*.safetensors"))
