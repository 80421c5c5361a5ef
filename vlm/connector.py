"""Connectors (projectors, resamplers): vision features become token embeddings of a language model.

Linear projection (LLaVA, Liu et al. 2023, arXiv:2304.08485), or an MLP (1.5, arXiv:2310.03744): as
many tokens out as in. Fewer, because every token costs: neighbours concatenated into one (pixel
unshuffle; MiniGPT-v2, Chen et al. 2023, arXiv:2310.09478; by squares as in Qwen2-VL,
arXiv:2409.12191), average pooling, bilinear samples, or the perceiver resampler (perceiver.py), of
a picture or of all its tiles at once (tile_resampler.py).
Before any of them, plug-ins may keep fewer vision features (token_sparsity.py); behind it, fewer
image tokens by the prompt (prompt_sparsity.py).

Shapes: (B,N,D) from the vision tower, N = g x g, row by row -> (B,M,E) for the language model, E
its hidden size.
What differs: squares that do not fill the grid are filled up with zeros.

    python vlm/connector_probe.py              # what each costs, and what it lets through
"""

import re
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import nn

from utils.run import UserError, check
from vlm import prompt_sparsity
from vlm.perceiver import PerceiverResampler
from vlm.tile_resampler import TileResampler
from vlm.token_sparsity import PLUGINS, TokenSparsity, grid


def mlp(depth, dim_in, dim_out):
    """mlp2x_gelu and the like: `depth` matrices, GELU between them. LLaVA-1.5, Sec. 3.3."""
    # from the width of the vision encoder to that of the language model; all further matrices are square
    layers = [nn.Linear(dim_in, dim_out)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(dim_out, dim_out)]
    return nn.Sequential(*layers)


