"""DPO and its relatives on the same pairs, steps and held-out prompts: win rate, and what each costs.

Each loss runs by the command of dpo.py with its own beta. Learning the chosen ones alone (sft) is the
baseline: what do the rejected ones add?

    python finetune/dpo_study.py
    python finetune/dpo_study.py --kinds sigmoid ipo --betas 0.1 0.05
"""

from dataclasses import dataclass, replace
from pathlib import Path

from finetune import dpo
from finetune.preference_losses import Kind
from utils import figures, run


@dataclass(frozen=True)
class Config(dpo.Config):
    """Compare losses on preference pairs."""

    kinds: tuple[Kind, ...] = ("sft", "sigmoid", "ipo", "hinge", "simpo", "orpo")  # which losses
    betas: tuple[float, ...] = (1.0, 0.1, 0.1, 0.1, 2.0, 1.0)  # the beta of each of them
    out: str = "outputs/dpo_study"  # where the results go


def row(metrics):
    """A row of the table."""
    won = metrics["win rate"]
    found = {"win rate": won["mean"], "low": won["low"], "high": won["high"]}
    for name in ("reward", "tokens", "distinct-2", "text perplexity"):
        found[name] = metrics[name]["after"]
    found["log-ratio"] = metrics["log-ratio of own samples"]
    if "pair accuracy" in metrics:
        found["pair accuracy"] = metrics["pair accuracy"]["mean"]
        for side in ("chosen", "rejected"):
            value = metrics[f"log p({side})"]
            found[side] = value["after"] - value["before"]
    return {name: float(value) for name, value in found.items()}


def main(cfg: Config) -> dict:
    """Train with each loss in turn, print and draw the table."""
    same = len(cfg.kinds) == len(cfg.betas)
    run.check(same, f"--betas: one for each of {', '.join(cfg.kinds)}")
    run.check(not cfg.resume, "--resume: the study has no checkpoint of its own; use dpo.py")
    folder = run.output(cfg.out, cfg)
    flags = {name: getattr(cfg, name) for name in dpo.Config.__dataclass_fields__}
    rows = {}
    bars = {}
    for kind, beta in zip(cfg.kinds, cfg.betas):
        out = str(Path(cfg.out) / kind)
        metrics = dpo.main(replace(dpo.Config(**flags), kind=kind, beta=beta, out=out))
        rows[kind] = row(metrics)
        bars[kind] = (rows[kind]["win rate"], rows[kind]["low"], rows[kind]["high"])
        # what is there so far, if a later loss fails
        run.write_json(folder / "rows.json", rows)
    figures.bars(folder / "win_rate.png", bars, "win rate against the reference")
    return run.report(folder, rows, then="python finetune/reward_model.py")


if __name__ == "__main__":
    run.cli(main, Config)
