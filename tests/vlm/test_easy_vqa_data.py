"""vlm/easy_vqa_data.py: true answers, rows of LLaVA's format, answers that leak between turns, files whole or not."""

import json
from collections import Counter

import pytest

from utils.run import UserError
from vlm import conversations
from vlm import easy_vqa_data as easy


@pytest.fixture(scope="module")
def train():
    return easy.questions("train")


@pytest.fixture(scope="module")
def turns_of_images(train):
    found = {}
    for question in train:
        found.setdefault(question.image, []).append((question.text, question.answer))
    return found


def test_questions_are_those_of_the_split(train):
    test = easy.questions("test")
    assert len(train) == 38_575 and len(test) == 9673
    assert {question.answer for question in train} == set(easy.ANSWERS) and len(easy.ANSWERS) == 13
    assert max(question.image for question in test) == 999
    counts = Counter(question.kind for question in test)
    assert counts["colour"] == 1280 and counts["shape"] == 1257
    assert counts["yes/no"] + counts["negated yes/no"] == 7136
    with pytest.raises(UserError, match="no 'val'"):
        easy.questions("val")


def test_the_rule_answers_every_question_of_a_settled_picture(train, turns_of_images):
    """A scene that fits all answers about a picture exists, and the rule gives each of them."""
    settled = 0
    for turns in turns_of_images.values():
        scenes = easy.scenes_of(turns)
        assert scenes
        settled += len(scenes) == 1
        for scene in scenes:
            assert all(easy.answer_for(text, scene) == answer for text, answer in turns)
    assert settled == 3578


def test_the_rule_knows_negation_and_presupposition():
    scene = ("red", "circle")
    assert easy.answer_for("is there a red shape in the image?", scene) == "yes"
    assert easy.answer_for("is no circle present?", scene) == "no"
    assert easy.answer_for("does the image not contain a teal shape?", scene) == "yes"
    assert easy.answer_for("what is the color of the circle?", scene) == "red"
    assert easy.answer_for("what is the red shape?", scene) == "circle"
    assert easy.consistent("what is the blue shape?", None, [scene]) == []
    assert easy.consistent("is a circle present?", "no", [scene]) == []


@pytest.mark.parametrize(
    "turns, settled",
    [
        # a question alone settles nothing
        ([("what is the red shape?", "circle")], 0),
        # the same again, and its negation
        ([("is there a circle?", "yes"), ("is no circle present?", "no")], 1),
        # the words of a question tell the colour, its answer the shape
        ([("what is the red shape?", "circle"), ("what color is the shape?", "red")], 1),
        # two shapes excluded leave the third; excluding one leaves two
        ([("is there a circle?", "no"), ("is there a triangle?", "no"),
          ("what shape is present?", "rectangle")], 1),
        ([("is there a circle?", "no"), ("what shape is present?", "rectangle")], 0),
        # a colour says nothing about the shape
        ([("what color is the shape?", "red"), ("what shape is present?", "circle")], 0),
    ],
)  # fmt: skip
def test_leakage_counts_answers_that_earlier_turns_settle(turns, settled):
    assert easy.leakage(turns) == settled


def test_rows_hold_every_question_once_in_random_order(turns_of_images):
    whole = easy.rows("train", 0, 0)
    assert len(whole) == 4000 and whole == easy.rows("train", 0, 0)
    unsorted = 0
    for row in whole:
        turns = easy.plain_turns(row)
        published = turns_of_images[int(row["image"][:4])]
        assert sorted(turns) == sorted(published)
        unsorted += turns != published
    assert unsorted > 3900
    assert easy.rows("train", 1, 0)[0] != whole[0]


def test_rows_by_turns_images_and_questions_of_a_picture():
    single = easy.rows("train", images=20, per_image=5)
    pairs = easy.rows("train", 0, 2, images=20, per_image=5)
    assert {len(row["conversations"]) for row in single} == {2}
    assert max(Counter(row["image"] for row in single).values()) == 5
    assert {row["image"] for row in single} == {f"{i:04}.png" for i in range(20)}
    # the same questions, two to a row
    assert [t for row in pairs for t in easy.plain_turns(row)] == [
        t for row in single for t in easy.plain_turns(row)
    ]
    assert len({row["id"] for row in pairs}) == len(pairs)
    assert all(len(row["conversations"]) <= 4 for row in pairs)
    # one question a row leaks nothing, more do
    assert sum(easy.leakage(easy.plain_turns(row)) for row in single) == 0
    assert sum(easy.leakage(easy.plain_turns(row)) for row in pairs) > 0


def test_balanced_answers_are_equally_frequent_for_every_wording(train):
    kept = easy.balance(train)
    counts = {}
    for question in kept:
        counts.setdefault(question.text, Counter())[question.answer] += 1
    before = {}
    for question in train:
        before.setdefault(question.text, Counter())[question.answer] += 1
    for text, found in counts.items():
        assert set(found.values()) == {min(before[text].values())}
        assert found.keys() == before[text].keys()
    assert len(counts) == 107 and set(kept) <= set(train)
    assert kept == easy.balance(train) != easy.balance(train, 1)
    # through the rows, of the pictures that were chosen
    rows = easy.rows("train", images=400, balanced=True)
    answers = [turn for row in rows for turn in easy.plain_turns(row)]
    kinds = Counter(easy.kind_of(*turn) for turn in answers)
    assert Counter(a for _, a in answers)["yes"] == Counter(a for _, a in answers)["no"]
    assert len(answers) < sum(question.image < 400 for question in train)
    assert kinds["colour"] > 0 and {row["image"] for row in rows} <= {
        f"{i:04}.png" for i in range(400)
    }


def test_a_negative_number_is_refused():
    for flags in ((0, -1), (0, 1, -1), (0, 1, 0, -2)):
        with pytest.raises(UserError, match="0 or more"):
            easy.rows("train", *flags)


def test_the_command_writes_rows_that_the_trainer_reads(tmp_path):
    cfg = easy.Config(images=6, per_image=2, out=str(tmp_path / "out"))
    metrics = easy.main(cfg)
    pictures = tmp_path / "out/pictures"
    rows = conversations.read(tmp_path / "out/chat.json", pictures)
    assert len(rows) == metrics["rows"] == metrics["questions"] == 12
    assert metrics["answers settled by earlier turns"] == 0
    # the pictures are those that were asked about, byte for byte
    assert sorted(p.name for p in pictures.iterdir()) == sorted({row["image"] for row in rows})
    for path in pictures.iterdir():
        assert path.read_bytes() == easy.picture("train", int(path.stem)).read_bytes()
    # again with fewer: no picture of the first run is left
    easy.main(easy.Config(images=2, out=str(tmp_path / "out")))
    assert len(list(pictures.iterdir())) == 2
    assert not list((tmp_path / "out").glob(".*"))


def test_an_interrupted_write_leaves_the_old_files(tmp_path, monkeypatch):
    easy.write(tmp_path, "train", easy.rows("train", images=3))
    before = (tmp_path / "chat.json").read_bytes()
    copies = []

    def full(source, target):
        if len(copies) == 2:
            raise OSError(28, "no space")
        copies.append(target)

    monkeypatch.setattr(easy.shutil, "copyfile", full)
    with pytest.raises(UserError, match="No space left"):
        easy.write(tmp_path, "train", easy.rows("train", images=5))
    assert (tmp_path / "chat.json").read_bytes() == before
    assert len(list((tmp_path / "pictures").iterdir())) == 3
    assert len(json.loads(before)) == len(easy.rows("train", images=3))
    assert not list(tmp_path.glob(".*"))
