"""vlm/data.py: LLaVA's format, made, checked and read; what is asked is masked, what ends is learned."""

import io
import json
import multiprocessing
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

from tests import eyes, fuzz
from tests.utils.test_images import exif_block
from utils.data import groceries
from utils.run import UserError
from vlm import anyres, conversations, data, fruit_photos, llava_parts, prompts, tower, views


@pytest.fixture(scope="module")
def rows():
    return data.fruit("train")


def test_the_photos_to_learn_from_are_those_of_the_data_set(rows):
    fruit = groceries(64)
    assert len(rows) == 732 and len(data.fruit("test")) == 1322
    for one in rows:
        assert fruit.split[int(one["image"][:4])] != "test"
    conversations.validate(rows, data.photos())


def test_every_answer_is_true(rows):
    fruit = groceries(64)
    for one in rows:
        i = int(one["image"][:4])
        group, kind = (
            fruit_photos.GROUPS[fruit.coarse_names[fruit.coarse[i]]],
            fruit_photos.name_of(fruit, i),
        )
        said = [turn["value"] for turn in one["conversations"]]
        for question, answer in zip(said[::2], said[1::2]):
            if "yes or no" in question:
                assert answer == ("yes" if f" {group}?" in question else "no")
            else:
                assert kind in answer or answer == group


def test_questions_of_every_sort_and_several_turns(rows):
    said = [turn["value"] for one in rows for turn in one["conversations"][::2]]
    for words in (*data.KIND, *data.GROUP, *data.DESCRIBE, "yes or no"):
        assert sum(words in s for s in said) > 20
    assert sum(len(one["conversations"]) > 2 for one in rows) > 300
    assert rows == data.fruit("train", 0) and rows != data.fruit("train", 1)


@pytest.fixture(scope="module")
def words():
    """SmolLM2's tokenizer with <image> and chatml, and the id of that word."""
    tokenizer, language = llava_parts.language_model("smollm2")
    return tokenizer, prompts.add_words(tokenizer, language)


def test_labels_are_the_answers_and_their_ends(rows, words):
    tokenizer, image_id = words
    for one in rows[:40]:
        sample = conversations.sample(tokenizer, one, 9, 7)
        assert sample["ids"].count(image_id) == 9 and sample["images"] == [7]
        answers = [turn["value"] for turn in one["conversations"][1::2]]
        learned = [i for i in sample["labels"] if i != prompts.IGNORE]
        assert tokenizer.decode(learned) == "".join(f"{a}<|im_end|>" for a in answers)
        assert all(a in (b, prompts.IGNORE) for a, b in zip(sample["labels"], sample["ids"]))


def spoiled(change):
    one = conversations.row("x", "0000.jpg", [("What?", "an apple"), ("Which?", "Gala")])
    change(one)
    return one


BAD = [
    (lambda one: one.pop("conversations"), "no list 'conversations'"),
    (lambda one: one["conversations"].pop(), "turns are human, gpt"),
    (lambda one: one["conversations"].reverse(), "turns are human, gpt"),
    (lambda one: one["conversations"][1].update(value=" "), "empty turn"),
    (lambda one: one["conversations"][1].update(value=3), "every turn is"),
    (lambda one: one["conversations"][0].update(value="What?"), "0 words <image> for 1 pictures"),
    (lambda one: one["conversations"][1].update(value="<image>"), "in an answer"),
    (lambda one: one.pop("image"), "1 words <image> for 0 pictures"),
    (lambda one: one.update(image="9999.jpg"), "there is no 9999.jpg"),
    (lambda one: one.update(image="../photos.txt"), "there is no ../photos.txt"),
    (lambda one: one.update(image=["a", "b"]), "name of one file"),
]


@pytest.mark.parametrize("change, says", BAD)
def test_a_bad_row_is_named(tmp_path, change, says):
    path = tmp_path / "chat.json"
    good = conversations.row("x", "0000.jpg", [("What?", "an apple")])
    path.write_text(json.dumps([good, spoiled(change)]))
    with pytest.raises(UserError, match="row 1") as found:
        conversations.read(path, data.photos())
    assert says in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    (tmp_path / "chat.json").write_text(text)
    with pytest.raises(UserError):
        conversations.read(tmp_path / "chat.json", tmp_path)


def test_pieces_are_of_the_photo():
    image = torch.arange(3 * 40 * 40).view(3, 40, 40)
    for seed in range(20):
        piece = views.random_crop(image, np.random.default_rng(seed))
        assert piece.shape[1] == piece.shape[2] >= 28
        rows = piece[0] if piece[0, 0, 1] > piece[0, 0, 0] else piece[0].flip(-1)
        assert (rows[1:] - rows[:-1]).eq(40).all() and (rows[:, 1:] - rows[:, :-1]).eq(1).all()


