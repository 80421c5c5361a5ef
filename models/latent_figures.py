"""Figures of a VAE's latent space: grid of codes, interpolation, clouds of codes, reconstructions, loss curves."""

import torch

from models.vae_network import VAE, paint
from utils import figures


def latent_grid(model, n=20):
    """n x n images (n^2, C, H, W) of a 2-d latent space, in steps of equal probability (inverse CDF). Fig. 4."""
    steps = torch.special.ndtri((torch.arange(n) + 0.5) / n)
    # z_1 to the right, z_2 upwards, as in the scatter plots
    z = torch.cartesian_prod(steps.flip(0), steps).flip(1)
    return paint(model, z)


def interpolate(model, a, b, n=10):
    """n images on the straight line between the codes of a and b, (C, H, W) each -> (n, C, H, W)."""
    mu, _ = model.encode(torch.stack([a, b]).to(next(model.parameters()).device))
    weight = torch.linspace(0, 1, n, device=mu.device)[:, None]
    return paint(model, mu[:1].lerp(mu[1:], weight))


def draw(folder, cfg, curves, models, codes, samples, test, labels):
    """Every figure of a run of vae.py; all dictionaries have the names of the variants as keys.

    codes, samples: of each model, (N, D) and (N, C, H, W); test: the images that the codes are of; labels: their
    classes, or None.
    """
    first = f"{cfg.latents[0]}-d"
    best = f"{cfg.latents[-1]}-d"
    figures.grid(folder / "samples.png", samples[best][:64])
    draw_reconstructions(folder, models, codes, test)
    if cfg.latents[0] == 2:
        draw_map(folder, cfg, models[first])
    draw_interpolations(folder, models[best], best, test, labels)
    if labels is not None:
        draw_clouds(folder, first, codes, samples, labels)
    draw_curves(folder, curves)


def draw_reconstructions(folder, models, codes, test):
    """Ten images, and what each model makes of their codes."""
    rows = {"original": test[:10]}
    for name, model in models.items():
        rows[name] = paint(model, codes[name][:10])
    figures.rows(folder / "reconstructions.png", rows)


def draw_map(folder, cfg, model):
    """The grid of a two-dimensional latent space, before the training and after it."""
    # a weave too faint to see, alike at every point
    grey = latent_grid(VAE(2, cfg.channels, cfg.hidden, model.image), n=8)
    low, high = grey.aminmax()
    before = f"before training, contrast x {2 / (high - low):.0f}"
    maps = {
        before: (grey - low) / (high - low) * 2 - 1,
        "after training": latent_grid(model),
    }
    figures.panels(folder / "map.png", [maps], size=5)


def pairs(test, labels):
    """{"3 to 8": (image, image), ...} to interpolate between: digits, or neighbours where there are no classes."""
    if labels is None:
        four = range(0, min(len(test), 8) - 1, 2)
        return {f"{i + 1} to {i + 2}": (test[i], test[i + 1]) for i in four}
    chosen = {}
    for i, j in ((3, 8), (4, 9), (0, 6), (1, 7)):
        chosen[f"{i} to {j}"] = (test[labels == i][1], test[labels == j][1])
    return chosen


def draw_interpolations(folder, model, name, test, labels):
    """From one image to another, on a line between their pixels and on one between their codes."""
    rows = {}
    weight = torch.linspace(0, 1, 10)[:, None, None, None]
    for names, (a, b) in pairs(test, labels).items():
        rows[f"{names}, pixels"] = a.lerp(b, weight)
        rows[f"{names}, {name}"] = interpolate(model, a, b)
    figures.rows(folder / "interpolation.png", rows)


def draw_clouds(folder, first, codes, samples, labels):
    """Codes of test digits above samples from the prior, of the first model and of the ablations."""
    names = [name for name in codes if name == first or not name.endswith("-d")]
    above = {f"{name}: codes of test digits": (codes[name], labels) for name in names}
    below = {f"{name}: samples from the prior": samples[name][:64] for name in names}
    figures.panels(folder / "latents.png", [above, below])


def draw_curves(folder, curves):
    """Reconstruction and KL divergence of all models, and the bound of those that have one."""
    for part in ("reconstruction", "kl"):
        log = {name: curve[part] for name, curve in curves.items()}
        label = f"{part}, nats per image"
        figures.curves(folder / f"{part}.png", log, "step", label, smooth=20, log="y")
    bound = {}
    for name, curve in curves.items():
        if name.endswith("-d"):
            bound[name] = [a + b for a, b in zip(*curve.values())]
    figures.curves(folder / "loss.png", bound, "step", "negative bound, nats per image", smooth=20)
