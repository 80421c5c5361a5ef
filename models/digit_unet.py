"""U-Net for digits of 28 x 28 pixels, or pictures of 32 x 32: two resolutions at most, attention at the coarsest."""

from models.unet import UNet
from utils import run


def check_channels(channels):
    """Raises UserError if there is no such U-Net for digits."""
    widths = all(c > 0 and c % 8 == 0 for c in channels)
    run.check(widths, "--channels must be multiples of 8, the norm groups")
    run.check(
        1 <= len(channels) <= 2,
        "--channels takes one or two widths: 14 x 14 positions can be halved once",
    )


def build(channels, layers, classes=None, in_channels=1, **_):
    """The U-Net of ddpm.py: pixels folded 2 x 2, attention at the coarsest resolution; with `classes` it reads them."""
    check_channels(channels)
    attention = [i == len(channels) - 1 for i in range(len(channels))]  # one per resolution
    return UNet(in_channels, channels, layers, attention, patch=2, classes=classes)
