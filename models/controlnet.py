"""ControlNet, the network: a copy of a U-Net's encoder half that also sees edges. Zhang, Rao & Agrawala 2023,
arXiv:2302.05543, Sec. 3.

What the copy sees is added to the activations that the frozen U-Net's decoder half reads, through convolutions that
start at zero: at first the U-Net is unchanged. There is nothing to run here: `control.py` trains it.

Shapes: B pictures, D latent channels, h x w latents, C channels of the U-Net, H x W pixels of the edge map, L words.
Modules carry the names of diffusers' ControlNetModel: weights move both ways by load_state_dict.
Differences from the paper: the edge map, 64 x 64, is brought to 8 x 8, where the folded latents are.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from models.unet import condition


def zero_conv(channels):
    """A 1 x 1 convolution whose weight and bias start at zero. Sec. 3.1."""
    layer = nn.Conv2d(channels, channels, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class EdgeEmbedding(nn.Module):
    """The edge map at the resolution of the U-Net: (B, 1, H, W) -> (B, C, H / 8, W / 8), zero at first. Eq. 4."""

    def __init__(self, channels, widths=(16, 32, 96, 256), edge_channels=1):
        super().__init__()
        self.conv_in = nn.Conv2d(edge_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in zip(widths[:-1], widths[1:]):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        # Gaussian weights that keep the variance: with torch's own, seven layers leave nothing of the edges
        for layer in (self.conv_in, *self.blocks):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, edges):
        h = F.silu(self.conv_in(edges))
        for block in self.blocks:
            h = F.silu(block(h))
        return self.conv_out(h)


class ControlNet(nn.Module):
    """A copy of the U-Net's encoder half that also sees edges; -> residuals for the decoder half. Sec. 3.2, Fig. 3."""

    def __init__(self, unet, widths=(16, 32, 96, 256)):
        super().__init__()
        self.patch = unet.patch
        self.channels = unet.channels
        # the trainable copy
        self.conv_in = copy.deepcopy(unet.conv_in)
        self.time_embedding = copy.deepcopy(unet.time_embedding)
        self.text_embedding = copy.deepcopy(unet.text_embedding)
        self.down_blocks = copy.deepcopy(unet.down_blocks)
        self.mid_block = copy.deepcopy(unet.mid_block)
        # a zero convolution for each activation that the decoder half reads
        self.controlnet_cond_embedding = EdgeEmbedding(unet.channels[0], widths)
        self.controlnet_down_blocks = nn.ModuleList()
        for channels in remembered_widths(unet):
            self.controlnet_down_blocks.append(zero_conv(channels))
        self.controlnet_mid_block = zero_conv(unet.channels[-1])
        self.requires_grad_(True)

    def forward(self, xt, t, context, mask, edges):
        """xt (B, D, h, w), edges (B, 1, H, W) -> residuals of the way down (a list), and of the middle."""
        time = condition(self, t, context, mask)
        x = self.conv_in(F.pixel_unshuffle(xt, self.patch))
        # the edges join the latents
        x = x + self.controlnet_cond_embedding(edges)
        memory = [x]
        for stage in self.down_blocks:
            x, outputs = stage(x, time, context, mask)
            memory += outputs
        x, _ = self.mid_block(x, time, context, mask)
        down = [conv(h) for conv, h in zip(self.controlnet_down_blocks, memory, strict=True)]
        return down, self.controlnet_mid_block(x)


def remembered_widths(unet):
    """Channels of each activation that the U-Net remembers on its way down."""
    widths = [unet.channels[0]]
    for stage, width in zip(unet.down_blocks, unet.channels):
        widths += [width] * (len(stage.resnets) + len(stage.downsamplers or ()))
    return widths


def controlled(unet, control, edges, scale=1.0):
    """The U-Net under control, a network (xt, t, words, mask) -> output. Eq. 2, y_c = F(x) + Z(F(x + Z(c)))."""

    def network(xt, t, context=None, mask=None):
        # guidance asks with and without the prompt in one batch: the edges are those of both
        both = edges.repeat(len(xt) // len(edges), 1, 1, 1)
        down, middle = control(xt, t, context, mask, both)
        # the encoder half, which learns nothing
        with torch.no_grad():
            time = condition(unet, t, context, mask)
            x = unet.conv_in(F.pixel_unshuffle(xt, unet.patch))
            memory = [x]
            for stage in unet.down_blocks:
                x, outputs = stage(x, time, context, mask)
                memory += outputs
            x, _ = unet.mid_block(x, time, context, mask)
        # what the control sees is added to what the decoder half reads
        x = x + scale * middle
        memory = [h + scale * residual for h, residual in zip(memory, down, strict=True)]
        for stage in unet.up_blocks:
            x, _ = stage(x, time, context, mask, memory)
        x = unet.conv_out(F.silu(unet.conv_norm_out(x)))
        return F.pixel_shuffle(x, unet.patch)

    return network
