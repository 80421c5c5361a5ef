"""finetune/reward_model.py: Bradley-Terry as TRL's and torch's, the last token is read, calibration, best-of-n."""

import json
import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finetune import preference_data, reward_model
from finetune.completion_logps import pairs_to_batch
from tests.conftest import gradients
from tests.llamas import folder, tiny, tokenizer
from tests.preferences import PAIRS, fake
from utils import run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("tiny") / "model")


def judge():
    """A tiny reward model whose head is not zero any more."""
    made = reward_model.RewardModel(tiny(vocabulary=len(tokenizer())))
    torch.nn.init.normal_(made.head.weight)
    return made


def test_bradley_terry_equals_that_of_trl_and_torch(parity):
    from accelerate import Accelerator
    from trl.trainer.reward_trainer import RewardTrainer

    rewards = torch.randn(10, dtype=torch.float64, requires_grad=True)
    mine = reward_model.bradley_terry(*rewards.chunk(2)).mean()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=Accelerator(cpu=True),
        args=SimpleNamespace(center_rewards_coefficient=None), _total_train_tokens=0, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip

    def model(**inputs):
        return SimpleNamespace(logits=rewards[:, None])

    theirs = RewardTrainer.compute_loss(trainer, model, {})
    both = [{"loss": x, "gradient": torch.autograd.grad(x, rewards)[0]} for x in (mine, theirs)]
    parity("Reward model", "reward_model.bradley_terry, gradients", "trl RewardTrainer", *both)
    first, second = rewards.chunk(2)
    entropy = F.binary_cross_entropy_with_logits(first - second, torch.ones_like(first))
    torchs = "F.binary_cross_entropy_with_logits"
    parity("Reward model", "reward_model.bradley_terry", torchs, mine, entropy)


def test_the_reward_is_read_at_the_last_token(parity):
    """As transformers' classifier with one label reads it, which looks for the last token that is no padding."""
    from transformers import LlamaForSequenceClassification

    made = judge()
    config = made.language.config
    config.num_labels = 1
    config.pad_token_id = 2
    theirs = LlamaForSequenceClassification(config).eval()
    theirs.model.load_state_dict(made.language.model.state_dict())
    theirs.score.weight.data.copy_(made.head.weight.data)
    # rows without an end token, which is padding to that class
    pairs = [pair._replace(chosen=(31, 32, 33), rejected=(41, 42)) for pair in PAIRS]
    ids, mask, _ = pairs_to_batch(tokenizer(), pairs)
    position = (mask.long().cumsum(-1) - 1).clamp(min=0)
    about = {"attention_mask": mask.long(), "position_ids": position}
    mine = made(ids, mask)
    other = theirs(input_ids=ids, **about).logits.squeeze(-1)
    name = "LlamaForSequenceClassification"
    parity("Reward model", "reward_model.RewardModel", name, mine, other)
    a = {f"model.{k.removeprefix('language.model.')}": g for k, g in gradients(made, mine).items()}
    a["score.weight"] = a.pop("model.head.weight")
    other = theirs(input_ids=ids, **about).logits.squeeze(-1)
    b = gradients(theirs, other)
    parity("Reward model", "reward_model.RewardModel, gradients", name, a, b, atol=1e-4)


def test_the_loss_takes_chosen_ones_first_and_padding_changes_nothing():
    made = judge()
    batch = pairs_to_batch(tokenizer(), PAIRS)
    rows = [(p.prompt, p.chosen) for p in PAIRS] + [(p.prompt, p.rejected) for p in PAIRS]
    alone = torch.tensor(reward_model.rate(made, tokenizer(), rows, size=1), dtype=torch.float)
    expected = F.softplus(-(alone[:3] - alone[3:])).mean()
    torch.testing.assert_close(reward_model.pair_loss(made, *batch), expected)
    together = reward_model.rate(made, tokenizer(), rows, size=6)
    np.testing.assert_allclose(together, alone.numpy(), atol=1e-5)


