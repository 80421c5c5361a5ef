"""Benchmarks of the memory predictor and of data parallel training: `make bench`.

The predictor against PyTorch's own `torch.distributed._tools.mem_tracker` on the same step of the
same model on fake tensors; our buckets against PyTorch's DistributedDataParallel on the same ranks,
step by step in turn. CPU time, one thread, medians of ratios: neighbours on the machine do not
count.

    python training/bench.py    # about 3 min on one CPU core
"""

import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from training import ddp, memory, memory_trace, ranks, tiny
from utils import run


@dataclass(frozen=True)
class Config:
    """Compare the predictor with MemTracker, and our DDP with PyTorch's."""

    model: str = "llama2-7b"  # what the predictor weighs
    rounds: int = 3  # repetitions of the predictor; MemTracker runs once
    steps: int = 20  # training steps of each DDP
    ranks: int = 2  # of DDP
    width: int = 256  # of its model
    seed: int = 0  # same seed, same weights
    out: str = "outputs/training_bench"  # where the results go


def seconds(action):
    """Call it -> CPU seconds, and what it returned."""
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


def by_mem_tracker(cfg):
    """The same two steps under PyTorch's tracker -> bytes at the highest moment."""
    from torch.distributed._tools.mem_tracker import MemTracker

    with memory_trace.fake_ranks(1), FakeTensorMode():
        model, batch, moving = memory_trace.set_up(cfg)
        tracker = MemTracker()
        tracker.track_external(model, moving.optimizer, *batch.values())
        with tracker:
            memory_trace.training_steps(model, batch, moving, cfg, steps=1)
            tracker.reset_mod_stats()  # it takes one step at a time
            memory_trace.training_steps(model, batch, moving, cfg, steps=1)
        return sum(size["Total"] for size in tracker.get_tracker_snapshot("peak").values())


def predictor(cfg):
    """CPU seconds of both and what they say."""
    asked = memory.Config(cfg.model, precision="bf16")
    # Once unmeasured: imports, caches.
    memory.exact.__wrapped__(asked)
    # Ours some times, theirs once.
    times = []
    for _ in range(cfg.rounds):
        used, found = seconds(lambda: memory.exact.__wrapped__(asked))
        times.append(used)
    theirs, their_peak = seconds(lambda: by_mem_tracker(asked))
    ours = statistics.median(times)
    return {
        "times_faster": theirs / ours,
        "seconds": ours,
        "their_seconds": theirs,
        "GB": found["peak"] / 1e9,
        "their_GB": their_peak / 1e9,
    }


def one_step(side, i):
    """Training step number i of one of the two models."""
    parallel, backward, optimizer, text, cfg = side
    for _ in ddp.train(parallel, backward, optimizer, text, cfg, i):
        return


def worker(cfg):
    """Our DDP and PyTorch's in turn on the same texts -> CPU seconds of each step."""
    text = tiny.corpus()
    # Two models with the same weights, one for each backend.
    sides: list[Any] = []
    for backend in ("ours", "pytorch"):
        # Drawn anew, so that both begin alike.
        run.seed(cfg.seed)
        model = tiny.llama(cfg.width).to(ranks.device())
        flags = ddp.Config(backend=backend, width=cfg.width, steps=cfg.steps + 2)
        parallel, backward = ddp.wrap(model, flags)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        sides.append((parallel, backward, optimizer, text, flags))
    # A step of each in turn; the first two steps are warm-up.
    times = []
    for i in range(cfg.steps + 2):
        times.append([seconds(partial(one_step, side, i))[0] for side in sides])
    return times[2:]


def main(cfg: Config) -> dict:
    run.check(min(cfg.rounds, cfg.steps) > 0, "--rounds and --steps must be at least 1")
    run.check(cfg.width > 0 and cfg.width % 8 == 0, "--width must be a multiple of 8")
    run.check(8 % ranks.count(cfg.ranks) == 0, "--ranks must divide the batch of 8")
    torch.set_num_threads(1)
    count = ranks.count(cfg.ranks)
    folder = run.output(cfg.out, cfg)
    # The predictor in this process, then DDP on ranks.
    metrics = {f"predictor, {cfg.model}": predictor(cfg)}
    found = ranks.launch(worker, cfg, count)
    if found is None:
        return {}
    times = [pair for row in found for pair in row]
    # Ratios of the same step on the same rank: what slows one slows the other, too.
    metrics["DDP step"] = {
        "times_faster": statistics.median(b / a for a, b in times),
        "ms": 1e3 * statistics.median(a for a, _ in times),
        "their_ms": 1e3 * statistics.median(b for _, b in times),
    }
    return run.report(folder, metrics)


if __name__ == "__main__":
    run.cli(main, Config)
