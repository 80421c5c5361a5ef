"""vlm/strategies.py: each strategy is a command that vlm/train.py takes; rates, seeds, the table; wrong names."""

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import scipy.stats
import tyro

from utils.run import UserError
from vlm import easy_vqa_score, strategies, strategy_runs, train, train_config
from vlm.flags import TrainType


def parsed(name, cfg, *about):
    words = strategy_runs.command(name, cfg, Path("out"), *about)
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
    assert about == (4, 17, 0, 1)
    whole = name in ("language", "everything")
    assert steps.lr == 2e-3
    assert steps.lr_pretrained == (1e-4 if whole else 2e-3)
    assert len(found.lora.target_modules) == (2 if name == "lora" else 7)
    assert not found.data.packing and found.model.connector == "pool1"
    assert Path(found.data.template).name == "short.jinja"
    paged = parsed(name, strategies.Config(packing=True, text_share=0.25), 9, 2.0, 3, 17)
    assert paged.data.packing and paged.data.text_share == 0.25


@pytest.mark.parametrize("name", strategies.STRATEGIES)
def test_a_strategy_on_easy_vqa_reads_its_rows_as_the_page_says(name):
    found = parsed(name, strategies.Config(data="easy_vqa"), 9, 1.0, 0, 4)
    third = train.with_file(["--config", "vlm/configs/easy_vqa_3.yaml"])
    curriculum = tyro.cli(train.Config, args=third).data
    for field in ("image_folder", "views", "text_share", "packing"):
        assert getattr(found.data, field) == getattr(curriculum, field)
    assert list(found.data.data_path) == ["outputs/easy_vqa_curriculum/open.json"]
    assert Path(found.data.template) == Path(curriculum.template).resolve()
    assert found.model.connector == "pool1" and found.train.steps == 9


def test_strategies_differ():
    runs = [parsed(name, strategies.Config(), 9, 1.0, 0, 4) for name in strategies.STRATEGIES]
    about = [(r.train.train_type, r.lora.target_modules, r.train.align_steps) for r in runs]
    assert len(set(about)) == len(about)
    assert {r.train.train_type for r in runs} == set(get_args(TrainType))


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


def test_the_table_and_its_figure(tmp_path, monkeypatch):
    runs = {0: metrics(0.5, 30.0), 1: metrics(0.7, 50.0)}
    monkeypatch.setattr(strategy_runs, "measure", lambda name, cfg, *run: runs[run[-2]])
    cfg = strategies.Config()
    judged = [strategies.judge("lora", cfg, tmp_path, 10, 2.0, seed) for seed in runs]
    row = strategies.row(judged, 10, 2.0)
    assert row["CPU s a step"] == 4 and row["MiB"] == 2800 and row["rate"] == 2
    assert math.isclose(row["14 kinds"], 0.6) and row["5 groups"] == 0.8 and row["text loss"] == 3
    assert list(row)[:3] == ["14 kinds", "+-", "5 groups"]
    assert row["+-"] == strategies.mean_and_half([0.5, 0.7])[1]
    rows = {"a": row, "b": row | {"14 kinds": 0.6, "+-": math.nan}}
    assert strategies.draw(tmp_path / "x.png", rows).stat().st_size > 1000


def test_runs_on_easy_vqa_are_judged_by_its_test_questions(tmp_path, monkeypatch):
    """The weights that the run wrote, so many questions, and the scores of ranked answers."""
    found = {"accuracy": 0.7, "low": 0.6, "high": 0.8}
    found |= {"colour": 0.1, "shape": 0.2}
    scored = []

    def run(words, stdout):
        folder = tmp_path / "run"
        if words[1].endswith("train.py"):
            found_here = {"final_loss": 1.0}
        else:
            cfg = tyro.cli(easy_vqa_score.Config, args=words[2:])
            scored.append(cfg)
            folder = Path(cfg.out)
            worse = {"accuracy": 0.0, "colour": 0.0, "shape": 0.0}
            found_here = {"LLaVA, ranked": found, "LLaVA, generated": worse}
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(found_here), "utf-8")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(strategy_runs.subprocess, "run", run)
    cfg = strategies.Config(data="easy_vqa", judged=77)
    judged = strategies.judge("lora", cfg, tmp_path / "run", 10, 2.0, 0)
    assert judged["final_loss"] == 1.0
    assert judged["scores"] == {"open questions": 0.7, "colour": 0.1, "shape": 0.2}
    (cfg,) = scored
    assert cfg.model == str(tmp_path / "run" / "model.safetensors")
    assert cfg.count == 77 and cfg.kinds == ("colour", "shape") and not cfg.baselines


def test_wrong_flags_are_refused(tmp_path, monkeypatch):
    out = str(tmp_path / "x")
    with pytest.raises(UserError, match="--only magic: there are projector"):
        strategies.main(strategies.Config(only=("magic",), out=out))
    with pytest.raises(UserError, match="--steps must be 3 or more"):
        strategies.main(strategies.Config(steps=2, out=out))
    with pytest.raises(UserError, match="above 0"):
        strategies.main(strategies.Config(seeds=0, out=out))
    with pytest.raises(UserError, match="above 0"):
        strategies.main(strategies.Config(rates=(), out=out))
    with pytest.raises(UserError, match="above 0"):
        strategies.main(strategies.Config(search_seeds=0, out=out))
    for share in (0.0, 1.1):
        with pytest.raises(UserError, match="--search_share must be above 0 and at most 1"):
            strategies.main(strategies.Config(search_share=share, out=out))
    monkeypatch.setattr(strategies, "EASY_VQA", tmp_path)
    with pytest.raises(UserError, match="has no open.json; write it by python vlm/easy_vqa_curr"):
        strategies.main(strategies.Config(data="easy_vqa", out=out))
    assert not (tmp_path / "x").exists()


