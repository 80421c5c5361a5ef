"""easy-VQA as instruction data: questions about one coloured shape, in LLaVA's chat format.

5000 pictures of 64 x 64 pixels, 48 248 questions, 13 answers (easy-VQA, Victor Zhou 2019). The answer
depends on two things only: the colour of the shape, one of 8, and which shape it is, one of 3. A row
holds one question, or several as the turns of a conversation (Liu et al. 2023, arXiv:2304.08485, Sec.
3). Turns save the image tokens of further rows, and leak: what an earlier turn says may settle a
later one without the picture. `leakage` counts those turns exactly, over the 24 possible scenes.

    python vlm/easy_vqa_data.py                                # one question a row, all pictures
    python vlm/easy_vqa_data.py --images 2000 --per_image 5    # 10 000 rows about 2000 pictures
    python vlm/easy_vqa_data.py --turns_per_row 0              # all questions of a picture in one row
"""

import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import assets, data, run
from utils.run import check
from vlm import conversations

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
ANSWERS = (*COLOURS, *SHAPES, "yes", "no")
KINDS = ("colour", "shape", "yes/no", "negated yes/no")
SCENES = tuple(product(COLOURS, SHAPES))  # 24 pairs of a colour and a shape


@dataclass(frozen=True)
class Config:
    """Write easy-VQA's training questions as conversations, with their pictures."""

    turns_per_row: int = 1  # questions in one conversation; 0: all of a picture
    images: int = 0  # the first so many pictures; 0: all 4000
    per_image: int = 0  # questions of a picture, drawn at random; 0: all, some ten
    balanced: bool = False  # of every wording as many questions of each answer
    seed: int = 0  # of the order of questions
    out: str = "outputs/easy_vqa_data"


class Question(NamedTuple):
    image: int  # number of the picture in its split
    text: str
    answer: str  # one of ANSWERS
    kind: str  # one of KINDS


def is_negated(text):
    """Is there a negation in it, as in "is there not a circle?" or "is no circle present?"."""
    words = text.rstrip("?").split()
    return "no" in words or "not" in words


def kind_of(text, answer):
    """Kind of a question and its answer. Raises UserError for an answer that is none of the 13."""
    check(answer in ANSWERS, f"'{answer}' is no answer of easy-VQA")
    if answer in COLOURS:
        return "colour"
    if answer in SHAPES:
        return "shape"
    return "negated yes/no" if is_negated(text) else "yes/no"


def check_split(split):
    """Raises UserError for a split that there is not."""
    check(split in ("train", "test"), f"easy-VQA has the splits train and test, no '{split}'")


def questions(split):
    """All questions of a split, in the order of the data set -> list of Question."""
    check_split(split)
    found = data.easy_vqa(split)
    listed = zip(found.image_of.tolist(), found.questions, found.answers)
    return [Question(i, text, answer, kind_of(text, answer)) for i, text, answer in listed]


def picture(split, number):
    """Path of a picture of the data set, as it was published."""
    check_split(split)
    return assets.fetch("easy_vqa") / "easy_vqa/data" / split / "images" / f"{number}.png"


def named(text):
    """Colour and shape that a question names -> (colour or None, shape or None)."""
    words = text.rstrip("?").split()
    colour = next((word for word in words if word in COLOURS), None)
    shape = next((word for word in words if word in SHAPES), None)
    return colour, shape


def answer_for(text, scene):
    """The right answer to a question about a scene (colour, shape)."""
    colour, shape = scene
    words = text.rstrip("?").split()
    # "what color is the circle?", "what is the red shape?"
    if words[0] == "what":
        return colour if "color" in words else shape
    # "is there a red shape?", "is no circle present?": true, and turned round by a negation
    is_there = any(name in scene for name in named(text) if name)
    return "no" if is_there == is_negated(text) else "yes"


def consistent(text, answer, scenes):
    """Those of the scenes in which a question makes sense ("what is the red shape?" is asked of red
    ones only) and has this answer; answer None: any."""
    kept = []
    for scene in scenes:
        presupposed = text.startswith("what") and any(n not in scene for n in named(text) if n)
        if not presupposed and answer in (None, answer_for(text, scene)):
            kept.append(scene)
    return kept


def scenes_of(turns):
    """Scenes that fit all questions and answers about a picture -> list of (colour, shape)."""
    scenes = list(SCENES)
    for text, answer in turns:
        scenes = consistent(text, answer, scenes)
    return scenes


def leakage(turns):
    """How many of a conversation's answers follow from its earlier turns and the question alone,
    without the picture."""
    scenes = list(SCENES)
    settled = 0
    for text, answer in turns:
        asked = consistent(text, None, scenes)
        settled += len({answer_for(text, scene) for scene in asked}) == 1
        scenes = consistent(text, answer, scenes)
    return settled


