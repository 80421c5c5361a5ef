"""Encoder and decoder of the latent autoencoder: residual blocks, a resolution a stage, attention at the coarsest.

Rombach et al. 2022, arXiv:2112.10752, Sec. 3.1. Modules carry the names of diffusers' Encoder and Decoder.

Shapes: B images, H x W pixels, D latent channels, h x w latents.
"""

import torch.nn.functional as F
from torch import nn

from models.unet import Stage
from models.unet_attention import AttentionBlock


class Encoder(nn.Module):
    """Down the ladder: (B, 3, H, W) -> (B, 2 D, h, w), mean and log-variance before the last 1x1 convolution."""

    def __init__(self, channels, latent, layers=1, groups=8):
        super().__init__()
        kw = dict(groups=groups, eps=1e-6)
        c = channels[0]
        self.conv_in = nn.Conv2d(3, c, 3, padding=1)
        # residual blocks of each resolution; every stage but the last halves it
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(channels):
            widths = [(c if j == 0 else width, width) for j in range(layers)]
            self.down_blocks.append(Stage(widths, down=i < len(channels) - 1, down_padding=0, **kw))
            c = width
        self.mid_block = Stage([(c, c), (c, c)], **kw)
        self.mid_block.attentions = nn.ModuleList([AttentionBlock(c, c, **kw)])
        self.conv_norm_out = nn.GroupNorm(groups, c, 1e-6)
        self.conv_out = nn.Conv2d(c, 2 * latent, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in (*self.down_blocks, self.mid_block):
            x, _ = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Up the ladder: (B, D, h, w) -> (B, 3, H, W)."""

    def __init__(self, channels, latent, layers=1, groups=8):
        super().__init__()
        kw = dict(groups=groups, eps=1e-6)
        c = channels[-1]
        self.conv_in = nn.Conv2d(latent, c, 3, padding=1)
        self.mid_block = Stage([(c, c), (c, c)], **kw)
        self.mid_block.attentions = nn.ModuleList([AttentionBlock(c, c, **kw)])
        # residual blocks of each resolution, coarsest first; every stage but the last doubles it
        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(channels))):
            widths = [(c if j == 0 else width, width) for j in range(layers + 1)]
            self.up_blocks.append(Stage(widths, up=i > 0, **kw))
            c = width
        self.conv_norm_out = nn.GroupNorm(groups, c, 1e-6)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z):
        x = self.conv_in(z)
        for stage in (self.mid_block, *self.up_blocks):
            x, _ = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