@pytest.fixture
def seen(monkeypatch):
    """Runs of train.py that were asked for; what they find.

    A step of the connector alone costs 2 s, of LoRA 4 s; in the trial twice as much. The loss is lowest at four
    times the rate; of the second seed at twice the rate, and higher.
    """
    listed = []

    def run(command, stdout):
        cfg = tyro.cli(train.Config, args=command[2:])
        steps = cfg.train.steps
        listed.append((steps, cfg.train.lr, cfg.train.seed, cfg.train.judged))
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        alone = cfg.train.train_type == "projector"
        lowest = 2e-3 if cfg.train.seed else 4e-3
        loss = abs(math.log(cfg.train.lr / lowest)) + cfg.train.seed
        kinds = (0.2 if alone else 0.7) + 0.01 * cfg.train.seed
        price = (2.0 if alone else 4.0) * (2 if steps == strategies.TRIAL else 1)
        about = metrics(kinds, steps * price, loss)
        about["command"] = shlex.join(["python", *command[1:]])
        (Path(cfg.out) / "metrics.json").write_text(json.dumps(about), "utf-8")
        return SimpleNamespace(returncode=int(cfg.train.align_steps > 0))

    monkeypatch.setattr(strategy_runs.subprocess, "run", run)
    return listed


def test_rates_are_searched_at_equal_compute_and_seeds_follow(tmp_path, seen):
    about = {"only": ("projector", "lora"), "seconds": 160, "seeds": 2, "rates": (0.5, 1.0)}
    about |= {"search_share": 0.25, "search_seeds": 2}
    cfg = strategies.Config(**about, out=str(tmp_path / "a"))
    rows = strategies.main(cfg)
    # the price of a step, first by a trial
    assert seen[0] == (12, 1e-3, 0, 14)
    # two seeds of each rate for a quarter of the time, higher ones until they are worse
    search = [(10, lr, seed, 14) for lr in (5e-4, 1e-3, 2e-3, 4e-3) for seed in (0, 1)]
    assert seen[1:9] == search
    # two seeds at the rate whose worse seed is best, and at the price that the search has found
    assert seen[9:11] == [(80, 2e-3, 0, 150), (80, 2e-3, 1, 150)]
    assert [s[0] for s in seen[11:]] == [12] + [5] * 8 + [40, 40]
    found = [round(rows[name]["14 kinds"], 6) for name in ("projector", "lora")]
    assert found == [0.205, 0.705]
    assert rows["projector"]["CPU s a step"] == 2 and rows["lora"]["steps"] == 40
    written = json.loads((tmp_path / "a/rows.json").read_text("utf-8"))
    assert written["search"]["lora"]["2.0"] == 1 and written["rows"] == rows
    # a study that was stopped goes on: what is there with the same command is not repeated
    seen.clear()
    assert strategies.main(cfg) == rows and not seen
    strategies.main(replace(cfg, batch=4))
    assert len(seen) == 22


def test_the_search_ends_at_a_limit_and_shuns_what_diverges(tmp_path, monkeypatch):
    """Losses that fall with the rate are followed to LIMIT, such that rise down to 1 / LIMIT."""
    cfg = strategies.Config(seed=3, rates=(1.0, 2.0, 4.0), search_share=0.25, search_seeds=2)
    asked = []

    def search(slope, diverged):
        """Loss = slope x factor; the second seed diverges from a factor on. A step costs 3 s, of a few runs 9 s."""

        def measured(name, cfg, folder, steps, factor, seed):
            asked.append((folder.name, steps, seed))
            price = 9 if factor == 4 else 3
            loss = slope * factor if factor < diverged or seed == 3 else math.nan
            return {"final_loss": loss, "train_cpu_seconds": steps * price}

        monkeypatch.setattr(strategies, "measure", measured)
        return strategies.search("lora", cfg, tmp_path, 40)

    assert search(-1, 99)[0] == 16
    assert search(1, 99)[0] == 1 / 16
    factor, losses, steps = search(-1, 8)
    assert factor == 4 and losses[8] == math.inf
    assert steps == round(cfg.seconds / 3)
    assert asked[:2] == [("rate-1-seed-3", 10, 3), ("rate-1-seed-4", 10, 4)]
    # whole runs of one seed
    asked.clear()
    strategies.try_rate("lora", strategies.Config(seed=3), tmp_path, 40, 2.0)
    assert asked == [("rate-2-seed-3", 40, 3)]


def test_as_many_steps_for_all_and_one_rate_leave_nothing_to_search(tmp_path, seen):
    about = {"steps": 6, "rates": (1.0,), "seeds": 1, "judged": 9}
    strategies.main(strategies.Config(only=("lora",), **about, out=str(tmp_path / "c")))
    assert seen == [(6, 1e-3, 0, 9)]
    # as many steps, rates searched
    seen.clear()
    cfg = strategies.Config(only=("lora",), **about | {"rates": (2.0, 4.0, 8.0)})
    strategies.main(replace(cfg, out=str(tmp_path / "d")))
    assert [s[0] for s in seen] == [6] * 4 and seen[-1][1] == 4e-3
    with pytest.raises(UserError, match="the run of two-stages failed"):
        strategies.main(strategies.Config(only=("two-stages",), out=str(tmp_path / "b")))