def balance(listed, seed=0):
    """Balanced answers: of every wording as many questions of each answer, the others left out.

    Seven of eight colours that are asked about are not there, so "no" is a good guess without the
    picture; balanced, no guess is (Goyal et al. 2017, arXiv:1612.00837, Sec. 3).
    """
    groups = {}
    for i, question in enumerate(listed):
        groups.setdefault(question.text, {}).setdefault(question.answer, []).append(i)
    random = np.random.default_rng([seed, 9])
    kept = []
    for by_answer in groups.values():
        # a wording that has one answer only could be answered blindly: none of it is kept
        fewest = min(map(len, by_answer.values())) if len(by_answer) > 1 else 0
        for numbers in by_answer.values():
            kept += random.permutation(numbers)[:fewest].tolist()
    return [listed[i] for i in sorted(kept)]


def rows(split, seed=0, turns_per_row=1, images=0, per_image=0, balanced=False):
    """Rows in LLaVA's chat format: questions of a picture in random order, cut into conversations.

    turns_per_row: questions in a row, 0: all of a picture; images: the first so many pictures, 0:
    all; per_image: at most so many of its questions, 0: all; balanced: see `balance`. Raises
    UserError for a number below 0.
    """
    numbers = min(turns_per_row, images, per_image)
    check(numbers >= 0, "--turns_per_row, --images and --per_image must be 0 or more")
    listed = [q for q in questions(split) if not images or q.image < images]
    if balanced:
        listed = balance(listed, seed)
    # the questions of each picture
    by_image = {}
    for question in listed:
        by_image.setdefault(question.image, []).append((question.text, question.answer))
    found = []
    for image, turns in by_image.items():
        # random order: with few turns of a picture these are a random sample of its questions
        random = np.random.default_rng([seed, 7, image])
        turns = [turns[i] for i in random.permutation(len(turns))]
        turns = turns[: per_image or len(turns)]
        # conversations of so many turns
        size = turns_per_row or len(turns)
        for start in range(0, len(turns), size):
            name = f"easy-vqa-{split}-{image:04}-{start:02}"
            part = turns[start : start + size]
            found.append(conversations.row(name, f"{image:04}.png", part))
    return found


def plain_turns(row):
    """[(question, answer)] of a row, without the word <image>."""
    return [(text.rpartition("\n")[2], answer) for text, answer in conversations.turns_of(row)]


def write_pictures(folder, split, names):
    """Copy pictures of a split to folder/pictures, whole or not at all -> its path.

    Raises UserError if it cannot be written.
    """
    folder = Path(folder)
    target = folder / "pictures"
    try:
        with tempfile.TemporaryDirectory(prefix=".pictures-", dir=folder) as temporary:
            # pictures, in a folder of our own, then under its name
            ready = Path(temporary) / "pictures"
            ready.mkdir()
            for name in sorted(names):
                shutil.copyfile(picture(split, int(name[:4])), ready / name)
            if target.exists():
                target.rename(Path(temporary) / "old")
            ready.rename(target)
    except OSError as error:
        raise run.UserError(
            f"cannot write to {folder}: {os.strerror(error.errno or 0)}; choose another --out"
        ) from None
    return target


def write(folder, split, made):
    """Write chat.json and pictures/ into a folder, each whole or not at all -> path of chat.json."""
    target = write_pictures(folder, split, {row["image"] for row in made})
    # rows last: a chat.json has its pictures
    path = Path(folder) / "chat.json"
    run.write_json(path, conversations.validate(made, target))
    return path


def main(cfg: Config) -> dict:
    """Write the training questions, count them by kind, count the answers that leak."""
    made = rows("train", cfg.seed, cfg.turns_per_row, cfg.images, cfg.per_image, cfg.balanced)
    folder = run.output(cfg.out, cfg)
    path = write(folder, "train", made)
    for row in made[:3]:
        texts = [f"{text} {answer}" for text, answer in plain_turns(row)]
        print(f"{row['image']}: {' | '.join(texts)}")
    # counts
    turns = [plain_turns(row) for row in made]
    kinds = [kind_of(*turn) for several in turns for turn in several]
    settled = sum(leakage(several) for several in turns)
    metrics = {
        "pictures": len({row["image"] for row in made}),
        "rows": len(made),
        "questions": len(kinds),
        "kinds": dict(Counter(kinds)),
        "answers settled by earlier turns": settled / len(kinds),
    }
    then = f"python vlm/train.py --data {path} --image_folder {path.parent / 'pictures'}"
    return run.report(folder, metrics, then)


if __name__ == "__main__":
    run.cli(main, Config)
