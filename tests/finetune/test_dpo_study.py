"""Preference losses compared: each kind runs with its own beta, a row holds what was measured, bad flags."""

import pytest

from finetune import dpo, dpo_study
from utils.run import UserError


def measured(rate):
    """Metrics of a run of dpo.py, numbers told apart."""
    return {
        "win rate": {"mean": rate, "low": rate - 0.1, "high": rate + 0.1},
        "reward": {"before": 0.1, "after": 0.2},
        "tokens": {"before": 10.0, "after": 12.0},
        "distinct-2": {"before": 0.8, "after": 0.7},
        "text perplexity": {"before": 100.0, "after": 110.0},
        "log-ratio of own samples": 5.0,
        "pair accuracy": {"mean": 0.6},
        "log p(chosen)": {"before": -50.0, "after": -51.0},
        "log p(rejected)": {"before": -50.0, "after": -54.0},
    }


def test_a_row_is_what_came_after_and_how_likelihoods_changed():
    row = dpo_study.row(measured(0.7))
    assert row["win rate"] == 0.7 and row["low"] < 0.7 < row["high"]
    assert (row["reward"], row["tokens"], row["text perplexity"]) == (0.2, 12.0, 110.0)
    assert (row["log-ratio"], row["chosen"], row["rejected"]) == (5.0, -1.0, -4.0)


def test_every_loss_runs_with_its_own_beta_and_the_same_flags(tmp_path, monkeypatch):
    asked = []

    def run_one(cfg):
        asked.append(cfg)
        return measured(len(asked) / 10)

    monkeypatch.setattr(dpo, "main", run_one)
    flags = dict(kinds=("ipo", "simpo"), betas=(0.3, 2.0), steps=7, out=str(tmp_path))
    metrics = dpo_study.main(dpo_study.Config(**flags))
    assert [(cfg.kind, cfg.beta, cfg.steps) for cfg in asked] == [
        ("ipo", 0.3, 7),
        ("simpo", 2.0, 7),
    ]
    assert len({cfg.out for cfg in asked}) == 2
    assert (metrics["ipo"]["win rate"], metrics["simpo"]["win rate"]) == (0.1, 0.2)
    assert (tmp_path / "win_rate.png").is_file() and (tmp_path / "rows.json").is_file()


@pytest.mark.parametrize(
    ("flags", "message"), [(dict(betas=(0.1,)), "--betas"), (dict(resume=True), "--resume")]
)
def test_bad_flags(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        dpo_study.main(dpo_study.Config(**flags, out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()
