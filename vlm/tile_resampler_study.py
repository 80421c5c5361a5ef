"""Tiles resampled to a fixed number of tokens, against tiles put together by place, and against none.

A picture is a mosaic of four photos of fruit (sparsity_train.py), 448 x 448 pixels; "What kind of pear is this?" asks
about one. An encoder of 224 pixels sees it whole, each photo in 112 pixels, or also in four tiles, each photo in all
its 224. Each run is vlm/train.py on the same rows, pictures, seed and steps; the vision features are computed once.
Judged on mosaics of held-out photos, by answer likelihood among the kinds of the group.

    python vlm/tile_resampler_study.py                     # 12 CPU min
    python vlm/tile_resampler_study.py --only "tiles resampled to 16" --steps 20
    python vlm/tile_resampler_study.py --reuse             # those that are finished are read, not made again
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import run
from vlm import anyres, kept_runs
from vlm.flags import PerceiverConfig
from vlm.sparsity_train import SIDE, draw, judge, prepare, train_run

K16 = PerceiverConfig(n_latents=16)
# flags of each run: what stands between encoder and language model
RUNS: dict[str, dict[str, Any]] = {
    "whole, pooled to 9": {"connector": "pool3"},
    "tiles, each pooled to 9": {"connector": "pool3", "tiles": 4},
    "tiles resampled to 16": {"connector": "tile_perceiver", "perceiver": K16, "tiles": 4},
}


@dataclass(frozen=True)
class Config:
    """Train with and without tiles, resampled or not, and compare accuracy, tokens and time."""

    pictures: int = 400  # to learn from
    judged: int = 80  # other pictures, of other photos
    steps: int = 80  # of each run
    batch: int = 16  # conversations a step
    only: tuple[str, ...] = ()  # of the runs, those of these names
    reuse: bool = False  # read the runs that are finished in --out
    seed: int = 0
    out: str = "outputs/tile_resampler_study"


def one_run(cfg, folder, name, judged):
    """Train one run and judge it on (fruit, groups, kinds) -> its row."""
    found = train_run(cfg, folder, name, **RUNS[name])
    weights = Path(found["out"]) / "model.safetensors"
    accuracy, tokens, seconds = judge(weights, folder / "judged", *judged)
    return {
        "accuracy": accuracy,
        "standard error": (accuracy * (1 - accuracy) / cfg.judged) ** 0.5,
        "tokens": tokens,
        "CPU s a step": found["train_cpu_seconds"] / cfg.steps,
        "CPU s an answer": seconds,
        "loss": found["final_loss"],
        "losses": found["losses"],
    }


def main(cfg: Config) -> dict:
    """Write the mosaics, train and judge each run; writes the figure."""
    folder, judged, chance = prepare(cfg, RUNS, 16)
    flags = {k: getattr(cfg, k) for k in ("pictures", "judged", "steps", "batch", "seed")}
    rows = {}
    losses = {}
    for name in cfg.only or RUNS:

        def make(name=name):
            return one_run(cfg, folder, name, judged)

        kept = folder / name.replace(" ", "-").replace(",", "")
        rows[name] = dict(kept_runs.row(kept, flags, make, cfg.reuse))
        losses[name] = rows[name].pop("losses")
    draw(folder / "runs.png", rows, chance, losses)
    # what tiles would cost if none of their tokens were pooled
    side = SIDE // 2
    every = anyres.count_tokens((SIDE, SIDE), side, 7, anyres.candidates(side, 4))
    metrics = rows | {"chance": chance, "tokens of tiles, none pooled": every}
    return run.report(folder, metrics, "python vlm/train.py --tiles 4 --connector tile_perceiver")


if __name__ == "__main__":
    run.cli(main, Config)
