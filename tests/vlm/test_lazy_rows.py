"""Lazy rows: the same rows as the whole file read at once, in bounded memory, each checked when it is read."""

import json
import os

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from tests import fuzz
from utils.run import UserError
from vlm import conversations, lazy_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_ACTION_CACHE", str(tmp_path / "cache"))


def talk(i, picture=True):
    text = f'What is "[{i}]" \\ }}]{{, é中?'
    return conversations.row(
        f"row-{i}",
        "a.png" if picture else None,
        [(text, "a pear"), ("Sure?", "yes, very " + "so " * i)],
    )


def written(folder, found, kind="json", name="chat"):
    """Rows as a JSON array on one line or indented, or as JSON lines -> path; a.png lies beside it."""
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    path = folder / f"{name}.{kind}"
    if kind == "jsonl":
        text = "\n".join(json.dumps(one, ensure_ascii=False) for one in found)
    else:
        text = json.dumps(found, ensure_ascii=False, indent=2 if kind == "indented" else None)
    path.write_text(text, "utf-8")
    return path


TALKS = [talk(0), talk(1, picture=False), talk(2), talk(3) | {"extra": {"deep": [[{}], "]}"]}}]


@pytest.mark.parametrize("kind", ["json", "indented", "jsonl"])
def test_lazy_rows_are_those_of_the_whole_file(tmp_path, kind):
    path = written(tmp_path, TALKS, kind)
    lazy = lazy_rows.Rows(path)
    expected = [conversations.tidy(one) for one in TALKS]
    if kind != "jsonl":
        assert conversations.read(path, tmp_path) == expected
    assert list(lazy) == expected and len(lazy) == 4
    assert (
        lazy[-1] == expected[3] and lazy[np.int64(2)] == expected[2] and lazy[1:3] == expected[1:3]
    )
    with pytest.raises(IndexError):
        lazy[4]
    # a byte order mark, lines of Windows, blank lines
    for content in (
        b"\xef\xbb\xbf" + path.read_bytes(),
        path.read_bytes().replace(b"\n", b"\r\n\n"),
    ):
        path.write_bytes(content + b"\r\n \n")
        assert list(lazy_rows.Rows(path)) == expected


def test_the_index_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    path = written(tmp_path, TALKS)
    scanned = []
    offsets = lazy_rows.offsets
    monkeypatch.setattr(lazy_rows, "offsets", lambda *about: scanned.append(1) or offsets(*about))
    first = lazy_rows.Rows(path)
    assert list(lazy_rows.Rows(path)) == list(first) and len(scanned) == 1
    # the same size, another time of change
    os.utime(path, ns=(1, 1))
    assert len(lazy_rows.Rows(path)) == 4 and len(scanned) == 2
    # a damaged index is made anew
    kept = next((tmp_path / "cache" / "rows").glob("offsets-*"))
    for kept in (tmp_path / "cache" / "rows").glob("offsets-*"):
        kept.write_bytes(kept.read_bytes()[:-5])
    assert list(lazy_rows.Rows(path)) == list(lazy_rows.Rows(path)) and len(scanned) == 3
    with pytest.raises(UserError, match="chat.json has changed while it was being read"):
        first[0]


def test_a_bad_row_is_named_by_file_and_number_when_it_is_read(tmp_path):
    bad = [talk(0), talk(1) | {"image": None}, {"id": 3}, talk(3)]
    for kind in ("json", "jsonl"):
        lazy = lazy_rows.Rows(written(tmp_path, bad, kind))
        assert lazy[0]["id"] == "row-0" and lazy[3]["id"] == "row-3"
        for number, says in ((1, "1 words <image> for 0 pictures"), (2, "no list 'conversations'")):
            with pytest.raises(UserError, match=rf"chat.{kind}: row {number}.*{says}") as found:
                lazy[number]
            assert "\n" not in str(found.value)
    path = tmp_path / "lines.jsonl"
    good = json.dumps(talk(0)).encode()
    for line, says in (
        (b'{"id": 1', "row 1 is no readable JSON"), (b"[" * 100_000, "nested too deeply"),
        (b'{"id": "\xe9"}', "row 1 is not UTF-8"), (b'{"id": 1, "id": 2}', "'id' is there twice"),
    ):  # fmt: skip
        path.write_bytes(good + b"\n" + line + b"\n" + good)
        assert lazy_rows.Rows(path)[2]["id"] == "row-0"
        with pytest.raises(UserError, match=says) as found:
            lazy_rows.Rows(path)[1]
        assert "lines.jsonl" in str(found.value) and "\n" not in str(found.value)


