"""Rows of vision-language benchmarks: parts of the published files, checked; where their images are.

What is not as published is a UserError of one line that names the file and the row.
"""

import json
from pathlib import Path
from typing import Any

from utils.run import UserError, check
from utils.text import clean, printable, read_text
from vlm import prompts, vqa_data
from vlm.vqa_data import is_number, is_text


def find_file(folder, pattern, split=""):
    """The one file of a pattern in the folder, or in its folder annotations; `split` must be in its name.

    Raises UserError for none, and for several: --split says which.
    """
    folder = Path(folder)
    check(folder.is_dir(), f"there is no folder {printable(folder)}; see --data")
    found = sorted([*folder.glob(pattern), *folder.glob(f"annotations/{pattern}")])
    found = [path for path in found if split in path.name]
    wanted = f"{pattern} with '{split}' in its name" if split else pattern
    check(found, f"there is no {wanted} in {printable(folder)}")
    names = ", ".join(path.name for path in found)
    check(len(found) == 1, f"{printable(folder)} has {names}: say which by --split")
    return found[0]


def find_image(folder, names, at):
    """The first of these names in the folder or in one of its sub-folders. Raises UserError."""
    folder = Path(folder)
    places = [folder, *sorted(p for p in folder.iterdir() if p.is_dir())]
    for name in names:
        # a name is no path that leads elsewhere
        check(name == Path(name).name, f"{at}: '{printable(name)}' is no name of a file")
        for place in places:
            if vqa_data.is_file(place / name):
                return place / name
    listed = printable(", ".join(names))
    raise UserError(f"{at}: there is no {listed} in {printable(folder)} or a folder in it")


def coco_names(number, at):
    """Names that COCO gives to picture `number`, in its releases of 2017 and 2014."""
    check(is_number(number) and 0 <= number < 10**12, f"{at}: 'image_id' is no number of COCO")
    of_2014 = [f"COCO_{part}2014_{number:012}.jpg" for part in ("val", "train", "test")]
    return [f"{number:012}.jpg", *of_2014, f"COCO_test2015_{number:012}.jpg"]


def text_of(one, key, at):
    """A text of a row, of 1 to 2000 letters, without <image>. Raises UserError."""
    value: Any = one.get(key) if isinstance(one, dict) else None
    ok = is_text(value) and prompts.IMAGE not in value
    check(ok, f"{at}: '{key}' is no text of 1 to {vqa_data.LONGEST} letters")
    return clean(value).strip()


def texts_of(one, key, at, least=1):
    """A list of texts of a row. Raises UserError."""
    value = one.get(key)
    ok = isinstance(value, list) and len(value) >= least and all(is_text(x) for x in value)
    check(ok, f"{at}: '{key}' is no list of {least} texts or more")
    return [clean(x) for x in value]


def id_of(one, at, key="question_id"):
    """The id of a row, a number or a text. Raises UserError."""
    value = one.get(key) if isinstance(one, dict) else None
    check(is_number(value) or is_text(value), f"{at} has no '{key}'")
    return value


def check_ids(rows, name):
    """Ids once each: a file of results could not tell two rows apart. Raises UserError."""
    check(rows, f"{name} holds no rows")
    check(len({row["id"] for row in rows}) == len(rows), f"{name} has an id twice")
    return rows


def listed(content, key, name) -> Any:
    """The list of a JSON object by its key. Raises UserError."""
    found = content.get(key) if isinstance(content, dict) else None
    check(isinstance(found, list) and found, f"{name} has no list '{key}'")
    return found


def row(name, image, question, **more):
    """One question; what a benchmark does not have is None."""
    return {
        "id": name, "image": image, "question": question, "choices": None, "right": None,
        "answers": None,
    } | more  # fmt: skip


def json_lines(path):
    """Objects of a file with one JSON object a line. Raises UserError, which names the line."""
    found = []
    for n, line in enumerate(read_text(path, limit_mb=1024).splitlines(), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError):
                raise UserError(f"{path.name}, line {n} is no JSON object") from None
    return found
