"""Figures: grids of pictures, film strips, curves, scatter plots. Each function writes one PNG and returns its path.

matplotlib is imported where it draws: `--help` need not wait for it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image


def tile(
    images: torch.Tensor, columns: int = 8, pad: int = 2, scale: int = 1, ground: int = 255
) -> np.ndarray:
    """(N, C, H, W) in [-1, 1] -> one uint8 picture (H', W', 3), row by row, with `pad` pixels between."""
    # [-1, 1] -> 0..255, grey as three equal channels
    x = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
    # Enlarge without smoothing, fill the last row with empty pictures, put the gap behind each
    x = x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    x = torch.cat([x, torch.full((-len(x) % columns, *x.shape[1:]), ground, dtype=torch.uint8)])
    x = torch.nn.functional.pad(x, (0, pad, 0, pad), value=ground)
    # Rows and columns; the last gap goes
    page = rearrange(x, "(r c) d h w -> (r h) (c w) d", c=columns)
    return page[: -pad or None, : -pad or None].numpy()


def grid(path: str | Path, images: torch.Tensor, columns: int = 8, scale: int = 2) -> Path:
    """Write a grid of pictures, (N, C, H, W) in [-1, 1]."""
    Image.fromarray(tile(images, columns, scale=scale)).save(path, optimize=True)
    return Path(path)


def rows(
    path: str | Path, named: dict[str, torch.Tensor], titles: Sequence[Any] = (), scale: float = 0.7
) -> Path:
    """One labelled row of pictures an entry: {"label": (N, C, H, W) in [-1, 1]}; `titles` stand over the columns."""
    import matplotlib.pyplot as plt

    # Inches: the pictures, room for labels on the left and titles above
    columns = max(len(x) for x in named.values())
    width = scale * columns + 1.2
    height = scale * len(named) + 0.4
    figure, axes = plt.subplots(len(named), columns, figsize=(width, height), squeeze=False)
    longest = max((len(line) for title in titles for line in str(title).splitlines()), default=0)
    size = 8 if longest < 10 else 7  # so that neighbours do not touch
    for i, (label, images) in enumerate(named.items()):
        for j in range(columns):
            axes[i, j].axis("off")
            if j < len(images):
                axes[i, j].imshow(tile(images[j : j + 1], 1, pad=0), interpolation="nearest")
            if i == 0 and j < len(titles):
                axes[i, j].set_title(str(titles[j]), fontsize=size)
        # The label of the row, left of its first picture
        place = {"transform": axes[i, 0].transAxes, "ha": "right", "va": "center"}
        axes[i, 0].text(-0.15, 0.5, label, fontsize=9, **place)
    edges = {"left": 1.2 / width, "right": 0.99, "bottom": 0.02, "top": 1 - 0.35 / height}
    figure.subplots_adjust(**edges, wspace=0.06, hspace=0.06)
    return close(figure, path)


def show(
    named: dict[str, torch.Tensor], titles: Sequence[Any] = (), title: str = "", size: float = 0.8
) -> None:
    """For notebooks: one labelled row of pictures an entry, {"label": (N, C, H, W) in [-1, 1]}, `size` inches each."""
    import matplotlib.pyplot as plt

    columns = max(len(x) for x in named.values())
    height = size * len(named)
    if title:
        height += 0.3
    if titles:
        height += 0.3
    figure, axes = plt.subplots(len(named), 1, figsize=(size * columns + 1, height), squeeze=False)
    # One picture a row: its images side by side
    for axis, (label, images) in zip(axes[:, 0], named.items()):
        axis.imshow(tile(images, columns), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    # A title above the middle of each column
    wide = next(iter(named.values())).shape[-1] + 2  # a picture and the gap behind it
    axes[0, 0].set_xticks([wide * i + wide / 2 for i in range(len(titles))], titles, fontsize=8)
    axes[0, 0].tick_params(top=False, labeltop=True, bottom=False, labelbottom=False)
    figure.suptitle(title, fontsize=11, y=1)
    figure.tight_layout(pad=0.3)
    plt.show()


def curves(
    path: str | Path,
    named: dict[str, Any],
    x: str = "",
    y: str = "",
    smooth: int = 0,
    log: str = "",
    size=(5.2, 3.2),
) -> Path:
    """One line an entry: a sequence of y, or a pair (xs, ys).

    `smooth` averages over so many points; log: "x", "y" or "xy".
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=size)
    for label, values in named.items():
        xs, ys = values if isinstance(values, tuple) else (range(1, len(values) + 1), values)
        xs = np.asarray(xs, float)
        ys = np.asarray(ys, float)
        # The mean of the last `smooth` points stands where the last of them stood
        if smooth > 1 and len(ys) > 2 * smooth:
            ys = np.convolve(ys, np.ones(smooth) / smooth, "valid")
            xs = xs[smooth - 1 :]
        axes.plot(xs, ys, label=label, marker="o" if len(ys) <= 20 else None, markersize=3)
    # Axes and legend
    for axis in log:
        getattr(axes, f"set_{axis}scale")("log")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if len(named) > 1:
        # Above the axes, where it hides no curve
        axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return close(figure, path)


def panels(path: str | Path, layout: list[dict[str, Any]], size: float = 3.0) -> Path:
    """Row by row {"title": pictures (N, C, H, W), laid in a square, or (codes (N, D), labels (N,)) for `scatter`}."""
    import matplotlib.pyplot as plt

    height = len(layout)
    width = len(layout[0])
    inches = (size * width, (size + 0.25) * height)
    figure, axes = plt.subplots(height, width, figsize=inches, squeeze=False)
    contents = [panel for row in layout for panel in row.items()]
    for axis, (title, content) in zip(axes.flat, contents):
        axis.set_title(title, fontsize=9)
        if isinstance(content, tuple):
            scatter(axis, *content)
        else:
            axis.imshow(tile(content, math.isqrt(len(content)), pad=0), interpolation="lanczos")
            axis.axis("off")
    figure.tight_layout()
    return close(figure, path)


def bars(
    path: str | Path, named: dict[str, tuple[float, float, float]], x: str = "accuracy"
) -> Path:
    """A horizontal bar an entry: {"label": (value, low, high)}, with the interval drawn on it."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 0.3 * len(named) + 0.8))
    for i, (value, low, high) in enumerate(named.values()):
        axis.barh(i, value, xerr=[[value - low], [high - value]], capsize=2, color="lightsteelblue")
    axis.set_yticks(range(len(named)), list(named), fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel=x)
    return close(figure, path)


def scatter(axis: Any, codes: torch.Tensor, labels: torch.Tensor) -> None:
    """The first two dimensions of codes (N, D), coloured by label; the circle holds 95 % of a 2-d standard normal."""
    import matplotlib.pyplot as plt

    codes = codes[:, :2].cpu()
    axis.scatter(*codes.T, c=labels, cmap="tab10", s=1, alpha=0.4, linewidths=0)
    # Each label in the middle of its points
    for k in labels.unique():
        middle = codes[labels == k].median(0).values
        axis.text(*middle, str(int(k)), ha="center", va="center", weight="bold", fontsize=9)
    # Rayleigh's quantile: of a 2-d standard normal 95 % lie within sqrt(-2 log 0.05) = 2.45
    radius = math.sqrt(-2 * math.log(0.05))
    axis.add_patch(plt.Circle((0, 0), radius, fill=False, color="black", linewidth=1))
    # All but a few outliers are in sight
    reach = max(3.0, 1.1 * float(codes.abs().quantile(0.998)))
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")


def close(figure: Any, path: str | Path) -> Path:
    """Write a matplotlib figure and free it."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return Path(path)
