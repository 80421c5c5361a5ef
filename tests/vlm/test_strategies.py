"""vlm/strategies.py: each strategy is a command that vlm/train.py takes; the table; wrong names."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tyro

from utils.run import UserError
from vlm import strategies, train, train_config


@pytest.mark.parametrize("name", strategies.STRATEGIES)
def test_every_strategy_is_a_run_of_the_same_length_and_seed(name):
    cfg = strategies.Config(steps=9, batch=4, seed=3)
    words = strategies.command(name, cfg, Path("out"))
    assert Path(words[1]) == Path(train.__file__)
    found = tyro.cli(train.Config, args=words[2:])
    train_config.check_flags(found)
    steps = found.train
    assert (steps.steps, steps.batch_size, steps.seed, found.out) == (9, 4, 3, f"out/{name}")
    assert steps.align_steps == (3 if name == "two-stages" else 0)
    about = (found.data.views, steps.judged, found.data.text_share, steps.warmup_steps)
    assert about == (4, 300, 0.1, 1)
    whole = name in ("language", "everything")
    assert steps.lr_pretrained == (5e-5 if whole else 1e-3)
    assert len(found.lora.target_modules) == (2 if name == "lora" else 7)


def test_strategies_differ():
    cfg = strategies.Config()
    runs = [
        tyro.cli(train.Config, args=strategies.command(n, cfg, Path("x"))[2:])
        for n in strategies.STRATEGIES
    ]
    about = [(r.train.train_type, r.lora.target_modules, r.train.align_steps) for r in runs]
    assert len(set(about)) == len(about)
    assert {r.train.train_type for r in runs} == {"projector", "use_lora", "freeze_vision", "none"}


def test_the_table_and_its_figure(tmp_path):
    metrics = {
        "LLaVA": {"14 kinds": 0.5, "5 groups": 0.8}, "final_loss": 1.5, "learned": 7,
        "text loss": {"before": 2.0, "after": 3.0}, "process_MiB": 4000.0, "train_cpu_seconds": 30.0,
    }  # fmt: skip
    row = strategies.row(metrics, 10)
    assert (
        row["CPU s a step"] == 3
        and row["text loss"] == 3
        and (row["14 kinds"], row["5 groups"]) == (0.5, 0.8)
    )
    assert (
        strategies.draw(tmp_path / "x.png", {"a": row, "b": row | {"14 kinds": 0.6}}).stat().st_size
        > 1000
    )


def test_an_unknown_strategy_is_refused(tmp_path):
    with pytest.raises(UserError, match="--only magic: there are projector"):
        strategies.main(strategies.Config(only=("magic",), out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


def test_each_strategy_is_run_and_read_from_its_own_folder(tmp_path, monkeypatch):
    def run(command, stdout):
        cfg = tyro.cli(train.Config, args=command[2:])
        Path(cfg.out).mkdir()
        about = {
            "LLaVA": {"14 kinds": 0.1 * len(cfg.lora.target_modules), "5 groups": 0.8}, "final_loss": 1.5,
            "text loss": {"before": 2.0, "after": 3.0}, "learned": 7, "process_MiB": 4000.0,
            "train_cpu_seconds": 12.0,
        }  # fmt: skip
        (Path(cfg.out) / "metrics.json").write_text(json.dumps(about), "utf-8")
        return SimpleNamespace(returncode=int(cfg.train.align_steps > 0))

    monkeypatch.setattr(strategies.subprocess, "run", run)
    cfg = strategies.Config(only=("lora", "lora-all"), steps=6, out=str(tmp_path / "a"))
    rows = strategies.main(cfg)
    assert [round(rows[name]["14 kinds"], 6) for name in ("lora", "lora-all")] == [0.2, 0.7]
    assert rows["lora"]["CPU s a step"] == 2
    with pytest.raises(UserError, match="the run of two-stages failed"):
        strategies.main(strategies.Config(only=("two-stages",), out=str(tmp_path / "b")))
