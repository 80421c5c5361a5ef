"""Perceiver resampler: a few learned latents query all of the image by cross-attention.

Flamingo: Alayrac et al. 2022, arXiv:2204.14198, Sec. 2.1; with RMSNorm and SwiGLU as in Idefics2:
Laurencon et al. 2024, arXiv:2405.02246. A width of its own and a projection to the language model
behind it, as the Q-Former has: BLIP-2, Li et al. 2023, arXiv:2301.12597, Sec. 3.

Shapes: (B,N,D) from the vision tower, M latents (B,M,H), (B,M,E) for the language model; H is the
resampler's width, by default E.
What differs: no embedding of time.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from utils.run import check


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
    """Cross-attention from latents (B,M,H) to image tokens (B,N,H), then a feed-forward network ->
    latents (B,M,H)."""

    def __init__(
        self,
        width,
        heads,
        kv_heads,
        head_dim,
        concat_latents_kv,
        mlp_ratio,
        use_rmsnorm_swiglu,
        attention_dropout=0.0,
    ):
        super().__init__()
        check(heads % kv_heads == 0, f"{heads} heads cannot share {kv_heads} keys evenly")
        self.heads = heads
        self.kv_heads = kv_heads
        self.concat_latents_kv = concat_latents_kv
        self.attention_dropout = attention_dropout
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

    def attention_weights(self, latents, context, mask=None):
        """Cross-attention weights (B,heads,M,N), with N + M keys if concat_latents_kv, and values
        (B,heads,N,head_dim).

        The weights of a latent add up to one. mask: bool (B,N), the image tokens to look at.
        """
        latents = self.norm_latents(latents)  # (B,M,H)
        context = self.norm_context(context)  # (B,N,H)
        # keys and values: the image tokens, and the latents too. Flamingo, Fig. 5
        # (B,N+M,H) or (B,N,H)
        kv_input = torch.cat([context, latents], dim=1) if self.concat_latents_kv else context
        q = rearrange(self.q_proj(latents), "b m (h d) -> b h m d", h=self.heads)
        k = rearrange(self.k_proj(kv_input), "b n (h d) -> b h n d", h=self.kv_heads)
        v = rearrange(self.v_proj(kv_input), "b n (h d) -> b h n d", h=self.kv_heads)
        # grouped-query attention: each key and value serves a group of query heads
        group = self.heads // self.kv_heads
        k = k.repeat_interleave(group, dim=1)  # (B,heads,N,head_dim)
        v = v.repeat_interleave(group, dim=1)  # (B,heads,N,head_dim)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # (B,heads,M,N)
        if mask is not None:
            # latents among the keys are always seen
            mask = F.pad(mask, (0, scores.shape[-1] - mask.shape[1]), value=True)
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        return scores.softmax(-1), v

    def forward(self, latents, context, mask=None):
        # cross-attention: latents are the queries, image tokens the keys and values
        # (B,heads,M,N), (B,heads,N,head_dim)
        weights, v = self.attention_weights(latents, context, mask)
        # while training, some of the weights are dropped and the others grow as much
        weights = F.dropout(weights, self.attention_dropout, self.training)
        attended = rearrange(weights @ v, "b h m d -> b m (h d)")
        latents = latents + self.o_proj(attended)  # (B,M,H)
        # feed-forward network, on each latent by itself
        return latents + self.mlp(self.norm_mlp(latents))  # (B,M,H)


class PerceiverResampler(nn.Module):
    """Perceiver resampler: M learned latents query the image by cross-attention, again in every
    layer.

    Any number N of image tokens becomes M. Flamingo, Sec. 2.1. kv_heads: keys and values that
    groups of heads share; concat_latents_kv: the latents are among keys and values;
    use_rmsnorm_swiglu: RMSNorm and SwiGLU (Idefics2), else LayerNorm and ReLU as in Idefics, its
    counterpart in transformers; the paper has squared ReLU here too (appendix). hidden_size: H, the
    width of latents and layers; None: that of the language model, E. attention_dropout: probability
    that an attention weight is dropped while training. Raises UserError for a width or a
    probability that makes no sense.
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
        hidden_size=None,
        attention_dropout=0.0,
    ):
        super().__init__()
        width = dim_out if hidden_size is None else hidden_size
        check(width > 0, f"perceiver: hidden_size must be above 0, not {width}")
        fine = 0 <= attention_dropout < 1
        check(
            fine, f"perceiver: attention_dropout is at least 0 and below 1, not {attention_dropout}"
        )
        # image tokens to the width of the latents, which are the learned queries
        self.input_proj = nn.Linear(dim_in, width) if dim_in != width else nn.Identity()
        self.latents = nn.Parameter(torch.randn(latents, width))
        # layers, each of which asks the image again
        sizes = (width, heads, kv_heads, head_dim)
        kind = (concat_latents_kv, mlp_ratio, use_rmsnorm_swiglu, attention_dropout)
        self.layers = nn.ModuleList(PerceiverLayer(*sizes, *kind) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6) if use_rmsnorm_swiglu else nn.LayerNorm(width)
        # drawn last, so that all before it is drawn as without it
        self.output_proj = nn.Linear(width, dim_out) if width != dim_out else nn.Identity()
        self.register_load_state_dict_pre_hook(rename_old_parameters)

    def count(self, n):
        return len(self.latents)

    def forward(self, x):
        return self.resample(self.input_proj(x))  # (B,N,D) -> (B,N,H) -> (B,M,E)

    def resample(self, context, mask=None):
        """Keys (B,N,H) -> (B,M,E). mask: bool (B,N), those to look at; None: all."""
        # the same latents for every picture
        latents = self.latents.expand(len(context), -1, -1)  # (M,H) -> (B,M,H)
        for layer in self.layers:
            latents = layer(latents, context, mask)  # (B,M,H)
        return self.output_proj(self.norm(latents))  # (B,M,H) -> (B,M,E)

    @torch.no_grad()
    def attention_map(self, x):
        """Cross-attention weights of each latent over the image tokens, last layer, mean over
        heads: (B,M,N)."""
        context = self.input_proj(x)  # (B,N,H)
        latents = self.latents.expand(len(x), -1, -1)  # (B,M,E)
        # all layers but the last as usual, of the last the weights alone
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
