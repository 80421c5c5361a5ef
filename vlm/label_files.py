"""Files of pseudo-labelling: a folder of photos, one JSON line a labelled photo, a list for human review.

A folder has a sub-folder for each class, as torchvision's ImageFolder and many public sets of weather or
traffic scenes have it. Photos in a sub-folder `unlabelled`, or in the folder itself, have no label.
Labels are appended as they come: a run that was stopped goes on where it ended, and a last line that is
cut short is dropped. The first line holds the settings (model, prompts, classes): labels made by others
are not mixed with them.
"""

import csv
import fcntl
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import assets, data, run
from utils.images import IMAGE_SUFFIXES
from utils.run import check
from utils.text import printable
from vlm import data as instruction_data
from vlm import fruit_photos

UNLABELLED = "unlabelled"


class Photo(NamedTuple):
    name: str  # path inside the folder
    path: Path
    label: int  # index of the class; -1: unlabelled


def read_folder(folder, classes=()):
    """-> photos, sorted by name, and names of the classes: those given, or of the sub-folders.

    Raises UserError for a folder without a photo, without two classes, or with a class that is not
    among those given.
    """
    folder = Path(folder)
    check(folder.is_dir(), f"{printable(folder)} is not a folder")
    # classes are the sub-folders
    inside = sorted(x.name for x in folder.iterdir() if x.is_dir() and not x.name.startswith("."))
    found = [name for name in inside if name != UNLABELLED]
    names = list(classes) or found
    check(len(set(names)) > 1, f"{printable(folder)} has no sub-folder a class; name --classes")
    check(len(set(names)) == len(names), "--classes names one twice")
    others = [name for name in found if name not in names]
    check(not others, f"sub-folder {printable(', '.join(others))} is not among --classes")
    # photos, at any depth
    photos = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not hidden:
            label = names.index(parts[0]) if len(parts) > 1 and parts[0] in names else -1
            photos.append(Photo(path.relative_to(folder).as_posix(), path, label))
    check(photos, f"no photo in {printable(folder)}; known are {' '.join(sorted(IMAGE_SUFFIXES))}")
    return photos, names


def digest(path):
    """First half of the sha256 of a file, by which a photo is known: moved to another sub-folder it keeps
    its label, changed it is labelled again."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32]


def read_labels(path, settings):
    """{hash of a photo: row} of a file of labels, {} if there is none; a cut last line is dropped
    from the file.

    Raises UserError if other settings made them, or a line in the middle is no JSON object.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    # the last line has no end: the run was stopped while it wrote
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        check(isinstance(row, dict), f"{printable(path)} is damaged in line {number}")
        rows.append(row)
    if not rows:
        return {}
    made = rows[0].get("settings")
    check(isinstance(made, dict), f"{printable(path)} is no file of labels: its first line")
    other = [key for key in settings if made.get(key) != settings[key]]
    advice = "name another --out, or --fresh to label anew"
    check(not other, f"{printable(path)} was made with another {', '.join(other)}; {advice}")
    whole = all(isinstance(row.get("sha256"), str) for row in rows[1:])
    check(whole, f"{printable(path)} has a line without the hash of a photo")
    return {row["sha256"]: row for row in rows[1:]}


@contextmanager
def appending(path, settings):
    """-> function that appends a row as one line, on the disk when it returns.

    Raises UserError if another process appends to the same file, or it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("ab")
    except OSError as error:
        raise run.UserError(f"cannot write {printable(path)}: {error.strerror}") from None
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise run.UserError(f"another run writes {printable(path)}; wait for it") from None

        def append(row):
            line = json.dumps(row, ensure_ascii=False) + "\n"
            file.write(run.clean(line).encode())
            file.flush()
            os.fsync(file.fileno())

        if not path.stat().st_size:
            append({"settings": settings})
        yield append


def write_table(path, header, rows):
    """A CSV table, whole or not at all. What a spreadsheet would take for a formula is quoted."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(header)
        for row in rows:
            table.writerow([f"'{x}" if str(x)[:1] in ("=", "+", "@") else x for x in row])
    temporary.replace(path)


def distinct_held_out(fruit):
    """Indices of the held-out photos of fruit, each picture once: the data set has them twice."""
    _, heldout = fruit_photos.split(fruit)
    first = {}
    for i in heldout.tolist():
        first.setdefault(digest(instruction_data.photos() / f"{i:04}.jpg"), i)
    return list(first.values())


def without_duplicates(photos):
    """Photos, each picture once, one with a label before one without: the same picture to learn from and to be
    judged by would flatter."""
    first = {}
    for photo in sorted(photos, key=lambda photo: photo.label < 0):
        first.setdefault(digest(photo.path), photo)
    return sorted(first.values())


def some(photos, count, seed=0):
    """`count` of the photos, drawn at random, in their order; 0: all."""
    order = np.random.default_rng([seed, 17]).permutation(len(photos))
    return [photos[i] for i in sorted(order[: count or None].tolist())]


def fruit_folder(labelled=0.5, seed=0):
    """The held-out photos of fruit as a folder, written once: a share `labelled` of each kind in its
    sub-folder, the rest in `unlabelled`."""
    place = assets.cache() / f"fruit-{labelled}-{seed}"
    if place.exists():
        return place
    # into a folder of our own, then under its name: several processes may write
    ready = place.with_name(f".{place.name}-{os.getpid()}")
    fruit = data.groceries(64)
    random = np.random.default_rng([seed, 14])
    chosen = np.array(distinct_held_out(fruit))
    for kind, name in enumerate(fruit.fine_names):
        own = random.permutation(chosen[fruit.fine[chosen].numpy() == kind])
        known = round(labelled * len(own))
        for n, i in enumerate(own.tolist()):
            inside = ready / (fruit_photos.NAMES[name] if n < known else UNLABELLED)
            inside.mkdir(parents=True, exist_ok=True)
            content = (instruction_data.photos() / f"{i:04}.jpg").read_bytes()
            (inside / f"{i:04}.jpg").write_bytes(content)
    ready.rename(place)
    return place
