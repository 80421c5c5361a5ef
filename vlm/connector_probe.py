"""Linear probing of connectors: small ones trained on frozen vision features, scored by what is seen and where.

Each connector (connector.py) gets two linear probes: of the mean of its tokens, which of 14 kinds
of fruit the photo shows; of their row, where a marker of 2 x 2 tokens was put. Beside the two
accuracies stand what it costs: parameters, tokens, seconds a step.

Shapes: features (B,N,D) with N = 49, tokens (B,M,E).

    python vlm/connector_probe.py
    python vlm/connector_probe.py --names pool1 mlp2x_gelu --steps 600
    python vlm/connector_probe.py --names linear --sparsity-plugins pool3
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils import data, figures, run
from utils.run import check
from vlm import fruit_photos, tower
from vlm.connector import PerceiverResampler, build, grid, tokens

NAMES = ("linear", "mlp2x_gelu", "concat4", "pool3", "pool1", "bilinear3", "perceiver")


@dataclass(frozen=True)
class Config:
    """Train small connectors on photos of fruit, and see what and where they let through."""

    # linear, mlp2x_gelu, mlpNx_gelu, identity, concatR, poolS, bilinearS, perceiver
    names: tuple[str, ...] = NAMES
    # token sparsification before each: poolS, bilinearS, topk_normK, randomK, in order
    sparsity_plugins: tuple[str, ...] = ()
    width: int = 576  # E, of SmolLM2's words
    steps: int = 150  # of training, for each
    batch: int = 64  # photos a step
    lr: float = 1e-3
    judged: int = 300  # photos to be judged by
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/connector_probe"


# Of a patch of 2 x 2 tokens in a grid of 7 x 7
PLACES = [(y, x) for y in (0, 2, 5) for x in (0, 2, 5)]


def insert_marker(maps, places, marker):
    """Put the same 2 x 2 tokens (2,2,D) into every photo (B,49,D), each at its place of nine: can
    it be told where?"""
    x = grid(maps).clone()  # (B,7,7,D)
    for i, place in enumerate(places.tolist()):
        top, left = PLACES[place]
        x[i, top : top + 2, left : left + 2] = marker
    return x.flatten(1, 2)  # (B,49,D)


class Probe(nn.Module):
    """A connector and two linear probes: what, from the mean of its tokens; where, from their
    row."""

    def __init__(self, join, n, width):
        super().__init__()
        self.join = join
        self.what = nn.Linear(width, 14)
        self.where = nn.Linear(tokens(join, n) * width, len(PLACES))

    def forward(self, x):
        x = self.join(x)  # (B,N,D) -> (B,M,E)
        return self.what(x.mean(1)), self.where(x.flatten(1))  # (B,14), (B,9)


def train(probe, maps, kinds, marker, cfg, on):
    """The loop; yields the loss of both probes."""
    optimizer = torch.optim.AdamW(probe.parameters(), cfg.lr, weight_decay=0.01)
    for step in range(cfg.steps):
        # learning rate of this step: warm-up, then constant, then a line to zero in the second half
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, (step + 1) / 10, 2 * (cfg.steps - step) / cfg.steps)
        # a batch of photos, a marker somewhere in each
        pick = torch.randint(len(maps), (cfg.batch,))
        places = torch.randint(len(PLACES), (cfg.batch,))
        x = insert_marker(maps[pick], places, marker).float().to(on)
        # forward pass and loss, matrix products in bf16
        with run.autocast(on):
            what, where = probe(x)
            loss = F.cross_entropy(what, kinds[pick].to(on)) + F.cross_entropy(where, places.to(on))
        # backward pass
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def accuracy(logits, truth):
    """Fraction of logits (B,C) whose largest is the truth (B,)."""
    return float((logits.argmax(-1).cpu() == truth).float().mean())


@torch.no_grad()
def score(probe, maps, kinds, marker, on):
    """Accuracies on held-out photos: {"what": of 14, "where": of 9}."""
    random = torch.Generator().manual_seed(0)
    places = torch.randint(len(PLACES), (len(maps),), generator=random)
    what, where = probe.eval()(insert_marker(maps, places, marker).float().to(on))
    return {"what": accuracy(what, kinds), "where": accuracy(where, places)}


def attribution_map(join, x):
    """Where each token that comes out comes from: (M,g,g). A resampler's attention map; of others
    the gradient norm."""
    side = grid(x).shape[1:3]
    if isinstance(join, PerceiverResampler):
        return join.attention_map(x)[0].unflatten(1, side)
    x = x.clone().requires_grad_()
    maps = []
    for token in join(x)[0]:
        (gradient,) = torch.autograd.grad(token.square().sum(), x, retain_graph=True)  # (1,N,D)
        maps.append(gradient[0].norm(dim=-1))
    return torch.stack(maps).unflatten(1, side)


def draw(path, photo, maps, joins):
    """A photo, and for each connector where its tokens come from: each token a colour, blended by
    how much it looks."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(joins) + 1, figsize=(1.55 * (len(joins) + 1), 2))
    axes[0].imshow(photo.permute(1, 2, 0))
    axes[0].set_title("photo", fontsize=8)
    for ax, (name, join) in zip(axes[1:], joins.items()):
        # where each token comes from: weights that add up to one
        weight = attribution_map(join, maps[None].float())
        weight = weight / weight.sum((1, 2), keepdim=True).clamp(min=1e-9)
        # a colour for each token, in a random order
        spectrum = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(weight)))
        order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(3))
        colours = torch.tensor(spectrum[:, :3]).float()[order]
        # blended by the fraction of each place
        fraction = weight / weight.sum(0).clamp(min=1e-9)
        picture = torch.einsum("mhw,mc->hwc", fraction, colours).clamp(0, 1)
        extent = (0, photo.shape[2], photo.shape[1], 0)
        ax.imshow(photo.permute(1, 2, 0))
        ax.imshow(picture, alpha=0.65, extent=extent, interpolation="nearest")
        ax.set_title(f"{name}\n{len(weight)} tokens", fontsize=8)
    for ax in axes:
        ax.axis("off")
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Cost and worth of each connector: parameters, tokens, time, what and where."""
    check(
        min(cfg.steps, cfg.batch, cfg.width, cfg.judged) > 0 and cfg.lr > 0,
        "all numbers must be above 0",
    )
    check(cfg.names, "--names needs one at least")
    # connectors, all of one seed
    joins = {}
    run.seed(cfg.seed)
    for name in cfg.names:
        joins[name] = build(name, 1280, cfg.width, cfg.sparsity_plugins)
    on = run.device(cfg.device)
    folder = run.output(cfg.out, cfg)
    # vision features of the photos to learn from and of the held-out ones
    fruit = data.groceries(224)
    vision_tower = tower.load("efficientnet", on=on)
    learn, unseen = fruit_photos.split(fruit, cfg.judged)
    maps = tower.vision_features(vision_tower, fruit.images[learn])
    others = tower.vision_features(vision_tower, fruit.images[unseen])
    marker = grid(maps[:1])[0, 3:5, 3:5]  # the middle of one photo
    metrics = {}
    for name, join in joins.items():
        # train a connector with its two probes
        run.seed(cfg.seed)
        probe = Probe(join, maps.shape[1], cfg.width).to(on)
        clock = time.process_time()
        for _ in run.progress(train(probe, maps, fruit.fine[learn], marker, cfg, on), cfg.steps):
            pass
        seconds = (time.process_time() - clock) / cfg.steps
        # cost, and accuracies on held-out photos
        size = sum(p.numel() for p in join.parameters())
        row = {"parameters": size, "tokens": tokens(join, maps.shape[1]), "seconds a step": seconds}
        metrics[name] = row | score(probe, others, fruit.fine[unseen], marker, on)
    draw(folder / "connector.png", fruit.images[unseen[5]], others[5].to(on), joins)
    return run.report(folder, metrics, "python vlm/llava.py")


if __name__ == "__main__":
    run.cli(main, Config)
