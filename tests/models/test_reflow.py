"""Reflow: straightness in closed form, pairs that stay together, and what the script trains, keeps and measures."""

import json

import pytest
import torch

from models import flow, quality, reflow
from tests.models.gaussian_flow import Gaussian
from tests.models.test_ddpm import command, one_line, same
from utils import checkpoint, figures

TINY = dict(pairs=16, pair_steps=3, steps=4, batch=8, samples=10, sampling_steps=(1, 3))


def test_straightness_of_straight_paths_is_zero():
    """Data that is one point: all lines end there, none cross."""
    eps = torch.randn(20, 1, 2, 2)
    times, values = reflow.straightness(Gaussian(mean=0.5, std=1e-6), eps, 8)
    assert times[0] == 1 and times[-1] == pytest.approx(1 / 8) and len(values) == 8
    assert values.abs().max() < 1e-3


def test_straightness_of_a_gaussian_in_closed_form():
    """x_t = (1-t) m + sqrt(var_t) eps, so v = -m + var_t' / (2 sqrt(var_t)) eps, and the line is -m + (1 - s) eps."""
    std = 0.4
    eps = torch.randn(400, 1, 4, 4)
    times, values = reflow.straightness(Gaussian(std=std), eps, 400)
    root = ((1 - times) ** 2 * std**2 + times**2).sqrt()
    slope = (times - (1 - times) * std**2) / root
    expected = (slope - (1 - std)) ** 2 * eps.square().mean()
    torch.testing.assert_close(values, expected, atol=0.01, rtol=0.05)
    assert values.max() > 0.3


def test_couple_ends_where_the_ode_ends():
    eps = torch.randn(10, 1, 2, 2)
    whole = torch.cat(list(flow.sample(Gaussian(), eps, 7))[-1:])
    torch.testing.assert_close(reflow.couple(Gaussian(), eps, 7, batch=4), whole)


def test_pairs_stay_together():
    eps = torch.arange(20.0).view(20, 1, 1, 1)
    pairs = reflow.coupled_pairs(100 + eps, eps, 8)
    seen = []
    for _ in range(2):
        x0, noise = next(pairs)
        assert torch.equal(x0, 100 + noise) and len(x0) == 8
        seen += noise.flatten().tolist()
    assert len(set(seen)) == 16 and seen != sorted(seen)


def test_reflow_of_a_gaussian_needs_one_step():
    """The velocity of a trained pair is (1 - s) eps - m, all of it known at t = 1: least squares on pairs finds it."""
    eps = torch.randn(500, 1, 1, 1)
    x0 = reflow.couple(Gaussian(mean=0.5, std=0.4), eps, 200, batch=500)
    design = torch.stack([eps.flatten(), torch.ones(500)], 1)
    slope, shift = torch.linalg.lstsq(design, flow.velocity(x0, eps).flatten()).solution.tolist()
    assert slope == pytest.approx(0.6, abs=0.01) and shift == pytest.approx(-0.5, abs=0.01)
    one = flow.euler_step(lambda x, t: slope * x + shift, eps, 1.0, 0.0)
    assert float(one.std()) == pytest.approx(0.4 * float(eps.std()), rel=0.05)


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

    def spied_straightness(network, eps):
        noted["straight"].append((network.state_dict(), eps))
        return straightness(network, eps, 3)

    def score(images):
        noted["score"].append(images)
        return {"recognised": 0.5}

    def figure(path, content, *_, **__):
        noted["drawn"][path.name] = content

    monkeypatch.setattr(flow, "train", spied_train)
    monkeypatch.setattr(reflow, "straightness", spied_straightness)
    monkeypatch.setattr(quality, "scorer", lambda device: score)
    for name in ("curves", "rows"):
        monkeypatch.setattr(figures, name, figure)
    metrics = reflow.main(reflow.Config(weights=str(path), out=str(tmp_path), **TINY))

    # it begins at the flow's weights, and each pair is a noise and where the flow takes it
    assert same(noted["begin"], model.state_dict())
    assert len(noted["train"]) == 4
    for x0, eps in noted["train"]:
        expected = reflow.couple(model, eps, 3)
        torch.testing.assert_close(x0, expected, atol=0.02, rtol=0.02)
    # the EMA is kept, with the flags of its network
    written, meta = checkpoint.read(tmp_path / "model.safetensors")
    assert same(written, noted["ema"]) and not same(written, noted["raw"])
    assert meta == {"channels": [8, 16], "layers": 1}
    # both are measured from the same noises, which are not those of the training
    (before, first), (after, second) = noted["straight"]
    assert same(before, model.state_dict()) and same(after, written)
    assert torch.equal(first, second) and len(first) == 10
    trained_on = torch.cat([eps for _, eps in noted["train"]])
    assert not any((first[0] == eps).all() for eps in trained_on)
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
        (["--samples", "9"], "--samples"),
        (["--sampling-steps", "0"], "--sampling-steps"),
        (["--weights", "nowhere"], "no checkpoint"),
    ],
)
def test_bad_input(args, word, tmp_path, monkeypatch, capsys):
    assert word in one_line(reflow, [*args, "--out", str(tmp_path / "x")], monkeypatch, capsys)
    assert not list(tmp_path.rglob("*.safetensors"))
