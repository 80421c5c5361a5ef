"""Connectors: how what an eye says becomes words that a language model can read.

One matrix (LLaVA, Liu et al. 2023, arXiv:2304.08485), or two with a bend between them (1.5, arXiv:2310.03744): as many
tokens out as in. Fewer, because every token costs: neighbours joined into one (MiniGPT-v2, Chen et al. 2023,
arXiv:2310.09478; by squares as in Qwen2-VL, arXiv:2409.12191), means over areas, bilinear samples, or a few learned
questions that look at all of it (the perceiver resampler: Alayrac et al. 2022, arXiv:2204.14198, Sec. 2.1; Idefics2:
Laurencon et al. 2024, arXiv:2405.02246).

Shapes: (B,N,D) from the eye, N = g x g, row by row -> (B,M,E) for the language model, E the size of its words.
What differs: squares that do not fill the grid are filled up with zeros; the resampler has no embedding of time.

    python vlm/connector_probe.py              # what each costs, and what it lets through
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from utils.run import UserError, check


def mlp(depth, dim_in, dim_out):
    """mlp2x_gelu and the like: `depth` matrices, GELU between them. LLaVA-1.5, Sec. 3.3."""
    layers = [nn.Linear(dim_in, dim_out)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(dim_out, dim_out)]
    return nn.Sequential(*layers)


def grid(x):
    """Tokens row by row -> (B,g,g,D). Raises UserError if they are not a square."""
    g = round(x.shape[1] ** 0.5)
    check(g * g == x.shape[1], f"{x.shape[1]} tokens are no square grid: this connector needs one")
    return rearrange(x, "b (h w) d -> b h w d", h=g)


class Concat(nn.Module):
    """Squares of s x s neighbours become one token, their features side by side, row by row; then an MLP."""

    def __init__(self, side, dim_in, dim_out):
        super().__init__()
        self.side, self.mlp = side, mlp(2, side * side * dim_in, dim_out)

    def count(self, n):
        return (-(-round(n**0.5) // self.side)) ** 2

    def join(self, x):
        x = grid(x)
        rest = -x.shape[1] % self.side  # a grid of 7 is filled up to 8
        x = F.pad(x, (0, 0, 0, rest, 0, rest))
        return rearrange(x, "b (h p) (w q) d -> b (h w) (p q d)", p=self.side, q=self.side)

    def forward(self, x):
        return self.mlp(self.join(x))


class Pool(nn.Module):
    """S x S tokens: means over areas, or bilinear samples between the four nearest; then an MLP."""

    def __init__(self, side, dim_in, dim_out, how):
        super().__init__()
        self.side, self.how, self.mlp = side, how, mlp(2, dim_in, dim_out)

    def count(self, n):
        return self.side**2

    def shrink(self, x):
        x = rearrange(grid(x), "b h w d -> b d h w")
        if self.how == "pool":
            x = F.adaptive_avg_pool2d(x, self.side)
        else:
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False)
        return rearrange(x, "b d h w -> b (h w) d")

    def forward(self, x):
        return self.mlp(self.shrink(x))


class Gated(nn.Module):
    """Feed-forward with a gate, SwiGLU: down(silu(gate x) * up x). Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, width, widen):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, widen * width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(widen * width, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PerceiverLayer(nn.Module):
    """Latents (B,M,E) look at the picture (B,N,E), and at themselves if `joined`; then each thinks alone."""

    def __init__(self, width, heads, kv_heads, head_dim, joined, widen, modern):
        super().__init__()
        check(heads % kv_heads == 0, f"{heads} heads cannot share {kv_heads} keys evenly")
        self.heads, self.kv_heads, self.joined = heads, kv_heads, joined
        norm = nn.RMSNorm if modern else nn.LayerNorm  # Idefics2, or Flamingo
        self.norm_latents, self.norm_context, self.norm_mlp = (
            norm(width, eps=1e-6 if modern else 1e-5) for _ in range(3)
        )
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, kv_heads * head_dim, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        plain = (nn.Linear(width, widen * width, bias=False), nn.ReLU(), nn.Linear(widen * width, width, bias=False))
        self.mlp = Gated(width, widen) if modern else nn.Sequential(*plain)

    def weights(self, latents, context):
        """Who looks where: (B,heads,M,N), or N + M keys if joined; rows add up to one. And the values."""
        latents, context = self.norm_latents(latents), self.norm_context(context)
        keys = torch.cat([context, latents], 1) if self.joined else context  # Flamingo, Fig. 5
        q = rearrange(self.q_proj(latents), "b n (h d) -> b h n d", h=self.heads)
        k, v = (rearrange(m(keys), "b n (h d) -> b h n d", h=self.kv_heads) for m in (self.k_proj, self.v_proj))
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))  # grouped queries
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1), v

    def forward(self, latents, context):
        look, v = self.weights(latents, context)
        latents = latents + self.o_proj(rearrange(look @ v, "b h n d -> b n (h d)"))
        return latents + self.mlp(self.norm_mlp(latents))


