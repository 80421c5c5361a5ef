"""Networks of the VAE: convolutional encoder and decoder of small images, and the images that codes stand for.

Kingma & Welling 2013, arXiv:1312.6114, App. C, with convolutions in place of one hidden layer.

Shapes: B or N images (C, H, W) in [-1, 1], digits (1, 28, 28) by default, D latent dimensions.
"""

import torch
from torch import nn

from utils import run


class VAE(nn.Module):
    """q(z | x), two numbers for every latent dimension, and p(x | z), one for every pixel."""

    def __init__(self, latent=2, channels=(16, 32), hidden=256, image=(1, 28, 28)):
        """image: (C, H, W), a multiple of 4 pixels high and wide."""
        super().__init__()
        a, b = channels
        self.image = tuple(image)
        colours, height, width = self.image
        # two halvings
        h, w = height // 4, width // 4
        self.latent = latent
        self.encoder = nn.Sequential(
            nn.Conv2d(colours, a, 4, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(a, b, 4, stride=2, padding=1), nn.SiLU(),
            nn.Flatten(), nn.Linear(b * h * w, hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2 * latent),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, b * h * w), nn.SiLU(), nn.Unflatten(1, (b, h, w)),
            nn.ConvTranspose2d(b, a, 4, stride=2, padding=1), nn.SiLU(),
            nn.ConvTranspose2d(a, colours, 4, stride=2, padding=1),
        )  # fmt: skip

    def encode(self, x):
        """(B, C, H, W) in [-1, 1] -> mu (B, D), logvar (B, D). Eq. 9."""
        wanted = ", ".join(map(str, self.image))
        other = f"this network reads (B, {wanted}) images, not {tuple(x.shape)}"
        run.check(x.shape[1:] == self.image, other)
        return self.encoder(x).chunk(2, dim=1)

    def decode(self, z):
        """(B, D) -> log odds of white (B, C, H, W); `picture` makes an image of them."""
        return self.decoder(z)


def picture(logits):
    """Log odds of white -> the expected image, in [-1, 1]: 2 sigmoid(logits) - 1."""
    return (logits / 2).tanh()


@torch.no_grad()
def paint(model, z):
    """Codes (N, D) -> expected images (N, C, H, W) in [-1, 1], on the CPU."""
    return picture(model.decode(z.to(next(model.parameters()).device))).cpu()