ONE = json.dumps(talk(0))


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "is empty"), (" \n ", "holds no list"), ("[]", "holds no list"), (f"[{ONE}", "cut short after 1"),
        (f"[{ONE} {ONE}]", "near row 1"), (f"[{ONE},,{ONE}]", "near row 1"), (f"[3, {ONE}]", "near row 0"),
        (f'[{ONE}, "x"]', "near row 1"), (f"[{ONE}] x", "goes on after"), ('["x', "cut short after 0"),
        (f"[{ONE},]", "near row 1"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_list_of_rows_is_refused_at_once(tmp_path, content, says):
    path = tmp_path / "chat.json"
    path.write_text(content)
    with pytest.raises(UserError, match=says) as found:
        lazy_rows.Rows(path)
    assert "chat.json" in str(found.value) and "\n" not in str(found.value)
    with pytest.raises(UserError, match="cannot read .*none.json: No such file"):
        lazy_rows.Rows(tmp_path / "none.json")


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_damaged_files_give_rows_or_one_line(tmp_path, kind):
    """250 damaged files of each kind: what is read is what reading the whole file gives."""
    path = written(tmp_path, TALKS, kind)
    outcomes = []
    for bad in fuzz.damaged(path.read_bytes(), 250, seed=5):
        path.write_bytes(bad)
        found = fuzz.reads_or_refuses(lambda: list(lazy_rows.Rows(path)))
        outcomes.append(found is not None)
        if kind == "json" and bad.lstrip(lazy_rows.BYTE_ORDER_MARK).strip().startswith(b"["):
            # the whole file: refused for the same reasons, and for pictures that are not there
            whole = fuzz.reads_or_refuses(lambda: conversations.read(path, tmp_path))
            names = {one.get("image", "a.png") for one in found or ()}
            assert whole == found or (found and names != {"a.png"})
    assert 5 < sum(outcomes) < 200


def test_many_rows_take_sixteen_bytes_each(tmp_path):
    """200 000 rows, 40 MB as text and 500 MB as Python objects: the process grows by a few MB."""
    line = json.dumps(talk(1)).encode() + b"\n"
    path = tmp_path / "many.jsonl"
    path.write_bytes(line * 200_000)
    process = psutil.Process()

    def private():
        found = process.memory_info()
        return (found.rss - found.shared) / 2**20

    before = private()
    lazy = lazy_rows.Rows(path)
    for number in range(0, 200_000, 1000):
        assert lazy[number]["id"] == "row-1"
    assert len(lazy) == 200_000 and lazy.offsets.nbytes == 3_200_000
    assert private() - before < 30


def test_lengths_are_those_of_llava(tmp_path):
    """Words of all turns, below zero without a picture: LazySupervisedDataset.modality_lengths of LLaVA."""
    lazy = lazy_rows.Rows(written(tmp_path, TALKS))
    expected = []
    for one in TALKS:
        words = sum(len(turn["value"].split()) for turn in one["conversations"])
        expected.append(words if "image" in one else -words)
    assert lazy.modality_lengths().tolist() == expected
    # read once: a second time they come out of the cache
    lazy.offsets = torch.zeros(0, 2)
    assert lazy.modality_lengths().tolist() == expected


def test_several_files_with_weights(tmp_path):
    first = written(tmp_path, TALKS, "json", "first")
    second = written(tmp_path, TALKS[1:3], "jsonl", "second")
    joined, numbers, weights = lazy_rows.open_rows([first, second], [2, 1])
    assert len(joined) == 6 and weights == {str(first): 2, str(second): 1}
    assert [joined[i]["id"] for i in numbers[str(second)]] == ["row-1", "row-2"]
    assert [joined[i]["id"] for i in numbers[str(first)]] == [f"row-{i}" for i in range(4)]
    assert lazy_rows.all_lengths(joined).tolist() == [12, -12, 14, 15, -12, 14]
    assert lazy_rows.open_rows([first, second])[2] == {str(first): 4, str(second): 2}
    with pytest.raises(UserError, match="--weights: 1 numbers for 2 files"):
        lazy_rows.open_rows([first, second], [2])
    with pytest.raises(UserError, match="names a file twice"):
        lazy_rows.open_rows([first, first])
