"""vlm/trainer_speed.py: five ways make the same steps, and are compared by what differs."""

from typing import Any

import pytest
import torch

from tests.vlm.test_lazy_data import lesson  # noqa: F401  (a fixture)
from utils.run import UserError
from vlm import packing, train, trainer_speed
from vlm.train_config import changed


@pytest.fixture(scope="module")
def made(lesson):  # noqa: F811
    """-> flags, model, source of tiny data in memory."""
    flags = {"lr": 1e-6, "lr_pretrained": 1e-6, "train_type": "use_lora", "log_steps": 500}
    cfg = changed(lesson, lazy=False, steps=100, **flags)
    _, model, source = train.prepare(cfg, torch.device("cpu"))
    return cfg, model, source


def gradients(learner, batch, features):
    """-> loss, {name: gradient} of what learns."""
    learner.zero_grad()
    value = learner(batch, features)
    value.backward()
    named = [(name, p) for name, p in learner.named_parameters() if p.grad is not None]
    return value.detach(), {name: p.grad.clone() for name, p in named}


def test_loss_at_supervised_tokens_is_that_of_transformers(made, parity):
    cfg, model, source = made
    (batch, features), *_ = next(iter(source.batches(changed(cfg, packing=False), 0)))
    mine, ours = gradients(train.Learner(model), batch, features)
    other, theirs = gradients(trainer_speed.AllLogits(model), batch, features)
    assert ours.keys() == theirs.keys() and max(g.abs().max() for g in ours.values()) > 1e-3
    named = "transformers, labels= (logits of all tokens)"
    parity("LLaVA, engines", "vlm.train.Learner, loss", named, mine, other, 1e-4)
    parity("LLaVA, engines", "vlm.train.Learner, gradients", named, ours, theirs, 1e-4)


def test_every_way_makes_the_same_steps(made):
    """Also after Trainer: nothing that it wraps around a forward method is left behind."""
    cfg, model, source = made
    found = trainer_speed.measure(model, source, cfg, steps=2, rounds=2)
    assert found.keys() == trainer_speed.WAYS.keys()
    for rows in found.values():
        assert len(rows) == 2 and all(len(row["losses"]) == 2 for row in rows)
        assert all(row["seconds"] > 0 for row in rows)
    assert trainer_speed.difference(found) < 1e-4
    first = found[trainer_speed.FIRST]
    # the second round goes on where the first one ended
    assert abs(first[0]["losses"][0] - first[1]["losses"][0]) > 1e-3
    # two short conversations fill one packed row; side by side one of them is padded
    assert all(row["places"] == row["tokens"] for row in first)
    assert any(row["places"] > row["tokens"] for row in found["ours, padded"])
    for rows in found.values():
        for name in ("tokens", "supervised"):
            assert [row[name] for row in rows] == [row[name] for row in first]


def test_real_tokens_are_those_of_the_samples(made):
    _, _, source = made
    samples = source.samples[:5]
    total = sum(len(s["ids"]) for s in samples)
    assert trainer_speed.real_tokens(packing.pad(samples, 0)) == total
    assert trainer_speed.real_tokens(packing.packed(packing.pack(samples, 128), 0)) == total


def rounds_of(*seconds):
    """Rounds of a way that took so many seconds: 100 tokens at 250 places, 10 of them supervised."""
    counted = {"tokens": 100, "supervised": 10, "places": 250, "losses": [2.0]}
    return [{"seconds": s, **counted} for s in seconds]


def test_ratios_are_of_the_same_round_and_multiply():
    found: Any = {
        "ours, packed": rounds_of(1.0, 2.0, 1.0),
        "ours, padded": rounds_of(2.0, 4.0, 2.0),
        "Trainer, packed": rounds_of(1.1, 2.2, 1.1),
        "Trainer, padded": rounds_of(3.0, 6.0, 3.0),
        "Trainer, padded, all logits": rounds_of(6.0, 12.0, 9.0),
    }
    rates, ratios = trainer_speed.summary(found)
    assert rates["ours, packed"]["tokens a CPU second"] == 300 / 4
    assert rates["Trainer, padded"]["supervised tokens a CPU second"] == 30 / 12
    assert rates["ours, padded"]["real"] == 0.4 and rates["ours, padded"]["supervised"] == 0.04
    assert ratios["packing"] == {"median": 2.0, "least": 2.0, "most": 2.0}
    assert ratios["loop"]["median"] == 1.5
    assert ratios["logits at supervised tokens only"]["median"] == 2.0
    assert ratios["all of them"] == {"median": 6.0, "least": 6.0, "most": 9.0}
    assert ratios["loop, packed"]["median"] == pytest.approx(1.1)


def test_difference_is_the_largest_of_all_steps():
    found: Any = {name: rounds_of(1.0, 1.0) for name in trainer_speed.WAYS}
    assert trainer_speed.difference(found) == 0
    found["Trainer, padded"][1]["losses"] = [2.5]
    found["ours, padded"][0]["losses"] = [1.8]
    assert trainer_speed.difference(found) == pytest.approx(0.25)


@pytest.mark.parametrize("name", ["batch", "steps", "rounds", "rank"])
def test_bad_flags(name, tmp_path):
    with pytest.raises(UserError, match="above 0"):
        trainer_speed.main(trainer_speed.Config(**{name: 0}, out=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()
