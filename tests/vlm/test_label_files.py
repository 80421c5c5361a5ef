"""vlm/label_files.py: folders of photos, a file of labels that survives a kill, tables."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from tests import fuzz
from utils import data
from utils.run import UserError
from vlm import label_files

SETTINGS = {"model": "m", "prompts": ["What?"], "classes": ["fog", "sun"]}


def photo(path, seed=0, size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def weather(tmp_path):
    """Two classes, one photo deeper, two without a label, a hidden one, a text."""
    folder = tmp_path / "weather"
    for n, name in enumerate(
        ["sun/b.png", "sun/deep/a.png", "fog/c.png", "unlabelled/d.png", "e.png", "sun/.x/h.png"]
    ):
        photo(folder / name, n)
    (folder / "sun/notes.txt").write_text("no photo")
    return folder


def test_a_folder_has_a_sub_folder_for_each_class(weather):
    photos, names = label_files.read_folder(weather)
    assert names == ["fog", "sun"]
    found = [(p.name, p.label) for p in photos]
    assert found == [
        ("e.png", -1),
        ("fog/c.png", 0),
        ("sun/b.png", 1),
        ("sun/deep/a.png", 1),
        ("unlabelled/d.png", -1),
    ]
    # classes may be named, in another order, with one that has no photo
    photos, names = label_files.read_folder(weather, ("sun", "rain", "fog"))
    assert names == ["sun", "rain", "fog"] and [p.label for p in photos] == [-1, 2, 0, 0, -1]


def test_a_flat_folder_needs_the_names(tmp_path):
    photo(tmp_path / "flat/a.png")
    with pytest.raises(UserError, match="name --classes"):
        label_files.read_folder(tmp_path / "flat")
    photos, names = label_files.read_folder(tmp_path / "flat", ("fog", "sun"))
    assert names == ["fog", "sun"] and [p.label for p in photos] == [-1]


@pytest.mark.parametrize(
    ("classes", "line"),
    [
        (("sun",), "no sub-folder a class"),
        (("sun", "rain"), "sub-folder fog"),
        (("fog", "sun", "sun"), "one twice"),
    ],
)
def test_names_that_do_not_fit(weather, classes, line):
    with pytest.raises(UserError, match=line):
        label_files.read_folder(weather, classes)


def test_folders_without_photos(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        label_files.read_folder(tmp_path / "none")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="no photo in"):
        label_files.read_folder(tmp_path)


def write(path, rows, settings=SETTINGS):
    with label_files.appending(path, settings) as append:
        for row in rows:
            append(row)


def test_labels_are_lines_that_can_be_gone_on_with(tmp_path):
    path = tmp_path / "labels.jsonl"
    assert label_files.read_labels(path, SETTINGS) == {}
    write(path, [{"sha256": "1", "photo": "ä.png"}])
    write(path, [{"sha256": "2", "photo": "b.png"}])
    found = label_files.read_labels(path, SETTINGS)
    assert list(found) == ["1", "2"] and found["1"]["photo"] == "ä.png"
    # the settings once, at the top
    lines = path.read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines][0] == {"settings": SETTINGS} and len(lines) == 3


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_cut_last_line_is_dropped_and_written_again(tmp_path, cut):
    path = tmp_path / "labels.jsonl"
    write(path, [{"sha256": "1"}])
    whole = path.read_bytes()
    write(path, [{"sha256": "2", "photo": "b.png"}])
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(label_files.read_labels(path, SETTINGS)) == ["1"]
    assert path.read_bytes() == whole
    write(path, [{"sha256": "3"}])
    assert list(label_files.read_labels(path, SETTINGS)) == ["1", "3"]


@pytest.mark.parametrize("key", SETTINGS)
def test_labels_of_another_teacher_are_refused(tmp_path, key):
    path = tmp_path / "labels.jsonl"
    write(path, [{"sha256": "1"}])
    with pytest.raises(UserError, match=f"another {key}; name another --out"):
        label_files.read_labels(path, SETTINGS | {key: "other"})


def test_two_runs_do_not_write_one_file(tmp_path):
    path = tmp_path / "labels.jsonl"
    with label_files.appending(path, SETTINGS) as append:
        append({"sha256": "1"})
        # what was appended is there at once
        assert list(label_files.read_labels(path, SETTINGS)) == ["1"]
        with pytest.raises(UserError, match="another run writes"):
            write(path, [])
    # a place that cannot be written is one line, too
    with pytest.raises(UserError, match="cannot write"):
        write(path / "labels.jsonl", [])


def test_damaged_labels_are_refused_in_one_line(tmp_path):
    path = tmp_path / "labels.jsonl"
    write(path, [{"sha256": str(n), "photo": "a.png"} for n in range(3)])
    whole = path.read_bytes()
    for damaged in fuzz.damaged(whole, 500):
        path.write_bytes(damaged)
        try:
            found = label_files.read_labels(path, SETTINGS)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        assert all(isinstance(key, str) and isinstance(row, dict) for key, row in found.items())


def test_a_picture_counts_once_and_keeps_its_label(weather):
    content = (weather / "sun/b.png").read_bytes()
    (weather / "unlabelled/again.png").write_bytes(content)
    (weather / "a.png").write_bytes(content)
    photos, _ = label_files.read_folder(weather)
    found = label_files.without_duplicates(photos)
    assert len(photos) == 7 and len(found) == 5
    assert ("sun/b.png", 1) in [(p.name, p.label) for p in found]
    assert [p.name for p in found] == sorted(p.name for p in found)


def test_some_photos(weather):
    photos, _ = label_files.read_folder(weather)
    assert label_files.some(photos, 0) == photos
    found = label_files.some(photos, 3, seed=1)
    assert len(set(found)) == 3 and found == sorted(found) and set(found) < set(photos)
    assert found != label_files.some(photos, 3, seed=2) or found != label_files.some(photos, 3)


def test_tables_have_no_formulas(tmp_path):
    path = tmp_path / "t.csv"
    label_files.write_table(path, ["photo", "label"], [("=1+1.png", "a, b"), ("ü.png", "c")])
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["photo", "label"], ["'=1+1.png", "a, b"], ["ü.png", "c"]]


def test_held_out_fruit_has_each_picture_once():
    """The data set's test part holds 661 pictures, each of them twice."""
    fruit = data.groceries(64)
    chosen = label_files.distinct_held_out(fruit)
    assert len(chosen) == 661 and {fruit.split[i] for i in chosen} == {"test"}
    folder = label_files.fruit_folder(0.5)
    photos, names = label_files.read_folder(folder)
    assert len(photos) == len(label_files.without_duplicates(photos)) == 661 and len(names) == 14
    known = sum(p.label >= 0 for p in photos)
    assert abs(known - 330) <= 7
    # none of them is one that the teacher was trained on
    numbers = {int(p.path.stem) for p in photos}
    assert min(numbers) >= 675 and max(numbers) < 1336
