"""vlm/benchmark_files.py, benchmark_rows.py, benchmark_samples.py: published layouts are read, others refused."""

import json

import pytest

from tests import fuzz
from tests.vlm import benchmark_folders as folders
from utils import data
from utils.run import UserError
from vlm import benchmark_files as files
from vlm import benchmark_rows, benchmark_samples, benchmark_scores, benchmarks, fruit_photos


def test_vqa_joins_questions_and_answers_by_their_ids(tmp_path):
    rows = files.read_vqa(folders.vqa(tmp_path))
    assert len(rows) == 12
    assert [row["answers"][0] for row in rows] == [f"cat {n}" for n in range(12)]
    assert rows[4]["id"] == 104 and rows[4]["image"].name == "COCO_val2014_000000000004.jpg"
    assert rows[4]["answer_type"] == "number" and rows[4]["question_type"] == "what is"


def test_vqa_of_a_test_split_has_no_answers(tmp_path):
    (folders.vqa(tmp_path) / "v2_mscoco_val2014_annotations.json").unlink()
    rows = files.read_vqa(tmp_path)
    assert len(rows) == 12 and all(row["answers"] is None for row in rows)


def test_annotations_of_another_split_are_not_taken(tmp_path):
    folders.vqa(tmp_path)
    notes = tmp_path / "v2_mscoco_val2014_annotations.json"
    notes.rename(tmp_path / "v2_mscoco_train2014_annotations.json")
    assert files.read_vqa(tmp_path)[0]["answers"] is None


def test_a_question_without_an_annotation_is_refused(tmp_path):
    path = folders.vqa(tmp_path) / "v2_mscoco_val2014_annotations.json"
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][1:]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="question 11 has no annotation"):
        files.read_vqa(tmp_path)


def test_textvqa(tmp_path):
    rows = files.read_textvqa(folders.textvqa(tmp_path))
    assert rows[2]["image"].name == "abc2.jpg" and rows[2]["answers"] == ["stop 2"] * 10


def test_aokvqa_has_choices_answers_and_difficult_questions(tmp_path):
    rows = files.read_aokvqa(folders.aokvqa(tmp_path))
    assert [row["difficult"] for row in rows] == [True, False, False, False]
    assert rows[3]["choices"][rows[3]["right"]] == "owl" and len(rows[3]["answers"]) == 10


def test_pope_is_read_line_by_line(tmp_path):
    rows = files.read_pope(folders.pope(tmp_path))
    assert [row["label"] for row in rows] == ["yes", "no", "yes", "no"]
    folders.pope(tmp_path, sampling="popular")
    with pytest.raises(
        UserError, match=r"coco_pope_popular.json, coco_pope_random.json: say which"
    ):
        files.read_pope(tmp_path)
    assert len(files.read_pope(tmp_path, "popular")) == 4


def test_scienceqa_takes_the_split_and_its_images(tmp_path):
    rows = files.read_scienceqa(folders.scienceqa(tmp_path))
    assert [row["id"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["image"] is not None for row in rows] == [True, False, False, True]
    assert rows[0]["image"].parent.name == "1" and rows[3]["image"].parent.name == "4"
    assert [row["grade"] for row in rows] == [3, 6, 9, 12] and rows[1]["hint"] == "Look."
    assert [row["id"] for row in files.read_scienceqa(tmp_path, "train")] == ["9"]


def test_captions_of_one_image_come_together(tmp_path):
    rows = files.read_captions(folders.captions(tmp_path))
    assert [row["id"] for row in rows] == [0, 1, 2]
    assert len(rows[1]["answers"]) == 5 and rows[1]["answers"][3] == "A cat no. 1, 3 times."


def test_folders_are_classes(tmp_path):
    rows = files.read_folders(folders.classes(tmp_path), "val")
    assert len(rows) == 6 and rows[0]["choices"] == ["great white shark", "hen", "n03"]
    assert [row["right"] for row in rows] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(UserError, match="a folder for each of two classes"):
        files.read_folders(tmp_path)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("pope", lambda one: one.pop("label"), "row 1: 'label' is neither yes nor no"),
        (
            "pope",
            lambda one: one.update(image="../x.jpg"),
            "row 1: '../x.jpg' is no name of a file",
        ),
        ("pope", lambda one: one.update(image="x.jpg"), "row 1: there is no x.jpg"),
        ("pope", lambda one: one.update(text="a <image>"), "row 1: 'text' is no text"),
        ("pope", lambda one: one.update(question_id=0), "has an id twice"),
    ],
)
def test_a_spoilt_row_is_named(tmp_path, name, spoil, said):
    path = folders.ALL[name](tmp_path) / "coco_pope_random.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    spoil(rows[1])
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        files.read_pope(tmp_path)


