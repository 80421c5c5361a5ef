"""U-Net, the network that predicts the noise. Ho, Jain & Abbeel 2020, arXiv:2006.11239, App. B.

With text: Rombach et al. 2022, arXiv:2112.10752. A ladder of resolutions: residual blocks go down, every activation is
remembered, residual blocks go up and read what was remembered. The time step enters every residual block, and the
class with it, if there is one; text, if any, enters by cross-attention (`unet_attention.py`). There is nothing to run
here: `ddpm.py`, `flow.py` and `stable_diffuser.py` import it.

Shapes: B images, C channels, H x W pixels, L words of text, D features of a word or a time step.
Modules carry the names of diffusers' UNet2DModel and UNet2DConditionModel: weights move both ways by load_state_dict.
Differences from Ho et al.: pixels may be folded into channels first (`patch`), which is four times cheaper at patch=2;
the mean of the words may be added to the time step (`pooled_text`), as in SDXL (Podell et al. 2023, arXiv:2307.01952).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from models.unet_attention import AttentionBlock, CrossAttentionBlock, mean_word
from utils import run


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


def condition(model, t, context=None, mask=None):
    """What the residual blocks read: the time step, and the mean of the words if `model` wants it. (B,) -> (B, D)."""
    time = model.time_embedding(timestep_embedding(t, model.channels[0]))
    # the pooled text, added to the time step: SDXL, Sec. 2.1
    if model.text_embedding is not None:
        time = time + model.text_embedding(mean_word(context, mask))
    return time


class UNet(nn.Module):
    """Predict the noise (or the image, or v) in xt: (B, C, H, W), (B,) [, (B, L, D), (B, L)] -> (B, C, H, W)."""

    def __init__(
        self, in_channels=1, channels=(32, 64), layers=2, attention=(False, True),
        context_dim=None, head_dim=32, groups=8, patch=1, classes=None,
        pooled_text=False,
    ):  # fmt: skip
        """`channels`, `attention`: one entry a resolution, finest first; `layers`: residual blocks each going down.

        classes: K; then y (B,) is a class 0..K-1, or K for "no class". pooled_text: the mean of the words, too, is
        added to the time step, by a linear layer that starts at zero. Raises UserError if there are no words.
        """
        super().__init__()
        run.check(context_dim or not pooled_text, "pooled_text needs a context_dim: words to pool")
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

        # pooled text, last: the seed gives all other weights what it gives them without it
        self.text_embedding = None
        if pooled_text:
            self.text_embedding = nn.Linear(context_dim, time_dim)
            nn.init.zeros_(self.text_embedding.weight)
            nn.init.zeros_(self.text_embedding.bias)

    def forward(self, xt, t, context=None, mask=None, y=None):
        """t: integers 0..T-1; context: word features, mask: True where there is a word; y: classes."""
        time = condition(self, t, context, mask)
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
