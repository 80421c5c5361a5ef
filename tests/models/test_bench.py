"""models/bench.py: what it compares is of one size, and its numbers are those of a stopwatch."""

import json

import pytest
import torch

from models import bench
from utils import run

SHAPE = dict(channels=(32, 64), layers=2, attention=(False, True))


def test_the_networks_compared_have_one_size():
    """Parameters within 10 %, FLOPs of a forward and backward pass within 5 %."""
    (ours, image), theirs = bench.ours(**SHAPE, size=14), bench.diffusers_unet(**SHAPE)
    x, t = torch.randn(2, *image), torch.tensor([1, 2])
    (parameters, flops), (their_parameters, their_flops) = (
        bench.cost(ours, x, t),
        bench.cost(theirs, x, t),
    )
    assert abs(parameters / their_parameters - 1) < 0.1 and abs(flops / their_flops - 1) < 0.05


def test_interleaved_takes_turns():
    calls = []
    times = bench.interleaved([lambda: calls.append("a"), lambda: calls.append("b")], rounds=3)
    assert calls == ["a", "b"] * 4  # the first turn is not measured
    assert len(times) == 2 and all(len(x) == 3 and min(x) >= 0 for x in times)


def test_a_step_trains():
    model, image = bench.ours(**SHAPE, size=14)
    before = model.conv_out.weight.clone()
    bench.training_step(model, torch.randn(2, *image), torch.tensor([1, 2]), bf16=False)()
    assert not torch.equal(model.conv_out.weight, before)


def test_command(tmp_path):
    threads = torch.get_num_threads()
    bench.main(bench.Config(rounds=1, batch=2, out=str(tmp_path)))
    torch.set_num_threads(threads)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for kind in ("fp32", "bf16"):
        step = metrics[f"diffusers: {kind} step"]
        assert (
            step["times_faster"] == pytest.approx(step["their_ms"] / step["ms"])
            and step["share_of_matmul_rate"] > 0
        )
        # the profile of the step: its kinds of operators, the slowest first, and its variants
        rows = {k: v for k, v in metrics.items() if k.startswith(f"{kind}, ") and "time" in v}
        times = [row["time"] for row in rows.values()]
        assert sum(times) == pytest.approx(1) and times == sorted(times, reverse=True)
        assert sum(row.get("FLOPs", 0) for row in rows.values()) == pytest.approx(1)
        convolution = rows[f"{kind}, convolution"]
        assert convolution["share_of_matmul_rate"] == pytest.approx(
            step["share_of_matmul_rate"] * convolution["FLOPs"] / convolution["time"]
        )
        faster = metrics[f"{kind}, times faster"]
        assert list(faster) == ["fused AdamW", "fused attention", "channels last"]
        assert min(faster.values()) > 0
    assert "sampler overhead" in metrics


def test_profile_of_step_measures_each_variant(monkeypatch):
    """Types, flags and order reach what is measured; a variant that takes half the time is twice as fast."""
    made = []
    monkeypatch.setattr(bench, "time_shares", lambda step, steps: {"convolution": 1.0})
    monkeypatch.setattr(bench, "flop_shares", lambda loss: {"convolution": 1.0})

    def training_step(model, x, t, bf16, **flags):
        made.append((bf16, flags, x.is_contiguous(memory_format=torch.channels_last)))
        return len(made)

    seconds = {2: 4.0, 3: 2.0, 4: 8.0, 5: 1.0}  # the first step made is the one profiled
    monkeypatch.setattr(bench, "training_step", training_step)
    monkeypatch.setattr(
        bench, "interleaved", lambda steps, rounds, name: [[seconds[s]] * rounds for s in steps]
    )
    model, image = bench.ours(**SHAPE, size=14)
    about = model, torch.randn(2, *image), torch.tensor([1, 2])
    metrics = bench.profile_of_step(bench.Config(rounds=3), *about, "bf16", 0.5)
    faster = {"fused AdamW": 2.0, "fused attention": 0.5, "channels last": 4.0}
    assert metrics["bf16, times faster"] == faster
    assert metrics["bf16, convolution"]["share_of_matmul_rate"] == 0.5
    assert all(bf16 for bf16, _, _ in made)
    assert [flags for _, flags, _ in made] == [{}, {}, {"fused": True}, {}, {}]
    assert [last for _, _, last in made] == [False, False, False, False, True]


def test_share_of_the_matrix_product_rate(monkeypatch):
    """FLOPs per second of the step over those of a product that took its turn in the same rounds."""
    times = [[1.0, 4.0], [2.0, 4.0], [0.5, 0.5]]  # ours, theirs, the product
    monkeypatch.setattr(bench, "interleaved", lambda actions, rounds, name: times)
    monkeypatch.setattr(bench, "profile_of_step", lambda *about: {"share": about[-1]})
    monkeypatch.setattr(bench, "sampler_overhead", lambda cfg: 0.0)
    monkeypatch.setattr(bench, "lucidrains_unet", lambda **sizes: None)
    monkeypatch.setattr(bench.run, "report", lambda folder, metrics: metrics)
    monkeypatch.setattr(bench.run, "output", lambda *about: None)
    threads = torch.get_num_threads()
    metrics = bench.main(bench.Config(rounds=2, batch=2))
    torch.set_num_threads(threads)
    step = metrics["diffusers: fp32 step"]
    flops = 1e9 * metrics["diffusers: size"]["GFLOP"]
    shares = [flops / mine / (2 * 1024**3 / 0.5) for mine in (1.0, 4.0)]
    assert step["share_of_matmul_rate"] == pytest.approx(sum(shares) / 2) == metrics["share"]
    assert step["times_faster"] == pytest.approx(1.5) and step["ms"] == 2500


def test_matrix_product():
    product, flops = bench.matrix_product(bf16=True, n=16)
    y = product()
    assert y.shape == (16, 16) and y.dtype == torch.bfloat16 and flops == 2 * 16**3


def test_bad_input():
    with pytest.raises(run.UserError, match="--rounds"):
        bench.main(bench.Config(rounds=0))
