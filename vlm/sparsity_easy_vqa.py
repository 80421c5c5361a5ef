"""Accuracy against visual tokens on easy-VQA: LLaVAs with 49 tokens of a picture, pooled to 9 or 1, 9 by the prompt.

A picture shows one coloured shape (Victor Zhou 2019), so that one token, the mean, may hold all that is asked for; in
the mosaics of sparsity_train.py a question is about a quarter. Each run is vlm/train.py on the open questions (what
colour, what shape: open.json of easy_vqa_curriculum.py), with the same rows, pictures, seed and number of steps, and
other `--sparsity_plugins`. It is judged by answer likelihood among all 13 answers (easy_vqa_score.py), with Wilson's
interval.

    python vlm/sparsity_easy_vqa.py                     # 9 CPU min
    python vlm/sparsity_easy_vqa.py --only "pooled to 1" --steps 20
    python vlm/sparsity_easy_vqa.py --reuse             # those that are finished are read, not made again
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils import figures, run
from utils.run import check
from vlm import (
    easy_vqa_baselines,
    easy_vqa_curriculum,
    easy_vqa_data,
    easy_vqa_score,
    kept_runs,
    llava,
    prompts,
    train,
)
from vlm.easy_vqa_data import ANSWERS
from vlm.train_config import Config as TrainConfig
from vlm.train_config import changed

# plug-ins of each run; the encoder gives 7 x 7 tokens
RUNS = {
    "all 49": (),
    "pooled to 9": ("pool3",),
    "prompt 9": ("prompt9",),
    "pooled to 1": ("pool1",),
}
KINDS = ("colour", "shape")  # of questions
TEMPLATE = Path(__file__).parent / "configs/short.jinja"  # begins with bos


@dataclass(frozen=True)
class Config:
    """Train with each choice of tokens on easy-VQA, and compare accuracy and time."""

    images: int = 0  # the first so many training pictures; 0: all 4000
    steps: int = 60  # of each run
    batch: int = 16  # conversations a step
    count: int = 300  # test questions, kinds in proportion; 0: all
    timed: int = 24  # of them, asked alone: the time of an answer is their median
    only: tuple[str, ...] = ()  # of the runs, those of these names
    reuse: bool = False  # read the runs that are finished in --out
    seed: int = 0
    out: str = "outputs/sparsity_easy_vqa"


def train_run(cfg, folder, name) -> dict[str, Any]:
    """One run of vlm/train.py -> its metrics, and "out", its folder."""
    flags = changed(
        TrainConfig(),
        connector="mlp2x_gelu",
        sparsity_plugins=RUNS[name],
        data_path=(str(folder / "rows/open.json"),),
        image_folder=str(folder / "rows/pictures"),
        template=str(TEMPLATE),
        views=1,
        text_share=0.0,
        packing=False,
        steps=cfg.steps,
        batch_size=cfg.batch,
        lr=0.003,  # of the connector
        warmup_steps=max(1, cfg.steps // 10),
        seed=cfg.seed,
        out=str(folder / name.replace(" ", "-")),
    )
    return train.main(flags) | {"out": flags.out}


def open_questions(cfg):
    """Open questions of the test split, kinds in proportion."""
    asked = [q for q in easy_vqa_data.questions("test") if q.kind in KINDS]
    return easy_vqa_score.stratified(asked, cfg.count, cfg.seed)


@torch.no_grad()
def seconds_of_an_answer(tokenizer, model, listed, features):
    """Questions asked one at a time, the answers ranked and one generated -> CPU seconds (the median)."""
    seconds = []
    for question, seen in zip(listed, features):
        turn = (f"{prompts.IMAGE}\n{question.text}", None)
        ids = torch.tensor([prompts.chat(tokenizer, [turn], model.count)[0]])
        with run.autocast(ids.device):
            start = time.process_time()
            easy_vqa_score.ask(tokenizer, model, ids, seen[None].float())
        seconds.append(time.process_time() - start)
    return float(np.median(seconds))


def judge(cfg, weights):
    """-> accuracy with its interval, by kind of question, image tokens, CPU seconds of an answer."""
    tokenizer, model = llava.load(weights)
    listed = open_questions(cfg)
    asked = sorted({question.image for question in listed})
    place = {image: i for i, image in enumerate(asked)}
    features = easy_vqa_baselines.picture_features(model.vision, "test", asked)
    features = features[[place[question.image] for question in listed]]
    log_p, _ = easy_vqa_score.ask_all(tokenizer, model, listed, features)
    predicted = [ANSWERS[i] for i in log_p.argmax(-1).tolist()]
    row: dict[str, Any] = easy_vqa_score.accuracies(predicted, listed)
    row["tokens"] = model.count
    # questions of both kinds: evenly spaced ones
    spaced = np.linspace(0, len(listed) - 1, min(cfg.timed, len(listed))).astype(int).tolist()
    some = [listed[i] for i in spaced]
    row["CPU s an answer"] = seconds_of_an_answer(tokenizer, model, some, features[spaced])
    return row


def one_run(cfg, folder, name):
    """Train and judge one run -> its row."""
    found: dict[str, Any] = train_run(cfg, folder, name)
    row = judge(cfg, Path(found["out"]) / "model.safetensors")
    row["CPU min of training"] = found["train_cpu_seconds"] / 60
    return row | {"loss": found["final_loss"], "losses": found["losses"]}


def draw(path, rows, blind, losses):
    """Left: accuracy with its 95 % interval against tokens. Right: loss of the runs, means of 10 steps."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, row in rows.items():
        around = [[row["accuracy"] - row["low"]], [row["high"] - row["accuracy"]]]
        about = {"marker": "o", "capsize": 3, "linestyle": "none", "label": name}
        left.errorbar(row["tokens"], row["accuracy"], around, **about)
        window = min(10, len(losses[name]))
        smooth = np.convolve(losses[name], np.ones(window) / window, "valid")
        right.plot(np.arange(len(smooth)) + window, smooth, label=name)
    left.axhline(blind, color="grey", linestyle="--", linewidth=1, label="question only")
    left.set(xlabel="image tokens of a picture", ylabel="accuracy", xlim=(0, 60), ylim=(0, 1.05))
    left.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    right.set(xlabel="step", ylabel="-log p(token of an answer)", yscale="log")
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Write the rows, train and judge each run; writes the figure."""
    numbers = (cfg.steps, cfg.batch, cfg.timed)
    check(min(numbers) > 0, "--steps, --batch, --timed: above 0")
    check(min(cfg.count, cfg.images) >= 0, "--count and --images: 0 or more")
    unknown = [name for name in cfg.only if name not in RUNS]
    check(not unknown, f"--only {', '.join(unknown)}: the runs are {', '.join(RUNS)}")
    folder = run.output(cfg.out, cfg)
    made = easy_vqa_curriculum.Config(cfg.images, seed=cfg.seed, out=str(folder / "rows"))
    easy_vqa_curriculum.main(made)
    flags = {"images": cfg.images, "count": cfg.count, "seed": cfg.seed}
    flags |= {"steps": cfg.steps, "batch": cfg.batch}
    rows = {}
    losses = {}
    for name in cfg.only or RUNS:

        def make(name=name):
            return one_run(cfg, folder, name)

        kept = folder / name.replace(" ", "-")
        rows[name] = dict(kept_runs.row(kept, flags, make, cfg.reuse))
        losses[name] = rows[name].pop("losses")
    # what the words of a question alone give away
    listed = open_questions(cfg)
    said = easy_vqa_baselines.question_only(easy_vqa_data.questions("train"), listed)
    blind = easy_vqa_score.accuracies(said, listed)
    draw(folder / "runs.png", rows, blind["accuracy"], losses)
    return run.report(folder, rows | {"question only": blind}, "python vlm/sparsity_train.py")


if __name__ == "__main__":
    run.cli(main, Config)
