"""Ring all-reduce: the sum over all ranks, of which each sends less than two vectors.

Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations". The
vector is cut into as many pieces as there are ranks, and pieces travel round a ring: first a
reduce-scatter (partial sums are added up), then an all-gather (whole sums are copied).
"""

import numpy as np
import torch
import torch.distributed as dist

from utils import figures


def schedule(n):
    """The steps of a ring all-reduce of n pieces: [(piece that rank 0 sends, "add" or "copy")].

    Rank r sends piece (that + r) mod n to rank r + 1. After n - 1 additions rank r has the whole
    sum of piece r + 1; n - 1 copies later everyone has every sum. Each rank has sent 2 (n - 1) / n
    of the vector: below 2, always.
    """
    reduce_scatter = [(-step % n, "add") for step in range(n - 1)]
    all_gather = [((1 - step) % n, "copy") for step in range(n - 1)]
    return reduce_scatter + all_gather


def all_reduce(x):
    """The sum of x over all ranks, in place. x: (size,), any size."""
    n = dist.get_world_size()
    rank = dist.get_rank()
    pieces = x.tensor_split(n) if n > 1 else ()
    for first, action in schedule(n):
        outgoing = pieces[(first + rank) % n]
        target = pieces[(first + rank - 1) % n]
        received = torch.empty_like(target)
        # Send to the right and receive from the left, both at once: one by one, all would wait to
        # be received.
        send = dist.P2POp(dist.isend, outgoing.clone(), (rank + 1) % n)
        receive = dist.P2POp(dist.irecv, received, (rank - 1) % n)
        for work in dist.batch_isend_irecv([send, receive]):
            work.wait()
        # Partial sums on the first way round, whole ones on the second.
        if action == "add":
            target.add_(received)
        else:
            target.copy_(received)
    return x


def draw(path, n=4):
    """From how many ranks the sum of each piece comes, before and after every step of the ring."""
    import matplotlib.pyplot as plt

    # The steps on counts instead of numbers: (rank, piece), how many ranks' parts the sum has.
    counts = np.ones((n, n))
    frames = [counts.copy()]
    titles = ["start"]
    for step, (first, action) in enumerate(schedule(n), 1):
        before = counts.copy()
        for rank in range(n):
            piece = (first + rank) % n
            right = (rank + 1) % n
            added = before[right, piece] if action == "add" else 0
            counts[right, piece] = before[rank, piece] + added
        frames.append(counts.copy())
        titles.append(f"{step}: {action}")
    # A table for each step.
    figure, axes = plt.subplots(1, len(frames), figsize=(1.55 * len(frames), 2.1), sharey=True)
    for axis, frame, title in zip(axes, frames, titles):
        axis.imshow(frame, cmap="Greens", vmin=0, vmax=n * 1.3)
        for rank in range(n):
            for piece in range(n):
                count = f"{frame[rank, piece]:.0f}"
                axis.text(piece, rank, count, ha="center", va="center", fontsize=9)
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(n), [f"p{k}" for k in range(n)], fontsize=8)
        axis.set_yticks(range(n), [f"rank {k}" for k in range(n)], fontsize=8)
    heading = "ring all-reduce: from how many ranks the sum of each piece comes"
    figure.suptitle(heading, fontsize=10, y=1.04)
    figure.tight_layout(pad=0.3)
    return figures.close(figure, path)
