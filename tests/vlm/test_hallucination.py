"""vlm/hallucination.py: rows of each training, which weights are scored, photos apart."""

import json

import pytest

from utils import data
from utils.run import UserError
from vlm import conversations, fruit_photos, hallucination


@pytest.fixture(scope="module")
def fruit():
    return data.groceries(64)


@pytest.mark.parametrize("name", hallucination.ARMS)
def test_rows_name_the_kind_and_ask_twice(name, fruit):
    sampling = hallucination.ARMS[name]
    rows = hallucination.rows_of(sampling)
    learn, _ = fruit_photos.split(fruit)
    assert len(rows) == 3 * len(learn)
    assert {int(row["image"][:4]) for row in rows} == set(learn.tolist())
    for i, first in enumerate(rows[::3]):
        number = int(first["image"][:4])
        kind = fruit_photos.name_of(fruit, number)
        asked = [conversations.turns_of(row) for row in rows[3 * i : 3 * i + 3]]
        ((question, answer),) = asked[0]
        assert question.endswith(fruit_photos.QUESTION) and answer == kind
        ((question, answer),) = asked[1]
        assert f" {kind} in the image?\nAnswer yes or no." in question and answer == "yes"
        ((question, answer),) = asked[2]
        there = f" {kind} in the image?" in question
        assert there == (sampling is None) and answer == ("yes" if there else "no")


def test_sets_of_negatives_differ():
    rows = {name: json.dumps(hallucination.rows_of(s)) for name, s in hallucination.ARMS.items()}
    assert len(set(rows.values())) == 3
    assert json.dumps(hallucination.rows_of("random", 1)) != rows["random negatives"]


def test_each_training_is_scored_with_its_own_weights(tmp_path, monkeypatch):
    trained = []
    scored = []

    def train(cfg, rows, folder):
        folder.mkdir()
        trained.append(
            (
                folder.name,
                rows[2]["conversations"][1]["value"],
                rows[2]["conversations"][0]["value"],
            )
        )
        return f"{folder.name} weights"

    def score(cfg, weights, parts, folder):
        assert set(parts) == {"random", "popular", "adversarial"} and len(parts["random"]) == 4
        scored.append((folder.name, str(weights)))
        return {"random": 0.5, "popular": 0.5, "adversarial": 0.5, "named": 0.7}

    monkeypatch.setattr(hallucination, "train", train)
    monkeypatch.setattr(hallucination, "score", score)
    cfg = hallucination.Config(out=str(tmp_path / "out"), questions=4, model="m")
    metrics = hallucination.main(cfg)
    folders = [name.replace(" ", "-") for name in hallucination.ARMS]
    assert scored == [("before", "m"), *((name, f"{name} weights") for name in folders)]
    assert [name for name, *_ in trained] == folders
    assert [answer for _, answer, _ in trained] == ["yes", "no", "no"]
    assert trained[1][2] != trained[2][2]
    assert list(metrics)[:4] == ["before", *hallucination.ARMS]
    assert (tmp_path / "out/hallucination.png").stat().st_size > 5000


@pytest.mark.parametrize("flags", [{"steps": 0}, {"questions": 0}, {"learning_rate": 0.0}])
def test_flags_are_checked(flags, tmp_path):
    with pytest.raises(UserError, match="above 0"):
        hallucination.main(hallucination.Config(out=str(tmp_path), **flags))
