"""vlm/pseudo_label.py: parts, kept labels, tables, students; what is labelled again; the study's curve."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from utils.run import UserError
from vlm import label_endpoint, label_files, label_report, label_teacher, pseudo_label


def test_parts_are_apart_and_of_labelled_photos():
    truth = torch.tensor([0, 1, -1, 2] * 25)
    parts = pseudo_label.parts(truth, 0.4, seed=1)
    assert [len(part) for part in parts] == [45, 15, 15]
    every = torch.cat(parts)
    assert len(every.unique()) == 75 and (truth[every] >= 0).all()
    assert not torch.equal(parts[0], pseudo_label.parts(truth, 0.4, seed=2)[0])


def test_probabilities_of_both_teachers():
    log_p = [[[0.0, -1.0], [-3.0, -1.0]], [[-9.0, -8.0], [-2.0, -1.0]]]  # two photos, two prompts
    p, answers = pseudo_label.probabilities([{"log_p": x} for x in log_p], 2)
    first = torch.tensor([0.0, -1.0]).softmax(-1)
    second = torch.tensor([-3.0, -1.0]).softmax(-1)
    assert torch.allclose(p[0], (first + second) / 2)
    assert answers.tolist() == [[0, 1], [1, 1]]
    # votes
    p, answers = pseudo_label.probabilities([{"answers": [0, -1]}, {"answers": [1, 1]}], 2)
    assert answers.tolist() == [[0, 1], [-1, 1]] and p.argmax(-1).tolist() == [0, 1]
    assert p[1, 1] > p[0, 0]


@pytest.mark.parametrize(
    "rows",
    [
        [{"photo": "a"}],
        [{"answers": [0, 2]}],
        [{"answers": [0, -2]}],
        [{"answers": ["a"]}],
        [{"answers": [0]}, {"log_p": [[1.0, 2.0]]}],
        [{"log_p": [[1.0, 2.0, 3.0]]}],
        [{"log_p": [[1.0, float("nan")]]}],
        [{"log_p": [[1.0, 2.0]]}, {"log_p": [[1.0, 2.0], [1.0, 2.0]]}],
    ],
)
def test_rows_of_no_teacher_are_refused(rows):
    with pytest.raises(UserError, match="damaged; --fresh"):
        pseudo_label.probabilities(rows, 2)


@pytest.fixture
def weather(tmp_path):
    """Photos of one colour: two classes that a mean tells apart, 20 known ones of each, 20 unlabelled."""
    random = np.random.default_rng(0)
    for n in range(60):
        kind = n % 2
        colour = [40 + 150 * kind, int(random.integers(0, 80)), n]
        place = tmp_path / "weather" / (("fog", "sun")[kind] if n < 40 else "unlabelled")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9, 3), colour, np.uint8)).save(place / f"{n:02}.png")
    return tmp_path / "weather"


def features(vision, photos, device="cpu"):
    """In the place of a tower: the mean colour."""
    found = [np.asarray(Image.open(photo.path)).mean((0, 1)) for photo in photos]
    return torch.tensor(np.array(found)).float()


def teacher(wrong=(), seen=None):
    """In the place of label_teacher.label: the class of a photo, surely; of those in `wrong` the other, barely."""

    def label(model, photos, prompts, names, append, device="cpu"):
        for photo in photos:
            number = int(photo.path.stem)
            if seen is not None:
                seen.append(number)
            sure = -0.1 if number in wrong else 4.0
            log_p = [sure, 0.0] if number % 2 == 0 else [0.0, sure]
            row = {"photo": photo.name, "sha256": label_files.digest(photo.path)}
            append(row | {"log_p": [log_p] * len(prompts)})

    return label


@pytest.fixture
def run_it(weather, tmp_path, monkeypatch):
    monkeypatch.setattr(label_report, "features_of", features)

    def main(wrong=(), seen=None, **flags):
        monkeypatch.setattr(label_teacher, "label", teacher(wrong, seen))
        flags = {"folder": str(weather), "prompts": ("W",), "out": str(tmp_path / "out")} | flags
        return pseudo_label.main(pseudo_label.Config(**flags)), tmp_path / "out"

    return main


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_unsure_is_left_out_and_shown_to_a_person(run_it):
    wrong = {1, 4, 9, 12, 17, 20, 25, 30, 33, 38, 43, 46, 51}
    metrics, out = run_it(wrong)
    assert metrics["photos"] == 60 and metrics["unlabelled"] == 20 and metrics["judged"] == 10
    assert metrics["accuracy of what is kept"] == 1 and metrics["teacher"] < 1
    assert metrics["coverage"] == metrics["teacher"]
    kept = table(out / "pseudo_labels.csv")
    assert len(kept) == 17 and not {"43", "46", "51"} & {r["photo"][-6:-4] for r in kept}
    for row in kept:
        number = int(row["photo"][-6:-4])
        assert row["photo"].startswith("unlabelled/") and row["label"] == ("fog", "sun")[number % 2]
    # the least certain first
    review = table(out / "review.csv")
    assert {r["photo"][-6:-4] for r in review[:3]} == {"43", "46", "51"} and len(review) == 20
    assert all(r["true label"] == "" and r["second"] != r["label"] for r in review)
    student = metrics["student"]
    assert student["true and kept"] == student["pseudo-labels kept"] == 1
    assert (out / "confidence.png").stat().st_size > 5000


def test_students_learn_from_their_own_photos_and_labels(run_it, monkeypatch):
    shown = {}
    score = pseudo_label.student_accuracy

    def spy(x, label, learn, truth, judge):
        shown[len(shown)] = (label.clone(), learn, judge)
        return score(x, label, learn, truth, judge)

    monkeypatch.setattr(pseudo_label, "student_accuracy", spy)
    wrong = set(range(40, 50))
    run_it(wrong, threshold=0.9, check=0.5)
    sizes = [len(learn) for _, learn, _ in shown.values()]
    assert sizes == [20, 20, 10, 40, 30]
    for mixed, learn, judge in shown.values():
        assert not set(learn.tolist()) & set(judge.tolist()) and len(judge) == 10
        # true labels where there are some (fog, then sun), the teacher's elsewhere
        assert mixed[:40].tolist() == [0] * 20 + [1] * 20
        assert all((mixed[i] == i % 2) == (i >= 50) for i in range(40, 60))


def test_students_without_photos_to_learn_from_are_left_out(run_it):
    metrics, _ = run_it(set(range(41, 60)), threshold=0.9)
    assert list(metrics["student"]) == [
        "true labels",
        "pseudo-labels",
        "true and pseudo-labels",
        "true and kept",
    ]


def test_a_stopped_run_goes_on_and_other_flags_are_refused(run_it):
    seen = []
    run_it(seen=seen)
    assert sorted(seen) == list(range(60))
    path = run_it(seen=seen)[1] / "labels.jsonl"
    assert len(seen) == 60
    # three labels are lost, and made again
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-3]) + lines[-3][:20])
    metrics, _ = run_it(seen=seen)
    assert len(seen) == 63 and metrics["photos"] == 60
    config = (path.parent / "config.json").read_text()
    with pytest.raises(UserError, match="another prompts"):
        run_it(prompts=("Other",))
    assert (path.parent / "config.json").read_text() == config
    seen.clear()
    run_it(seen=seen, prompts=("Other",), fresh=True)
    assert len(seen) == 60


def test_without_true_labels_a_threshold_must_be_named(weather, run_it):
    names = ("fog", "sun")
    flat = weather / "unlabelled"
    seen = []
    with pytest.raises(UserError, match="set --threshold"):
        run_it(folder=str(flat), classes=names, seen=seen)
    # before anything is labelled
    assert not seen
    metrics, out = run_it(folder=str(flat), classes=names, threshold=0.8)
    assert "teacher" not in metrics and len(table(out / "pseudo_labels.csv")) == 20


def test_questions_about_fruit_for_a_folder_are_said(run_it, capsys):
    run_it()
    assert "--prompts" not in capsys.readouterr().out
    run_it(prompts=pseudo_label.Config.prompts, fresh=True)
    assert "ask about your photos with --prompts" in capsys.readouterr().out


def test_a_dry_run_counts_and_asks_nothing(run_it, monkeypatch):
    def label(*about):
        raise AssertionError("asked")

    monkeypatch.setattr(label_endpoint, "label", label)
    flags = {"endpoint": "http://127.0.0.1:1/v1", "model": "m", "price_in": 1.0, "dry_run": True}
    metrics, out = run_it(**flags)
    assert metrics["photos"] == metrics["requests"] == 60 and metrics["cost"] > 0
    assert not (out / "labels.jsonl").exists()


@pytest.mark.parametrize(
    "flags",
    [
        {"prompts": ()},
        {"prompts": (" ",)},
        {"parallel": 0},
        {"price_in": -1.0},
        {"check": 1.0},
        {"accuracy": 0.0},
        {"threshold": 1.5},
        {"dry_run": True},
        {"endpoint": "http://127.0.0.1/v1"},
    ],
)
def test_flags_are_checked(flags, tmp_path):
    with pytest.raises(UserError):
        pseudo_label.main(pseudo_label.Config(out=str(tmp_path / "out"), **flags))
    assert not (tmp_path / "out").exists()


def test_tokens_that_were_counted_are_paid_for(run_it, monkeypatch):
    def label(cfg, photos, names, append):
        for photo in photos:
            row = {"photo": photo.name, "sha256": label_files.digest(photo.path)}
            row |= {"answers": [int(photo.path.stem) % 2], "tokens_in": 1000, "tokens_out": 10}
            append(row)

    monkeypatch.setattr(label_endpoint, "label", label)
    about = {"endpoint": "http://127.0.0.1:1/v1", "model": "m", "price_in": 1.0, "price_out": 10.0}
    metrics, out = run_it(**about)
    assert metrics["tokens in"] == 60_000 and metrics["cost"] == pytest.approx(0.066)
    assert metrics["teacher"] == 1
    settings = json.loads((out / "labels.jsonl").read_text().splitlines()[0])["settings"]
    assert settings["model"] == "m" and settings["classes"] == ["fog", "sun"]
