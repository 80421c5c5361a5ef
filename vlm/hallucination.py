"""Object hallucination measured: POPE's questions before and after training on negatives.

A model that was never asked about what is not there says yes, or names what it was asked for (Li et
al. 2023, arXiv:2305.10355). Liu et al. 2023, arXiv:2306.14565 (LRV-Instruction) mend it by training on
negatives. Here the same LLaVA goes on for as many steps with three sets of rows about the training photos:
positives alone, with negatives drawn at random, with adversarial ones (kinds of the same group).
Each is scored on POPE's three files about held-out photos (benchmark_samples.py), and on naming,
which must not suffer.

    python vlm/hallucination.py                              # 26 CPU min
    python vlm/hallucination.py --questions 40 --steps 20    # a first look: too few steps to learn it
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import data, figures, run
from utils.run import check
from vlm import (
    benchmark_files,
    benchmark_samples,
    benchmark_scores,
    benchmarks,
    conversations,
    fruit_photos,
    llava,
)
from vlm import data as instruction_data

# Line behind each question: the model was trained with it, and answers other questions by a name
SUFFIX = "Answer yes or no."
# Name: which absent kinds the rows to learn from ask about; None: none
ARMS = {
    "positives alone": None,
    "random negatives": "random",
    "adversarial negatives": "adversarial",
}


@dataclass(frozen=True)
class Config:
    """Train a LLaVA on negatives, and ask it about what is not there."""

    model: str = str(llava.WEIGHTS)  # weights to go on from
    steps: int = 240  # of each training
    batch: int = 16  # rows a step
    learning_rate: float = 1e-3
    questions: int = 100  # of each of POPE's three files
    judged: int = 100  # photos to be named
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/hallucination"


def yes_or_no(fruit, kind):
    """POPE's question about a kind, and the line behind it."""
    return f"{benchmark_samples.asks_for(fruit, kind)}\n{SUFFIX}"


def rows_of(sampling, seed=0):
    """Rows to learn from: each training photo is named, and asked about by yes-or-no questions.

    Half of these ask about an absent kind, or none if sampling is None: then a second one about the
    kind that is there."""
    fruit = data.groceries(64)
    train, _ = fruit_photos.split(fruit)
    frequent = fruit.fine[train].bincount(minlength=len(fruit.fine_names))
    frequent = frequent.argsort(descending=True).tolist()
    random = np.random.default_rng([seed, 12])
    rows = []
    for i in train.tolist():
        kind = int(fruit.fine[i])
        asked = [(fruit_photos.QUESTION, fruit_photos.name_of(fruit, i))]
        asked.append((yes_or_no(fruit, kind), "yes"))
        if sampling is None:
            asked.append(asked[1])
        else:
            other = benchmark_samples.absent(sampling, fruit, kind, frequent, random)
            asked.append((yes_or_no(fruit, other), "no"))
        # one question a row: an earlier answer would give a later one away
        for n, turn in enumerate(asked):
            rows.append(conversations.row(f"fruit-{i:04}-{n}", f"{i:04}.jpg", [turn]))
    return rows


def train(cfg, rows, folder):
    """Go on from the model with these rows, in a process of its own -> its weights."""
    folder.mkdir(exist_ok=True)
    run.write_json(folder / "chat.json", rows)
    flags = {
        "model": cfg.model, "data": folder / "chat.json", "image_folder": instruction_data.photos(),
        "max_steps": cfg.steps, "num_warmup_steps": max(1, cfg.steps // 10),
        "per_device_train_batch_size": cfg.batch, "learning_rate": cfg.learning_rate,
        "learning_rate_pretraining_components": cfg.learning_rate, "views": 1, "text_share": 0,
        "judged": cfg.judged, "seed": cfg.seed, "device": cfg.device, "out": folder,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in flags.items()]
    script = Path(__file__).with_name("train.py")
    done = subprocess.run([sys.executable, str(script), *words], stdout=subprocess.DEVNULL)
    check(done.returncode == 0, f"the training in {folder} failed")
    return folder / "model.safetensors"


def score(cfg, weights, parts, folder):
    """POPE's three files, and names of held-out photos: {sampling: rows} -> {what: share in 0..1}."""
    tokenizer, model = llava.load(str(weights), run.device(cfg.device))
    found = {}
    for sampling, rows in parts.items():
        done = benchmarks.answer("pope", tokenizer, model, rows, suffix=SUFFIX)
        lines = [{"question": r["question"], "label": r["label"], "said": r["said"]} for r in done]
        run.write_json(folder / f"{sampling}.json", lines)
        each = benchmark_scores.pope([r["said"] for r in done], [r["label"] for r in done])
        found |= {sampling: each["accuracy"], f"{sampling}: yes": each["yes"]}
    # naming must not suffer
    fruit = data.groceries(64)
    _, chosen = fruit_photos.split(fruit, cfg.judged, cfg.seed)
    photos = []
    for i in chosen.tolist():
        path = instruction_data.photos() / f"{i:04}.jpg"
        photos.append({"image": path, "question": fruit_photos.QUESTION, "choices": None})
    done = benchmarks.answer("naming", tokenizer, model, photos)
    right = [r["said"] == fruit_photos.name_of(fruit, i) for r, i in zip(done, chosen.tolist())]
    return found | {"named": float(np.mean(right))}


def draw(path, rows):
    """Bars: accuracy on each of POPE's files, a group for each training; chance is a half."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    names = list(rows)
    width = 0.26
    for n, sampling in enumerate(benchmark_samples.SAMPLINGS):
        places = [i + (n - 1) * width for i in range(len(names))]
        axis.bar(places, [rows[name][sampling] for name in names], width, label=sampling)
    named = [rows[name]["named"] for name in names]
    axis.plot(range(len(names)), named, "k_", markersize=40, label="kind named")
    axis.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(names)), names)
    axis.set(ylim=(0, 1), ylabel="accuracy")
    axis.legend(
        ncols=4,
        loc="upper center",
        bbox_to_anchor=(0.5, 1.17),
        frameon=False,
        fontsize=8,
        markerscale=0.4,
    )
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Score the model, train it on each set of rows, score again."""
    least = min(cfg.steps, cfg.batch, cfg.questions, cfg.judged)
    check(least > 0 and cfg.learning_rate > 0, "all numbers must be above 0")
    folder = run.output(cfg.out, cfg)
    run.seed(cfg.seed)
    # POPE's questions about held-out photos
    place = folder / "pope"
    place.mkdir(exist_ok=True)
    ways = benchmark_samples.write_pope(place, cfg.questions, cfg.seed)
    parts = {way: benchmark_files.read_pope(place, way) for way in ways}
    # before
    before = folder / "before"
    before.mkdir(exist_ok=True)
    rows = {"before": score(cfg, cfg.model, parts, before)}
    # after each training
    for name, sampling in ARMS.items():
        own = folder / name.replace(" ", "-")
        weights = train(cfg, rows_of(sampling, cfg.seed), own)
        rows[name] = score(cfg, weights, parts, own)
    draw(folder / "hallucination.png", rows)
    return run.report(folder, rows)


if __name__ == "__main__":
    run.cli(main, Config)
