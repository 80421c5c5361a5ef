"""Training strategies of LLaVA compared: frozen, trained or LoRA parts, at equal compute.

Every strategy learns for as many CPU seconds, so that a cheap one takes more steps. Its learning rate is
searched first: three rates, a quarter of the time, and the lowest training loss is taken, so that no held-out photo
decides. Then several seeds; the interval of their mean is Student's (1908). Each run is one of
vlm/train.py in a process of its own, so that its memory is its own. Two data sets: fruit, of which the
kind is named, and easy-VQA, of which all questions are learned at once, without a curriculum.

    python vlm/strategies.py                                   # fruit: hours
    python vlm/easy_vqa_curriculum.py                          # writes the rows of
    python vlm/strategies.py --data easy_vqa
    python vlm/strategies.py --steps 60 --rates 1 --seeds 1    # as many steps instead of as much time
    python vlm/strategies.py --only lora-all random-connector
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np

from utils import figures, run
from utils.run import check
from vlm.easy_vqa_data import KINDS

STRATEGIES = {  # name: what vision, connector and language model do; rate of what is pretrained, flags
    "projector": ("frozen, trained, frozen", 1e-3, ["--train_type", "projector"]),
    "lora": ("frozen, trained, LoRA on q v", 1e-3, ["--lora_targets", "q_proj", "v_proj"]),
    "lora-all": ("frozen, trained, LoRA on all", 1e-3, ["--train_type", "use_lora"]),
    "random-connector": (
        "frozen, frozen, LoRA on all",
        1e-3,
        ["--train_type", "lora_frozen_projector"],
    ),
    # a third of the steps
    "two-stages": ("frozen, trained, LoRA on all in the last two thirds", 1e-3, ["--align_steps"]),
    "language": ("frozen, trained, trained", 5e-5, ["--train_type", "freeze_vision"]),
    "everything": ("trained, trained, trained", 5e-5, ["--train_type", "none"]),
}
# Rate of new parts, the connector
LR = 1e-3
# Steps of the run that tells what a step costs
TRIAL = 4
# Rows and pictures that easy_vqa_curriculum.py wrote
EASY_VQA = Path("outputs/easy_vqa_curriculum")


@dataclass(frozen=True)
class Config:
    """Search the learning rate of each strategy, train at equal compute, put the results side by side."""

    data: Literal["fruit", "easy_vqa"] = "fruit"
    only: tuple[str, ...] = ()  # names of strategies; none: all of them
    seconds: float = 400  # CPU seconds of training of each run
    steps: int = 0  # instead of seconds: as many steps for all
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)  # factors of both learning rates that are searched
    seeds: int = 3  # runs of each strategy at the rate that was found
    batch: int = 8  # conversations a step
    views: int = 4  # of each photo of fruit
    text_share: float = 0.0  # pages of manuals among the rows; 0: the loss is that of answers
    packing: bool = False  # rows are nearly as long as each other, and padded
    judged: int = 150  # photos or questions to be judged by
    seed: int = 0  # the first one
    out: str = "outputs/strategies"


def data_flags(cfg):
    """Flags of the data set: its rows, and how they are read."""
    flags = ["--text_share", str(cfg.text_share), "--packing" if cfg.packing else "--no-packing"]
    if cfg.data == "fruit":
        return [*flags, "--views", str(cfg.views)]
    # a picture is one token, and not the first one (vlm/easy_vqa.md)
    template = Path(__file__).parent / "configs" / "short.jinja"
    flags += ["--views", "1", "--connector", "pool1", "--template", str(template)]
    return [
        *flags,
        "--data_path",
        str(EASY_VQA / "all.json"),
        "--image_folder",
        str(EASY_VQA / "pictures"),
    ]


def command(name, cfg, folder, steps, factor, seed, judged):
    """A run of a strategy: so many steps, both learning rates times a factor, a seed."""
    _, lr_pretrained, flags = STRATEGIES[name]
    # flags of the strategy
    flags = list(flags)
    if flags[-1] == "--align_steps":
        flags.append(str(steps // 3))
    # the same for all strategies
    every = {
        "max_steps": steps,
        "learning_rate": LR * factor,
        "learning_rate_pretraining_components": lr_pretrained * factor,
        "per_device_train_batch_size": cfg.batch,
        "judged": judged,
        "num_warmup_steps": max(1, steps // 10),
        "seed": seed,
        "out": folder,
    }
    flags += data_flags(cfg)
    for flag, value in every.items():
        flags += [f"--{flag}", str(value)]
    return [sys.executable, str(Path(__file__).with_name("train.py")), *flags]


def score_command(cfg, folder):
    """Score what a run has learned on easy-VQA's test questions; of fruit the run does it itself."""
    script = Path(__file__).with_name("easy_vqa_score.py")
    flags = {"model": folder / "model.safetensors", "count": cfg.judged, "out": folder / "score"}
    words = [f"--{flag}={value}" for flag, value in flags.items()]
    return [sys.executable, str(script), *words, "--no-baselines"]


def read_metrics(words, folder, name):
    """Run a command that writes metrics.json -> it. Raises UserError if the command fails."""
    done = subprocess.run(words, stdout=subprocess.DEVNULL)
    check(done.returncode == 0, f"the run of {name} failed")
    return json.loads((folder / "metrics.json").read_text("utf-8"))


