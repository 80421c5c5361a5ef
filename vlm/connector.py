"""Connectors (projectors, resamplers): vision features become token embeddings of a language model.

Linear projection (LLaVA, Liu et al. 2023, arXiv:2304.08485), or an MLP (1.5, arXiv:2310.03744): as
many tokens out as in. Fewer, because every token costs: neighbours concatenated into one (pixel
unshuffle; MiniGPT-v2, Chen et al. 2023, arXiv:2310.09478; by squares as in Qwen2-VL,
arXiv:2409.12191), average pooling, bilinear samples, or the perceiver resampler, a few learned
latents that query all of the image by cross-attention (Flamingo, Alayrac et al. 2022,
arXiv:2204.14198, Sec. 2.1; Idefics2: Laurencon et al. 2024, arXiv:2405.02246).

Shapes: (B,N,D) from the vision tower, N = g x g, row by row -> (B,M,E) for the language model, E
its hidden size.
What differs: squares that do not fill the grid are filled up with zeros; the resampler has no
embedding of time.

    python vlm/connector_probe.py              # what each costs, and what it lets through
"""

import re
from functools import partial
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
    """Squares of s x s neighbours become one token, their features side by side, row by row; then
    an MLP."""

    def __init__(self, side, dim_in, dim_out):
        super().__init__()
        self.side = side
        self.mlp = mlp(2, side * side * dim_in, dim_out)

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
        self.side = side
        self.how = how
        self.mlp = mlp(2, dim_in, dim_out)

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


