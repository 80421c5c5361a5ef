"""The timeline of a pipeline: when each action ran, what autograd kept, and the Gantt chart."""

import time
import weakref
from contextlib import contextmanager

import torch
import torch.distributed as dist

from training import ranks
from training.pipeline_schedules import UNITS
from utils import figures

COLOURS = {"forward": "lightskyblue", "backward": "sandybrown"}


class SavedTensor:
    """Something to hold a tensor that can be watched: tensors themselves come and go as views."""

    def __init__(self, tensor):
        self.tensor = tensor


class Timeline:
    """Records when each action of a stage ran, how long it computed, and bytes of activations kept.

    line: [(kind, micro-batch, begin, end)]; seconds: {(kind, micro-batch): CPU seconds}; peak:
    bytes of activations at the most; one: those of one micro-batch.
    """

    def __init__(self, module, pace):
        self.pace = pace
        self.line = []
        self.seconds = {}
        self.peak = 0
        self.one = 0
        self.weights = {p.untyped_storage()._cdata for p in module.parameters()}
        # Autograd alone holds what is in here, as long as it needs it
        self.saved = weakref.WeakSet()
        # All ranks begin at once.
        dist.barrier()
        self.start = time.perf_counter()

    def save(self, x):
        """Hook: autograd keeps x for the backward pass; weights are kept anyway."""
        box = SavedTensor(x.detach())
        if x.untyped_storage()._cdata not in self.weights:
            self.saved.add(box)
        return box

    @contextmanager
    def record(self, kind, i):
        """The action inside; it lasts at least `pace` seconds, a backward twice that."""
        begin = time.perf_counter()
        cpu_begin = time.process_time()
        with torch.autograd.graph.saved_tensors_hooks(self.save, lambda box: box.tensor):
            yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[kind, i] = time.process_time() - cpu_begin
        # Ranks may share cores: who is early sleeps.
        time.sleep(max(0.0, begin + self.pace * UNITS[kind] - time.perf_counter()))
        self.line.append((kind, i, begin - self.start, time.perf_counter() - self.start))
        # Bytes of activations that autograd still holds.
        held = ranks.held(*(box.tensor for box in self.saved))
        self.peak = max(self.peak, held)
        self.one = self.one or held  # after the first forward


def gantt(axis, timelines, title):
    """Ranks down, time across, a box an action with the number of its micro-batch."""
    for rank, line in enumerate(timelines):
        for kind, i, begin, end in line:
            colour = COLOURS[kind]
            axis.barh(rank, end - begin, left=begin, height=0.9, color=colour, edgecolor="white")
            axis.text((begin + end) / 2, rank, i, ha="center", va="center", fontsize=7)
    names = [f"rank {rank}" for rank in range(len(timelines))]
    axis.set(yticks=range(len(timelines)), yticklabels=names)
    axis.set_title(title, fontsize=9, loc="left")
    axis.invert_yaxis()


def draw_timelines(path, runs):
    """Both schedules as planned and as measured, and the activations that each rank kept.

    runs: {schedule: {"planned", "measured": timelines; "planned idle", "measured idle": fractions;
    "kept": MiB by rank}}.
    """
    import matplotlib.pyplot as plt

    stages = len(next(iter(runs.values()))["planned"])
    figure, axes = plt.subplots(5, 1, figsize=(11, 1.1 + 0.36 * stages * 5), layout="constrained")
    units = "in units of a forward (blue; a backward, orange, takes two)"
    for k, (name, one) in enumerate(runs.items()):
        # Two timelines a schedule.
        planned = f"{name} as planned, {units}: {one['planned idle']:.1%} idle"
        measured = f"{name} as measured, in seconds: {one['measured idle']:.1%} idle"
        gantt(axes[2 * k], one["planned"], planned)
        gantt(axes[2 * k + 1], one["measured"], measured)
        # One bar for each rank, those of the schedules beside each other.
        where = [rank + 0.4 * k - 0.2 for rank in range(stages)]
        axes[4].bar(where, one["kept"], 0.38, label=name, color=f"{0.4 + 0.3 * k}")
    names = [f"rank {rank}" for rank in range(stages)]
    axes[4].set(xticks=range(stages), xticklabels=names, ylabel="MiB")
    axes[4].set_title("activations kept at once, at the most", fontsize=9, loc="left")
    axes[4].legend(fontsize=8, frameon=False)
    return figures.close(figure, path)
