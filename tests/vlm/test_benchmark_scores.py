"""vlm/benchmark_scores.py: the official rules on written cases."""

import pytest
import torch

from utils.run import UserError
from vlm import benchmark_scores as scores
from vlm import evaluate


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("yes", True),
        ("Yes, there is a dog.", True),
        ("no", False),
        ("No.", False),
        ("No, a cat", False),
        ("No, there is no dog", False),
        ("There is not a dog", False),
        # the second sentence is not read
        ("A dog. There is no cat", True),
        # the odd cases of the rule
        ("NO", True),
        ("nope", True),
        ("not-a-dog", True),
        ("", True),
        ("a dog,no cat", True),
        ("3.5 no", True),
    ],
)
def test_what_pope_takes_for_yes(text, yes):
    assert scores.says_yes(text) == yes


def test_pope_counts_four_cells():
    answers = ["yes", "yes", "no", "no", "yes", "no"]
    labels = ["yes", "no", "yes", "no", "yes", "no"]
    found = evaluate.pope(answers, labels)
    # 2 true yes, 1 false yes, 1 false no, 2 true no
    assert found == pytest.approx(
        {"accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes": 0.5}
    )
    unequal = evaluate.pope(["yes", "yes", "yes", "no"], ["yes", "no", "no", "yes"])
    assert unequal == pytest.approx(
        {"accuracy": 0.25, "precision": 1 / 3, "recall": 0.5, "f1": 0.4, "yes": 0.75}
    )


def test_pope_of_a_model_that_says_no_to_everything():
    found = scores.pope(["no", "no"], ["yes", "no"])
    assert found == {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes": 0}


@pytest.mark.parametrize(
    ("answers", "labels"), [([], []), (["a"], ["yes", "no"]), (["a"], ["maybe"])]
)
def test_pope_refuses(answers, labels):
    with pytest.raises(UserError):
        scores.pope(answers, labels)


def test_vqa_accuracy_by_type():
    ten = ["yes"] * 7 + ["no"] * 3
    rows = [
        {"answers": ten, "answer_type": "yes/no", "question_type": "is it"},
        {"answers": ten, "answer_type": "yes/no", "question_type": "are they"},
        {"answers": ["red"] * 2 + ["blue"] * 8, "answer_type": "other", "question_type": "is it"},
    ]
    found = scores.vqa(rows, ["Yes.", "no", "red"])
    # 3 of ten: 0.9; 2 of ten: 0.6
    assert found["accuracy"] == pytest.approx((1 + 0.9 + 0.6) / 3)
    assert found == pytest.approx({
        "accuracy": found["accuracy"], "answer type other": 0.6, "answer type yes/no": 0.95,
        "question type are they": 0.9, "question type is it": 0.8,
    })  # fmt: skip
    # TextVQA has no types
    assert set(scores.vqa([{"answers": ten}], ["yes"])) == {"accuracy"}
    assert evaluate.vqa_accuracy("yes", ten) == 1


def test_aokvqa_leaves_difficult_questions_out_of_direct_answers_only():
    rows = [
        {"choices": ["a", "b"], "right": 0, "answers": ["x"] * 10, "difficult": True},
        {"choices": ["a", "b"], "right": 1, "answers": ["b"] * 2 + ["c"] * 8, "difficult": False},
        # the same choice twice: by its words
        {"choices": ["a", "a"], "right": 1, "answers": ["b"] * 10, "difficult": False},
        {"choices": ["a", "b"], "right": 1, "answers": ["B"] * 10, "difficult": False},
    ]
    found = scores.aokvqa(rows, [1, 1, 0, None], ["x", "b", "b", "b"])
    assert found["multiple choice"] == 0.5
    # 2/3 for two people, 1 for ten; capital letters differ
    assert found["direct answer"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["left out of direct answer"] == 1


def test_scienceqa_classes_overlap():
    def row(subject, grade, hint="", image=None, right=0):
        return {
            "subject": f"{subject} science", "grade": grade, "hint": hint, "image": image, "right": right,
        }  # fmt: skip

    rows = [
        row("natural", 2, "Look.", "x.png"),
        row("natural", 6),
        row("social", 7, "", "y.png"),
        row("language", 12, "Read.", right=1),
    ]
    found = scores.science_qa(rows, [0, 1, 0, 1])
    assert found == {
        "NAT": 0.5, "SOC": 1, "LAN": 1, "TXT": 1, "IMG": 1, "NO": 0, "G1-6": 0.5, "G7-12": 1, "accuracy": 0.75,
    }  # fmt: skip


def test_top_k():
    log_p = torch.tensor([[-1.0, -2, -3], [-3, -2, -1], [-1, -2, -3]])
    truth = torch.tensor([0, 1, 2])
    assert scores.top_k(log_p, truth, 1) == pytest.approx(1 / 3)
    assert scores.top_k(log_p, truth, 2) == pytest.approx(2 / 3)
    assert scores.top_k(log_p, truth, 5) == 1
