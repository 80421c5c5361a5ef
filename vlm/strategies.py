"""Training strategies of LLaVA compared: frozen, trained or LoRA parts; same photos, same seed, same steps.

Each strategy is one run of vlm/train.py in a process of its own, so that its memory is its own.

    python vlm/strategies.py                     # the table of vlm/train.md: 53 CPU minutes
    python vlm/strategies.py --only lora
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from utils import figures, run
from utils.run import check

STRATEGIES = {  # name: what vision, connector and language model do, flags
    "projector": ("frozen, trained, frozen", ["--train_type", "projector"]),
    "lora": ("frozen, trained, LoRA on q v", ["--lora_targets", "q_proj", "v_proj"]),
    "lora-all": ("frozen, trained, LoRA on all matrices", ["--train_type", "use_lora"]),
    # a third of the steps
    "two-stages": ("frozen, trained, LoRA on all in the last two thirds", ["--align_steps"]),
    "language": (
        "frozen, trained, trained",
        ["--train_type", "freeze_vision", "--learning_rate_pretraining_components", "5e-5"],
    ),
    "everything": (
        "trained, trained, trained",
        ["--train_type", "none", "--learning_rate_pretraining_components", "5e-5"],
    ),
}


@dataclass(frozen=True)
class Config:
    """Train with each strategy, for as many steps, and put the results side by side."""

    only: tuple[str, ...] = ()  # names of strategies; none: all of them
    steps: int = 60  # of each
    batch: int = 16  # conversations a step
    views: int = 4  # of each photo
    judged: int = 300  # photos to be judged by
    seed: int = 0
    out: str = "outputs/strategies"


def command(name, cfg, folder):
    """The run of one strategy."""
    # flags of the strategy
    flags = list(STRATEGIES[name][1])
    if flags[-1] == "--align_steps":
        flags.append(str(cfg.steps // 3))
    # the same for all strategies
    every = {
        "max_steps": cfg.steps,
        "per_device_train_batch_size": cfg.batch,
        "views": cfg.views,
        "judged": cfg.judged,
        "text_share": 0.1,
        "num_warmup_steps": max(1, cfg.steps // 10),
        "seed": cfg.seed,
        "out": folder / name,
    }
    more = []
    for flag, value in every.items():
        more += [f"--{flag}", str(value)]
    return [sys.executable, str(Path(__file__).with_name("train.py")), *flags, *more]


def row(metrics, steps):
    """Row of the table: the metrics of a run."""
    return {
        "14 kinds": metrics["LLaVA"]["14 kinds"], "5 groups": metrics["LLaVA"]["5 groups"],
        "loss": metrics["final_loss"], "text loss": metrics["text loss"]["after"], "learned": metrics["learned"],
        "MiB": metrics["process_MiB"], "CPU s a step": metrics["train_cpu_seconds"] / steps,
    }  # fmt: skip


def draw(path, rows):
    """Accuracy against the time of a step; the area of a point is the memory of its process."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.5, 3.6))
    # a point for each strategy; its area says how much memory
    for name, r in rows.items():
        ax.scatter(r["CPU s a step"], r["14 kinds"], s=r["MiB"] / 15, alpha=0.6)
        point = (r["CPU s a step"], r["14 kinds"])
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
    check(
        cfg.steps >= 3 and min(cfg.batch, cfg.views, cfg.judged) > 0,
        "--steps must be 3 or more, the rest above 0",
    )
    folder = run.output(cfg.out, cfg)
    rows = {}
    for name in cfg.only or STRATEGIES:
        # a run in a process of its own
        print(f"{name}: {STRATEGIES[name][0]}", flush=True)
        done = subprocess.run(command(name, cfg, folder), stdout=subprocess.DEVNULL)
        check(done.returncode == 0, f"the run of {name} failed")
        metrics = json.loads((folder / name / "metrics.json").read_text("utf-8"))
        rows[name] = row(metrics, cfg.steps)
    # side by side
    draw(folder / "compare.png", rows)
    return run.report(folder, rows)


if __name__ == "__main__":
    run.cli(main, Config)
