"""Pictures of others: the right grey whatever the file stores, upright, on white; or one line that names the file."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests import fuzz
from utils import data, images
from utils.run import UserError


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(width, depth, colour, row, clear=b""):
    """One row of a PNG by hand: Pillow writes neither 16 bits a colour nor 2 bits a grey."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    transparent = chunk(b"tRNS", clear) if clear else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + transparent
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


def saved(image, kind="TIFF", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def array(kind, *values):
    return Image.fromarray(np.array([values], kind))


def pixels(content):
    """First channel of every pixel, row by row; the picture must be 8-bit RGB."""
    image = images.open_image(io.BytesIO(content))
    assert image.mode == "RGB"
    return np.asarray(image)[..., 0].ravel().tolist()


def unsigned(content):
    """The SampleFormat of a TIFF of 32-bit integers turned from 2, signed, into 1."""
    entry = struct.pack("<HHLH", 339, 3, 1, 2)
    assert content.count(entry) == 1
    return content.replace(entry, struct.pack("<HHLH", 339, 3, 1, 1))


GREY = {  # black, mid-grey, white as files hold them
    "png 16 bits": png(3, 16, 0, struct.pack(">3H", 0, 128 * 257, 65535)),
    "png 16 bits, dark": (png(3, 16, 0, struct.pack(">3H", 0, 128, 255)), [0, 0, 1]),
    "png 16 bits, alpha": png(3, 16, 4, struct.pack(">6H", 0, 65535, 128 * 257, 65535, 9, 0)),
    "png 16 bits, colours": png(
        3, 16, 2, struct.pack(">9H", *(v for v in (0, 128 * 257, 65535) for _ in "rgb"))
    ),
    "png 16 bits, one clear": (
        png(2, 16, 0, struct.pack(">2H", 7, 128 * 257), b"\0\7"),
        [255, 128],
    ),
    "png 2 bits": (png(4, 2, 0, b"\x1b"), [0, 85, 170, 255]),
    "png 2 bits, one clear": (png(4, 2, 0, b"\x1b", b"\0\1"), [0, 255, 170, 255]),
    "png 1 bit, black clear": (png(2, 1, 0, b"\x80", b"\0\0"), [255, 255]),
    "tiff 16 bits": saved(array(np.uint16, 0, 128 * 257, 65535)),
    "tiff 32 bits holding 8": saved(array(np.int32, 0, 128, 255)),
    "tiff 32 bits holding 16": saved(array(np.int32, 0, 128 * 257, 65535)),
    "tiff 32 bits, signed": saved(array(np.int32, 0, 2**30, 2**31 - 1)),
    "tiff 32 bits, unsigned": unsigned(saved(array(np.int32, 0, 0x80808080 - 2**32, -1))),
    "tiff float to 1": saved(array(np.float32, 0, 0.5, 1)),
    "tiff float to 255": saved(array(np.float32, 0, 128, 255)),
    "tiff float to 65535": saved(array(np.float32, 0, 128 * 257, 65535)),
    "tiff cmyk": saved(
        Image.merge("CMYK", [*[Image.new("L", (3, 1))] * 3, array(np.uint8, 255, 127, 0)])
    ),
    "grey and alpha": saved(
        Image.merge("LA", [array(np.uint8, 0, 128, 9), array(np.uint8, 255, 255, 0)]), "PNG"
    ),
    "one bit": (saved(Image.fromarray(np.array([[False, True]])), "PNG"), [0, 255]),
}


@pytest.mark.parametrize("name", GREY)
def test_grey_reads_as_grey(name):
    content, right = GREY[name] if isinstance(GREY[name], tuple) else (GREY[name], [0, 128, 255])
    assert pixels(content) == right


def test_cmyk_photo_of_a_camera():
    content = saved(Image.new("CMYK", (16, 16), (0, 0, 0, 127)), "JPEG", quality=100)
    assert all(abs(v - 128) <= 1 for v in pixels(content))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_a_transparent_colour(kind):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 128, 128, 128])
    image.putpixel((1, 0), 1)
    assert pixels(saved(image, kind, transparency=0)) == [255, 128]


def test_half_transparent_lies_on_white():
    assert pixels(saved(Image.new("RGBA", (1, 1), (0, 0, 0, 127)), "PNG")) == [128]


@pytest.mark.parametrize(
    "values, reason",
    [
        ([0, np.nan], "not finite"),
        ([-1, 1], "negative values, down to -1"),
        ([0, 3.5], "values up to 3.5"),
    ],
)
def test_values_of_unknown_range_are_refused(tmp_path, values, reason):
    path = tmp_path / "depth.tiff"
    array(np.float32, *values).save(path)
    with pytest.raises(
        UserError, match=f"depth.tiff: it holds .*{reason}.*save it with 8 bits"
    ) as error:
        images.open_image(path)
    assert "\n" not in str(error.value)


UPRIGHT = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40  # six greys, no two alike
TURNS = {  # what the camera stored, by orientation: what undoes it gives UPRIGHT back
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT),
    7: UPRIGHT[::-1, ::-1].T,
    8: np.rot90(UPRIGHT, -1),
}


