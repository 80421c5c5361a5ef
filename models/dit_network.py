"""Diffusion transformer (DiT), the network: patches as tokens, blocks steered by adaLN-Zero. Peebles & Xie 2022,
arXiv:2212.09748, Sec. 3.2.

There is nothing to run here: `dit.py` trains it. Section and figure numbers are the paper's.

Shapes: B images, C channels, H x W pixels, patches of P x P pixels, N = (H/P)(W/P) tokens, D width, K classes.
y (B,) are classes 0..K-1, and K stands for "no class".
"""

import torch
from einops import rearrange
from torch import nn

from models.unet import TimeEmbedding, timestep_embedding
from models.unet_attention import Attention
from utils import run


def position_embedding(dim, size):
    """Position embedding: sines and cosines of the column and the row of a token, (size * size, dim). Sec. 3.2."""
    run.check(dim % 4 == 0, f"a width of {dim} is no multiple of 4: sines, cosines, columns, rows")
    frequency = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(size)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=-1).float()  # (size, dim / 2)
    # column first, as in MAE
    column = line.repeat(size, 1)
    row = line.repeat_interleave(size, 0)
    return torch.cat([column, row], dim=-1)


def modulate(x, shift, scale):
    """What adaLN does to normalised tokens: (B, N, D), (B, 1, D), (B, 1, D) -> (B, N, D). Zeros change nothing."""
    return x * (1 + scale) + shift


class Block(nn.Module):
    """A transformer block steered by the condition: (B, N, D), (B, D) -> (B, N, D). Fig. 3, adaLN-Zero."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, width // heads, bias=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        # adaLN-Zero: beta, gamma, alpha of attention and MLP, all from the condition
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c)[:, None].chunk(6, dim=-1)
        # attention
        y = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1 * self.attention(y)
        # feed-forward network
        y = modulate(self.norm2(x), shift2, scale2)
        return x + gate2 * self.mlp(y)


class DiT(nn.Module):
    """(B, C, H, W), time steps (B,), classes (B,), of which the last is "no class" -> (B, C, H, W). Fig. 3."""

    def __init__(self, depth, width, heads, patch, image=28, channels=1, classes=10):
        super().__init__()
        self.patch = patch
        self.classes = classes
        self.side = image // patch
        self.embed = nn.Linear(channels * patch**2, width)
        # not learned
        self.register_buffer("position", position_embedding(width, self.side), persistent=False)
        self.time = TimeEmbedding(256, width)
        self.label = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, channels * patch**2)
        self.initialise()

    def initialise(self):
        """As the authors' code: zero gates make a block the identity, a zero head the output zero. Sec. 3.2."""
        # linear layers, then the embeddings of class and time step
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for layer in (self.label, self.time.linear_1, self.time.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        # shifts, scales and gates, and the head
        adaln = [m.adaln[1] for m in self.modules() if isinstance(m, (Block, DiT))]
        for linear in (*adaln, self.head):
            nn.init.zeros_(linear.weight)

    def forward(self, x, t, y):
        # "patchify", Fig. 4
        x = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        x = self.embed(x) + self.position  # (B, N, D)
        # the condition: time step and class
        c = self.time(timestep_embedding(t, 256)) + self.label(y)  # (B, D)
        for block in self.blocks:
            x = block(x, c)
        # "linear and reshape": tokens to pixels
        shift, scale = self.adaln(c)[:, None].chunk(2, dim=-1)
        x = self.head(modulate(self.norm(x), shift, scale))  # (B, N, P P C)
        p = self.patch
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=self.side, p=p, q=p)
