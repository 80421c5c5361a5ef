"""Accuracy against visual tokens on easy-VQA: LLaVAs with 49 tokens of a picture, pooled to 9 or 1, 9 by the prompt.

A picture shows one coloured shape (Victor Zhou 2019), so that a token of the mean may hold all that is asked for; in
the mosaics of sparsity_train.py a question is about a quarter. Each model goes through the three stages of
easy_vqa_curriculum.py with the same rows, pictures, seed and steps, and other `--sparsity_plugins`; it is judged by
answer likelihood on test questions (easy_vqa_score.py), with Wilson's interval.

    python vlm/sparsity_easy_vqa.py                     # 35 CPU min
    python vlm/sparsity_easy_vqa.py --only "pooled to 1" --steps 20 20 20
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
# rows of each stage, conversations a step, rate of the connector: as in configs/easy_vqa_*.yaml
STAGES = (("captions", 32, 0.003), ("plain", 16, 0.002), ("all", 16, 0.001))
TEMPLATE = Path(__file__).parent / "configs/short.jinja"


@dataclass(frozen=True)
class Config:
    """Train with each choice of tokens on easy-VQA, and compare accuracy and time."""

    images: int = 0  # the first so many training pictures; 0: all 4000
    steps: tuple[int, int, int] = (80, 120, 200)  # of the stages captions, plain, all
    count: int = 1000  # test questions, kinds in proportion; 0: all 9673
    timed: int = 24  # of them, asked alone: the time of an answer is their median
    only: tuple[str, ...] = ()  # of the runs, those of these names
    reuse: bool = False  # read the runs that are finished in --out
    seed: int = 0
    out: str = "outputs/sparsity_easy_vqa"


def folder_of(folder, name):
    """Where a run of this name is kept."""
    return folder / name.replace(" ", "-")


def train_stages(cfg, folder, name):
    """The three stages of one run, each from the weights of the one before -> weights, CPU seconds."""
    weights = ""
    seconds = 0.0
    for (stage, batch, rate), steps in zip(STAGES, cfg.steps, strict=True):
        flags = changed(
            TrainConfig(),
            data_path=(str(folder / f"rows/{stage}.json"),),
            image_folder=str(folder / "rows/pictures"),
            template=str(TEMPLATE),
            views=1,
            text_share=0.0,
            packing=False,
            steps=steps,
            batch_size=batch,
            lr=rate,
            warmup_steps=min(30, steps // 4),
            seed=cfg.seed,
            out=str(folder_of(folder, name) / stage),
        )
        # the parts are named once; then they are those of the weights
        if weights:
            flags = changed(flags, ckpt_path=weights)
        else:
            flags = changed(flags, connector="mlp2x_gelu", sparsity_plugins=RUNS[name])
        seconds += train.main(flags)["train_cpu_seconds"]
        weights = str(Path(flags.out) / "model.safetensors")
    return weights, seconds


@torch.no_grad()
def seconds_of_an_answer(tokenizer, model, listed, features):
    """Questions asked one at a time, their answers ranked and one generated -> CPU seconds (the median)."""
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
    listed = easy_vqa_score.stratified(easy_vqa_data.questions("test"), cfg.count, cfg.seed)
    asked = sorted({question.image for question in listed})
    place = {image: i for i, image in enumerate(asked)}
    features = easy_vqa_baselines.picture_features(model.vision, "test", asked)
    features = features[[place[question.image] for question in listed]]
    log_p, _ = easy_vqa_score.ask_all(tokenizer, model, listed, features)
    predicted = [ANSWERS[i] for i in log_p.argmax(-1).tolist()]
    row: dict[str, Any] = easy_vqa_score.accuracies(predicted, listed)
    row["tokens"] = model.count
    # questions of all kinds: evenly spaced ones
    spaced = np.linspace(0, len(listed) - 1, min(cfg.timed, len(listed))).astype(int).tolist()
    some = [listed[i] for i in spaced]
    row["CPU s an answer"] = seconds_of_an_answer(tokenizer, model, some, features[spaced])
    return row


def one_run(cfg, folder, name):
    """Train and judge, or read what was found before -> the row of the run."""
    flags = {"images": cfg.images, "steps": list(cfg.steps), "count": cfg.count, "seed": cfg.seed}

    def make():
        weights, seconds = train_stages(cfg, folder, name)
        return judge(cfg, weights) | {"CPU min of training": seconds / 60}

    return kept_runs.row(folder_of(folder, name), flags, make, cfg.reuse)


def baselines(cfg):
    """Accuracy of the two baselines that see no picture."""
    learned = easy_vqa_data.questions("train")
    listed = easy_vqa_score.stratified(easy_vqa_data.questions("test"), cfg.count, cfg.seed)
    found = {
        "majority class": easy_vqa_baselines.majority_class(learned, listed),
        "question only": easy_vqa_baselines.question_only(learned, listed),
    }
    return {name: easy_vqa_score.accuracies(said, listed) for name, said in found.items()}


def draw(path, rows, blind):
    """Left: accuracy with its 95 % interval against tokens. Right: time of an answer, of training."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, row in rows.items():
        about = {"marker": "o", "linestyle": "none", "label": name}
        around = [[row["accuracy"] - row["low"]], [row["high"] - row["accuracy"]]]
        left.errorbar(row["tokens"], row["accuracy"], around, capsize=3, **about)
        right.plot(row["CPU min of training"], row["CPU s an answer"], **about)
    for style, (name, row) in zip(("--", ":"), blind.items()):
        left.axhline(row["accuracy"], color="grey", linestyle=style, linewidth=1, label=name)
    left.set(xlabel="image tokens of a picture", ylabel="accuracy", xlim=(0, 60), ylim=(0.3, 1.02))
    left.legend(frameon=False, fontsize=8, ncols=2, loc="center right")
    right.set(xlabel="training, CPU min", ylabel="an answer, CPU s", xlim=(0, None), ylim=(0, None))
    right.legend(frameon=False, fontsize=8, loc="lower right")
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Write the rows, train and judge each run; writes the figure."""
    check(min(*cfg.steps, cfg.timed) > 0, "--steps and --timed: above 0")
    check(min(cfg.count, cfg.images) >= 0, "--count and --images: 0 or more")
    unknown = [name for name in cfg.only if name not in RUNS]
    check(not unknown, f"--only {', '.join(unknown)}: the runs are {', '.join(RUNS)}")
    folder = run.output(cfg.out, cfg)
    made = easy_vqa_curriculum.Config(cfg.images, seed=cfg.seed, out=str(folder / "rows"))
    easy_vqa_curriculum.main(made)
    rows = {}
    for name in cfg.only or RUNS:
        rows[name] = one_run(cfg, folder, name)
    blind = baselines(cfg)
    draw(folder / "runs.png", rows, blind)
    return run.report(folder, rows | blind, "python vlm/sparsity_train.py")


if __name__ == "__main__":
    run.cli(main, Config)
