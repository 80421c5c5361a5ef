"""Token sparsification: plug-ins that keep fewer vision features, before the connector.

Each plug-in is a function (B,N,D) -> (B,M,D) with a row in PLUGINS, and is asked for by name and
number: "pool7", "bilinear7", "topk_norm64", "random64". Several are applied in the order given.
"random" is PatchDropout (Liu et al. 2022, arXiv:2208.07220; in CLIP's training: Li et al. 2022,
arXiv:2212.00794).

Shapes: B pictures, N vision features of width D row by row, M of them kept or made.
What differs from PatchDropout: evaluation also has M tokens, evenly spaced, because the text has M
places <image> for each picture in training and in evaluation alike.
"""

import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from utils.run import check
from utils.text import printable


def grid(x):
    """Tokens row by row -> (B,g,g,D). Raises UserError if they are not a square."""
    # in torch.jit.trace a size is a tensor, which round() does not take
    g = round(int(x.shape[1]) ** 0.5)
    check(g * g == x.shape[1], f"{x.shape[1]} tokens are no square grid: this connector needs one")
    return rearrange(x, "b (h w) d -> b h w d", h=g)


def pool(x, side, training=False):
    """Means over side x side areas of the grid, which overlap where they must: (B,side^2,D)."""
    x = rearrange(grid(x), "b h w d -> b d h w")
    # areas of one size where the grid divides, overlapping ones where not
    x = F.adaptive_avg_pool2d(x, side)
    return rearrange(x, "b d h w -> b (h w) d")


def bilinear(x, side, training=False):
    """side x side samples between the four nearest tokens each: (B,side^2,D)."""
    x = rearrange(grid(x), "b h w d -> b d h w")
    x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
    return rearrange(x, "b d h w -> b (h w) d")


def topk_norm(x, keep, training=False):
    """The tokens of largest Euclidean norm, in the order in which they stood: (B,keep,D)."""
    # the longest vectors, put back in the order of their places
    chosen = x.norm(dim=-1).topk(keep, dim=1).indices  # (B,keep)
    return take(x, chosen.sort(dim=1).values)


def random_subset(x, keep, training=False):
    """In training another random subset for every picture, else evenly spaced tokens, the same each
    time; in the order in which they stood: (B,keep,D)."""
    b, n, _ = x.shape
    if training:
        # the first of a random permutation: without replacement
        chosen = torch.rand(b, n, device=x.device).argsort(dim=1)[:, :keep]
        return take(x, chosen.sort(dim=1).values)
    # the middle of each of `keep` equal stretches
    places = (2 * torch.arange(keep, device=x.device) + 1) * n // (2 * keep)
    return x[:, places]


def take(x, chosen):
    """Tokens (B,N,D) at the places chosen (B,M) -> (B,M,D)."""
    return x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))


PLUGINS = {"pool": pool, "bilinear": bilinear, "topk_norm": topk_norm, "random": random_subset}
# Their number is the side of a grid; they need a grid and leave one
ON_GRIDS = ("pool", "bilinear")


def parse(name):
    """A name and its number: topk_norm64 -> topk_norm, 64. Raises UserError for a plug-in that
    there is not."""
    found = re.fullmatch(r"([a-z_]+)([1-9]\d*)", name)
    kind, number = found.groups() if found else ("", "0")
    known = ", ".join(f"{kind}<number>" for kind in PLUGINS)
    nowhere = f"there is no sparsity plug-in '{printable(name)}'; known are {known}"
    check(kind in PLUGINS, nowhere)
    return kind, int(number)


class TokenSparsity(nn.Module):
    """Plug-ins by their names, one after the other: (B,N,D) -> (B,M,D). It has no weights.

    Raises UserError for an unknown name, and for one that needs a grid behind one that leaves none.
    """

    def __init__(self, names):
        super().__init__()
        self.plugins = [parse(name) for name in names]
        # a subset has no grid: what needs one must come before it
        self.leaves_grid = True
        for kind, number in self.plugins:
            broken = f"{kind}{number} needs a grid of tokens, and the plug-in before it leaves none"
            check(self.leaves_grid or kind not in ON_GRIDS, broken)
            self.leaves_grid = kind in ON_GRIDS

    def count(self, n):
        """How many tokens come out of n. Raises UserError if a plug-in would have to add some."""
        for kind, number in self.plugins:
            # the number of a plug-in is the side of a grid, or a number of tokens
            left = number**2 if kind in ON_GRIDS else number
            check(left <= n, f"sparsity plug-in {kind}{number} keeps {left} tokens, there are {n}")
            n = left
        return n

    def forward(self, x):
        self.count(x.shape[1])
        for kind, number in self.plugins:
            x = PLUGINS[kind](x, number, self.training)
        return x
