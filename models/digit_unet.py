"""U-Net for digits of 28 x 28 pixels: two resolutions at most, attention at the coarsest."""

from models.unet import UNet
from utils import run


def check_channels(channels):
    """Raises UserError if there is no such U-Net for digits."""
    run.check(
        1 <= len(channels) <= 2,
        "--channels takes one or two widths: 14 x 14 positions can be halved once",
    )


def build(channels, layers, **_):
    """The U-Net of ddpm.py: pixels folded 2 x 2, attention at the coarsest resolution."""
    check_channels(channels)
    attention = [i == len(channels) - 1 for i in range(len(channels))]  # one per resolution
    return UNet(1, channels, layers, attention, patch=2)
