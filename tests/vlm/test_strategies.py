"""vlm/strategies.py: each strategy is a command that vlm/train.py takes; rates, seeds, the table; wrong names."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import tyro

from utils.run import UserError
from vlm import strategies, train, train_config


def parsed(name, cfg, *about):
    words = strategies.command(name, cfg, Path("out"), *about)
    assert Path(words[1]) == Path(train.__file__)
    found = tyro.cli(train.Config, args=words[2:])
    train_config.check_flags(found)
    return found


@pytest.mark.parametrize("name", strategies.STRATEGIES)
def test_every_strategy_is_a_run_of_the_steps_rate_and_seed_that_are_asked_for(name):
    found = parsed(name, strategies.Config(batch=4), 9, 2.0, 3, 17)
    steps = found.train
    assert (steps.steps, steps.batch_size, steps.seed, found.out) == (9, 4, 3, "out")
    assert steps.align_steps == (3 if name == "two-stages" else 0)
    about = (found.data.views, steps.judged, found.data.text_share, steps.warmup_steps)
    assert about == (4, 17, 0.1, 1)
    whole = name in ("language", "everything")
    assert steps.lr == 2e-3
    assert steps.lr_pretrained == (1e-4 if whole else 2e-3)
    assert len(found.lora.target_modules) == (2 if name == "lora" else 7)


def test_strategies_differ():
    runs = [parsed(name, strategies.Config(), 9, 1.0, 0, 4) for name in strategies.STRATEGIES]
    about = [(r.train.train_type, r.lora.target_modules, r.train.align_steps) for r in runs]
    assert len(set(about)) == len(about)
    assert {r.train.train_type for r in runs} == {"projector", "use_lora", "freeze_vision", "none"}


def test_the_interval_is_students():
    values = [0.5, 0.6, 0.8]
    mean, half = strategies.mean_and_half(values)
    about = (2, np.mean(values), scipy.stats.sem(values))
    low, high = scipy.stats.t.interval(0.95, *about)
    assert math.isclose(mean - half, low) and math.isclose(mean + half, high)
    assert math.isnan(strategies.mean_and_half([0.5])[1])


def metrics(kinds, seconds, loss=1.5):
    return {
        "LLaVA": {"14 kinds": kinds, "5 groups": 0.8}, "final_loss": loss, "learned": 7,
        "text loss": {"before": 2.0, "after": 3.0}, "process_MiB": 4000.0 * kinds, "train_cpu_seconds": seconds,
    }  # fmt: skip


def test_the_table_and_its_figure(tmp_path):
    row = strategies.row([metrics(0.5, 30.0), metrics(0.7, 50.0)], 10, 2.0)
    assert row["CPU s a step"] == 4 and row["MiB"] == 2800 and row["rate"] == 2
    assert math.isclose(row["14 kinds"], 0.6) and row["5 groups"] == 0.8 and row["text loss"] == 3
    assert row["+-"] > 0
    rows = {"a": row, "b": row | {"14 kinds": 0.6, "+-": math.nan}}
    assert strategies.draw(tmp_path / "x.png", rows).stat().st_size > 1000


def test_wrong_flags_are_refused(tmp_path):
    out = str(tmp_path / "x")
    with pytest.raises(UserError, match="--only magic: there are projector"):
        strategies.main(strategies.Config(only=("magic",), out=out))
    with pytest.raises(UserError, match="--steps must be 3 or more"):
        strategies.main(strategies.Config(steps=2, out=out))
    with pytest.raises(UserError, match="above 0"):
        strategies.main(strategies.Config(seeds=0, out=out))
    with pytest.raises(UserError, match="above 0"):
        strategies.main(strategies.Config(rates=(), out=out))
    assert not (tmp_path / "x").exists()


def test_rates_are_searched_at_equal_compute_and_seeds_follow(tmp_path, monkeypatch):
    """A step of LoRA on q v costs 2 s, of all matrices 4 s; the loss is lowest at twice the rate."""
    seen = []

    def run(command, stdout):
        cfg = tyro.cli(train.Config, args=command[2:])
        steps = cfg.train.steps
        seen.append((steps, cfg.train.lr, cfg.train.seed, cfg.train.judged))
        Path(cfg.out).mkdir(parents=True)
        matrices = len(cfg.lora.target_modules)
        loss = abs(cfg.train.lr - 2e-3)
        about = metrics(
            0.1 * matrices + 0.01 * cfg.train.seed, steps * (2.0 if matrices == 2 else 4.0), loss
        )
        (Path(cfg.out) / "metrics.json").write_text(json.dumps(about), "utf-8")
        return SimpleNamespace(returncode=int(cfg.train.align_steps > 0))

    monkeypatch.setattr(strategies.subprocess, "run", run)
    cfg = strategies.Config(only=("lora", "lora-all"), seconds=80, seeds=2, out=str(tmp_path / "a"))
    rows = strategies.main(cfg)
    # a trial, three rates for half the time, two seeds at the best one
    search = [(20, rate, 0, 14) for rate in (5e-4, 1e-3, 2e-3)]
    assert seen[:6] == [(4, 1e-3, 0, 14), *search, (40, 2e-3, 0, 300), (40, 2e-3, 1, 300)]
    assert [s[0] for s in seen[6:]] == [4, 10, 10, 10, 20, 20]
    found = [round(rows[name]["14 kinds"], 6) for name in ("lora", "lora-all")]
    assert found == [0.205, 0.705]
    assert rows["lora"]["CPU s a step"] == 2 and rows["lora-all"]["steps"] == 20
    # as many steps for all, one rate: nothing to try or to search
    seen.clear()
    cfg = strategies.Config(
        only=("lora",), steps=6, rates=(1.0,), seeds=1, judged=9, out=str(tmp_path / "c")
    )
    strategies.main(cfg)
    assert seen == [(6, 1e-3, 0, 9)]
    with pytest.raises(UserError, match="the run of two-stages failed"):
        strategies.main(strategies.Config(only=("two-stages",), out=str(tmp_path / "b")))
