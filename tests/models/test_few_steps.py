"""Few steps, the comparison: which sampler is asked for what, from which noise; what is counted, judged and drawn."""

import json
import math
import time
from dataclasses import asdict

import pytest
import torch

from models import ddim, ddpm, distill, dpm_solver, few_steps, flow, quality
from tests.models.test_ddpm import command, one_line
from utils import checkpoint, figures

TINY = dict(samples=10, rounds=2, calls=(1, 4), reference=3, grids=("time", "karras"))
FILES = {"weights": "ddpm", "student": "student", "reflow": "reflow"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files as ddpm.py, distill.py and flow.py write them, of small networks that predict x0."""
    folder = tmp_path_factory.mktemp("weights")
    cfg = ddpm.Config(channels=(8,), layers=1, predict="x0", schedule="linear")
    torch.manual_seed(3)
    for name in ("ddpm", "student", "flow", "reflow"):
        build = flow.build if "flow" in name else ddpm.build
        state = build(cfg.channels, cfg.layers).state_dict()
        checkpoint.write(folder / f"{name}.safetensors", state, asdict(cfg))
    return folder


@pytest.fixture
def spied(weights, monkeypatch, tmp_path):
    """The comparison with samplers that note what they are asked for; (metrics, notes, what was drawn)."""
    notes = []
    drawn = {}
    states = {p.stem: checkpoint.read(p)[0] for p in weights.iterdir()}

    def who(model, xt):
        """Which network answers, by its first answer."""
        model(xt, torch.full((len(xt),), 7.0))

    def ddim_sample(model, schedule, xt, n, predict="eps", spacing="trailing", eta=0.0, clip=True):
        who(model, xt)
        notes.append(dict(kind="ddim", noise=xt, n=n, predict=predict, eta=eta, clip=clip))
        yield xt
        yield torch.full_like(xt, n / 10)

    def dpm_sample(model, schedule, xt, n, predict="eps", solver="dpm++", grid="time", clip=True):
        who(model, xt)
        notes.append(dict(kind=solver, noise=xt, n=n, predict=predict, grid=grid, clip=clip))
        yield xt
        yield torch.full_like(xt, n / 10)

    def student_sample(model, schedule, xt, n, predict="eps", clip=True):
        who(model, xt)
        notes.append(dict(kind="student", noise=xt, n=n, predict=predict, clip=clip))
        yield xt
        yield torch.full_like(xt, n / 10)

    def flow_sample(model, xt, n, solver="euler"):
        who(model, xt)
        notes.append(dict(kind="flow", noise=xt, n=n, solver=solver))
        yield xt
        yield torch.full_like(xt, n / 10)

    def forward(self, xt, t, y=None):
        name = next(k for k, v in states.items() if same(v, self.state_dict()))
        notes.append({"network": name, "classes": None if y is None else y.tolist()})
        return xt

    def same(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    def score(images):
        value = float(images.mean())
        scores = {"recognised": value, "recognised_error": 0.1, "digits_seen": 10.0}
        return scores | {"frechet": value + len(notes), "frechet_of_real": 1.0}

    def figure(path, content, *rest, **__):
        drawn[path.name] = (content, *rest)

    monkeypatch.setattr(ddim, "sample", ddim_sample)
    monkeypatch.setattr(dpm_solver, "sample", dpm_sample)
    monkeypatch.setattr(distill, "sample", student_sample)
    monkeypatch.setattr(flow, "sample", flow_sample)
    monkeypatch.setattr(type(ddpm.build((8,), 1)), "forward", forward)
    monkeypatch.setattr(quality, "scorer", lambda device: score)
    monkeypatch.setattr(flow, "WEIGHTS", weights / "flow.safetensors")
    for name in ("rows", "curves"):
        monkeypatch.setattr(figures, name, figure)
    where = {k: str(weights / f"{v}.safetensors") for k, v in FILES.items()}
    metrics = few_steps.main(few_steps.Config(out=str(tmp_path), **where, **TINY))
    asked = {note["network"]: note["classes"] for note in notes[::2]}
    # only flows are told the digit; reflow has its guidance in the weights
    ten = list(range(10))
    assert asked == {"ddpm": None, "student": None, "flow": ten + [10] * 10, "reflow": ten}
    pairs = [(a["network"], b) for a, b in zip(notes[::2], notes[1::2], strict=True)]
    return metrics, pairs, drawn


def test_every_sampler_gets_its_network_noise_and_flags(spied):
    metrics, pairs, _ = spied
    first = pairs[: len(pairs) // 2]
    found = [(who, note["kind"], note["n"]) for who, note in first]
    assert found == [
        ("ddpm", "ddim", 1), ("ddpm", "ddim", 4),
        ("ddpm", "ddim", 1), ("ddpm", "ddim", 4),
        ("ddpm", "dpm++", 1), ("ddpm", "dpm++", 4),
        ("ddpm", "dpm++", 1), ("ddpm", "dpm++", 4),
        ("ddpm", "heun", 1), ("ddpm", "heun", 2),
        ("flow", "flow", 1), ("flow", "flow", 4),
        ("reflow", "flow", 1), ("reflow", "flow", 4),
        ("student", "student", 1), ("student", "student", 4),
        ("ddpm", "ddim", 3),
    ]  # fmt: skip
    notes = [note for _, note in first]
    assert [note.get("eta") for note in notes[:4]] == [1, 1, 0, 0] and notes[-1]["eta"] == 0
    grids = [note.get("grid") for note in notes[4:10]]
    assert grids == ["time", "time", "karras", "karras", "log-snr", "log-snr"]
    assert {note["predict"] for note in notes if "predict" in note} == {"x0"}
    assert {note["clip"] for note in notes if "clip" in note} == {True}
    # one noise for all of a round, another one in the next
    noise = notes[0]["noise"]
    assert noise.shape == (10, 1, 28, 28) and float(noise.std()) == pytest.approx(1, abs=0.05)
    assert all(torch.equal(note["noise"], noise) for note in notes)
    second = [note["noise"] for _, note in pairs[len(pairs) // 2 :]]
    assert not torch.equal(second[0], noise) and all(torch.equal(x, second[0]) for x in second)
    # what is judged is the last of the chain
    assert metrics["DDIM, 4 calls"]["recognised"] == pytest.approx(0.4)
    assert metrics["consistency student, 1 calls"]["recognised"] == pytest.approx(0.1)


def test_intervals_are_over_rounds(spied):
    """The spied distance of a cell grows from round to round by the number of notes that a round leaves."""
    metrics, pairs, _ = spied
    row = metrics["DDIM, 1 calls"]
    apart = len(pairs)  # notes of a round: two for each of half the pairs
    assert row["frechet_error"] == pytest.approx(apart / 2)  # std = d / sqrt(2), over sqrt(2)
    assert row["recognised_error"] == pytest.approx(0.1 / math.sqrt(2))


def test_what_is_drawn(spied):
    metrics, _, drawn = spied
    rows, titles = drawn["samples.png"]
    assert list(rows) == [
        "DDPM\nancestral",
        "DDIM",
        "DPM-Solver++\ntime",
        "DPM-Solver++\nkarras",
        "Heun",
        "flow\nEuler",
        "reflow\nEuler",
        "consistency\nstudent",
    ]
    assert titles == ["1 call", "", "", "", "", "4 calls", "", "", ""]
    assert all(len(x) == 9 for x in rows.values())
    levels = rows["DDIM"].mean((1, 2, 3)).tolist()
    assert levels == pytest.approx([0.1] * 4 + [1] + [0.4] * 4)
    calls, values = drawn["frechet.png"][0]["Heun"]
    assert calls == (1, 4)
    assert values == [metrics[f"Heun, {n} calls"]["frechet"] for n in calls]
    assert metrics["order of DDIM"] == pytest.approx(1, abs=0.05)
    assert metrics["order of DPM-Solver++(2M)"] == pytest.approx(2, abs=0.05)
    assert metrics["order of Heun"] == pytest.approx(2, abs=0.05)


def test_only_some_rows_give_what_they_give_beside_the_others(weights, tmp_path):
    """Noises are those of the round, and a sampler's own draws begin anew in each cell."""
    where = {k: str(weights / f"{v}.safetensors") for k, v in FILES.items()}
    found = []
    for only in (("DDPM, ancestral", "consistency student"), ("consistency student",)):
        cfg = few_steps.Config(only=only, out=str(tmp_path), **where, **TINY)
        found.append(few_steps.table(cfg, torch.device("cpu"))[1]["consistency student"])
    assert found[0].keys() == {1, 4}
    assert all(torch.equal(found[0][n], found[1][n]) for n in (1, 4))


def test_heun_stays_within_its_calls():
    assert [few_steps.heun_steps(n) for n in (1, 2, 3, 4, 7, 8)] == [1, 1, 2, 2, 4, 4]


def busy(seconds):
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        pass


def test_meter_tells_network_and_sampler_apart():
    """A sampler that works a quarter of its time outside the network; counts begin anew with each draw."""
    meter = few_steps.Meter()

    def network(xt, t):
        busy(0.03)
        return xt

    def sampler(noise, calls):
        watched = meter.watch(network)
        for _ in range(calls):
            busy(0.01)
            noise = watched(noise + 1, None)
        yield noise

    for n in (2, 3):
        images, calls, outside = few_steps.draw(meter, sampler, torch.zeros(1), n)
        assert calls == n and float(images) == n
        assert outside == pytest.approx(0.25, abs=0.08)


@pytest.mark.long
def test_command(weights, tmp_path):
    tiny = "--samples 10 --rounds 2 --calls 1 2 --reference 3".split()
    where = ["--weights", str(weights / "ddpm.safetensors"), "--student", "no", "--reflow", "no"]
    done = command(*where, *tiny, "--out", str(tmp_path), script="few_steps")
    assert done.returncode == 0, done.stderr
    for name in ("samples.png", "frechet.png", "order.png"):
        assert (tmp_path / name).stat().st_size > 0, name
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["Heun, 2 calls"]["calls"] == 1 and metrics["DDIM, 2 calls"]["calls"] == 2
    assert 0 < metrics["outside_the_network"] < 1
    assert not any(name.startswith(("reflow", "consistency")) for name in metrics)


@pytest.mark.parametrize(
    "args, word",
    [
        (["--calls", "0"], "--calls"),
        (["--calls"], "calls"),
        (["--calls", "2", "2"], "twice"),
        (["--calls", "2000"], "--calls"),
        (["--reference", "0"], "--reference"),
        (["--reference", "8"], "--reference"),
        (["--samples", "9"], "--samples"),
        (["--rounds", "1"], "--rounds"),
        (["--grids", "linear"], "grids"),
        (["--weights", "nowhere"], "no checkpoint"),
        (["--pretrained", "--only", "ddim"], "--only"),
    ],
)
def test_bad_input(args, word, tmp_path, monkeypatch, capsys):
    assert word in one_line(few_steps, [*args, "--out", str(tmp_path / "x")], monkeypatch, capsys)