def test_calibration_of_a_model_that_is_as_sure_as_it_is_right():
    """80 % sure and right in 80 of 100; and 99 % sure with the same answers."""
    sure = math.log(0.8 / 0.2)
    margins = np.where(np.arange(100) < 80, sure, -sure)
    rows, error = reward_model.calibration(margins, 5)
    assert rows == [pytest.approx((0.8, 0.8, 100))] and error == pytest.approx(0)
    rows, error = reward_model.calibration(margins / sure * math.log(99), 5)
    assert error == pytest.approx(0.19) and rows[0][0] == pytest.approx(0.99)
    # two equal rewards: undecided, and right half of the time
    assert reward_model.calibration([0.0], 5) == ([(0.5, 0.5, 1)], 0.0)
    # confident answers in one bin, doubtful ones in another
    rows, _ = reward_model.calibration([0.1, -0.1, 3.0, 4.0], 5)
    assert [row[2] for row in rows] == [2, 2] and [row[1] for row in rows] == [0.5, 1.0]


def test_best_of_n_takes_the_favourite_of_the_first_n():
    scores = np.array([[0.1, 0.9, 2.0], [5.0, 1.0, 2.0]])
    truth = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert reward_model.best_of_n(scores, truth, 1).tolist() == [1.0, 4.0]
    assert reward_model.best_of_n(scores, truth, 2).tolist() == [2.0, 4.0]
    assert reward_model.best_of_n(scores, truth, 3).tolist() == [3.0, 4.0]
    assert reward_model.best_of_n_kl(1) == 0 and reward_model.best_of_n_kl(4) == pytest.approx(
        0.636, abs=1e-3
    )


def config(place, out, **kw):
    about = {"prompts": 20, "held_out": 12, "steps": 3, "batch": 4, "max_new_tokens": 6}
    return reward_model.Config(model=place, out=str(out), device="cpu", **about | kw)


def test_a_run_begins_undecided_and_writes_what_it_promises(place, tmp_path, monkeypatch):
    fake(monkeypatch)
    seen = []

    def spy(made, *batch):
        value = real(made, *batch)
        seen.append(float(value.detach()))
        return value

    real = reward_model.pair_loss
    monkeypatch.setattr(reward_model, "pair_loss", spy)
    metrics = reward_model.main(config(place, tmp_path, steps=30, lr=3e-2))
    assert seen[0] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(seen[25:30]) / 5 < 0.5
    assert metrics["trained"] > 32 and {"reward of best of 1", "reward of best of 4"} <= set(
        metrics
    )
    # the truth itself never chooses worse than the model
    for n in (1, 2, 4):
        row = metrics[f"reward of best of {n}"]
        assert row["mean"] <= row["by the truth"] + 1e-9
    names = {path.name for path in tmp_path.iterdir()}
    assert {"loss.png", "reliability.png", "reward_model.safetensors", "metrics.json"} <= names
    assert json.loads((tmp_path / "metrics.json").read_text())["pairs"] == metrics["pairs"]


def test_scores_are_those_of_the_rewards(monkeypatch):
    """A judge that knows the truth is always right; one that has it upside down never."""
    monkeypatch.undo()
    answers = [
        preference_data.Answers("a", "", [(1,), (2, 2), (3,)], [0.9, -0.5, 0.0]),
        preference_data.Answers("b", "", [(1,), (2, 2), (3,)], [-0.9, 0.5, 0.1]),
        preference_data.Answers("c", "", [(1,), (2, 2), (3,)], [0.1, 0.1, 0.2]),
    ]
    cfg = reward_model.Config(samples=3, least=0.3)
    for sign in (1, -1):
        truth = np.array([sign * r for row in answers for r in row.rewards])
        monkeypatch.setattr(reward_model, "rate", lambda *args, truth=truth: truth)
        found = reward_model.evaluate(None, None, answers, cfg)
        assert found["held-out pairs"] == 2  # the third differs by 0.1
        assert found["pair accuracy"]["mean"] == (sign + 1) / 2
        assert found["correlation with the truth"] == pytest.approx(sign)
        # the longer one was preferred once in two
        assert found["pair accuracy of length"]["mean"] == 0.5
    assert found["reward of best of 2"]["by the truth"] == pytest.approx((0.9 + 0.5 + 0.1) / 3)


@pytest.mark.parametrize(
    "change, says", [({"bins": 0}, "--bins"), ({"lr": 0.0}, "--lr"), ({"held_out": 0}, "at 1")]
)
def test_bad_flags_are_refused(change, says, place, tmp_path):
    with pytest.raises(run.UserError, match=says):
        reward_model.main(replace(config(place, tmp_path / "out"), **change))
    assert not (tmp_path / "out").exists()