def test_a_missing_folder_or_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        files.read_pope(tmp_path / "x")
    with pytest.raises(UserError, match=r"there is no \*_pope_\*.json with 'random'"):
        files.read_pope(tmp_path, "random")


@pytest.mark.parametrize("name", [n for n in folders.ALL if n not in ("pope", "folders", "okvqa")])
def test_damaged_files_are_read_or_refused(tmp_path, name):
    """500 wrong types in a file of each format: rows, or one line."""
    read = benchmarks.BENCHMARKS[name].read
    folders.ALL[name](tmp_path)
    path = max(tmp_path.rglob("*.json"), key=lambda p: p.stat().st_size)
    content = json.loads(path.read_text())
    kept = 0
    for bad in fuzz.retyped(content, 100):
        path.write_text(json.dumps(bad))
        rows = fuzz.reads_or_refuses(lambda: read(tmp_path))
        kept += rows is not None
        for row in rows or ():
            assert row["image"] is None or row["image"].is_file()
            assert row["right"] is None or 0 <= row["right"] < len(row["choices"])
    assert kept < 100


def test_pope_about_fruit_asks_for_what_is_there_and_as_often_for_what_is_not(tmp_path):
    fruit = data.groceries(64)
    ways = benchmark_samples.write_pope(tmp_path, 40)
    assert ways == ("random", "popular", "adversarial")
    kinds = {name: k for k, name in enumerate(fruit_photos.NAMES[s] for s in fruit.fine_names)}
    learn, heldout = fruit_photos.split(fruit)
    frequent = fruit.fine[learn].bincount().argsort(descending=True).tolist()
    absent = {}
    for way in ways:
        rows = files.read_pope(tmp_path, way)
        assert len(rows) == 40 and [row["label"] for row in rows] == ["yes", "no"] * 20
        for row in rows:
            number = int(row["image"].stem)
            assert number in heldout
            asked = row["question"].removesuffix(" in the image?").split(" ", 3)[3]
            assert (kinds[asked] == int(fruit.fine[number])) == (row["label"] == "yes")
            if row["label"] == "no":
                absent.setdefault(way, []).append((int(fruit.fine[number]), kinds[asked]))
    # adversarial: of the same group, or the other citrus fruit; popular: of the four most frequent
    group = {int(k): int(g) for k, g in zip(fruit.fine, fruit.coarse)}
    citrus = {fruit.fine_names.index(name) for name in benchmark_samples.CITRUS}
    assert all(group[a] == group[b] or {a, b} == citrus for a, b in absent["adversarial"])
    assert all(b in frequent[:4] for _, b in absent["popular"])
    assert len({b for _, b in absent["random"]}) > 6


def test_easy_vqa_in_the_layout_of_vqa_v2(tmp_path):
    (split,) = benchmark_samples.write_vqa(tmp_path, 30)
    rows = files.read_vqa(tmp_path, split)
    right = [row["answers"][0] for row in rows]
    found = benchmark_scores.vqa(rows, right)
    assert (
        len(rows) == 30
        and found["accuracy"] == 1
        and {"answer type yes/no", "answer type other"} <= set(found)
    )
    assert benchmark_scores.vqa(rows, ["x"] * 30)["accuracy"] == 0


def test_held_out_fruit_in_folders(tmp_path):
    (split,) = benchmark_samples.write_folders(tmp_path, 30)
    rows = files.read_folders(tmp_path, split)
    fruit = data.groceries(64)
    assert len(rows) == 30 and len(rows[0]["choices"]) == 14
    for row in rows:
        kind = fruit.fine_names[fruit.fine[int(row["image"].stem)]]
        assert row["choices"][row["right"]] == fruit_photos.NAMES[kind]


def test_an_id_is_needed():
    with pytest.raises(UserError, match="holds no rows"):
        benchmark_rows.check_ids([], "x.json")
