"""Training strategies of LLaVA compared: frozen, trained or LoRA parts, at equal compute, each at its best rate.

Every strategy learns for as many CPU seconds, so that a cheap one takes more steps. Its learning rate is
searched first: three rates, half the time, and the lowest training loss is taken, so that no held-out photo
decides. Then several seeds; the interval of their mean is Student's (1908). Each run is one of
vlm/train.py in a process of its own, so that its memory is its own.

    python vlm/strategies.py                                   # at equal compute, rates searched: hours
    python vlm/strategies.py --steps 60 --rates 1 --seeds 1    # the table of vlm/train.md: 53 CPU minutes
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from utils import figures, run
from utils.run import check

STRATEGIES = {  # name: what vision, connector and language model do; rate of what is pretrained, flags
    "projector": ("frozen, trained, frozen", 1e-3, ["--train_type", "projector"]),
    "lora": ("frozen, trained, LoRA on q v", 1e-3, ["--lora_targets", "q_proj", "v_proj"]),
    "lora-all": ("frozen, trained, LoRA on all matrices", 1e-3, ["--train_type", "use_lora"]),
    # a third of the steps
    "two-stages": ("frozen, trained, LoRA on all in the last two thirds", 1e-3, ["--align_steps"]),
    "language": ("frozen, trained, trained", 5e-5, ["--train_type", "freeze_vision"]),
    "everything": ("trained, trained, trained", 5e-5, ["--train_type", "none"]),
}
# Rate of new parts, the connector
LR = 1e-3
# Steps of the run that tells what a step costs
TRIAL = 4


@dataclass(frozen=True)
class Config:
    """Train with each strategy at equal compute, at its best rate, and put the results side by side."""

    only: tuple[str, ...] = ()  # names of strategies; none: all of them
    seconds: float = 160  # CPU seconds of training of each run
    steps: int = 0  # instead of seconds: as many steps for all
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)  # factors of both learning rates that are searched
    seeds: int = 3  # runs of each strategy at its best rate
    batch: int = 16  # conversations a step
    views: int = 4  # of each photo
    judged: int = 300  # photos to be judged by
    seed: int = 0  # the first one
    out: str = "outputs/strategies"


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
        "views": cfg.views,
        "judged": judged,
        "text_share": 0.1,
        "num_warmup_steps": max(1, steps // 10),
        "seed": seed,
        "out": folder,
    }
    more = []
    for flag, value in every.items():
        more += [f"--{flag}", str(value)]
    return [sys.executable, str(Path(__file__).with_name("train.py")), *flags, *more]


def measure(name, cfg, folder, steps, factor=1.0, seed=None, judged=14):
    """Metrics of a run in a process of its own. Raises UserError if it fails."""
    seed = cfg.seed if seed is None else seed
    words = command(name, cfg, folder, steps, factor, seed, judged)
    done = subprocess.run(words, stdout=subprocess.DEVNULL)
    check(done.returncode == 0, f"the run of {name} failed")
    return json.loads((folder / "metrics.json").read_text("utf-8"))


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
        found = measure(name, cfg, folder / f"rate-{factor:g}", max(3, steps // 2), factor)
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
    """Row of the table: the metrics of runs that differ in their seed."""
    kinds, half = mean_and_half([metrics["LLaVA"]["14 kinds"] for metrics in runs])
    return {
        "14 kinds": kinds,
        "+-": half,
        "5 groups": fmean(metrics["LLaVA"]["5 groups"] for metrics in runs),
        "loss": fmean(metrics["final_loss"] for metrics in runs),
        "text loss": fmean(metrics["text loss"]["after"] for metrics in runs),
        "learned": runs[0]["learned"],
        "rate": factor,
        "steps": steps,
        "MiB": max(metrics["process_MiB"] for metrics in runs),
        "CPU s a step": fmean(seconds_a_step(metrics, steps) for metrics in runs),
    }


def draw(path, rows):
    """Accuracy with its interval against the time of a step; the area is the memory of a process."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.5, 3.6))
    # a point for each strategy; its area says how much memory
    for name, r in rows.items():
        point = (r["CPU s a step"], r["14 kinds"])
        drawn = ax.errorbar(*point, yerr=np.nan_to_num(r["+-"]), capsize=3)
        ax.scatter(*point, s=r["MiB"] / 15, alpha=0.6, color=drawn[0].get_color())
        ax.annotate(name, point, (0, 12), textcoords="offset points", ha="center", fontsize=8)
    ax.set(xlabel="CPU seconds a step", ylabel="right of 14 kinds, held-out photos")
    ax.set_xlim(0, 1.15 * max(r["CPU s a step"] for r in rows.values()))
    ax.margins(y=0.25)
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Run what was asked for, one after the other."""
    # flags, before hours of training
    unknown = set(cfg.only) - STRATEGIES.keys()
    check(not unknown, f"--only {' '.join(sorted(unknown))}: there are {', '.join(STRATEGIES)}")
    check(cfg.steps == 0 or cfg.steps > 2, "--steps must be 3 or more")
    least = min(cfg.batch, cfg.views, cfg.judged, cfg.seeds, cfg.seconds, *cfg.rates, 1)
    check(len(cfg.rates) > 0 and least > 0, "all numbers must be above 0")
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
            runs.append(measure(name, cfg, place, steps, factor, seed, cfg.judged))
        rows[name] = row(runs, steps, factor)
        run.write_json(folder / "rows.json", rows)
    # side by side
    draw(folder / "compare.png", rows)
    return run.report(folder, rows)


if __name__ == "__main__":
    run.cli(main, Config)
