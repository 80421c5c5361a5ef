"""LLaVAs trained on pictures with distractors, with fewer visual tokens: all of them, pooled, random, by the prompt.

A picture is a mosaic of four photos of fruit of different groups (sparsity_study.py); "What kind of pear is this?"
asks about one. EfficientNet sees 448 x 448 pixels, a grid of 14 x 14, of which means over 7 x 7 areas remain: 49
tokens. Each run is vlm/train.py on the same rows, pictures, seed and number of steps, with other
`--sparsity_plugins`, and is judged on mosaics of held-out photos by answer likelihood among the kinds of the group.

    python vlm/sparsity_train.py                     # 20 CPU min
    python vlm/sparsity_train.py --only "prompt 9" --steps 20
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils import data, figures, run
from utils.run import check
from vlm import conversations, fruit_photos, generation, llava, prompted_answers, train
from vlm.sparsity_study import draw_mosaics, kinds_of, question
from vlm.train_config import Config as TrainConfig
from vlm.train_config import changed

SIDE = 448  # of a picture; half of it is a photo
# plug-ins of each run, behind the means over 7 x 7 areas
RUNS = {
    "all 49": ("pool7",),
    "pooled to 9": ("pool3",),
    "random 9": ("pool7", "random9"),
    "prompt 9": ("pool7", "prompt9"),
    "9 means, prompt 9": ("pool7", "coarse3", "prompt9"),
}


@dataclass(frozen=True)
class Config:
    """Train with each choice of tokens, and compare accuracy and time."""

    pictures: int = 600  # to learn from
    judged: int = 120  # other pictures, of other photos
    steps: int = 120  # of each run
    batch: int = 16  # conversations a step
    only: tuple[str, ...] = ()  # of the runs, those of these names
    seed: int = 0
    out: str = "outputs/sparsity_train"


def mosaic(photos):
    """Four photos uint8 (4,3,224,224) -> a picture (3,448,448), row by row."""
    above = torch.cat([photos[0], photos[1]], dim=2)
    below = torch.cat([photos[2], photos[3]], dim=2)
    return torch.cat([above, below], dim=1)


def write_mosaics(folder, fruit, among, count, random):
    """Pictures as files and chat.json: of each the question about one photo -> groups, kinds."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_mosaics(fruit, among, count, random)
    rows = []
    for number in range(count):
        picture = mosaic(fruit.images[drawn.photos[number]])
        file = f"{number:04}.png"
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / file)
        answer = fruit_photos.NAMES[fruit.fine_names[int(drawn.kinds[number])]]
        asked = question(int(drawn.groups[number]))
        rows.append(conversations.row(file, file, [(asked, answer)]))
    run.write_json(folder / "chat.json", rows)
    return drawn.groups, drawn.kinds


def train_run(cfg, folder, name, **parts) -> dict[str, Any]:
    """One run of vlm/train.py, `parts`: flags of its model -> its metrics, and "out", its folder."""
    flags = changed(
        TrainConfig(),
        **parts,
        data_path=(str(folder / "learn/chat.json"),),
        views=1,
        text_share=0.0,
        steps=cfg.steps,
        batch_size=cfg.batch,
        warmup_steps=max(1, cfg.steps // 10),
        seed=cfg.seed,
        out=str(folder / name.replace(" ", "-").replace(",", "")),
    )
    return train.main(flags) | {"out": flags.out}


@torch.no_grad()
def judge(path, folder, fruit, groups, kinds):
    """-> accuracy among the kinds of the group, image tokens of a picture, CPU seconds of an answer (the median)."""
    tokenizer, model = llava.load(path)
    right = 0
    seconds = []
    for number, (group, kind) in enumerate(zip(groups.tolist(), kinds.tolist())):
        picture = data.read_image(folder / f"{number:04}.png", 0)
        choices = kinds_of(fruit, group)
        names = [fruit_photos.NAMES[fruit.fine_names[k]] for k in choices]
        with run.autocast(next(model.language.parameters()).device):
            seen = generation.photo_embeddings(model, picture)
            start = time.process_time()
            embeds = prompted_answers.embed_prompt(tokenizer, model, question(group), seen)
            log_p = prompted_answers.rank_answers(tokenizer, model, embeds, names, question(group))
        seconds.append(time.process_time() - start)
        right += choices[int(log_p[0].argmax())] == kind
    return right / len(kinds), model.count_of((SIDE, SIDE)), float(np.median(seconds))


def draw(path, rows, chance, losses):
    """Left: accuracy with one standard error against tokens. Right: loss of the runs, means of 20 steps."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, row in rows.items():
        about = {"marker": "o", "capsize": 3, "linestyle": "none", "label": name}
        left.errorbar(row["tokens"], row["accuracy"], row["standard error"], **about)
        window = min(20, len(losses[name]))
        smooth = np.convolve(losses[name], np.ones(window) / window, "valid")
        right.plot(np.arange(len(smooth)) + window, smooth, label=name)
    left.axhline(chance, color="grey", linestyle="--", linewidth=1, label="chance")
    most = max(row["tokens"] for row in rows.values())
    about = {"xlim": (0, 1.2 * most), "ylim": (0, 0.8)}
    left.set(xlabel="image tokens of a picture", ylabel="accuracy", **about)
    left.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    right.set(xlabel="step", ylabel="-log p(token of an answer)", yscale="log")
    return figures.close(figure, path)


def prepare(cfg, runs, stream):
    """Check the flags, write the mosaics; stream: of the random numbers.

    -> folder of the study; fruit, groups and kinds that its mosaics in judged/ ask about; accuracy of a guess. Raises
    UserError for a number of 0 and for a run in cfg.only that is none of `runs`.
    """
    numbers = (cfg.pictures, cfg.judged, cfg.steps, cfg.batch)
    check(min(numbers) > 0, "--pictures, --judged, --steps, --batch: above 0")
    unknown = [name for name in cfg.only if name not in runs]
    check(not unknown, f"--only {', '.join(unknown)}: the runs are {'; '.join(runs)}")
    folder = run.output(cfg.out, cfg)
    fruit = data.groceries(SIDE // 2)
    learn, heldout = fruit_photos.split(fruit)
    random = np.random.default_rng([cfg.seed, stream])
    write_mosaics(folder / "learn", fruit, learn, cfg.pictures, random)
    groups, kinds = write_mosaics(folder / "judged", fruit, heldout, cfg.judged, random)
    chance = float(np.mean([1 / len(kinds_of(fruit, g)) for g in groups.tolist()]))
    return folder, (fruit, groups, kinds), chance


def main(cfg: Config) -> dict:
    """Write the mosaics, train and judge each run; writes the figure."""
    folder, judged, chance = prepare(cfg, RUNS, 15)
    rows = {}
    losses = {}
    for name in cfg.only or RUNS:
        parts = {"connector": "mlp2x_gelu", "sparsity_plugins": RUNS[name]}
        found = train_run(cfg, folder, name, img_size=SIDE, **parts)
        weights = Path(found["out"]) / "model.safetensors"
        accuracy, tokens, seconds = judge(weights, folder / "judged", *judged)
        losses[name] = found["losses"]
        rows[name] = {
            "accuracy": accuracy,
            "standard error": (accuracy * (1 - accuracy) / cfg.judged) ** 0.5,
            "tokens": tokens,
            "CPU s an answer": seconds,
            "CPU min of training": found["train_cpu_seconds"] / 60,
            "loss": found["final_loss"],
        }
    draw(folder / "runs.png", rows, chance, losses)
    return run.report(folder, rows | {"chance": chance})


if __name__ == "__main__":
    run.cli(main, Config)
