"""Attention rollout: how much of each patch the answer of a vision transformer has read, drawn over the photo.

Abnar & Zuidema 2020, arXiv:2005.00928.

Shapes: B photos of C x H x W, T = 1 + N tokens, h x w patches.
"""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from utils import figures


def rollout(maps):
    """Attention (B,depth,heads,T,T) -> how much each token has reached each other through all blocks, (B,T,T).

    Eq. 1: half of every token is itself, for the residual stream.
    """
    eye = torch.eye(maps.shape[-1], device=maps.device)
    steps = 0.5 * maps.mean(2) + 0.5 * eye  # (B, depth, T, T)
    # later blocks from the left
    total = eye.expand(len(maps), -1, -1)
    for step in steps.unbind(1):
        total = step @ total
    return total


def rollout_map(model, x):
    """Where the answer comes from: (B,h,w), the rollout of the class token or of the mean, 0 to 1 in each photo."""
    total = rollout(model.maps(x))
    # the row of what the answer is read from
    seen = total[:, 0, 1:] if model.pool == "cls" else total[:, 1:, 1:].mean(1)
    seen = rearrange(seen, "b (h w) -> b h w", h=x.shape[2] // model.patch)
    # 0 to 1 in each photo
    low = seen.amin((1, 2), keepdim=True)
    high = seen.amax((1, 2), keepdim=True)
    return (seen - low) / (high - low).clamp(min=1e-12)  # one patch is a map without heights


def draw(path, images, seen):
    """Images (N,C,H,W) in a row, and below them one row an entry of `seen`: {name: (N,h,w)}, laid over the photo."""
    import matplotlib.pyplot as plt

    size = (1.3 * len(images) + 1, 1.35 * (1 + len(seen)))
    figure, axes = plt.subplots(1 + len(seen), len(images), figsize=size)
    for j, image in enumerate(images):
        # the photo in every row
        picture = (np.clip(image.permute(1, 2, 0).numpy(), -1, 1) + 1) / 2
        for axis in axes[:, j]:
            axis.set(xticks=[], yticks=[])
            axis.imshow(picture)
        # below the first one, what each network has read
        for axis, found in zip(axes[1:, j], seen.values()):
            heat = found[j][None, None]
            heat = F.interpolate(heat, picture.shape[:2], mode="bicubic", align_corners=False)
            axis.imshow(heat[0, 0].clamp(0, 1), cmap="inferno", alpha=0.6, vmin=0, vmax=1)
    for axis, name in zip(axes[:, 0], ("photo", *seen)):
        axis.set_ylabel(name, fontsize=8)
    figure.tight_layout(pad=0.3)
    return figures.close(figure, path)
