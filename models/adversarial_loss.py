"""Adversarial loss of an autoencoder: PatchGAN discriminator, hinge loss, adaptive weight.

The discriminator is Isola et al. 2017, arXiv:1611.07004; its loss is Lim & Ye 2017, arXiv:1705.02894; the weight is
Esser et al. 2021, arXiv:2012.09841.

Shapes: B images of 3 x H x W.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Discriminator(nn.Module):
    """PatchGAN: is each patch of 38 x 38 pixels real? (B, 3, H, W) -> logits (B, 1, H/8, W/8)."""

    def __init__(self, width=32):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        layers = []
        # each halves the resolution
        for i, o in zip(widths, widths[1:]):
            conv = nn.Conv2d(i, o, 4, 2, 1)
            layers.append(nn.Sequential(conv, nn.GroupNorm(8, o), nn.LeakyReLU(0.2)))
        self.body = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, x):
        return self.body(x)


def discriminator_loss(real, fake):
    """Hinge loss of logits: real patches above 1, painted ones below -1."""
    real_loss = F.relu(1 - real).mean()
    fake_loss = F.relu(1 + fake).mean()
    return (real_loss + fake_loss) / 2


def gradient_norm(loss, weight):
    """Norm of the gradient of a loss with respect to one weight; the graph is kept for the backward pass."""
    return torch.autograd.grad(loss, weight, retain_graph=True)[0].norm()


def adaptive_weight(reconstruction_loss, generator_loss, last_layer):
    """Weight with which both losses have gradients of equal norm at the decoder's last layer. Esser et al., Eq. 7."""
    reconstruction = gradient_norm(reconstruction_loss, last_layer)
    generator = gradient_norm(generator_loss, last_layer)
    return (reconstruction / (generator + 1e-4)).clamp(0, 1e4).detach()
