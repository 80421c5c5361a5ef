"""U-Net, the network that predicts the noise. Ho, Jain & Abbeel 2020, arXiv:2006.11239, App. B.

With text: Rombach et al. 2022, arXiv:2112.10752. A ladder of resolutions: residual blocks go down, every activation is
remembered, residual blocks go up and read what was remembered. The time step enters every residual block, and the
class with it, if there is one; text, if any, enters by cross-attention. There is nothing to run here:
`ddpm.py`, `flow.py` and `stable_diffuser.py` import it.

Shapes: B images, C channels, H x W pixels, N = H*W positions, L words of text, D features of a word or a time step.
Modules carry the names of diffusers' UNet2DModel and UNet2DConditionModel: weights move both ways by load_state_dict.
Differences from Ho et al.: pixels may be folded into channels first (`patch`), which is four times cheaper at patch=2.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


def timestep_embedding(t, dim):
    """Cosines, then sines, of t at geometric frequencies: (B,) -> (B, dim). Vaswani et al. 2017, Sec. 3.5."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """(B, C) sinusoids -> (B, D) features that the residual blocks read."""

    def __init__(self, channels, dim):
        super().__init__()
        self.linear_1 = nn.Linear(channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the time step is added in between. (B, C, H, W), (B, D) -> (B, C', H, W)."""

    def __init__(self, channels, out_channels, time_dim=None, groups=8, eps=1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels) if time_dim else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None
        if channels != out_channels:
            self.conv_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, time=None):
        h = self.conv1(F.silu(self.norm1(x)))
        # the time step, added to every position
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        # residual connection; a 1 x 1 convolution where the width changes
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return h + x


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


class Downsample(nn.Module):
    """Half the resolution by a strided convolution; the autoencoder pads at the bottom right only."""

    def __init__(self, channels, padding=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.padding = padding

    def forward(self, x):
        if not self.padding:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the resolution: every pixel four times, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Module):
    """One resolution of the ladder: residual blocks, attention after each if wanted, then a change of resolution."""

    def __init__(self, widths, attention=None, down=False, up=False, down_padding=1, **kw):
        """widths: [(channels in, channels out), ...] of the residual blocks; attention: function channels -> module."""
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(i, o, **kw) for i, o in widths)
        self.attentions = nn.ModuleList(attention(o) for _, o in widths) if attention else None
        width = widths[-1][1]
        self.downsamplers = nn.ModuleList([Downsample(width, down_padding)]) if down else None
        self.upsamplers = nn.ModuleList([Upsample(width)]) if up else None

    def forward(self, x, time=None, context=None, mask=None, memory=()):
        """-> x, [output of every block]. On the way up, each block also takes the last of `memory` and reads it."""
        outputs = []
        for j, resnet in enumerate(self.resnets):
            # skip connection: what the way down has remembered last
            if memory:
                x = torch.cat([x, memory.pop()], dim=1)
            x = resnet(x, time)
            if self.attentions is not None and j < len(self.attentions):
                x = self.attentions[j](x, context, mask)
            outputs.append(x)
        for resize in self.downsamplers or self.upsamplers or ():
            x = resize(x)
            outputs.append(x)
        return x, outputs


class UNet(nn.Module):
    """Predict the noise (or the image, or v) in xt: (B, C, H, W), (B,) [, (B, L, D), (B, L)] -> (B, C, H, W)."""

    def __init__(
        self, in_channels=1, channels=(32, 64), layers=2, attention=(False, True),
        context_dim=None, head_dim=32, groups=8, patch=1, classes=None,
    ):  # fmt: skip
        """`channels`, `attention`: one entry a resolution, finest first; `layers`: residual blocks each going down.

        classes: K; then y (B,) is a class 0..K-1, or K for "no class".
        """
        super().__init__()
        self.patch = patch
        self.in_channels = in_channels
        self.classes = classes
        self.channels = channels
        folded = in_channels * patch**2
        time_dim = 4 * channels[0]
        kw = dict(time_dim=time_dim, groups=groups)

        def attend(c):
            if context_dim:
                return CrossAttentionBlock(c, head_dim, context_dim, groups)
            return AttentionBlock(c, head_dim, groups)

        self.conv_in = nn.Conv2d(folded, channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(channels[0], time_dim)
        self.class_embedding = nn.Embedding(classes + 1, time_dim) if classes else None
        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()

        # down; `remembered` are the widths that the way up will read
        c = channels[0]
        remembered = [c]
        for i, width in enumerate(channels):
            last = i == len(channels) - 1
            widths = [(c if j == 0 else width, width) for j in range(layers)]
            block = attend if attention[i] else None
            self.down_blocks.append(Stage(widths, block, down=not last, **kw))
            remembered += [width] * layers
            if not last:
                remembered.append(width)  # the halved one
            c = width

        # in the middle: attention between two residual blocks
        self.mid_block = Stage([(c, c), (c, c)], **kw)
        self.mid_block.attentions = nn.ModuleList([attend(c)])

        # up: each residual block reads one activation more, the last remembered first
        for i, width in reversed(list(enumerate(channels))):
            widths = []
            for _ in range(layers + 1):
                widths.append((c + remembered.pop(), width))
                c = width
            block = attend if attention[i] else None
            self.up_blocks.append(Stage(widths, block, up=i > 0, **kw))
        self.conv_norm_out = nn.GroupNorm(groups, c)
        self.conv_out = nn.Conv2d(c, folded, 3, padding=1)

    def forward(self, xt, t, context=None, mask=None, y=None):
        """t: integers 0..T-1; context: word features, mask: True where there is a word; y: classes."""
        time = self.time_embedding(timestep_embedding(t, self.channels[0]))
        # the class, added to the time step
        if self.class_embedding is not None:
            time = time + self.class_embedding(y)
        # pixels folded into channels
        x = F.pixel_unshuffle(xt, self.patch)
        x = self.conv_in(x)
        # down, every activation remembered
        memory = [x]
        for stage in self.down_blocks:
            x, outputs = stage(x, time, context, mask)
            memory += outputs
        x, _ = self.mid_block(x, time, context, mask)
        # up, what was remembered read again
        for stage in self.up_blocks:
            x, _ = stage(x, time, context, mask, memory)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return F.pixel_shuffle(x, self.patch)