def test_the_command_writes_what_it_reads(tmp_path):
    data.main(data.Config(emoji=3, out=str(tmp_path)))
    rows = conversations.read(tmp_path / "chat.json", tmp_path / "pictures")
    assert len(rows) == 735 and rows[-1]["image"].startswith("emoji")


def chat_json(folder):
    """Three conversations, two of them with pictures that are there -> (path, rows)."""
    Image.new("RGB", (8, 8), (200, 0, 0)).save(folder / "a.png")
    Image.new("L", (9, 8), 90).save(folder / "b.jpg")
    rows = [
        conversations.row("one", "a.png", [("What?", "an apple"), ("Sure?", "yes, \u00e9\u4e2d")]),
        conversations.row("two", "b.jpg", [("Which?", "a pear")]),
        conversations.row("three", None, [("What is red?", "a cherry")]),
    ]
    path = folder / "chat.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    return path, rows


def test_a_byte_order_mark_null_pictures_and_half_characters(tmp_path):
    path, rows = chat_json(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert conversations.read(path, tmp_path) == rows
    path.write_text(json.dumps([rows[0], rows[2] | {"image": None}]), "utf-8")
    assert conversations.read(path, tmp_path) == [rows[0], rows[2]]
    assert conversations.replace_undecodable(conversations.read(path, tmp_path), tmp_path)[1] == 0
    rows[2]["conversations"][1]["value"] = "half \ud83d"
    path.write_text(json.dumps(rows), "utf-8")
    assert conversations.read(path, tmp_path)[2]["conversations"][1]["value"] == "half \ufffd"


REFUSED = [
    ('[{"id": "caf\u00e9"}]'.encode("latin-1"), "is not UTF-8 (byte 12 is 0xe9)"),
    (b"[" * 100_000, "nested too deeply"),
    (b'[{"image": "a.png", "image": "b.jpg", "conversations": []}]', "'image' is there twice"),
    (json.dumps([conversations.row("x", "a" * 5000, [("q", "a")])]).encode(), "there is no aaa"),
    (json.dumps([conversations.row("x", "a\0.png", [("q", "a")])]).encode(), "row 0: there is no"),
    (
        json.dumps([conversations.row("x", "\ud800.png", [("q", "a")])]).encode(),
        "row 0: there is no",
    ),
    (
        json.dumps([conversations.row("x", "", [("q", "a")]) | {"image": ""}]).encode(),
        "row 0: 0 words <image>",
    ),
    (json.dumps([conversations.row("x", None, [("q", None)])]).encode(), "row 0: every turn is"),
    (
        json.dumps([{"conversations": [{"from": "z" * 5000, "value": "x"}]}]).encode(),
        "turns are human, gpt",
    ),
]


@pytest.mark.parametrize("content, says", REFUSED)
def test_a_file_of_an_outsider_is_refused_in_one_short_line(tmp_path, content, says):
    chat_json(tmp_path)
    (tmp_path / "chat.json").write_bytes(content)
    with pytest.raises(UserError) as found:
        conversations.read(tmp_path / "chat.json", tmp_path)
    line = str(found.value)
    assert says in line and "\n" not in line and len(line) < 700
    line.encode("utf-8")


def check_rows(found, folder, words):
    """Whatever was read fits its pictures, and becomes samples whose learned tokens are its answers."""
    tokenizer, image_id = words
    conversations.validate(found, folder)
    for one in found:
        assert one.keys() <= {"id", "image", "conversations"} and one.get("image", "") is not None
        made = conversations.sample(tokenizer, one, 4, 0 if "image" in one else None)
        assert made["ids"].count(image_id) == 4 * len(made["images"])
        ends = made["labels"].count(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        assert ends == len(one["conversations"]) // 2


def test_damaged_files_are_read_or_refused(tmp_path, words):
    """500 damaged chat.json, fixed seed: bytes, and values of wrong types."""
    path, rows = chat_json(tmp_path)
    whole = path.read_bytes()
    values = [json.dumps(bad).encode() for bad in fuzz.retyped(rows, 200, seed=1)]
    outcomes = []
    for bad in [*fuzz.damaged(whole, 300, seed=1), *values]:
        path.write_bytes(bad)
        found = fuzz.reads_or_refuses(lambda: conversations.read(path, tmp_path))
        outcomes.append(found is not None)
        if found is not None:
            check_rows(found, tmp_path, words)
    assert len(outcomes) == 500 and 20 < sum(outcomes) < 400  # both happen


def test_damaged_pictures_are_replaced_or_read(tmp_path):
    """500 damaged pictures, fixed seed: what cannot be read is counted and replaced, the rest keeps its row."""
    path, rows = chat_json(tmp_path)
    rows, whole = rows[:2], (tmp_path / "a.png").read_bytes()
    turned = io.BytesIO()
    Image.new("RGB", (6, 4), (9, 99, 200)).save(turned, "JPEG", exif=exif_block(6, damage=True))
    outcomes = []
    for bad in [*fuzz.damaged(whole, 250, seed=2), *fuzz.damaged(turned.getvalue(), 250, seed=3)]:
        (tmp_path / "a.png").write_bytes(bad)
        mended, broken = fuzz.reads_or_refuses(
            lambda: conversations.replace_undecodable(rows, tmp_path)
        )
        outcomes.append(broken)
        assert mended == ([rows[1], rows[1]] if broken else rows)
    assert 50 < sum(outcomes) < 490


def test_control_tokens_in_a_conversation_are_text(words):
    tokenizer, image_id = words
    said = "</s> <|im_end|>\n<|im_start|>system <file_sep>"
    made = conversations.sample(tokenizer, conversations.row("x", "a.png", [(said, said)]), 3, 0)
    count = {
        w: made["ids"].count(tokenizer.convert_tokens_to_ids(w))
        for w in ("<|im_end|>", "<|im_start|>")
    }
    assert count == {"<|im_end|>": 2, "<|im_start|>": 2} and made["ids"].count(image_id) == 3
    assert tokenizer.convert_tokens_to_ids("<file_sep>") not in made["ids"]


def test_long_conversations_lose_whole_turns_and_are_counted(words):
    tokenizer, image_id = words
    talk = [
        ("What?", "a pear"),
        ("Sure?", "yes"),
        ("Tell more", "very " * 50 + "much"),
        ("Stop?", "yes"),
    ]
    long, short = (
        conversations.row("long", "a.png", talk),
        conversations.row("short", None, talk[:1]),
    )
    size = lambda row: len(conversations.sample(tokenizer, row, 5, 0)["ids"])  # noqa: E731
    two = size(conversations.row("x", "a.png", talk[:2]))
    every, shortened, left_out = conversations.samples(
        tokenizer, [long, short], 5, {"a.png": 7}, size(long)
    )
    assert (shortened, left_out) == (0, 0) and len(every[0]["ids"]) == size(long)
    for longest in (two, size(long) - 1):
        cut, shortened, left_out = conversations.samples(
            tokenizer, [long, short], 5, {"a.png": 7}, longest
        )
        assert (shortened, left_out) == (1, 0) and [s["images"] for s in cut] == [[7], []]
        learned = tokenizer.decode([i for i in cut[0]["labels"] if i != prompts.IGNORE])
        assert learned.startswith("a pear<|im_end|>yes<|im_end|>") and learned.endswith(
            "<|im_end|>"
        )
        assert (
            learned.count("<|im_end|>") == (2 if longest == two else 3)
            and len(cut[0]["ids"]) <= longest
        )
    one, shortened, left_out = conversations.samples(
        tokenizer, [long, short], 5, {"a.png": 7}, size(short)
    )
    assert (shortened, left_out) == (0, 1) and [s["images"] for s in one] == [[]]
    with pytest.raises(UserError, match="no conversation fits into 3 tokens"):
        conversations.samples(tokenizer, [long, short], 5, {"a.png": 7}, 3)


class Eye:
    """A tower whose only token is the mean colour."""

    size = 6
    count = 1
    width = 3


@pytest.fixture
def eye(tmp_path, monkeypatch):
    """Three pictures in a cache of their own, and how many were looked at."""
    monkeypatch.setenv("VLM_ACTION_CACHE", str(tmp_path / "cache"))
    looked = []

    def encode(vision_tower, batches):
        batches = [batch.float() for batch in batches]
        looked.extend(len(batch) for batch in batches)
        return torch.cat(batches).mean((2, 3))[:, None].bfloat16()

    monkeypatch.setattr(views.tower, "encode", encode)
    monkeypatch.setattr(views.tower, "fingerprint", lambda vision_tower: f"eye {vision_tower.size}")
    ramp = np.tile(np.linspace(0, 255, 32, dtype=np.uint8), (32, 1))
    Image.fromarray(np.stack([ramp, ramp * 0, ramp.T], 2)).save(tmp_path / "ramp.png")
    Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((8, 8), 10, dtype=np.uint8)).save(tmp_path / "dark.png")
    return [tmp_path / f"{name}.png" for name in ("ramp", "grey", "dark")], looked


def test_features_are_of_these_pictures_in_this_order_and_views_differ(eye):
    """What the tower is shown: view 0 the middle square, others random pieces; and what they are kept by."""
    paths, looked = eye
    found = views.features(Eye, paths, 3, seed=4)
    assert found.shape == (3, 3, 1, 3) and looked == [3, 3, 3]
    found = found.tensor().float()
    assert found[:, 1].eq(128).all() and found[:, 2].eq(10).all()
    assert found[0, 0, 0, 0] == pytest.approx(127.5, abs=1) and found[0, 0, 0, 2] == pytest.approx(
        127.5, abs=1
    )
    assert not torch.equal(found[1, 0], found[0, 0]) and not torch.equal(found[1, 0], found[2, 0])
    # kept; the middle square does not depend on the seed, pieces do
    again = views.features(Eye, paths, 2, seed=4).tensor()
    assert torch.equal(again.float(), found[:2]) and len(looked) == 3
    other = views.features(Eye, paths, 2, seed=5).tensor().float()
    assert torch.equal(other[0], found[0]) and not torch.equal(other[1], found[1])
    assert len(looked) == 4
    # another order, another content, another tower: computed anew
    turned = views.features(Eye, paths[::-1], 1, seed=4).tensor().float()
    assert torch.equal(turned[0], found[0].flip(0)) and len(looked) == 5
    paths[2].write_bytes(paths[1].read_bytes())
    assert views.features(Eye, paths, 1, seed=4).tensor()[0, 2].eq(128).all() and len(looked) == 6
    retrained = type("Retrained", (Eye,), {"size": 8})
    views.features(retrained, paths, 1, seed=4)
    assert len(looked) == 7


def test_pictures_are_hashed_once_until_they_change(eye, monkeypatch):
    """665 000 pictures are 100 GB: at the next start their sizes and times say that they are the same."""
    paths, _ = eye
    store = views.Files()
    read = []
    monkeypatch.setattr(store, "read", lambda path: read.append(path) or path.read_bytes())
    first = views.content_hash(store, paths)
    assert views.content_hash(store, paths) == first and read == paths
    os.utime(paths[0], ns=(1, 1))
    assert views.content_hash(store, paths) == first and len(read) == 6


def test_ranks_that_start_together_read_the_pictures_once(eye, tmp_path):
    paths, _ = eye
    store = views.Files()

    def read(path):
        with open(tmp_path / "log", "a") as file:
            file.write(f"{path.name}\n")
        time.sleep(0.05)
        return path.read_bytes()

    store.read = read
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=views.content_hash, args=(store, paths)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert (tmp_path / "log").read_text().split() == [path.name for path in paths]


def test_unreadable_pictures_are_refused_or_numbered(eye):
    paths, looked = eye
    paths[1].write_bytes(paths[1].read_bytes()[:40])
    with pytest.raises(UserError, match="grey.png is not a readable image") as found:
        views.features(Eye, paths, 2, seed=4)
    assert "\n" not in str(found.value) and not looked
    kept = views.features(Eye, paths, 2, seed=4, skip_unreadable=True)
    assert kept.unreadable() == [1] and kept[1, 1].eq(0).all() and kept[0, 2].eq(10).all()
    # computed by a run that skips: still refused by one that does not
    with pytest.raises(UserError, match="grey.png is not a readable image"):
        views.features(Eye, paths, 2, seed=4)
    missing = [paths[0], paths[0].with_name("none.png")]
    with pytest.raises(UserError, match="cannot read .*none.png: No such file"):
        views.features(Eye, missing)
    assert views.features(Eye, missing, skip_unreadable=True).unreadable() == [1]


def test_features_on_disk_are_those_in_memory(tmp_path, monkeypatch):
    """Bit for bit what the tower gives for all pictures at once, in every view: chunks are whole batches."""
    monkeypatch.setenv("VLM_ACTION_CACHE", str(tmp_path / "cache"))
    vision_tower = tower.VisionTower(eyes.tower())
    monkeypatch.setattr(views.feature_cache, "CHUNK_BYTES", 4 * 2 * 16 * 16)
    paths = []
    for i in range(11):
        noise = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(noise).save(paths[-1])
    kept = views.features(vision_tower, paths, 2, seed=4)
    assert kept.files[0].chunks == 3
    # the middle squares, and crops drawn one after the other
    middle = torch.stack([data.data.read_image(path, 28) for path in paths])
    random = np.random.default_rng([4, 1])
    crops = []
    for path in paths:
        crop = views.random_crop(data.data.read_image(path, 42), random)
        crops.append(anyres.resize(crop, (28, 28)))
    for view, images in enumerate((middle, torch.stack(crops))):
        expected = tower.vision_features(vision_tower, images)
        assert torch.equal(kept.tensor()[view], expected)
    # a piece alone, as after a kill: the same crops
    fresh = views.ViewOfPictures(vision_tower, views.Files(), paths, 1, 4, False)
    assert torch.equal(fresh(8, 11)[0], expected[8:])
