"""rag/bench.py: both sides do the same work, and the ranking is the same."""

import json
from dataclasses import replace

import pytest
import torch

from rag import bench
from utils.run import UserError


def test_command(tmp_path):
    threads = torch.get_num_threads()
    metrics = bench.main(
        bench.Config(distractors=0, queries=5, rounds=1, sections=3, out=str(tmp_path))
    )
    torch.set_num_threads(threads)
    assert metrics["queries"]["same_ranking"] == 1 and metrics["queries"]["times_faster"] > 0
    assert metrics["indexing"]["passages_a_second"] > 0
    assert json.loads((tmp_path / "metrics.json").read_text())["queries"] == metrics["queries"]


def test_bad_input():
    with pytest.raises(UserError, match="--rounds"):
        bench.main(replace(bench.Config(), rounds=0))