class Concat(nn.Module):
    """Squares of s x s neighbours become one token, their features side by side, row by row; then
    an MLP."""

    def __init__(self, side, dim_in, dim_out):
        super().__init__()
        self.side = side
        self.mlp = mlp(2, side * side * dim_in, dim_out)

    def count(self, n):
        return (-(-round(n**0.5) // self.side)) ** 2

    def join(self, x):
        # tokens back on their grid
        x = grid(x)
        rest = -x.shape[1] % self.side  # a grid of 7 is filled up to 8
        x = F.pad(x, (0, 0, 0, rest, 0, rest))
        # features of a square side by side: R times as wide, R times fewer tokens
        return rearrange(x, "b (h p) (w q) d -> b (h w) (p q d)", p=self.side, q=self.side)

    def forward(self, x):
        return self.mlp(self.join(x))


class Pool(nn.Module):
    """S x S tokens: means over areas, or bilinear samples between the four nearest; then an MLP."""

    def __init__(self, side, dim_in, dim_out, how):
        super().__init__()
        self.side = side
        self.how = how
        self.mlp = mlp(2, dim_in, dim_out)

    def count(self, n):
        return self.side**2

    def shrink(self, x):
        return PLUGINS[self.how](x, self.side)

    def forward(self, x):
        return self.mlp(self.shrink(x))


class SparseConnector(nn.Module):
    """Token sparsification, then a connector: (B,N,D) -> (B,M,E)."""

    def __init__(self, sparsity, connector):
        super().__init__()
        self.sparsity = sparsity
        self.connector = connector

    def count(self, n):
        return tokens(self.connector, self.sparsity.count(n))

    def forward(self, x):
        return self.connector(self.sparsity(x))


class PromptConnector(nn.Module):
    """A connector, and the choice among its tokens, which is made where they are merged into a text
    (prompt_sparsity.choose): (B,N,D) -> (B,M,E), and K of M stay."""

    def __init__(self, connector, by_prompt):
        super().__init__()
        self.connector = connector
        self.by_prompt = by_prompt

    def count(self, n):
        return self.by_prompt.count(tokens(self.connector, n))

    def forward(self, x):
        return self.connector(x)


def build(name, dim_in, dim_out, sparsity_plugins=(), **options):
    """A connector by its name, behind plug-ins by theirs: (B,N,dim_in) -> (B,M,dim_out).

    Raises UserError for a name that there is not, and for a connector that needs a grid of tokens
    behind a plug-in that leaves none.
    """
    sparsity_plugins, (coarse, keep) = prompt_sparsity.split(sparsity_plugins)
    if keep:
        connector = build(name, dim_in, dim_out, sparsity_plugins, **options)
        check(not joins_tiles(connector), f"{name} has few tokens already: leave out prompt{keep}")
        needs = coarse and not has_places(connector)
        check(not needs, f"coarse{coarse} needs a grid of tokens, and {name} leaves none")
        by_prompt = prompt_sparsity.PromptSparsity(keep, dim_out, coarse)
        return PromptConnector(connector, by_prompt)
    # the connector behind the plug-ins
    connector = by_name(name, dim_in, dim_out, **options)
    if not sparsity_plugins:
        return connector
    # neighbours need places: a plug-in that keeps a subset has none left
    tiled = joins_tiles(connector)
    check(not tiled, f"{name} reads all features of all tiles: leave out --sparsity_plugins")
    sparsity = TokenSparsity(sparsity_plugins)
    needs_grid = isinstance(connector, (Concat, Pool))
    last = sparsity_plugins[-1]
    check(
        sparsity.leaves_grid or not needs_grid,
        f"{name} needs a grid of tokens, and the sparsity plug-in {last} leaves none",
    )
    return SparseConnector(sparsity, connector)


def by_name(name, dim_in, dim_out, **options):
    """A connector by its name, without plug-ins."""
    # a word, or a word with its number
    known = r"(linear|identity|perceiver|tile_perceiver)|(mlp)([1-9]\d*)x_gelu|(concat|pool|bilinear)([1-9]\d*)"
    found = re.fullmatch(known, name)
    # its kind and its number: pool3 -> pool, 3
    kind, number = [g for g in (*found.groups(), "") if g is not None][:2] if found else ("", "")
    if kind == "linear":
        return nn.Linear(dim_in, dim_out)  # LLaVA, Eq. 1
    if kind == "mlp":
        return mlp(int(number), dim_in, dim_out)
    if kind == "identity":
        check(
            dim_in == dim_out,
            f"identity: the vision encoder has {dim_in} numbers a token, the language model {dim_out}",
        )
        return nn.Identity()
    if kind == "concat":
        # MiniGPT-v2: R neighbours are a square of side R^0.5
        side = round(int(number) ** 0.5)
        check(
            side * side == int(number),
            f"{name}: neighbours are joined in squares: concat4, concat9 ...",
        )
        return Concat(side, dim_in, dim_out)
    # S x S tokens, whatever the grid was
    if kind in ("pool", "bilinear"):
        return Pool(int(number), dim_in, dim_out, kind)
    # Flamingo: as many tokens as there are latents
    if kind == "perceiver":
        return PerceiverResampler(dim_in, dim_out, **options)
    # over all tiles of a picture
    if kind == "tile_perceiver":
        return TileResampler(dim_in, dim_out, **options)
    names = "linear, mlp2x_gelu, mlpNx_gelu, identity, concatR, poolS, bilinearS, perceiver, tile_perceiver"
    raise UserError(
        f"there is no connector '{name}'; known are {names}, with numbers for N, R and S"
    )


def tokens(connector: Any, n):
    """How many tokens come out of n."""
    return connector.count(n) if hasattr(connector, "count") else n


def joins_tiles(connector: Any):
    """Whether it reads all tiles of a picture at once, and so gives as many tokens of any picture."""
    return isinstance(connector, TileResampler)


def has_places(connector: Any):
    """Whether tokens stand for places of the image, row by row: not latents, not a subset."""
    if isinstance(connector, PromptConnector):
        return False
    if isinstance(connector, SparseConnector):
        return connector.sparsity.leaves_grid and has_places(connector.connector)
    return not isinstance(connector, PerceiverResampler)
