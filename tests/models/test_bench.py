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
    assert "sampler overhead" in metrics


def test_bad_input():
    with pytest.raises(run.UserError, match="--rounds"):
        bench.main(bench.Config(rounds=0))
