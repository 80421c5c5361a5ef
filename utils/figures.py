"""Figures: grids of pictures, film strips, curves. Each function writes one PNG and returns its path."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from PIL import Image


def tile(images: torch.Tensor, columns: int = 8, pad: int = 2, scale: int = 1, ground: int = 255) -> np.ndarray:
    """(N, C, H, W) in [-1, 1] -> one uint8 picture (H', W', 3), row by row, with `pad` pixels between."""
    x = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
    x = x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    x = torch.cat([x, torch.full((-len(x) % columns, *x.shape[1:]), ground, dtype=torch.uint8)])
    x = torch.nn.functional.pad(x, (0, pad, 0, pad), value=ground)
    return rearrange(x, "(r c) d h w -> (r h) (c w) d", c=columns)[:-pad or None, :-pad or None].numpy()


def grid(path: str | Path, images: torch.Tensor, columns: int = 8, scale: int = 2) -> Path:
    """Write a grid of pictures, (N, C, H, W) in [-1, 1]."""
    Image.fromarray(tile(images, columns, scale=scale)).save(path, optimize=True)
    return Path(path)


def rows(path: str | Path, named: dict[str, torch.Tensor], titles: Sequence[Any] = (), scale: float = 0.7) -> Path:
    """One labelled row of pictures an entry: {"label": (N, C, H, W) in [-1, 1]}; `titles` stand over the columns."""
    columns = max(len(x) for x in named.values())
    figure, axes = plt.subplots(len(named), columns, figsize=(scale * columns + 1.2, scale * len(named) + 0.4), squeeze=False)
    for i, (label, images) in enumerate(named.items()):
        for j in range(columns):
            axes[i, j].axis("off")
            if j < len(images):
                axes[i, j].imshow(tile(images[j : j + 1], 1, pad=0), interpolation="nearest")
            if i == 0 and j < len(titles):
                axes[i, j].set_title(str(titles[j]), fontsize=8)
        axes[i, 0].text(-0.15, 0.5, label, transform=axes[i, 0].transAxes, ha="right", va="center", fontsize=9)
    figure.subplots_adjust(wspace=0.06, hspace=0.06, left=1.2 / (scale * columns + 1.2), right=0.99, bottom=0.02, top=1 - 0.35 / (scale * len(named) + 0.4))
    return close(figure, path)


def curves(path: str | Path, named: dict[str, Any], x: str = "", y: str = "", smooth: int = 0, log: str = "", size=(5.2, 3.2)) -> Path:
    """One line an entry: a sequence of y, or a pair (xs, ys); `smooth` averages over so many points; log: "x", "y" or "xy"."""
    figure, axes = plt.subplots(figsize=size)
    for label, values in named.items():
        xs, ys = values if isinstance(values, tuple) else (range(1, len(values) + 1), values)
        xs, ys = np.asarray(xs, float), np.asarray(ys, float)
        if smooth > 1 and len(ys) > 2 * smooth:
            ys, xs = np.convolve(ys, np.ones(smooth) / smooth, "valid"), xs[smooth - 1 :]
        axes.plot(xs, ys, label=label, marker="o" if len(ys) <= 20 else None, markersize=3)
    for axis in log:
        getattr(axes, f"set_{axis}scale")("log")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if len(named) > 1:
        axes.legend(fontsize=8)
    return close(figure, path)


def close(figure: Any, path: str | Path) -> Path:
    """Write a matplotlib figure and free it."""
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return Path(path)
