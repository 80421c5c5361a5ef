"""vlm/questions.py: files of A-OKVQA and VQA v2, choices by likelihood, both accuracies, files that are refused."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests import eyes, fuzz
from utils import data, run
from utils.run import UserError
from utils.text import clean
from vlm import (
    answer_metrics,
    easy_vqa_score,
    evaluate,
    fruit_photos,
    generation,
    llava,
    questions,
    vqa_data,
)

AOKVQA = {
    "question_id": "a", "image_id": 7, "question": "What is it?", "choices": ["cat", "dog", "cow", "owl"],
    "correct_choice_idx": 1, "direct_answers": ["dog"] * 6 + ["puppy"] * 4,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name in ("000000000007.jpg", "COCO_val2014_000000000009.jpg"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    return tmp_path


def written(folder, content, name="questions.json"):
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_both_formats_are_read(folder):
    (one,) = vqa_data.read(written(folder, [AOKVQA]), images=folder)
    assert one["image"].name == "000000000007.jpg" and one["choices"][one["right"]] == "dog"
    numbers = {90: "red", 91: "yes"}  # the answers stand in another order than the questions
    asked = {
        "questions": [
            {"question_id": n, "image_id": 9, "question": "What colour?"} for n in numbers
        ]
    }
    people = [
        {"question_id": n, "answers": [{"answer": said}] * 10}
        for n, said in reversed(numbers.items())
    ]
    answers = written(folder, {"annotations": people}, "people.json")
    two, three = vqa_data.read(written(folder, asked), answers, folder)
    assert (
        two["answers"] == ["red"] * 10 and two["choices"] is None and "val2014" in two["image"].name
    )
    assert three["answers"] == ["yes"] * 10


@pytest.mark.parametrize(
    "change, says",
    [
        ({"image_id": 8}, "there is none of 000000000008.jpg"), ({"correct_choice_idx": 4}, "of 4 choices"),
        ({"correct_choice_idx": None}, "of 4 choices"), ({"question": None}, "no text 'question'"),
        ({"choices": None, "direct_answers": None}, "neither"), ({"direct_answers": ["dog"]}, "two people"),
        ({"choices": ["cat", "", "cow", "owl"]}, "not empty"), ({"image_id": None}, "no name"),
        ({"correct_choice_idx": True}, "of 4 choices"), ({"image_id": True}, "no name"), ({"choices": "c"}, "no list"),
        ({"direct_answers": {"dog": 1, "cat": 2}}, "no list"), ({"question": "why " * 6000}, "1 to 2000 letters"),
        ({"question": "<image>?"}, "'question' is no text"), ({"image": "x" * 5000, "image_id": 8}, "none of"),
        ({"image": "a\0b", "image_id": 8}, "none of"), ({"image_id": 10**400}, "no name"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named(folder, change, says):
    with pytest.raises(UserError, match=f"question 1.*{says}"):
        vqa_data.read(written(folder, [AOKVQA, AOKVQA | change]), images=folder)


def test_files_that_are_none_of_both_are_refused(folder):
    for content, says in (([], "no list of questions"), ({"rows": []}, "no list 'questions'"),
                          ({"questions": [{}]}, "--annotations"), ("text", "no list of questions")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            vqa_data.read(written(folder, content), images=folder)
    with pytest.raises(UserError, match="--annotations goes with that only"):
        vqa_data.read(
            written(folder, [AOKVQA]), written(folder, {"annotations": []}, "people.json"), folder
        )
    twice = {"questions": [{"question_id": 90, "image_id": 9, "question": "What?"}] * 2}
    people = {"annotations": [{"question_id": 90, "answers": [{"answer": "red"}] * 10}]}
    with pytest.raises(UserError, match="question_id twice"):
        vqa_data.read(written(folder, twice), written(folder, people, "people.json"), folder)
    asked, people = (
        written(folder, {"questions": [{}]}),
        written(folder, {"annotations": []}, "people.json"),
    )
    with pytest.raises(UserError, match="lacks 'question_id'"):
        vqa_data.read(asked, people, folder)
    (folder / "broken.json").write_text("{")
    with pytest.raises(UserError, match="no readable JSON"):
        vqa_data.read(folder / "broken.json")


def right_or_refused(folder, asked, people=None):
    """What was read says what the file says, or nothing was read."""
    (folder / "questions.json").write_bytes(asked)
    if people is not None:
        (folder / "people.json").write_bytes(people)
    more = (folder / "people.json",) if people is not None else ("",)
    rows = fuzz.reads_or_refuses(lambda: vqa_data.read(folder / "questions.json", *more, folder))
    if rows is None:
        return False
    found = json.loads(asked.decode("utf-8-sig"))
    found = found["questions"] if isinstance(found, dict) else found
    assert len(rows) == len(found)
    for row, one in zip(rows, found):
        assert row["question"] == clean(one["question"]).strip() and row["image"].is_file()
        if people is None:
            assert (
                row["choices"] == one.get("choices")
                or [clean(c) for c in one["choices"]] == row["choices"]
            )
            assert row["choices"] is None or (
                type(row["right"]) is int and row["right"] == one["correct_choice_idx"]
            )
            assert row["answers"] is None or row["answers"] == [
                clean(a) for a in one["direct_answers"]
            ]
        else:
            said = {
                a["question_id"]: a for a in json.loads(people.decode("utf-8-sig"))["annotations"]
            }
            assert row["answers"] == [
                clean(x["answer"]) for x in said[one["question_id"]]["answers"]
            ]
    return True


@pytest.mark.parametrize("kind", ["A-OKVQA", "VQA v2 questions", "VQA v2 answers"])
def test_damaged_files_of_questions_are_read_right_or_refused(folder, kind):
    """500 damaged files of each kind, of a fixed seed."""
    asked = {
        "questions": [{"question_id": i, "image_id": i, "question": "What colour?"} for i in (7, 9)]
    }
    people = {
        "annotations": [{"question_id": i, "answers": [{"answer": "red"}] * 3} for i in (7, 9)]
    }
    good = {"A-OKVQA": [AOKVQA, AOKVQA], "VQA v2 questions": asked, "VQA v2 answers": people}[kind]
    whole = [json.dumps(x).encode() for x in (asked, people)]
    bad = [
        *fuzz.damaged(json.dumps(good).encode(), 250),
        *(json.dumps(x).encode() for x in fuzz.retyped(good, 250)),
    ]
    read = 0
    for content in bad:
        if kind == "A-OKVQA":
            read += right_or_refused(folder, content)
        else:
            read += right_or_refused(
                folder,
                *((content, whole[1]) if kind.endswith("questions") else (whole[0], content)),
            )
    assert 0 < read < len(bad)


def test_choices_are_chosen_and_answers_said_of_the_right_picture(monkeypatch):
    rows = [
        {"question": f"Q{i}?", "choices": ["x", "y"], "right": 1, "answers": None} for i in range(3)
    ]
    rows[1]["choices"] = None
    asked = []

    def embed(tokenizer, model, question, seen):
        return seen, question

    def rank(tokenizer, model, embeds, choices, question):
        assert embeds[1] == question
        asked.append((int(embeds[0][0, 0, 0]), question, choices))
        return torch.tensor([[-4.0, -5.0]])

    monkeypatch.setattr(questions.evaluate, "embed_prompt", embed)
    monkeypatch.setattr(questions.evaluate, "rank_answers", rank)
    said = lambda tokenizer, model, embeds: [f"y {int(embeds[0][0, 0, 0])} {embeds[1]}"]  # noqa: E731
    monkeypatch.setattr(questions.evaluate, "generate_answers", said)
    monkeypatch.setattr(questions, "plain", lambda text, tokenizer: text)
    model = SimpleNamespace(language=torch.nn.Linear(1, 1))
    # The mean of two tokens is -2, of four -1.25: another choice
    words = {"x": [1], "y": [1, 2, 3]}
    tokenizer = lambda text, **more: SimpleNamespace(input_ids=words[text])  # noqa: E731
    seen = torch.arange(3)[:, None, None, None].expand(-1, 1, 4, 16)
    for per_token, chosen in ((False, 0), (True, 1)):
        done = questions.answer(tokenizer, model, rows, seen, per_token)
        assert [r["said"] for r in done] == ["y 0 Q0?", "y 1 Q1?", "y 2 Q2?"]
        assert [r.get("chosen") for r in done] == [chosen, None, chosen] and done[0]["matched"] == 1
    assert asked == 2 * [(0, "Q0?", ["x", "y"]), (2, "Q2?", ["x", "y"])]


def test_the_same_choice_twice_is_right_both_times():
    row = {"choices": ["cat", "dog", "dog", "owl"], "right": 2, "answers": None, "said": "dog"}
    found = questions.score(
        [row | {"chosen": 1, "matched": 2}, row | {"chosen": 2, "matched": None}]
    )
    assert found["chosen by likelihood"] == 1.0 and found["named in the generated answer"] == 0.5


def test_the_photos_of_the_made_file_were_never_learned_from(monkeypatch, tmp_path):
    fruit = eyes.shop()
    monkeypatch.setattr(questions.data, "groceries", lambda size: fruit)
    rows = vqa_data.read(vqa_data.write_fruit(tmp_path, 12), images=tmp_path)
    names = [fruit_photos.NAMES[kind] for kind in fruit.fine_names]
    for row in rows:
        number = int(row["image"].stem)
        assert (
            number >= 20 and row["choices"][row["right"]] == names[number % 3] == row["answers"][0]
        )
        assert len(set(row["choices"])) == 4
    assert len({row["right"] for row in rows}) > 1  # not always in the same place


def test_scores_of_a_known_case():
    row = {"choices": AOKVQA["choices"], "right": 1, "answers": AOKVQA["direct_answers"]}
    done = [
        row | {"said": "dog", "chosen": 1, "matched": 1},
        row | {"said": "puppy", "chosen": 0, "matched": None},
    ]
    done.append({"choices": None, "answers": ["a"] * 9 + ["b"], "said": "b"})
    found = questions.score(done)
    assert (
        found["chosen by likelihood"],
        found["named in the generated answer"],
        found["chance"],
    ) == (
        0.5,
        0.5,
        0.25,
    )
    assert found["A-OKVQA direct answer"] == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert found["VQA accuracy"] == pytest.approx(
        (1 + 1 + answer_metrics.vqa_accuracy("b", ["a"] * 9 + ["b"])) / 3
    )


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    return eyes.talker(tmp_path_factory.mktemp("speaker"))


def test_the_choice_is_the_one_that_transformers_finds_likeliest(speaking, parity):
    """The photo and the whole text in one reading, one choice after the other, against the remembered question."""
    tokenizer, model = speaking
    features = torch.randn(1, 16, 16)
    choices = ["orange", "Royal Gala apple", "watermelon"]
    mine = questions.evaluate.answer_likelihoods(
        tokenizer, model, features, choices, "What is it?"
    )[0]
    start, theirs = (
        questions.evaluate.prompt_embeddings(tokenizer, model, "What is it?", features),
        [],
    )
    for text in choices:
        ids = tokenizer(
            f"{text}<|im_end|>", add_special_tokens=False, return_tensors="pt"
        ).input_ids
        whole = torch.cat([start, model.language.get_input_embeddings()(ids)], 1)
        with torch.no_grad():
            labels = torch.cat([torch.full(start.shape[:2], -100), ids], 1)
            theirs.append(-model.language(inputs_embeds=whole, labels=labels).loss * ids.shape[1])
    parity(
        "Scores",
        "evaluate.answer_likelihoods",
        "transformers loss, one reading",
        mine,
        torch.stack(theirs),
        1e-4,
    )
    best = questions.choose(tokenizer, model, start, "What is it?", choices)
    assert best == int(mine.argmax())


def test_the_whole_script_runs_on_its_own_file_and_on_the_same_file_by_name(
    speaking, monkeypatch, tmp_path
):
    monkeypatch.setattr(llava, "load", lambda *about: speaking)
    cfg = questions.Config(count=6, out=str(tmp_path / "a"))
    found = questions.main(cfg)
    assert found["questions"] == 6 and found["chance"] == 0.25
    made = tmp_path / "a" / "pictures"
    again = questions.main(
        questions.Config(
            file=str(made / "questions.json"), images=str(made), count=0, out=str(tmp_path / "b")
        )
    )
    assert again == found
    assert len(json.loads((tmp_path / "b" / "answers.json").read_text())) == 6


def test_a_model_with_tiles_is_asked_with_them(speaking, monkeypatch, tmp_path):
    """As llava.py asks, picture by picture; and where photos are shown whole it is refused."""
    tokenizer, model = speaking
    tiled = copy.copy(model)
    tiled.grids = [(28, 56), (56, 28), (56, 56)]
    tiled.newline = torch.randn(32)
    rows = []
    for number, size in enumerate([(50, 37), (20, 22), (90, 30)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        about = {"question": f"What is {number}?", "choices": ["pear", "fig"], "right": 0}
        rows.append(about | {"image": tmp_path / f"{number}.png", "answers": None})
    done = questions.answer(tokenizer, tiled, rows, questions.image_tokens(tiled, rows))
    for row, found in zip(rows, done, strict=True):
        photo = data.read_image(row["image"], 0)
        with run.autocast(torch.device("cpu")):
            said = generation.answer(tokenizer, tiled, photo, row["question"], max_new_tokens=12)
        assert found["said"] == said
    counts = [tokens.shape[1] for tokens in questions.image_tokens(tiled, rows)]
    assert counts == [tiled.count_of(size) for size in [(50, 37), (20, 22), (90, 30)]]
    assert len(set(counts)) > 1 and min(counts) > model.count
    monkeypatch.setattr(llava, "load", lambda *about: (tokenizer, tiled))
    for script in (evaluate, easy_vqa_score):
        with pytest.raises(UserError, match="was trained with tiles"):
            script.main(script.Config(model="x", out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_bad_flags_are_refused_before_anything_is_written(tmp_path):
    for flags, says in (
        ({"count": -1}, "--count"),
        ({"images": "x"}, "--file"),
        ({"file": "none.json"}, "cannot read"),
    ):
        with pytest.raises(UserError, match=says):
            questions.main(questions.Config(**{"out": str(tmp_path / "out")} | flags))
    assert not (tmp_path / "out").exists()
