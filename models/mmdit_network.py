"""MMDiT, the network of Stable Diffusion 3: image and text as two streams with weights of their own, one attention.

Esser et al. 2024, arXiv:2403.03206, Sec. 4 and Fig. 2. A U-Net (`stable_diffuser.py`) looks at the words, and the words
stay what they were. Here both are tokens of one sequence for attention: the text reads the image, too, and changes
from block to block. Only attention is shared; norms, linear layers and feed-forward networks are doubled. The time step
and the mean of the words steer both streams by adaLN-Zero, as in `dit.py`. `CrossDiT` is the same without a second
stream: self-attention, then cross-attention to the words.

Shapes: B images of C channels, H x W; N = (H/P)(W/P) image tokens, L words of E features, D width.
Modules carry the names of diffusers' SD3Transformer2DModel: weights move both ways by load_state_dict.
Differences from the paper: padding words are masked; one text encoder in place of three.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.dit_network import modulate, position_embedding
from models.unet import TimeEmbedding, timestep_embedding
from models.unet_attention import Attention, mean_word


def norm(x):
    """Layer norm without weights: (B, N, D) -> (B, N, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class AdaLN(nn.Module):
    """Shifts, scales and gates from the condition: (B, D) -> `parts` of (B, 1, D)."""

    def __init__(self, width, parts):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, c):
        return self.linear(F.silu(c))[:, None].chunk(self.parts, dim=-1)


class Proj(nn.Module):
    """A linear layer and GELU, under the name that diffusers has for the first half of a feed-forward network."""

    def __init__(self, width, hidden):
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x):
        return F.gelu(self.proj(x), approximate="tanh")


def feed_forward(width):
    """(B, N, D) -> (B, N, D); in diffusers the identity is a dropout."""
    net = nn.Sequential(Proj(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))
    return nn.ModuleDict({"net": net})


class JointAttention(nn.Module):
    """One attention over image tokens and words, each with projections of its own. Fig. 2b.

    (B, N, D), (B, L, D), mask (B, L) of the words -> (B, N, D), (B, L, D), or None of the last block's words.
    """

    def __init__(self, width, heads, last=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.add_q_proj = nn.Linear(width, width)
        self.add_k_proj = nn.Linear(width, width)
        self.add_v_proj = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = None if last else nn.Linear(width, width)

    def forward(self, x, words, mask=None):
        # queries, keys and values of both, side by side in one sequence, cut into heads
        q = torch.cat([self.to_q(x), self.add_q_proj(words)], dim=1)
        k = torch.cat([self.to_k(x), self.add_k_proj(words)], dim=1)
        v = torch.cat([self.to_v(x), self.add_v_proj(words)], dim=1)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in (q, k, v))
        # attention weights of the whole sequence; nobody attends to padding
        score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            image = mask.new_ones(x.shape[:2])
            there = torch.cat([image, mask], dim=1)
            score = score.masked_fill(~there[:, None, None, :], -torch.inf)
        y = score.softmax(dim=-1) @ v
        # the two streams part again
        y = rearrange(y, "b h n d -> b n (h d)")
        x, words = y.split([x.shape[1], words.shape[1]], dim=1)
        words = None if self.to_add_out is None else self.to_add_out(words)
        return self.to_out[0](x), words


class JointBlock(nn.Module):
    """A block of MMDiT: (B, N, D), (B, L, D), condition (B, D) -> (B, N, D), (B, L, D); the last drops the words."""

    def __init__(self, width, heads, last=False):
        super().__init__()
        self.last = last
        self.norm1 = AdaLN(width, 6)
        self.norm1_context = AdaLN(width, 2 if last else 6)
        self.attn = JointAttention(width, heads, last)
        self.ff = feed_forward(width)
        self.ff_context = None if last else feed_forward(width)

    def forward(self, x, words, c, mask=None):
        # shifts, scales and gates of both streams, from the same condition
        shift1, scale1, gate1, shift2, scale2, gate2 = self.norm1(c)
        if self.last:
            scale_w1, shift_w1 = self.norm1_context(c)
        else:
            shift_w1, scale_w1, gate_w1, shift_w2, scale_w2, gate_w2 = self.norm1_context(c)
        # joint attention
        parts = modulate(norm(x), shift1, scale1), modulate(norm(words), shift_w1, scale_w1)
        y, seen = self.attn(*parts, mask)
        x = x + gate1 * y
        # feed-forward network of the image
        x = x + gate2 * self.ff["net"](modulate(norm(x), shift2, scale2))
        if self.ff_context is None:
            return x, None
        # the same for the words
        words = words + gate_w1 * seen
        words = words + gate_w2 * self.ff_context["net"](modulate(norm(words), shift_w2, scale_w2))
        return x, words