def exif_block(orientation, damage=False):
    """A TIFF header with the orientation and, damaged, a resolution of 72/0: cameras write it."""
    entries = [struct.pack("<HHLHH", 0x0112, 3, 1, orientation, 0)]
    if damage:
        entries.append(struct.pack("<HHLL", 0x011A, 5, 1, 8 + 2 + 24 + 4))
    table = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return (
        b"Exif\0\0II*\0"
        + struct.pack("<L", 8)
        + table
        + (struct.pack("<LL", 72, 0) if damage else b"")
    )


@pytest.mark.parametrize("damage", [False, True])
@pytest.mark.parametrize("orientation", TURNS)
def test_upright_by_exif_even_if_the_rest_of_it_is_damaged(orientation, damage):
    stored = Image.fromarray(np.ascontiguousarray(TURNS[orientation]))
    content = saved(stored, "PNG", exif=exif_block(orientation, damage))
    image = images.open_image(io.BytesIO(content))
    assert (np.asarray(image)[..., 0] == UPRIGHT).all()
    # a second time turns nothing
    assert (np.asarray(images.to_rgb(image)) == np.asarray(image)).all()


@pytest.mark.parametrize(
    "content", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0MM\0*" + bytes(9)]
)
def test_unreadable_exif_leaves_the_picture_as_it_is(content):
    image = images.open_image(io.BytesIO(saved(Image.new("L", (3, 2), 128), "JPEG", exif=content)))
    assert image.size == (3, 2)


def test_exif_that_the_parser_gives_up_on_turns_nothing(monkeypatch):
    def give_up(image):
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(Image.Image, "getexif", give_up)
    assert images.open_image(io.BytesIO(saved(Image.new("L", (3, 2), 128), "BMP"))).size == (3, 2)


def test_one_line_for_what_cannot_be_read(tmp_path):
    whole = saved(Image.new("RGB", (9, 9)), "PNG")
    for name, content in {
        "cut.png": whole[:-20],
        "text.jpg": b"hello",
        "none.png": b"",
        "x\udcff.png": b"1",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="is not a readable image") as error:
            images.open_image(tmp_path / name)
        assert (
            str(error.value).isprintable()
            and "object at" not in str(error.value)
            and len(str(error.value)) < 400
        )
    for name in ("missing.png", "."):
        with pytest.raises(
            UserError, match="not a readable image: (No such file|it is no ordinary)"
        ):
            images.open_image(tmp_path / name)
    with pytest.raises(UserError, match="not a readable image"):
        # Would start ghostscript
        images.open_image(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"))
    with pytest.raises(UserError, match="binary file"):
        images.open_image(io.StringIO("hello"))


def test_a_changed_byte_of_a_png_is_noticed():
    content = bytearray(saved(Image.effect_noise((9, 9), 50), "PNG"))
    # Inside the pixels, and their checksum, which Pillow passes over
    for place in (60, content.index(b"IEND") - 5):
        bad = content.copy()
        bad[place] ^= 1
        with pytest.raises(UserError, match="not a readable image"):
            images.open_image(io.BytesIO(bytes(bad)))


def test_readers_of_the_book_use_it(tmp_path):
    array(np.uint16, 128 * 257, 128 * 257).save(tmp_path / "grey.tiff")
    assert (data.image_folder(tmp_path, 4) == 128).all()
    assert (data.read_image(tmp_path / "grey.tiff", 0) == 128).all()


def coloured():
    """12 x 9, every pixel another colour."""
    y, x = np.mgrid[:9, :12]
    return Image.fromarray(np.stack([x * 20, y * 25, (x + y) * 12], -1).astype(np.uint8))


FORMATS = {
    "png": lambda: saved(coloured(), "PNG"),
    "palette": lambda: saved(coloured().quantize(16), "PNG", transparency=0),
    "16 bits": lambda: saved(array(np.uint16, *range(0, 60000, 3000)), "PNG"),
    "jpeg": lambda: saved(coloured(), "JPEG", exif=exif_block(6, True)),
    "gif": lambda: saved(coloured().quantize(16), "GIF"),
    "bmp": lambda: saved(coloured(), "BMP"),
    "webp": lambda: saved(coloured(), "WEBP", lossless=True),
    "tiff": lambda: saved(coloured(), "TIFF", compression="tiff_lzw"),
    "float": lambda: saved(array(np.float32, *np.linspace(0, 1, 20)), "TIFF"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_fuzz_images(kind, tmp_path):
    """Damage is refused, or the picture is what it was; formats without checksums may show other pixels, no more."""
    whole = FORMATS[kind]()
    right = np.asarray(images.open_image(io.BytesIO(whole)))
    for number, bad in enumerate(fuzz.damaged(whole, 500 // len(FORMATS) + 1)):
        image = fuzz.reads_or_refuses(lambda bad=bad: images.open_image(io.BytesIO(bad)))
        if image is not None:
            assert image.mode == "RGB" and image.width * image.height <= 40e6
            if kind in ("png", "palette", "16 bits"):
                assert (np.asarray(image) == right).all()
        if number % 10 == 0:
            (tmp_path / "bad.png").write_bytes(bad)
            read = fuzz.reads_or_refuses(lambda: data.image_folder(tmp_path, 4))
            assert (read is None) == (image is None)