class Perceiver(nn.Module):
    """M learned latents ask the picture, again in every layer: any number of tokens becomes M. Flamingo, Sec. 2.1.

    kv_heads: keys and values that groups of heads share; joined: latents are among the keys; modern: RMSNorm and a
    gated feed-forward (Idefics2), else LayerNorm and ReLU as in Idefics, its counterpart in transformers; the paper has
    squared ReLU here too (its appendix, hyper-parameters).
    """

    def __init__(
        self, dim_in, dim_out, depth=2, latents=16, heads=8, kv_heads=8, head_dim=32, joined=True, widen=2, modern=True
    ):  # fmt: skip
        super().__init__()
        self.inlet = nn.Linear(dim_in, dim_out) if dim_in != dim_out else nn.Identity()
        self.latents = nn.Parameter(torch.randn(latents, dim_out))
        about = (dim_out, heads, kv_heads, head_dim, joined, widen, modern)
        self.layers = nn.ModuleList([PerceiverLayer(*about) for _ in range(depth)])
        self.norm = nn.RMSNorm(dim_out, eps=1e-6) if modern else nn.LayerNorm(dim_out)

    def count(self, n):
        return len(self.latents)

    def forward(self, x):
        context = self.inlet(x)
        latents = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(latents, context)
        return self.norm(latents)

    @torch.no_grad()
    def looks(self, x):
        """How much each latent looks at each token of the picture, mean over heads, last layer: (B,M,N)."""
        context, latents = self.inlet(x), self.latents.expand(len(x), -1, -1)
        for layer in self.layers[:-1]:
            latents = layer(latents, context)
        last: Any = self.layers[-1]
        return last.weights(latents, context)[0].mean(1)[..., : x.shape[1]]


def build(name, dim_in, dim_out, **options):
    """A connector by its name: (B,N,dim_in) -> (B,M,dim_out). Raises UserError for a name that there is not."""
    known = r"(linear|identity|perceiver)|(mlp)([1-9]\d*)x_gelu|(concat|pool|bilinear)([1-9]\d*)"
    found = re.fullmatch(known, name)
    kind, number = [g for g in (*found.groups(), "") if g is not None][:2] if found else ("", "")
    if kind == "linear":
        return nn.Linear(dim_in, dim_out)  # LLaVA, Eq. 1
    if kind == "mlp":
        return mlp(int(number), dim_in, dim_out)
    if kind == "identity":
        check(dim_in == dim_out, f"identity: the eye has {dim_in} numbers a token, the language model {dim_out}")
        return nn.Identity()
    if kind == "concat":
        side = round(int(number) ** 0.5)
        check(side * side == int(number), f"{name}: neighbours are joined in squares: concat4, concat9 ...")
        return Concat(side, dim_in, dim_out)
    if kind in ("pool", "bilinear"):
        return Pool(int(number), dim_in, dim_out, kind)
    if kind == "perceiver":
        return Perceiver(dim_in, dim_out, **options)
    names = "linear, mlp2x_gelu, mlpNx_gelu, identity, concatR, poolS, bilinearS, perceiver"
    raise UserError(f"there is no connector '{name}'; known are {names}, with numbers for N, R and S")


def tokens(connector: Any, n):
    """How many tokens come out of n."""
    return connector.count(n) if hasattr(connector, "count") else n