class CrossBlock(nn.Module):
    """The same without a stream for the words: self-attention, cross-attention, feed-forward network."""

    def __init__(self, width, heads, last=False):
        super().__init__()
        self.norm1 = AdaLN(width, 6)
        self.attn1 = Attention(width, width // heads, bias=True)
        self.attn2 = Attention(width, width // heads, bias=True)
        self.ff = feed_forward(width)

    def forward(self, x, words, c, mask=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.norm1(c)
        x = x + gate1 * self.attn1(modulate(norm(x), shift1, scale1))
        x = x + self.attn2(norm(x), words, mask)
        x = x + gate2 * self.ff["net"](modulate(norm(x), shift2, scale2))
        return x, words


class PatchEmbed(nn.Module):
    """Patches to tokens, with the position added: (B, C, H, W) -> (B, N, D)."""

    def __init__(self, channels, width, patch, side):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)
        self.register_buffer("pos_embed", position_embedding(width, side // patch)[None])

    def forward(self, x):
        return rearrange(self.proj(x), "b d h w -> b (h w) d") + self.pos_embed


class MMDiT(nn.Module):
    """Velocity of noisy latents: (B, C, H, W), times (B,), words (B, L, E), mask (B, L) -> (B, C, H, W)."""

    block = JointBlock

    def __init__(self, channels, side, depth=6, width=128, heads=4, patch=2, features=384):
        super().__init__()
        self.patch = patch
        self.pos_embed = PatchEmbed(channels, width, patch, side)
        time = TimeEmbedding(256, width)
        text = TimeEmbedding(features, width)  # the same two layers
        parts = {"timestep_embedder": time, "text_embedder": text}
        self.time_text_embed = nn.ModuleDict(parts)
        self.context_embedder = nn.Linear(features, width)
        blocks = [self.block(width, heads, i == depth - 1) for i in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = AdaLN(width, 2)
        self.proj_out = nn.Linear(width, channels * patch**2)
        self.initialise()

    def initialise(self):
        """As DiT: zero gates make a block the identity, a zero head the output zero."""
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        zero = [m.linear for m in self.modules() if isinstance(m, AdaLN)]
        # words enter a cross-attention block without a gate: its output begins at zero instead
        zero += [m.attn2.to_out[0] for m in self.modules() if isinstance(m, CrossBlock)]
        for linear in (*zero, self.proj_out):
            nn.init.zeros_(linear.weight)

    def forward(self, xt, t, words, mask=None, pooled=None):
        """pooled: (B, E) in place of the mean of the words."""
        if pooled is None:
            pooled = mean_word(words, mask)
        # the condition: time and pooled text
        c = self.time_text_embed["timestep_embedder"](timestep_embedding(t, 256))
        c = c + self.time_text_embed["text_embedder"](pooled)
        # two streams through all blocks
        x = self.pos_embed(xt)
        words = self.context_embedder(words)
        for block in self.transformer_blocks:
            x, words = block(x, words, c, mask)
        # tokens to pixels; here the scale comes first
        scale, shift = self.norm_out(c)
        x = self.proj_out(modulate(norm(x), shift, scale))
        rows = xt.shape[2] // self.patch
        return rearrange(
            x, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=self.patch, q=self.patch
        )


class CrossDiT(MMDiT):
    """The same with cross-attention to words that stay what they are."""

    block = CrossBlock


def forward_gflops(model, channels, side, words=16, features=384):
    """GFLOPs of a forward pass of one picture, counted by torch."""
    device = next(model.parameters()).device
    x = torch.zeros(1, channels, side, side, device=device)
    text = torch.zeros(1, words, features, device=device)
    mask = torch.ones(1, words, dtype=torch.bool, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, torch.zeros(1, device=device), text, mask)
    return counter.get_total_flops() / 1e9