class SwiGLU(nn.Module):
    """Gated feed-forward network: down(silu(gate x) * up x). Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, width, mlp_ratio):
        super().__init__()
        self.gate_proj = nn.Linear(width, mlp_ratio * width, bias=False)
        self.up_proj = nn.Linear(width, mlp_ratio * width, bias=False)
        self.down_proj = nn.Linear(mlp_ratio * width, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PerceiverLayer(nn.Module):
    """Cross-attention from latents (B,M,E) to image tokens (B,N,E), then a feed-forward network ->
    latents (B,M,E)."""

    def __init__(
        self, width, heads, kv_heads, head_dim, concat_latents_kv, mlp_ratio, use_rmsnorm_swiglu
    ):
        super().__init__()
        check(heads % kv_heads == 0, f"{heads} heads cannot share {kv_heads} keys evenly")
        self.heads = heads
        self.kv_heads = kv_heads
        self.concat_latents_kv = concat_latents_kv
        # Idefics2, or Flamingo
        norm = partial(nn.RMSNorm, eps=1e-6) if use_rmsnorm_swiglu else nn.LayerNorm
        self.norm_latents = norm(width)
        self.norm_context = norm(width)
        self.norm_mlp = norm(width)
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        # made in both cases, so that the same seed draws the same weights for all that follows
        relu_mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width, bias=False),
            nn.ReLU(),
            nn.Linear(mlp_ratio * width, width, bias=False),
        )
        self.mlp = SwiGLU(width, mlp_ratio) if use_rmsnorm_swiglu else relu_mlp

    def attention_weights(self, latents, context):
        """Cross-attention weights (B,heads,M,N), with N + M keys if concat_latents_kv, and values
        (B,heads,N,head_dim).

        The weights of a latent add up to one.
        """
        latents = self.norm_latents(latents)  # (B,M,E)
        context = self.norm_context(context)  # (B,N,E)
        # keys and values: the image tokens, and the latents too. Flamingo, Fig. 5
        # (B,N+M,E) or (B,N,E)
        kv_input = torch.cat([context, latents], dim=1) if self.concat_latents_kv else context
        q = rearrange(self.q_proj(latents), "b m (h d) -> b h m d", h=self.heads)
        k = rearrange(self.k_proj(kv_input), "b n (h d) -> b h n d", h=self.kv_heads)
        v = rearrange(self.v_proj(kv_input), "b n (h d) -> b h n d", h=self.kv_heads)
        # grouped-query attention: each key and value serves a group of query heads
        group = self.heads // self.kv_heads
        k = k.repeat_interleave(group, dim=1)  # (B,heads,N,head_dim)
        v = v.repeat_interleave(group, dim=1)  # (B,heads,N,head_dim)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # (B,heads,M,N)
        return scores.softmax(-1), v

    def forward(self, latents, context):
        # cross-attention: latents are the queries, image tokens the keys and values
        weights, v = self.attention_weights(latents, context)  # (B,heads,M,N), (B,heads,N,head_dim)
        attended = rearrange(weights @ v, "b h m d -> b m (h d)")
        latents = latents + self.o_proj(attended)  # (B,M,E)
        # feed-forward network, on each latent by itself
        return latents + self.mlp(self.norm_mlp(latents))  # (B,M,E)


class PerceiverResampler(nn.Module):
    """Perceiver resampler: M learned latents query the image by cross-attention, again in every
    layer.

    Any number N of image tokens becomes M. Flamingo, Sec. 2.1. kv_heads: keys and values that
    groups of heads share; concat_latents_kv: the latents are among keys and values;
    use_rmsnorm_swiglu: RMSNorm and SwiGLU (Idefics2), else LayerNorm and ReLU as in Idefics, its
    counterpart in transformers; the paper has squared ReLU here too (appendix).
    """

    def __init__(
        self,
        dim_in,
        dim_out,
        depth=2,
        latents=16,
        heads=8,
        kv_heads=8,
        head_dim=32,
        concat_latents_kv=True,
        mlp_ratio=2,
        use_rmsnorm_swiglu=True,
    ):
        super().__init__()
        self.input_proj = nn.Linear(dim_in, dim_out) if dim_in != dim_out else nn.Identity()
        self.latents = nn.Parameter(torch.randn(latents, dim_out))
        sizes = (dim_out, heads, kv_heads, head_dim)
        self.layers = nn.ModuleList(
            PerceiverLayer(*sizes, concat_latents_kv, mlp_ratio, use_rmsnorm_swiglu)
            for _ in range(depth)
        )
        self.norm = nn.RMSNorm(dim_out, eps=1e-6) if use_rmsnorm_swiglu else nn.LayerNorm(dim_out)
        self.register_load_state_dict_pre_hook(rename_old_parameters)

    def count(self, n):
        return len(self.latents)

    def forward(self, x):
        context = self.input_proj(x)  # (B,N,dim_in) -> (B,N,E)
        latents = self.latents.expand(len(x), -1, -1)  # (M,E) -> (B,M,E)
        for layer in self.layers:
            latents = layer(latents, context)  # (B,M,E)
        return self.norm(latents)  # (B,M,E)

    @torch.no_grad()
    def attention_map(self, x):
        """Cross-attention weights of each latent over the image tokens, last layer, mean over
        heads: (B,M,N)."""
        context = self.input_proj(x)  # (B,N,E)
        latents = self.latents.expand(len(x), -1, -1)  # (B,M,E)
        for layer in self.layers[:-1]:
            latents = layer(latents, context)
        last: Any = self.layers[-1]
        weights, _ = last.attention_weights(latents, context)  # (B,heads,M,N), or N + M keys
        return weights.mean(1)[..., : x.shape[1]]  # (B,M,N)


def rename_old_parameters(resampler, state_dict, prefix, *_):
    """Weights that were saved when `input_proj` was called `inlet` still load: renames their keys,
    in place."""
    for leaf in ("weight", "bias"):
        old_key = f"{prefix}inlet.{leaf}"
        if old_key in state_dict:
            state_dict[f"{prefix}input_proj.{leaf}"] = state_dict.pop(old_key)


def build(name, dim_in, dim_out, **options):
    """A connector by its name: (B,N,dim_in) -> (B,M,dim_out). Raises UserError for a name that
    there is not."""
    known = r"(linear|identity|perceiver)|(mlp)([1-9]\d*)x_gelu|(concat|pool|bilinear)([1-9]\d*)"
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
        side = round(int(number) ** 0.5)
        check(
            side * side == int(number),
            f"{name}: neighbours are joined in squares: concat4, concat9 ...",
        )
        return Concat(side, dim_in, dim_out)
    if kind in ("pool", "bilinear"):
        return Pool(int(number), dim_in, dim_out, kind)
    if kind == "perceiver":
        return PerceiverResampler(dim_in, dim_out, **options)
    names = "linear, mlp2x_gelu, mlpNx_gelu, identity, concatR, poolS, bilinearS, perceiver"
    raise UserError(
        f"there is no connector '{name}'; known are {names}, with numbers for N, R and S"
    )


def tokens(connector: Any, n):
    """How many tokens come out of n."""
    return connector.count(n) if hasattr(connector, "count") else n
