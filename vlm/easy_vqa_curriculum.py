"""Curriculum of easy-VQA: captions, then plain questions, then negated ones, each a chat.json to train on.

Curriculum learning, Bengio et al. 2009: easy examples first. What makes "is there not a red shape?"
hard is an exclusive or: the answer is yes if there is one or if the question is negated, but not
both. Averaged over a batch of both kinds neither fact has a gradient, so none is learned; without
negation the comparison of a word with the picture is learned alone. Before that, captions align the
image token with words (LLaVA's first stage, Liu et al. 2023, arXiv:2304.08485, Sec. 4.2), and rows
in which words stand where the picture stands teach the comparison itself: the language model cannot
do it, not even between words.

    python vlm/easy_vqa_curriculum.py
    python vlm/train.py --config vlm/configs/easy_vqa_1.yaml     # then 2, then 3
    python vlm/easy_vqa_score.py --model outputs/easy_vqa_3/model.safetensors
"""

from dataclasses import dataclass

import numpy as np

from utils import run
from utils.run import check
from vlm import conversations, easy_vqa_data
from vlm.easy_vqa_baselines import known_scenes
from vlm.easy_vqa_data import balance, questions

# The question whose answer is a caption: the picture alone
CAPTION = ""


@dataclass(frozen=True)
class Config:
    """Write the three stages of the curriculum, with their pictures."""

    images: int = 0  # the first so many training pictures; 0: all 4000
    # yes/no questions that are asked once more in words, as a fraction of them
    in_words: float = 0.7
    seed: int = 0  # of the choice of questions
    out: str = "outputs/easy_vqa_curriculum"


def captions(scenes):
    """Captions of pictures, as answers: {picture: (colour, shape)} -> rows. "red circle"."""
    rows = []
    for image, (colour, shape) in scenes.items():
        turn = (CAPTION, f"{colour} {shape}")
        rows.append(conversations.row(f"caption-{image:04}", f"{image:04}.png", [turn]))
    return rows


def about_pictures(listed):
    """Questions about pictures -> rows of one question each."""
    rows = []
    for number, question in enumerate(listed):
        turn = (question.text, question.answer)
        name = f"question-{number:05}"
        rows.append(conversations.row(name, f"{question.image:04}.png", [turn]))
    return rows


def about_words(listed, scenes):
    """Text-only rows: the words of a caption stand where the picture stands. "red circle", a
    newline, and the question."""
    rows = []
    for number, question in enumerate(listed):
        told = " ".join(scenes[question.image])
        turn = (f"{told}\n{question.text}", question.answer)
        rows.append(conversations.row(f"words-{number:05}", None, [turn]))
    return rows


def sample(listed, share, random):
    """A random sample of the questions: so many of all of them."""
    order = random.permutation(len(listed))[: round(share * len(listed))]
    return [listed[i] for i in order]


def stages(images=0, share=0.7, seed=0):
    """Rows of the three stages, and of open questions alone -> {"captions", "plain", "all", "open"}.

    images: the first so many training pictures, 0: all; share: of yes/no questions that are asked
    once more in words. Raises UserError for numbers that make no sense.
    """
    check(images >= 0, "--images must be 0 or more")
    check(0 <= share <= 1, "--in_words must be between 0 and 1")
    listed = [q for q in questions("train") if not images or q.image < images]
    # the same pictures in all stages: those whose answers settle what they show
    scenes = known_scenes(listed)
    listed = [q for q in listed if q.image in scenes]
    told = captions(scenes)
    # what colour, what shape: no comparison, so no curriculum
    asked_openly = [q for q in listed if q.kind in ("colour", "shape")]
    # balanced answers: of every wording as many of each
    balanced = balance(listed, seed)
    plain = [q for q in balanced if q.kind == "yes/no"]
    yes_no = [q for q in balanced if q.kind.endswith("yes/no")]
    # in words
    random = np.random.default_rng([seed, 11])
    plain_words = about_words(sample(plain, share, random), scenes)
    all_words = about_words(sample(yes_no, share, random), scenes)
    return {
        "captions": told,
        "plain": told + about_pictures(plain) + plain_words,
        "all": told + about_pictures(balanced) + all_words,
        "open": about_pictures(asked_openly),
    }


def main(cfg: Config) -> dict:
    """Write captions.json, plain.json, all.json and open.json beside their pictures."""
    made = stages(cfg.images, cfg.in_words, cfg.seed)
    folder = run.output(cfg.out, cfg)
    names = {row["image"] for rows in made.values() for row in rows if "image" in row}
    pictures = easy_vqa_data.write_pictures(folder, "train", names)
    metrics = {}
    for name, rows in made.items():
        run.write_json(folder / f"{name}.json", conversations.validate(rows, pictures))
        in_words = sum("image" not in row for row in rows)
        metrics[name] = {"rows": len(rows), "in words": in_words}
        print(f"{name}: {conversations.turns_of(rows[-1])[0]}")
    return run.report(folder, metrics, "python vlm/train.py --config vlm/configs/easy_vqa_1.yaml")


if __name__ == "__main__":
    run.cli(main, Config)
