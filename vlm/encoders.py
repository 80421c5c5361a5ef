"""Vision encoders measured: sizes of the picture, convolutional network against vision transformer.

Frozen encoders, and a linear probe (probe.py) on the mean of their tokens: which of 14 kinds of fruit is
it. A smaller picture has fewer tokens and costs less; a transformer's positions are interpolated for it
(ViT, Dosovitskiy et al. 2021, arXiv:2010.11929, Sec. 3.2). Two encoders at once: two_encoders.py.

The encoders do not differ in their kind alone: EfficientNet saw ImageNet's 1.3 million labelled photos, the
masked autoencoder 732 photos of fruit without labels.

    python papers/clip.py --no-sweep                 # the space of outputs/clip
    python vlm/encoders.py --clip outputs/clip       # 3 CPU min
"""

import time
from dataclasses import dataclass

import torch

from papers import mae
from utils import data, figures, run
from utils.run import check
from vlm import book_encoders, fruit_photos, probe, tower
from vlm import data as instruction_data
from vlm.easy_vqa_score import wilson
from vlm.label_files import distinct_held_out


@dataclass(frozen=True)
class Config:
    """Measure vision encoders and sizes of the picture."""

    sizes: tuple[int, ...] = (
        96,
        128,
        160,
        224,
        288,
    )  # of EfficientNet; 224 is that of its training
    small_sizes: tuple[int, ...] = (
        32,
        48,
        64,
        96,
        112,
    )  # of the autoencoder; 64 is that of its training
    clip: str = ""  # folder of papers/clip.py; empty: leave it out
    judged: int = 300  # held-out photos
    rounds: int = 10  # of timing, the least one counts
    device: str = "auto"
    out: str = "outputs/encoders"


def untrained(size=64):
    """The autoencoder's encoder with random weights: what its shape alone can tell."""
    torch.manual_seed(0)
    network = book_encoders.MaskedAutoencoder(mae.build(size, 8), size).eval()
    made = tower.VisionTower(network.requires_grad_(False))
    made.mean, made.std = (0.5,) * 3, (0.5,) * 3
    return made


def towers(cfg):
    """{row of the table: function that makes the tower}."""
    found = {}
    for size in cfg.sizes:
        found[f"EfficientNet {size}"] = lambda size=size: tower.load("efficientnet", size=size)
    for size in cfg.small_sizes:
        found[f"MAE {size}"] = lambda size=size: tower.load("mae", size=size)
    found["MAE's shape, random weights 64"] = untrained
    if cfg.clip:
        found["CLIP space 224"] = lambda: tower.load(cfg.clip)
    return found


def parts(judged):
    """Photos to learn from, and held-out ones, each picture once, from the first to the last kind."""
    fruit = data.groceries(64)
    learn, _ = fruit_photos.split(fruit)
    return learn, fruit_photos.spread(torch.tensor(distinct_held_out(fruit)), judged)


def photos(size, chosen):
    """Photos of fruit, numbers `chosen`, as a tower of this size sees them: uint8 (n,3,S,S)."""
    folder = instruction_data.photos()
    return torch.stack([data.read_image(folder / f"{i:04}.jpg", size) for i in chosen.tolist()])


def least_seconds(made, rounds):
    """CPU seconds of a photo for each tower, four at a time, interleaved; the least of all rounds."""
    pictures = {
        name: torch.zeros(4, 3, one.size, one.size, dtype=torch.uint8) for name, one in made.items()
    }
    best = {}
    for _ in range(rounds):
        for name, one in made.items():
            start = time.process_time()
            tower.encode(one, [pictures[name]])
            seconds = (time.process_time() - start) / 4
            best[name] = min(seconds, best.get(name, seconds))
    return best


def compare(cfg, learn, judge):
    """A row for each tower: tokens, width, CPU ms of a photo, accuracy of its probe with an interval."""
    kinds = data.groceries(64).fine
    made = {name: make() for name, make in towers(cfg).items()}
    seconds = least_seconds(made, cfg.rounds)
    rows = {}
    for name, one in made.items():
        x, heldout = (
            tower.vision_features(one, photos(one.size, part)).float().mean(1)
            for part in (learn, judge)
        )
        right = probe.probe(x, kinds[learn], heldout).argmax(-1) == kinds[judge]
        low, high = wilson(probe.share(right), len(judge))
        row = {"tokens": one.count, "width": one.width, "CPU ms": 1000 * seconds[name]}
        rows[name] = row | {"accuracy": probe.share(right), "low": low, "high": high}
    return rows


def draw(path, rows):
    """Accuracy against tokens, and against CPU time, of both encoders at all sizes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
    for kind in ("EfficientNet", "MAE"):
        own = {name: row for name, row in rows.items() if name.rpartition(" ")[0] == kind}
        y = [row["accuracy"] for row in own.values()]
        error = [[row["accuracy"] - row["low"] for row in own.values()]]
        error.append([row["high"] - row["accuracy"] for row in own.values()])
        for axis, what in zip(axes, ("tokens", "CPU ms")):
            x = [row[what] for row in own.values()]
            axis.errorbar(x, y, error, fmt="o-", capsize=2, markersize=4, label=kind)
            for place, value, name in zip(x, y, own):
                axis.annotate(
                    name.split()[-1],
                    (place, value),
                    fontsize=7,
                    xytext=(4, -9),
                    textcoords="offset points",
                )
            axis.set(xlabel=f"{what} of a photo", xscale="log")
    axes[0].set_ylabel("accuracy of the probe")
    axes[0].legend(frameon=False, fontsize=8)
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """A linear probe for each encoder and size."""
    check(min(cfg.judged, cfg.rounds) > 0, "--judged and --rounds: at least 1")
    folder = run.output(cfg.out, cfg)
    learn, judge = parts(cfg.judged)
    rows = compare(cfg, learn, judge)
    draw(folder / "encoders.png", rows)
    return run.report(folder, {"learned": len(learn), "judged": len(judge)} | rows)


if __name__ == "__main__":
    run.cli(main, Config)
