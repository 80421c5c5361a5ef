"""Figures of vlm/sparsity_study.py: accuracy against tokens, gates over training, which patches are open."""

import torch
import torch.nn.functional as F

from utils import figures

WAYS = ("top-k", "random", "evenly spaced")


def draw_curves(path, rows, losses, is_open):
    """Accuracy and time of an answer against tokens, the share of open gates against steps of training."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for way in WAYS:
        of_way = [row for name, row in rows.items() if name.startswith(way)]
        tokens = [row["tokens"] for row in of_way]
        axes[0].plot(tokens, [row["accuracy"] for row in of_way], "o-", label=way, markersize=4)
    for name, mark in (("gates", "k*"), ("all", "ks")):
        row = rows[name]
        axes[0].plot(row["tokens"], row["accuracy"], mark, label=name, markersize=8)
    axes[0].set(xlabel="image tokens", ylabel="accuracy", ylim=(0, 1))
    axes[0].legend(fontsize=7)
    # time of an answer
    every = sorted(rows.values(), key=lambda row: row["tokens"])
    times = [1000 * row["CPU s an answer"] for row in every]
    axes[1].plot([row["tokens"] for row in every], times, "o", markersize=4)
    axes[1].set(xlabel="image tokens", ylabel="CPU ms an answer", ylim=(0, 1.15 * max(times)))
    # sparsity over training
    axes[2].plot(is_open, label="share of open gates")
    axes[2].plot(losses, label="loss", linewidth=0.8)
    axes[2].set(xlabel="step", ylim=(0, None))
    axes[2].legend(fontsize=7)
    return figures.close(figure, path)


def draw_gates(path, images, p, titles):
    """Mosaics with the probability of each patch's gate: images uint8 (B,4,3,S,S), p (B,36), titles (B,)."""
    import matplotlib.pyplot as plt

    # small ones: figures stay below 300 KB
    images = F.interpolate(images.flatten(0, 1).float(), (72, 72), mode="area")
    images = images.view(len(titles), 4, 3, 72, 72).to(torch.uint8)
    figure, axes = plt.subplots(2, len(images), figsize=(1.4 * len(images), 2.9), squeeze=False)
    side = images.shape[-1]
    for (above, below), four, gates, title in zip(axes.T, images, p, titles):
        # two rows of two photos, each with 3 x 3 patches
        whole = torch.cat([torch.cat(list(four[:2]), 2), torch.cat(list(four[2:]), 2)], 1)
        patches = gates.view(4, 1, 3, 3)
        each = F.interpolate(patches, (side, side), mode="nearest")[:, 0]
        mask = torch.cat([torch.cat(list(each[:2]), 1), torch.cat(list(each[2:]), 1)], 0)
        above.imshow(whole.permute(1, 2, 0))
        below.imshow((whole.permute(1, 2, 0) / 255 * mask[..., None]).clamp(0, 1))
        above.set_title(title, fontsize=6)
        above.axis("off")
        below.axis("off")
    figure.tight_layout()
    return figures.close(figure, path)
