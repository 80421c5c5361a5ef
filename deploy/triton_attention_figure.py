"""The figure of FlashAttention: bytes by length, the order of its tiles, the online softmax of one row."""

import math
from dataclasses import replace

import torch

from deploy import triton_attention_costs
from utils import figures

LENGTHS = [2**i for i in range(8, 18)]
TILE = (128, 64)


def tile_order(T, S, tile=TILE, causal=True):
    """Number of each tile within its program, from 0, (T/M, S/N); -1 where none is computed."""
    M, N = tile
    shape = triton_attention_costs.Shape(1, 1, 1, T, S, 64, causal)
    order = torch.full((-(-T // M), -(-S // N)), -1)
    for row, loaded in enumerate(triton_attention_costs.loaded_keys(shape, tile)):
        count = -(-loaded // N)
        order[row, :count] = torch.arange(count)
    return order


def running(scores, N):
    """Scores of one row (S,) -> its largest score and its logsumexp after each tile of N keys."""
    ends = torch.arange(N, len(scores) + N, N).clamp(max=len(scores)) - 1
    return scores.cummax(0).values[ends], scores.logcumsumexp(0)[ends]


def draw_figure(shape):
    """Three panels -> figure."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(12, 3.6), width_ratios=[1.3, 1, 1.2]
    )
    # bytes of one head, forward
    lines = {
        "eager: scores stored": [],
        "flash: loads of all programs": [],
        "flash: each number once": [],
    }
    for length in LENGTHS:
        one = replace(shape, B=1, H=1, K=1, T=length, S=length)
        counts = [
            triton_attention_costs.eager_bytes(one),
            triton_attention_costs.forward_bytes(one, TILE),
            triton_attention_costs.least_bytes(one),
        ]
        for line, count in zip(lines.values(), counts):
            line.append(count / 1e6)
    for (name, line), colour in zip(lines.items(), ("C0", "C1", "C2")):
        left.plot(LENGTHS, line, "o-", color=colour, markersize=3, label=name)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set(xlabel="tokens", ylabel="MB of one head", title="bytes of a forward pass")
    left.grid(alpha=0.3)
    left.legend(fontsize=8, frameon=False)
    # order of tiles
    order = tile_order(1024, 1024).float()
    order[order < 0] = math.nan
    middle.imshow(order.numpy(), aspect="auto", cmap="viridis", extent=(0, 1024, 1024, 0))
    for edge in range(0, 1024, TILE[0]):
        middle.axhline(edge, color="white", linewidth=0.7)
    middle.plot([0, 1024], [0, 1024], color="white", linestyle=":", linewidth=1)
    middle.set(xlabel="keys", ylabel="queries: a program for each band")
    middle.set_title("order of tiles; white: skipped", fontsize=10)
    # one row: scores that are drawn, and what the program knows after each tile
    scores = 2 * torch.randn(1024, generator=torch.Generator().manual_seed(0))
    most, sums = running(scores, TILE[1])
    places = torch.arange(1, len(most) + 1) * TILE[1]
    right.plot(scores, ".", color="0.6", markersize=3, label="scores")
    right.step(places, most, where="post", color="C1", label="largest so far, m")
    right.plot(places, sums, "o-", color="C0", markersize=3, label="m + log of the sum")
    right.axhline(float(scores.logsumexp(0)), color="0.3", linestyle="--", linewidth=1)
    right.set(xlabel="keys read", title="online softmax of one row")
    right.set_ylim(bottom=-13)
    right.legend(fontsize=8, frameon=False, loc="lower right")
    figure.tight_layout()
    return figure


def draw(path, shape):
    """The figure as a file -> its path."""
    return figures.close(draw_figure(shape), path)
