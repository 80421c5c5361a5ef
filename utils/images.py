"""Pictures that somebody else made: read as 8-bit RGB, upright, on white, or refused in one line."""

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from utils.run import UserError, check
from utils.text import printable

MEGAPIXELS = 40  # more than any photo of ours; PIL decodes twice as much without a word
MEGABYTES = 256  # of one file
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # never EPS: it starts a program
# How to turn a photo upright, by the orientation in its EXIF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# PIL leaves the transparent value of a grey PNG as it is stored, and stretches the pixels to 0..255
STRETCHED = {"1": 255, "L;2": 85, "L;4": 17}
# Of damage that is mended here, or refused by our own line
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """A path or a binary file -> 8-bit RGB picture, upright by its EXIF, on white where it is transparent.

    Of an animation the first frame. 16-bit and float pictures are scaled as `to_8_bit` says. Raises UserError, one line
    that names the file: missing, not an image, cut short, damaged, more than MEGAPIXELS, values of unknown range.
    """
    is_path = isinstance(source, (str, Path))
    name = printable(source if is_path else getattr(source, "name", "the image"))
    try:
        data = whole_file(source, name)
        # A first pass over the header, and over the checksums where the format has them
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = image.width * image.height
            check(pixels <= MEGAPIXELS * 1e6, f"{name} has more than {MEGAPIXELS} megapixels")
            image.verify()
        # A second one for the pixels: PIL closes the file after verify
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return to_rgb(image)
    except UserError as error:
        message = str(error)
        raise UserError(message if name in message else f"{name}: {message}") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name} has more than {MEGAPIXELS} megapixels") from None
    except UnidentifiedImageError:
        known = f"it is none of {', '.join(FORMATS)}, or damaged"
        raise UserError(f"{name} is not a readable image: {known}") from None
    # The decoders raise what comes: struct.error, IndexError, SyntaxError, OSError ...
    except Exception as error:
        reason = getattr(error, "strerror", None) or printable(error) or type(error).__name__
        raise UserError(f"{name} is not a readable image: {reason}") from None


def whole_file(source: str | Path | BinaryIO, name: str) -> bytes:
    """All bytes of it. Raises UserError if there are more than MEGABYTES, or it is no ordinary file."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        # A pipe or a device could be read without end
        ordinary = path.is_file() or not path.exists()
        check(ordinary, f"{name} is not a readable image: it is no ordinary file")
        with path.open("rb") as file:
            data = file.read(MEGABYTES * 2**20 + 1)
    else:
        data = source.read(MEGABYTES * 2**20 + 1)
        wrong_mode = f"{name} was not opened as a binary file; open it with mode 'rb'"
        check(isinstance(data, bytes), wrong_mode)
    check(len(data) <= MEGABYTES * 2**20, f"{name} is larger than {MEGABYTES} MB; make it smaller")
    return data


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture of PIL -> 8-bit RGB, upright, on white where it is transparent."""
    # The transparent grey, in the range of the pixels
    one_grey = isinstance(image.info.get("transparency"), int)
    if one_grey and isinstance(image, ImageFile.ImageFile) and image.tile:
        stored = image.tile[0].args  # how the pixels lie in the file
        if isinstance(stored, str):
            image.info["transparency"] *= STRETCHED.get(stored, 1)
    image.load()
    orientation = orientation_of(image)
    # To 8 bits, on white, RGB
    if image.mode.startswith(("I", "F")):
        image = to_8_bit(image)
    if image.mode == "La":  # PIL knows no way from it to RGBA
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}  # else who asks again turns it again
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def orientation_of(image: Image.Image) -> int:
    """1 to 8, as EXIF says; 1 where that cannot be read. Nothing else of EXIF is looked at: cameras damage it."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # PIL's parser raises what comes
        return 1


def to_8_bit(image: Image.Image) -> Image.Image:
    """Greys of 16 or 32 bits, or floats -> mode "L", or "LA" if one value stands for transparent.

    16 bits: v / 257, so that 65535 becomes 255. Integers of 32 bits are taken for what their largest value fits in: 8,
    16, 31 (with a sign) or 32 bits; in a PNG they are 16. Floats whose largest value is below 1.01 are 0..1, from 16 to
    255.5 they are 0..255, above that 0..65535. Raises UserError for what fits nowhere: negative, not finite, 1.01..16.
    """
    values = np.asarray(image).astype(np.float64)  # (H,W)
    unsigned = 1 in np.atleast_1d(getattr(image, "tag_v2", {}).get(339, 2))  # SampleFormat of TIFF
    if image.mode == "I" and unsigned:
        values = values % 2**32  # PIL reads them as if they had a sign
    # What fits no range is refused
    advice = "save it with 8 bits a channel"
    check(np.isfinite(values).all(), f"it holds values that are not finite; {advice}")
    low = values.min()
    high = values.max()
    check(low >= 0, f"it holds negative values, down to {low:.4g}; {advice}")
    # The value that stands for white
    if image.mode.startswith("I;16") or image.format == "PNG":
        top = 65535
    elif image.mode == "F":
        known = high <= 1.01 or 16 <= high <= 65535
        check(known, f"it holds values up to {high:.4g}, of which range is unknown; {advice}")
        top = 1 if high <= 1.01 else 255 if high <= 255.5 else 65535
    else:
        widest = 2**32 - 1 if unsigned else 2**31 - 1
        top = 255 if high <= 255 else 65535 if high <= 65535 else widest
    grey = Image.fromarray((values * (255 / top)).round().clip(0, 255).astype(np.uint8))
    # The one transparent value becomes an alpha channel
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey
