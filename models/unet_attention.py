"""Attention of the U-Net: self-attention of positions, cross-attention to words. Rombach et al. 2022, arXiv:2112.10752.

At its coarse resolutions the U-Net lets every position read every other one, and every word, if there are any. There
is nothing to run here: `unet.py` imports it, and so do the transformers of `dit.py` and `mmdit.py`.

Shapes: B images, C channels, H x W pixels, N = H*W positions, L words of text, D features of a word.
Modules carry the names of diffusers' Attention and Transformer2DModel: weights move both ways by load_state_dict.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V in heads of `head_dim`: (B, N, C), (B, L, D) -> (B, N, C). Vaswani 2017, Eq. 1."""

    def __init__(self, channels, head_dim=32, context_dim=None, bias=False):
        super().__init__()
        self.heads = max(channels // head_dim, 1)
        self.to_q = nn.Linear(channels, channels, bias)
        self.to_k = nn.Linear(context_dim or channels, channels, bias)
        self.to_v = nn.Linear(context_dim or channels, channels, bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x, context=None, mask=None):
        """Cross-attention to `context`, self-attention without it. mask: (B, L), True where there is a word."""
        context = x if context is None else context
        # queries, keys, values, each cut into heads
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        k = rearrange(self.to_k(context), "b n (h d) -> b h n d", h=self.heads)
        v = rearrange(self.to_v(context), "b n (h d) -> b h n d", h=self.heads)
        # attention weights; padding gets none
        score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            score = score.masked_fill(~mask[:, None, None, :], -torch.inf)
        # weighted sum of the values, heads side by side
        y = score.softmax(dim=-1) @ v
        return self.to_out[0](rearrange(y, "b h n d -> b n (h d)"))


class AttentionBlock(nn.Module):
    """Self-attention of all positions: x + attention(norm(x)). (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels, head_dim=32, groups=8, eps=1e-5):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps)
        attention = Attention(channels, head_dim, bias=True)
        # its parts, without a level in between: diffusers' names
        self.heads = attention.heads
        self.to_q = attention.to_q
        self.to_k = attention.to_k
        self.to_v = attention.to_v
        self.to_out = attention.to_out

    def forward(self, x, context=None, mask=None):
        y = Attention.forward(self, rearrange(self.group_norm(x), "b c h w -> b (h w) c"))
        return x + rearrange(y, "b (h w) c -> b c h w", h=x.shape[2])


class GEGLU(nn.Module):
    """a * gelu(b), where a and b are the halves of one linear map. Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x):
        a, b = self.proj(x).chunk(2, dim=-1)
        return a * F.gelu(b)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to words, feed-forward network. (B, N, C), (B, L, D) -> (B, N, C)."""

    def __init__(self, channels, head_dim, context_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, head_dim)
        self.attn2 = Attention(channels, head_dim, context_dim)
        # in diffusers the identity is a dropout
        widened = GEGLU(channels, 4 * channels)
        net = nn.Sequential(widened, nn.Identity(), nn.Linear(4 * channels, channels))
        self.ff = nn.ModuleDict({"net": net})

    def forward(self, x, context, mask):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff["net"](self.norm3(x))


class CrossAttentionBlock(nn.Module):
    """A transformer block between two 1x1 convolutions: (B, C, H, W), (B, L, D) -> (B, C, H, W). Rombach, Sec. 3.3."""

    def __init__(self, channels, head_dim, context_dim, groups=8):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, head_dim, context_dim)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, context, mask):
        y = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        y = self.transformer_blocks[0](y, context, mask)
        return x + self.proj_out(rearrange(y, "b (h w) c -> b c h w", h=x.shape[2]))


def mean_word(words, mask=None):
    """Mean of the words that are no padding: (B, L, D), (B, L) -> (B, D)."""
    if mask is None:
        return words.mean(1)
    weight = mask[..., None].to(words)
    return (words * weight).sum(1) / weight.sum(1).clamp(min=1)
