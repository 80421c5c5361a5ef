"""Pictures of a folder, of tar shards and of a web server: read by name, refused in one line, replaced and counted."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests import eyes, fuzz
from utils import data
from utils.run import UserError
from vlm import conversations, lazy_rows, tar_shards, tower, views
from vlm.collator import Collator
from vlm.image_store import ImageStore
from vlm.loader import LazySamples
from vlm.tar_shards import QUESTION, TarRows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_ACTION_CACHE", str(tmp_path / "cache"))


def picture(i, kind="PNG", size=24):
    """Bytes of a picture of noise."""
    noise = np.random.default_rng(i).integers(0, 255, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def talk(image, i):
    return conversations.row(f"talk {i}", image, [("What?", f"noise {i}")])


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def shards(folder, form=tarfile.PAX_FORMAT):
    """Two shards that number their samples alike: JSON without "image", JSON with it, a caption, a text
    alone; a long name; a directory, a link and an index among them."""
    folder.mkdir()
    for which in (0, 1):
        with tarfile.open(folder / f"shard-{which}.tar", "w", format=form) as archive:
            directory = tarfile.TarInfo("./more")
            directory.type = tarfile.DIRTYPE
            archive.addfile(directory)
            first = talk("x", 10 * which)
            del first["image"]
            add(archive, "./000.json", json.dumps(first).encode())
            add(archive, "./000.jpg", picture(10 * which, "JPEG"))
            add(archive, "001.PNG", picture(10 * which + 1))
            add(archive, "001.json", json.dumps(talk("001.PNG", 10 * which + 1)).encode())
            add(archive, "002.txt", f"a caption, é {which}\n".encode())
            add(archive, "002.cls", b"3")
            add(archive, "002.png", picture(10 * which + 2))
            add(archive, "003.json", json.dumps(talk(None, 10 * which + 3)).encode())
            link = tarfile.TarInfo("004.png")
            link.type = tarfile.SYMTYPE
            link.linkname = "/etc/passwd"
            archive.addfile(link)
            add(archive, f"{'deep/' * 30}{which}.a.png", picture(5))
            add(archive, f"{'deep/' * 30}{which}.png", picture(10 * which + 6))
    return folder


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_of_shards_are_read_by_name_key_and_shard(tmp_path, form):
    where = shards(tmp_path / "shards", form)
    store = ImageStore(where)
    assert store.read("001") == store.read("001.PNG") == picture(1)
    assert store.read("shard-1.tar/001") == store.read("shard-1.tar/001.PNG") == picture(11)
    assert store.read("000.jpg") == picture(0, "JPEG")
    assert store.read(f"{'deep/' * 30}1") == picture(16)
    # as the archive itself gives them
    with tarfile.open(where / "shard-1.tar") as archive:
        assert store.read("shard-1.tar/002.png") == archive.extractfile("002.png").read()
    expected = data.square(data.open_image(io.BytesIO(picture(11))), 8)
    assert torch.equal(store.image("shard-1.tar/001", 8), expected)
    for name in (
        "004.png",
        "005",
        "002.txt",
        "000.json",
        "shard-2.tar/001",
        "../shards/000.jpg",
        "",
    ):
        with pytest.raises(UserError, match="there is no picture") as found:
            store.read(name)
        assert "\n" not in str(found.value)
    # one shard alone; nothing was unpacked, nothing is scanned twice
    assert ImageStore(where / "shard-1.tar").read("001") == picture(11)
    assert sorted(path.name for path in where.iterdir()) == ["shard-0.tar", "shard-1.tar"]


def test_rows_come_out_of_shards(tmp_path):
    where = shards(tmp_path / "shards")
    rows = TarRows(where)
    assert len(rows) == 8
    store = ImageStore(where)
    for which in (0, 1):
        first, second, caption, words = (rows[4 * which + i] for i in range(4))
        assert [first["id"], second["id"]] == [f"talk {10 * which}", f"talk {10 * which + 1}"]
        assert store.read(first["image"]) == picture(10 * which, "JPEG")
        assert store.read(second["image"]) == picture(10 * which + 1)
        assert store.read(caption["image"]) == picture(10 * which + 2)
        assert conversations.turns_of(caption) == [
            (f"<image>\n{QUESTION}", f"a caption, é {which}")
        ]
        assert "image" not in words and words["id"] == f"talk {10 * which + 3}"
    assert rows[-1] == rows[7]
    with pytest.raises(IndexError):
        rows[8]
    # a chat.jsonl that names the keys
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps(talk("shard-1.tar/002", 2)) + "\n" + json.dumps(talk("000", 0)))
    listed = lazy_rows.Rows(chat)
    assert store.read(listed[0]["image"]) == picture(12)
    assert store.read(listed[1]["image"]) == picture(0, "JPEG")


def test_the_index_of_a_shard_is_kept_until_it_changes(tmp_path, monkeypatch):
    where = shards(tmp_path / "shards")
    scanned = []
    members = tar_shards.members
    monkeypatch.setattr(tar_shards, "members", lambda path: scanned.append(path) or members(path))
    first = ImageStore(where)
    ImageStore(where)
    assert len(scanned) == 2
    with tarfile.open(where / "shard-0.tar", "a") as archive:
        add(archive, "new.png", picture(77))
    with pytest.raises(UserError, match="shard-0.tar has changed"):
        first.read("001")
    assert ImageStore(where).read("new") == picture(77) and len(scanned) == 3


BAD_TEXTS = [
    ("a.json", b"{", "text 0 is no readable JSON"),
    ("a.json", b"[1]", "text 0 has no list 'conversations'"),
    (
        "a.json",
        json.dumps(talk(None, 0)).replace("What", "<image>").encode(),
        "text 0: 1 words <image> for 0",
    ),
    ("a.txt", b"a caption", "text 0: a caption without a picture"),
    ("a.json", b"\xff", "text 0 is not UTF-8"),
]


@pytest.mark.parametrize("name, content, says", BAD_TEXTS)
def test_a_bad_text_is_named_by_archive_and_number(tmp_path, name, content, says):
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        add(archive, name, content)
    with pytest.raises(UserError, match=f"one.tar: {says}") as found:
        TarRows(tmp_path / "one.tar")[0]
    assert "\n" not in str(found.value)


def test_a_picture_of_a_row_without_its_word_is_refused(tmp_path):
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        add(archive, "a.json", json.dumps(talk(None, 0)).encode())
        add(archive, "a.png", picture(0))
    with pytest.raises(UserError, match="text 0: 0 words <image> for 1 pictures"):
        TarRows(tmp_path / "one.tar")[0]


def test_what_is_no_shard_is_one_line(tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        add(archive, "a.png", picture(0))
        add(archive, "a.jpg", picture(0))
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        add(archive, "a.png", picture(0))
    (tmp_path / "empty").mkdir()
    for make, says in (
        (lambda: ImageStore(tmp_path / "bad.tar"), "bad.tar is no uncompressed tar"),
        (lambda: ImageStore(tmp_path / "packed.tar"), "packed.tar is no uncompressed tar"),
        (lambda: ImageStore(tmp_path / "twice.tar"), "two pictures of one key"),
        (lambda: ImageStore(tmp_path / "none"), "--image_folder: there is no"),
        (lambda: TarRows(tmp_path / "empty"), "there is no .tar file"),
    ):
        with pytest.raises(UserError, match=says) as found:
            make()
        assert "\n" not in str(found.value)
    with tarfile.open(tmp_path / "pictures.tar", "w") as archive:
        add(archive, "a.png", picture(0))
    with pytest.raises(UserError, match="no .json or .txt member"):
        TarRows(tmp_path / "pictures.tar")


def test_damaged_shards_are_read_or_refused(tmp_path):
    """250 damaged archives: a picture is read as it is there, or one line says why not."""
    where = shards(tmp_path / "shards") / "shard-0.tar"
    whole = where.read_bytes()
    outcomes = []
    for bad in fuzz.damaged(whole, 250, seed=6):
        where.write_bytes(bad)
        found = fuzz.reads_or_refuses(lambda: ImageStore(where).read("001"))
        outcomes.append(found is not None)
        rows = fuzz.reads_or_refuses(lambda: list(TarRows(where)))
        assert rows is None or all(one["conversations"] for one in rows)
    assert 20 < sum(outcomes) < 245


def test_files_of_a_folder_and_names_that_lead_out_of_it(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "coco").mkdir(parents=True)
    (folder / "coco" / "a.png").write_bytes(picture(3))
    (tmp_path / "secret.png").write_bytes(picture(4))
    store = ImageStore(folder)
    assert store.read("coco/a.png") == picture(3)
    for name in (
        "../secret.png",
        str(tmp_path / "secret.png"),
        "coco",
        "b.png",
        "a\0",
        "a" * 5000,
        "",
    ):
        with pytest.raises(UserError, match="there is no .* in") as found:
            store.read(name)
        assert "\n" not in str(found.value) and len(str(found.value)) < 600
        assert store.stamp(name)[1:] != store.stamp("coco/a.png")[1:]
    # files may lie beside shards
    shards(tmp_path / "shards")
    (tmp_path / "shards" / "b.png").write_bytes(picture(9))
    mixed = ImageStore(tmp_path / "shards")
    assert mixed.read("b.png") == picture(9) and mixed.read("001") == picture(1)


def test_broken_pictures_of_a_store_are_replaced_and_counted(tmp_path):
    """Missing, damaged and larger than the limit: the run goes on with other samples."""
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "1.png").write_bytes(picture(1)[:50])
    Image.new("1", (9000, 9000)).save(tmp_path / "2.png")
    rows = [talk(f"{i}.png", i) for i in range(6)] + [talk("none.png", 6)]

    def tokenise(one):
        number = int(one["id"].split()[1])
        return {"ids": [number + 1] * 3, "labels": [1] * 3, "images": [one["image"]]}

    lazy = LazySamples(rows, tokenise)
    store = ImageStore(tmp_path)
    collate = Collator(lambda name: store.image(name, 8), lazy, pad_id=0)
    batch = collate([lazy[i] for i in range(7)])
    used = (batch["ids"][:, 0] - 1).tolist()
    assert used[0] == 0 and used[3:6] == [3, 4, 5] and set(used) <= {0, 3, 4, 5}
    for number, image in zip(used, batch["images"]):
        assert torch.equal(image, store.image(f"{number}.png", 8))
    assert collate.broken >= 3


def test_features_of_shards_are_those_of_the_files(tmp_path):
    vision_tower = tower.VisionTower(eyes.tower())
    where = shards(tmp_path / "shards")
    names = ["shard-0.tar/000", "shard-1.tar/002", "001.PNG"]
    for name, content in zip("abc", (picture(0, "JPEG"), picture(12), picture(1))):
        (tmp_path / f"{name}.png").write_bytes(content)
    of_files = views.features(vision_tower, [tmp_path / f"{name}.png" for name in "abc"], 2, 5)
    store = ImageStore(where)
    assert views.content_hash(store, names) == views.content_hash(
        views.Files(), [tmp_path / f"{name}.png" for name in "abc"]
    )
    of_shards = views.features(vision_tower, names, 2, 5, store)
    assert torch.equal(of_shards.tensor(), of_files.tensor())
    missing = views.features(vision_tower, [*names, "none"], 1, 5, store, skip_unreadable=True)
    # zeros, not the features of a black picture
    assert missing.unreadable() == [3] and missing[0, 3].eq(0).all()
