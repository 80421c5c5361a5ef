"""models/questions.py: files of A-OKVQA and VQA v2, choices by likelihood, both accuracies, files that are refused."""

import json

import pytest
import torch
from PIL import Image

from models import captions, llava_io, questions
from utils.run import UserError

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
    (one,) = questions.read(written(folder, [AOKVQA]), images=folder)
    assert one["image"].name == "000000000007.jpg" and one["choices"][one["right"]] == "dog"
    asked = {"questions": [{"question_id": 90, "image_id": 9, "question": "What colour?"}]}
    people = {"annotations": [{"question_id": 90, "answers": [{"answer": "red"}] * 10}]}
    (two,) = questions.read(written(folder, asked), written(folder, people, "people.json"), folder)
    assert two["answers"] == ["red"] * 10 and two["choices"] is None and "val2014" in two["image"].name


@pytest.mark.parametrize(
    "change, says",
    [
        ({"image_id": 8}, "there is none of 000000000008.jpg"), ({"correct_choice_idx": 4}, "of 4 choices"),
        ({"correct_choice_idx": None}, "of 4 choices"), ({"question": None}, "no text 'question'"),
        ({"choices": None, "direct_answers": None}, "neither"), ({"direct_answers": ["dog"]}, "two people"),
        ({"choices": ["cat", "", "cow", "owl"]}, "not empty"), ({"image_id": None}, "no name"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named(folder, change, says):
    with pytest.raises(UserError, match=f"question 1.*{says}"):
        questions.read(written(folder, [AOKVQA, AOKVQA | change]), images=folder)


def test_files_that_are_none_of_both_are_refused(folder):
    for content, says in (([], "no list of questions"), ({"rows": []}, "no list 'questions'"),
                          ({"questions": [{}]}, "--annotations"), ("text", "no list of questions")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            questions.read(written(folder, content), images=folder)
    asked, people = written(folder, {"questions": [{}]}), written(folder, {"annotations": []}, "people.json")
    with pytest.raises(UserError, match="lacks 'question_id'"):
        questions.read(asked, people, folder)
    (folder / "broken.json").write_text("{")
    with pytest.raises(UserError, match="no readable JSON"):
        questions.read(folder / "broken.json")


def test_scores_of_a_known_case():
    row = {"choices": AOKVQA["choices"], "right": 1, "answers": AOKVQA["direct_answers"]}
    done = [row | {"said": "dog", "chosen": 1, "matched": 1}, row | {"said": "puppy", "chosen": 0, "matched": None}]
    done.append({"choices": None, "answers": ["a"] * 9 + ["b"], "said": "b"})
    found = questions.score(done)
    assert (found["chosen by likelihood"], found["named in what was said"], found["chance"]) == (0.5, 0.5, 0.25)
    assert found["A-OKVQA direct answer"] == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert found["VQA accuracy"] == pytest.approx((1 + 1 + captions.vqa_accuracy("b", ["a"] * 9 + ["b"])) / 3)


@pytest.fixture(scope="module")
def speaking():
    return llava_io.load(str(questions.llava.WEIGHTS))


def test_the_choice_is_the_one_that_transformers_finds_likeliest(speaking, parity):
    """The photo and the whole text in one reading, one choice after the other, against the remembered question."""
    tokenizer, model = speaking
    features = torch.randn(1, 49, 1280)
    choices = ["orange", "Royal Gala apple", "watermelon"]
    mine = questions.evaluate_vlm.likelihoods(tokenizer, model.float(), features, choices, "What is it?")[0]
    start, theirs = questions.evaluate_vlm.asked(tokenizer, model, "What is it?", features), []
    for text in choices:
        ids = tokenizer(f"{text}<|im_end|>", add_special_tokens=False, return_tensors="pt").input_ids
        whole = torch.cat([start, model.language.get_input_embeddings()(ids)], 1)
        with torch.no_grad():
            labels = torch.cat([torch.full(start.shape[:2], -100), ids], 1)
            theirs.append(-model.language(inputs_embeds=whole, labels=labels).loss * ids.shape[1])
    parity("Scores", "evaluate_vlm.likelihoods", "transformers loss, one reading", mine, torch.stack(theirs), 1e-4)
    best = questions.choose(tokenizer, model, features, "What is it?", choices)
    assert best == int(mine.argmax())


def test_the_whole_script_runs_on_its_own_file_and_on_the_same_file_by_name(tmp_path):
    cfg = questions.Config(count=6, out=str(tmp_path / "a"))
    found = questions.main(cfg)
    assert found["questions"] == 6 and found["chance"] == 0.25
    made = tmp_path / "a" / "pictures"
    again = questions.main(
        questions.Config(file=str(made / "questions.json"), images=str(made), count=0, out=str(tmp_path / "b"))
    )
    assert again == found
    assert len(json.loads((tmp_path / "b" / "answers.json").read_text())) == 6


def test_bad_flags_are_refused_before_anything_is_written(tmp_path):
    for flags, says in (
        ({"count": -1}, "--count"),
        ({"images": "x"}, "--file"),
        ({"file": "none.json"}, "no readable"),
    ):
        with pytest.raises(UserError, match=says):
            questions.main(questions.Config(**{"out": str(tmp_path / "out")} | flags))
    assert not (tmp_path / "out").exists()
