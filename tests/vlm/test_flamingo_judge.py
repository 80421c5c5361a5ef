"""vlm/flamingo_judge.py: copying from examples is right, controls are chance, RICES, the rows of the table."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.vlm.flamingo_classes import START, Letters, class_of, classes, everything, split_chunks
from vlm import flamingo_episodes, flamingo_judge
from vlm.flamingo_data import PictureSet

ON = torch.device("cpu")


def oracle(known):
    """In the place of a model: sure of the name that stood behind a picture of the class that is asked about."""

    def name_scores(model, ids, supervised, features, on):
        found = []
        for row, targets, numbers in zip(
            ids.tolist(), supervised.tolist(), features[..., 0, 0].tolist()
        ):
            *examples, last = split_chunks(row, targets)
            # only the last name is scored
            assert (
                all(not any(t) and not end for _, t, end in examples) and all(last[1]) and last[2]
            )
            shown = [class_of(known, int(n)).name for n in numbers]
            found.append(
                sum(
                    text == last[0]
                    for (text, _, _), name in zip(examples, shown)
                    if name == shown[-1]
                )
            )
        return torch.tensor(found).float()

    return name_scores


def accuracy(monkeypatch, each, **more):
    known = classes(each=5)
    monkeypatch.setattr(flamingo_episodes, "name_scores", oracle(known))
    features = torch.arange(150.0)[:, None, None].expand(-1, 2, 3)
    about = (features, known, np.arange(40, 80), 2, each, ON, 120)
    right = flamingo_episodes.evaluate(
        None, flamingo_episodes.Chunks(Letters()), START, *about, **more
    )
    assert right.shape == (120,)
    return float(right.float().mean())


def test_who_copies_the_name_of_the_same_class_is_right_and_controls_are_chance(monkeypatch):
    assert accuracy(monkeypatch, 1) == 1.0 and accuracy(monkeypatch, 3, true_names=True) == 1.0
    for each, more in (
        (0, {}),
        (2, {"control": "shuffled names"}),
        (2, {"control": "other pictures"}),
    ):
        assert 0.35 < accuracy(monkeypatch, each, **more) < 0.65


def test_rices_puts_the_most_similar_example_last():
    pool = torch.tensor([[1.0, 0.0], [0.0, 9.0], [5.0, 5.0], [-3.0, 0.1]])
    assert flamingo_judge.most_similar(torch.tensor([2.0, 0.1]), pool, 3).tolist() == [1, 2, 0]


def test_rices_finds_the_kind_and_random_examples_seldom_do(monkeypatch):
    """Photos whose features tell their kind: training photos are the pool, test photos are asked about."""
    known = classes("fruit", 7, 6)
    centres = torch.eye(7)
    numbers = torch.arange(42.0)
    features = torch.cat([numbers[:, None] * 1e-3, centres[torch.arange(42) % 7]], 1)[:, None]
    monkeypatch.setattr(
        flamingo_judge.flamingo_data, "fruit_classes", lambda *a, **k: (features, known)
    )

    def name_scores(model, ids, supervised, shown, on):
        kinds = shown[..., 0, 1:].argmax(-1)
        found = []
        for row, targets, of in zip(ids.tolist(), supervised.tolist(), kinds.tolist()):
            *examples, last = split_chunks(row, targets)
            assert len(examples) == 4 and all(last[1])
            found.append(
                sum(text == last[0] for (text, _, _), k in zip(examples, of) if k == of[-1])
            )
        return torch.tensor(found).float()

    monkeypatch.setattr(flamingo_judge, "name_scores", name_scores)
    cfg = SimpleNamespace(seed=0, trials=84, photos=0)
    heldout = PictureSet(features, known)
    about = (
        None,
        flamingo_episodes.Chunks(Letters()),
        START,
        heldout,
        None,
        np.arange(40, 90),
        cfg,
        ON,
    )
    found = {
        name.split(", ")[-1]: row["accuracy"] for name, row in flamingo_judge.rices(*about).items()
    }
    assert found["RICES"] == found["1 nearest neighbour"] == 1.0 and found["random"] < 0.8


def test_the_table_asks_what_its_rows_say(monkeypatch):
    asked = []

    def evaluate(model, chunks, start_id, features, shown, words, ways, each, on, trials, **more):
        asked.append((shown[0].source, ways, each, more["true_names"], more["control"], trials))
        return torch.arange(10) < 5 + each

    monkeypatch.setattr(flamingo_judge, "evaluate", evaluate)
    heldout = PictureSet(torch.zeros(1), everything())
    cfg = SimpleNamespace(seed=0, trials=10)
    rows = flamingo_judge.shots_table(None, None, START, heldout, None, cfg, ON)
    assert len(rows) == len(asked) == 16
    for (source, names, shots), (s, ways, each, true, control, trials) in zip(rows, asked):
        assert (source, 2, shots, 10) == (s, ways, 2 * each, trials)
        assert true == (names == "true") and control == (
            names if names in flamingo_judge.CONTROLS else ""
        )
    found = flamingo_judge.numbers(rows)
    assert found["fruit, nonsense, 4 examples"]["accuracy"] == pytest.approx(0.7)
    assert found["emoji, true, 4 examples against 0"]["difference"] == pytest.approx(0.2)
