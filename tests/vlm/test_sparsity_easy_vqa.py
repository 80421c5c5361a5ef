"""vlm/sparsity_easy_vqa.py: runs that differ in their plug-ins alone, each picture with its own question."""

import json
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch

from utils.run import UserError
from vlm import sparsity_easy_vqa
from vlm.easy_vqa_data import ANSWERS
from vlm.easy_vqa_score import wilson
from vlm.train_config import changed

FOUND = {"losses": [2.0] * 12, "train_cpu_seconds": 120.0, "final_loss": 0.5}
ROW = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "tokens": 9, "CPU s an answer": 0.3}


def test_runs_differ_in_their_plugins_alone(tmp_path, monkeypatch):
    runs = []
    judged = []
    monkeypatch.setattr(
        sparsity_easy_vqa.train, "main", lambda cfg: runs.append(cfg) or dict(FOUND)
    )
    monkeypatch.setattr(
        sparsity_easy_vqa, "judge", lambda cfg, weights: judged.append(weights) or dict(ROW)
    )
    flags = {"images": 20, "steps": 8, "batch": 2, "count": 30}
    cfg = sparsity_easy_vqa.Config(**flags, out=str(tmp_path / "out"))
    found = sparsity_easy_vqa.main(cfg)
    assert [one.model.sparsity_plugins for one in runs] == list(sparsity_easy_vqa.RUNS.values())
    same = [changed(one, sparsity_plugins=(), out="") for one in runs]
    assert all(one == same[0] for one in same)
    assert same[0].train.steps == 8 and same[0].train.batch_size == 2
    assert same[0].data.template.endswith("vlm/configs/short.jinja") and not same[0].data.packing
    # open questions alone
    rows = json.loads((tmp_path / "out/rows/open.json").read_text())
    assert same[0].data.data_path == (str(tmp_path / "out/rows/open.json"),)
    answers = {row["conversations"][1]["value"] for row in rows}
    assert answers <= set(ANSWERS) - {"yes", "no"} and len(answers) > 5
    assert [str(path.parent) for path in judged] == [one.out for one in runs]
    row = found["prompt 9"]
    assert row["CPU min of training"] == 2 and row["loss"] == 0.5 and row["tokens"] == 9
    # the words alone do not tell the colour
    assert 0 < found["question only"]["accuracy"] < 0.6
    assert (tmp_path / "out/runs.png").is_file() and not plt.get_fignums()
    # those that are finished are read
    assert sparsity_easy_vqa.main(replace(cfg, reuse=True))["prompt 9"] == row and len(runs) == 4
    with pytest.raises(UserError, match="other flags"):
        sparsity_easy_vqa.main(replace(cfg, reuse=True, count=31))


def test_each_question_is_asked_with_its_own_picture(monkeypatch):
    """A stand-in that answers "red" to all; features that hold the number of their picture."""
    cfg = sparsity_easy_vqa.Config(count=60, timed=5)
    listed = sparsity_easy_vqa.open_questions(cfg)
    assert len(listed) == 60 and {q.kind for q in listed} == {"colour", "shape"}
    model = SimpleNamespace(vision="tower", count=9)
    alone = []

    def ask_all(tokenizer, model, questions, features):
        assert [int(x[0, 0]) for x in features] == [q.image for q in questions]
        log_p = torch.zeros(len(questions), len(ANSWERS))
        log_p[:, ANSWERS.index("red")] = 1
        return log_p, [""] * len(questions)

    def picture_features(vision, split, numbers):
        assert vision == "tower" and split == "test"
        return torch.tensor(numbers)[:, None, None].expand(-1, 49, 2)

    def seconds(tokenizer, model, questions, features):
        assert [int(x[0, 0]) for x in features] == [q.image for q in questions]
        alone.extend(questions)
        return 0.25

    monkeypatch.setattr(sparsity_easy_vqa.llava, "load", lambda path: ("tokenizer", model))
    monkeypatch.setattr(sparsity_easy_vqa.easy_vqa_score, "ask_all", ask_all)
    about = sparsity_easy_vqa.easy_vqa_baselines
    monkeypatch.setattr(about, "picture_features", picture_features)
    monkeypatch.setattr(sparsity_easy_vqa, "seconds_of_an_answer", seconds)
    row = sparsity_easy_vqa.judge(cfg, "weights")
    right = sum(q.answer == "red" for q in listed) / 60
    assert right > 0 and row["accuracy"] == pytest.approx(right)
    assert (row["low"], row["high"]) == wilson(row["accuracy"], len({q.image for q in listed}))
    assert row["tokens"] == 9 and row["CPU s an answer"] == 0.25
    assert len(alone) == 5 and {q.kind for q in alone} == {"colour", "shape"}


def test_the_time_of_an_answer_is_the_median_of_single_ones(monkeypatch):
    listed = sparsity_easy_vqa.open_questions(sparsity_easy_vqa.Config(count=3))
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 29.0])
    shown = []

    def ask(tokenizer, model, ids, seen):
        assert ids.shape == (1, 7) and seen.shape == (1, 49, 2)
        shown.append(float(seen[0, 0, 0]))

    turns = []

    def chat(tokenizer, asked, count):
        turns.append((asked, count))
        return list(range(7)), None

    monkeypatch.setattr(sparsity_easy_vqa.easy_vqa_score, "ask", ask)
    monkeypatch.setattr(sparsity_easy_vqa.prompts, "chat", chat)
    monkeypatch.setattr(sparsity_easy_vqa.time, "process_time", lambda: next(clock))
    features = torch.arange(3.0)[:, None, None].expand(-1, 49, 2)
    model = SimpleNamespace(count=9)
    assert sparsity_easy_vqa.seconds_of_an_answer("tokenizer", model, listed, features) == 2.0
    assert shown == [0, 1, 2] and [count for _, count in turns] == [9, 9, 9]
    assert [asked[0][0].rpartition("\n")[2] for asked, _ in turns] == [q.text for q in listed]


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"steps": 0}, "above 0"),
        ({"timed": 0}, "above 0"),
        ({"count": -1}, "0 or more"),
        ({"only": ("all",)}, "the runs are all 49"),
    ],
)
def test_bad_flags(flags, says, tmp_path):
    with pytest.raises(UserError, match=says):
        sparsity_easy_vqa.main(sparsity_easy_vqa.Config(**flags, out=str(tmp_path)))
