"""training/bench.py: both sides do the same work, and the ratios are those of the times."""

import json
from dataclasses import replace

import pytest
import torch

from tests.conftest import ROOT
from training import bench, memory
from utils import run

TINY = str(ROOT / "training/configs/llama_tiny.json")


def test_mem_tracker_says_the_same(parity):
    cfg = memory.Config(TINY, precision="bf16")
    ours, theirs = memory.exact(cfg)["peak"], bench.by_mem_tracker(cfg)
    parity(
        "Memory",
        "memory.exact, peak in MB",
        "torch MemTracker",
        ours / 1e6,
        theirs / 1e6,
        atol=0.001,
    )


def test_command(tmp_path):
    threads = torch.get_num_threads()
    cfg = bench.Config(TINY, rounds=1, steps=1, width=32, out=str(tmp_path))
    metrics = bench.main(cfg)
    torch.set_num_threads(threads)
    for row in metrics.values():
        assert row["times_faster"] > 0
    assert json.loads((tmp_path / "metrics.json").read_text())["DDP step"] == metrics["DDP step"]
    row = metrics[f"predictor, {TINY}"]
    assert row["times_faster"] == pytest.approx(row["their_seconds"] / row["seconds"])


def test_bad_input():
    with pytest.raises(run.UserError, match="--rounds"):
        bench.main(replace(bench.Config(), rounds=0))
