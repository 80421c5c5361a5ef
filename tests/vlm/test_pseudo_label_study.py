"""vlm/pseudo_label_study.py: halves, ways of choosing pseudo-labels, what each share learns, intervals."""

import numpy as np
import pytest
import torch
from scipy import stats

from utils.run import UserError
from vlm import label_files, label_report, pseudo_label
from vlm import pseudo_label_study as study


def test_halves_have_as_many_of_each_class():
    truth = torch.tensor([0] * 10 + [1] * 6 + [2] * 5)
    pool, judge = study.halves(truth, np.random.default_rng(0))
    assert truth[pool].bincount().tolist() == [5, 3, 2] and truth[judge].bincount().tolist() == [
        5,
        3,
        3,
    ]
    assert len(torch.cat([pool, judge]).unique()) == 21
    other, _ = study.halves(truth, np.random.default_rng(1))
    assert set(other.tolist()) != set(pool.tolist())


def test_ways_of_choosing():
    sure = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    label = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    rest = torch.tensor([6, 5, 4, 3, 2, 1])
    found = study.ways(sure, label, rest)
    assert list(found) == list(study.WAYS)
    none, every, half, each = found.values()
    assert len(none) == 0 and torch.equal(every, rest)
    assert sorted(half.tolist()) == [1, 2, 3]
    # of class 0 the surest two of three, of class 1, too
    assert sorted(each.tolist()) == [1, 2, 4, 5]
    assert all(len(x) == 0 for x in study.ways(sure, label, rest[:0]).values())


@pytest.fixture
def easy():
    """200 photos of two classes that one feature tells; a teacher that is wrong on every fifth, and unsure."""
    torch.manual_seed(0)
    truth = torch.arange(200) % 2
    x = torch.randn(200, 3)
    x[:, 0] += 6 * truth
    label = torch.where(torch.arange(200) % 5 == 0, 1 - truth, truth)
    sure = torch.where(label == truth, 0.95, 0.6) + 0.001 * torch.rand(200)
    p = torch.stack([1 - sure, sure], 1)
    p = torch.where(label[:, None] == 1, p, p.flip(1))
    return x, p, truth


def test_every_share_learns_true_labels_of_its_own(easy, monkeypatch):
    x, p, truth = easy
    label = p.argmax(-1)
    seen = []

    def score(x, mixed, learn, truth, judge):
        seen.append((mixed, learn, judge))
        return 0.5

    monkeypatch.setattr(pseudo_label, "student_accuracy", score)
    cfg = study.Config(shares=(0.0, 0.3, 1.0), seeds=2)
    found = study.curve(cfg, x, p, truth)
    assert found[0.0]["true alone"] == [] and len(found[0.3]["true alone"]) == 2
    # 3 ways at share 0, for none has a label; 4 at each other one
    sizes = [len(learn) for _, learn, _ in seen]
    assert sizes[:3] == [100, 50, 50] and sizes[3:5] == [30, 100]
    assert sizes[5] == 30 + 35 and sizes[7:11] == [100] * 4 and len(sizes) == 22
    for n, (mixed, learn, judge) in enumerate(seen[:11]):
        assert len(judge) == 100 and not set(judge.tolist()) & set(learn.tolist())
        known = [0, 0, 0, 30, 30, 30, 30, 100, 100, 100, 100][n]
        assert torch.equal(mixed[learn[:known]], truth[learn[:known]])
        assert torch.equal(mixed[learn[known:]], label[learn[known:]])
    # another seed, other halves; a larger share has the labels of a smaller one
    assert set(seen[0][2].tolist()) != set(seen[11][2].tolist())
    assert set(seen[3][1].tolist()) < set(seen[7][1].tolist())


def test_a_student_is_better_than_a_teacher_that_errs_at_random(easy):
    x, p, truth = easy
    found = study.curve(study.Config(shares=(0.0,), seeds=3), x, p, truth)[0.0]
    assert np.mean(found["and all"]) > 0.9 > 0.8
    assert np.mean(found["and the surest half"]) > 0.97


def test_intervals():
    values = [0.5, 0.6, 0.7, 0.9]
    mean, half = study.mean_and_error(values)
    assert mean == pytest.approx(0.675)
    low, high = stats.norm.interval(0.95, mean, stats.sem(values))
    assert half == pytest.approx((high - low) / 2, rel=1e-3)
    by_way = dict(zip(study.WAYS, ([0.5, 0.6], [0.6, 0.8], [0.1, 0.1], [0.2, 0.2])))
    rows = study.summary({0.05: by_way})
    assert rows["5 % true"]["true alone"] == pytest.approx(0.55)
    gain = rows["5 % true, gain"]
    assert gain["and all"] == pytest.approx(0.15) and "true alone" not in gain
    assert gain["and the surest half"] == pytest.approx(-0.45)
    # paired: not the spread of both
    assert gain["± and all"] == pytest.approx(study.mean_and_error([0.1, 0.2])[1])
    assert list(study.summary({0.0: by_way | {"true alone": []}})) == ["0 % true"]


def test_the_study_shares_labels_and_writes_its_figure(tmp_path, monkeypatch, easy):
    x, p, truth = easy
    photos = [label_files.Photo(str(n), tmp_path, int(t)) for n, t in enumerate(truth)]
    paths = []

    def teach(cfg, photos, names, path):
        paths.append((path, names))
        return [{"log_p": [row]} for row in p.log().tolist()]

    monkeypatch.setattr(label_files, "fruit_folder", lambda labelled: labelled)
    monkeypatch.setattr(label_files, "read_folder", lambda folder: (photos, ["a", "b"]))
    monkeypatch.setattr(pseudo_label, "teach", teach)
    monkeypatch.setattr(label_report, "features_of", lambda *about: x)
    labels = str(tmp_path / "other/labels.jsonl")
    cfg = study.Config(seeds=2, shares=(0.0, 0.5), labels=labels, out=str(tmp_path / "out"))
    metrics = study.main(cfg)
    assert str(paths[0][0]) == labels
    scores = metrics["teacher"]
    assert scores["accuracy"] == pytest.approx(0.8) and scores["surest half"] == 1
    assert (
        scores["all prompts agree"] == 1 and scores["right where they agree"] == scores["accuracy"]
    )
    # 0.95 where it is always right, 0.6 where it never is
    assert scores["ECE"] == pytest.approx(0.8 * 0.05 + 0.2 * 0.6, abs=0.01)
    assert list(metrics["50 % true"])[:2] == ["true alone", "± true alone"]
    assert (tmp_path / "out/pseudo_label.png").stat().st_size > 5000


@pytest.mark.parametrize("flags", [{"seeds": 0}, {"shares": (1.5,)}, {"shares": ()}])
def test_flags_are_checked(flags, tmp_path):
    with pytest.raises(UserError, match="--seeds"):
        study.main(study.Config(out=str(tmp_path), **flags))