def measure(name, cfg, folder, steps, factor=1.0, seed=None, judged=14):
    """Metrics of a run in a process of its own. Raises UserError if it fails."""
    seed = cfg.seed if seed is None else seed
    return read_metrics(command(name, cfg, folder, steps, factor, seed, judged), folder, name)


def judge(name, cfg, folder, steps, factor, seed):
    """Metrics of a run that counts, with its scores: {"scores": {name: accuracy}}, the main one first."""
    metrics = measure(name, cfg, folder, steps, factor, seed, cfg.judged)
    if cfg.data == "fruit":
        scores = dict(metrics["LLaVA"]) | {"text loss": metrics["text loss"]["after"]}
    else:
        found = read_metrics(score_command(cfg, folder), folder / "score", name)
        scores = {"all questions": found["LLaVA, ranked"]["accuracy"]}
        scores |= {kind: found["LLaVA, ranked"][kind] for kind in KINDS}
    return metrics | {"scores": scores}


def seconds_a_step(metrics, steps):
    """CPU seconds of training, by steps."""
    return metrics["train_cpu_seconds"] / steps


def steps_for(name, cfg, folder):
    """Steps that fit into the time, at the price of a step in a short run."""
    trial = measure(name, cfg, folder, TRIAL)
    return max(3, round(cfg.seconds / seconds_a_step(trial, TRIAL)))


def best_rate(name, cfg, folder, steps):
    """The factor of the learning rates after which the training loss is lowest -> (it, losses)."""
    if len(cfg.rates) == 1:
        return cfg.rates[0], {}
    losses = {}
    for factor in cfg.rates:
        found = measure(name, cfg, folder / f"rate-{factor:g}", max(3, steps // 4), factor)
        losses[factor] = found["final_loss"]
        print(f"    learning rates x {factor:g}: loss {losses[factor]:.3f}", flush=True)
    return min(losses, key=losses.__getitem__), losses


def mean_and_half(values, level=0.95):
    """Mean of independent runs, and half of its confidence interval; one run has none. Student 1908."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return fmean(values), float("nan")
    half = t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / n**0.5
    return fmean(values), float(half)


def row(runs, steps, factor):
    """Row of the table: the metrics of runs that differ in their seed; the first score has its interval."""
    first, *others = runs[0]["scores"]
    mean, half = mean_and_half([metrics["scores"][first] for metrics in runs])
    scores = {first: mean, "+-": half}
    for other in others:
        scores[other] = fmean(metrics["scores"][other] for metrics in runs)
    return scores | {
        "loss": fmean(metrics["final_loss"] for metrics in runs),
        "learned": runs[0]["learned"],
        "rate": factor,
        "steps": steps,
        "MiB": max(metrics["process_MiB"] for metrics in runs),
        "CPU s a step": fmean(seconds_a_step(metrics, steps) for metrics in runs),
    }


def draw(path, rows):
    """Three panels, a line for each strategy: accuracy with its interval, time of a step, memory."""
    import matplotlib.pyplot as plt

    names = list(rows)
    about: dict = {"figsize": (8, 0.9 + 0.4 * len(names)), "sharey": True}
    figure, axes = plt.subplots(1, 3, **about, layout="constrained")
    # a point for the mean of the runs, whiskers for its interval
    score = next(iter(rows[names[0]]))
    means = [r[score] for r in rows.values()]
    halves = np.nan_to_num([r["+-"] for r in rows.values()])
    axes[0].errorbar(means, names, xerr=halves, fmt="o", capsize=3)
    axes[0].set(xlim=(0, 1), xlabel=f"accuracy, {score}")
    # what a step costs
    axes[1].barh(names, [r["CPU s a step"] for r in rows.values()])
    axes[1].set(xlabel="CPU seconds a step")
    axes[2].barh(names, [r["MiB"] / 1024 for r in rows.values()])
    axes[2].set(xlabel="GiB of the process")
    # the first strategy above
    axes[0].invert_yaxis()
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Run what was asked for, one after the other."""
    # flags, before hours of training
    unknown = set(cfg.only) - STRATEGIES.keys()
    check(not unknown, f"--only {' '.join(sorted(unknown))}: there are {', '.join(STRATEGIES)}")
    check(cfg.steps == 0 or cfg.steps > 2, "--steps must be 3 or more")
    least = min(cfg.batch, cfg.views, cfg.judged, cfg.seeds, cfg.seconds, *cfg.rates, 1)
    check(len(cfg.rates) > 0 and least > 0, "all numbers must be above 0")
    rows_there = cfg.data == "fruit" or (EASY_VQA / "all.json").is_file()
    check(rows_there, f"{EASY_VQA} has no all.json; write it by python vlm/easy_vqa_curriculum.py")
    folder = run.output(cfg.out, cfg)
    rows = {}
    for name in cfg.only or STRATEGIES:
        own = folder / name
        own.mkdir(exist_ok=True)
        print(f"{name}: {STRATEGIES[name][0]}", flush=True)
        steps = cfg.steps or steps_for(name, cfg, own / "trial")
        factor, _ = best_rate(name, cfg, own, steps)
        # the runs that count
        runs = []
        for seed in range(cfg.seed, cfg.seed + cfg.seeds):
            place = own / f"seed-{seed}"
            runs.append(judge(name, cfg, place, steps, factor, seed))
        rows[name] = row(runs, steps, factor)
        run.write_json(folder / "rows.json", rows)
    # side by side
    draw(folder / "compare.png", rows)
    return run.report(folder, rows)


if __name__ == "__main__":
    run.cli(main, Config)
