"""Figures of the masked autoencoder: photos with masked patches, as reconstructed, and pasted together.

He et al. 2021, arXiv:2111.06377, Figs. 2 to 4.
"""

import torch

from papers import photos
from papers.patches import moments, patchify, unpatchify
from utils import figures

RATIOS = (0.25, 0.5, 0.75, 0.9)  # that are drawn side by side


@torch.no_grad()
def draw(model, imgs, ratio, noise=None):
    """-> images (B,C,H,W): with holes, as drawn, and the drawn patches pasted among the visible ones.

    With `norm_pix` the network says nothing about mean and spread of a patch: they are taken from the photo.
    """
    _, pred, mask = model(imgs, ratio, noise)
    patches = patchify(imgs, model.patch)
    hidden = mask[..., None]
    if model.norm_pix:
        mean, spread = moments(patches)
        pred = pred * spread + mean
    grid = (imgs.shape[2] // model.patch, imgs.shape[3] // model.patch)
    visible = patches * (1 - hidden)
    views = (visible + 0.6 * hidden, pred, visible + pred * hidden)
    return [unpatchify(x, model.patch, grid).float() for x in views]


def pictures(model, images, cfg, folder):
    """Two figures: what is drawn at one ratio, and what at several. The same patches are masked first in all."""
    device = next(model.parameters()).device
    x = photos.whole(images, cfg.image_size).to(device)
    noise = torch.rand(len(x), (cfg.image_size // cfg.patch) ** 2, device=device)
    # the ratio of the run: masked, reconstructed, pasted
    hidden, drawn, pasted = draw(model, x, cfg.ratio, noise)
    rows = {"photo": x, "hidden": hidden, "drawn": drawn, "pasted": pasted}
    figures.rows(folder / "drawn.png", rows, scale=0.9)
    # several ratios: masked and pasted
    rows = {"photo": x}
    for ratio in RATIOS:
        hidden, _, pasted = draw(model, x, ratio, noise)
        rows[f"{ratio:.0%}, hidden"] = hidden
        rows[f"{ratio:.0%}, pasted"] = pasted
    figures.rows(folder / "ratios.png", rows, scale=0.7)
