"""Training strategies of LLaVA compared: frozen, trained or LoRA parts, at equal compute.

Every strategy learns for as many CPU seconds, so that a cheap one takes more steps. Its learning rate is
searched first: rates are doubled or halved until the best one has a worse one on either side. What counts is the
training loss, so that no held-out photo decides, and that of the worst seed, so that no rate is taken which a run may
not bear. Then several seeds; the interval of their mean is Student's (1908). Each run is one of vlm/train.py in a
process of its own, so that its memory is its own. Two data sets: fruit, of which the kind is named, and the open
questions of easy-VQA, for colour and shape. A picture is one token (--connector pool1), so that many steps fit into
the time.

    python vlm/strategies.py                                   # fruit: hours
    python vlm/easy_vqa_curriculum.py                          # writes the rows of
    python vlm/strategies.py --data easy_vqa --seconds 100 --search_share 0.25 --search_seeds 2
    python vlm/strategies.py --steps 60 --rates 1 --seeds 1    # as many steps instead of as much time
    python vlm/strategies.py --only lora-all random-connector
"""

from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

import numpy as np

from utils import figures, run
from utils.run import check
from vlm.strategy_runs import EASY_VQA, STRATEGIES, judge, measure, seconds_a_step

# Steps of the run that tells what a step costs
TRIAL = 12
# Factors of the learning rates lie between 1 / LIMIT and LIMIT
LIMIT = 16


@dataclass(frozen=True)
class Config:
    """Search the learning rate of each strategy, train at equal compute, put the results side by side."""

    data: Literal["fruit", "easy_vqa"] = "fruit"
    only: tuple[str, ...] = ()  # names of strategies; none: all of them
    seconds: float = 160  # CPU seconds of training of each run
    steps: int = 0  # instead of seconds: as many steps for all
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)  # factors tried first; a single one: no search
    # steps of a run of the search, as a share of those of a run that counts
    search_share: float = 1.0
    search_seeds: int = 1  # runs of each rate that is tried
    seeds: int = 3  # runs of each strategy at the rate that was found
    batch: int = 16  # conversations a step
    views: int = 4  # of each photo of fruit
    text_share: float = 0.0  # pages of manuals among the rows; 0: the loss is that of answers
    packing: bool = False  # rows are nearly as long as each other, and padded
    judged: int = 150  # photos or questions to be judged by
    seed: int = 0  # the first one
    out: str = "outputs/strategies"


def trial_steps(name, cfg, folder):
    """Steps that fit into the time, at the price of a step in a short run."""
    if cfg.steps:
        return cfg.steps
    trial = measure(name, cfg, folder / "trial", TRIAL)
    return max(3, round(cfg.seconds / seconds_a_step(trial, TRIAL)))


def try_rate(name, cfg, folder, steps, factor):
    """Runs of the search at a factor of the learning rates -> (training loss, [CPU seconds a step]).

    The loss at the end is that of the worst seed, and infinite if one of them diverged.
    """
    steps = max(3, round(cfg.search_share * steps))
    losses = []
    prices = []
    for seed in range(cfg.seed, cfg.seed + cfg.search_seeds):
        place = folder / f"rate-{factor:g}-seed-{seed}"
        found = measure(name, cfg, place, steps, factor, seed)
        losses.append(found["final_loss"])
        prices.append(seconds_a_step(found, steps))
    worst = max(losses) if np.isfinite(losses).all() else float("inf")
    print(f"    learning rates x {factor:g}: loss {worst:.3f}", flush=True)
    return worst, prices


def search(name, cfg, folder, steps):
    """Factor of the learning rates with the lowest training loss -> (it, {factor: loss}, steps of a run that counts).

    The search goes on, twice or half as high, as long as the best factor is the last one on its side. Its runs
    also tell what a step costs: more of them than the trial has, so less noise.
    """
    if len(cfg.rates) == 1:
        return cfg.rates[0], {}, steps
    losses = {}
    prices = []
    left = list(cfg.rates)
    while left:
        factor = left.pop(0)
        losses[factor], found = try_rate(name, cfg, folder, steps, factor)
        prices += found
        if left:
            continue
        # worse ones on both sides, or far enough?
        best = min(losses, key=losses.__getitem__)
        further = {max(losses): 2 * best, min(losses): best / 2}
        if best in further and 1 / LIMIT <= further[best] <= LIMIT:
            left.append(further[best])
    return best, losses, cfg.steps or max(3, round(cfg.seconds / median(prices)))


def mean_and_half(values, level=0.95):
    """Mean of independent runs, and half of its confidence interval; one run has none. Student 1908."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return fmean(values), float("nan")
    half = t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / n**0.5
    return fmean(values), float(half)


def row(runs, steps, factor):
    """Row of the table: metrics of runs that differ in their seed; the first score has its interval."""
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
    """Run what was asked for, one after the other; runs that are in the folder already are taken as they are."""
    # flags, before hours of training
    unknown = set(cfg.only) - STRATEGIES.keys()
    check(not unknown, f"--only {' '.join(sorted(unknown))}: there are {', '.join(STRATEGIES)}")
    check(cfg.steps == 0 or cfg.steps > 2, "--steps must be 3 or more")
    runs = min(cfg.seeds, cfg.search_seeds)
    least = min(cfg.batch, cfg.views, cfg.judged, runs, cfg.seconds, *cfg.rates, 1)
    check(len(cfg.rates) > 0 and least > 0, "all numbers must be above 0")
    check(0 < cfg.search_share <= 1, "--search_share must be above 0 and at most 1")
    rows_there = cfg.data == "fruit" or (EASY_VQA / "open.json").is_file()
    check(rows_there, f"{EASY_VQA} has no open.json; write it by python vlm/easy_vqa_curriculum.py")
    folder = run.output(cfg.out, cfg)
    names = cfg.only or tuple(STRATEGIES)
    rows = {}
    losses = {}
    for name in names:
        own = folder / name
        own.mkdir(exist_ok=True)
        print(f"{name}: {STRATEGIES[name][0]}", flush=True)
        # equal compute: as many steps as fit into the time
        steps = trial_steps(name, cfg, own)
        factor, losses[name], steps = search(name, cfg, own, steps)
        # the runs that count
        runs = []
        for seed in range(cfg.seed, cfg.seed + cfg.seeds):
            place = own / f"seed-{seed}"
            runs.append(judge(name, cfg, place, steps, factor, seed))
        rows[name] = row(runs, steps, factor)
        run.write_json(folder / "rows.json", {"rows": rows, "search": losses})
    # side by side
    draw(folder / "compare.png", rows)
    return run.report(folder, rows)


if __name__ == "__main__":
    run.cli(main, Config)
