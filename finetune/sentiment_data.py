"""Texts with labels: tweets, reviews or a file of your own, dealt to training, validation and test
by a hash.

Texts and ratings: Hutto & Gilbert 2014, "VADER", ICWSM: 20 people rated each text from -4 to 4;
ratings near zero are left out. Copies of a text have the same hash, so no test text was trained on,
and the parts are the same on every machine. A .csv or .jsonl file is read strictly: what is wrong
with it is a UserError that names the line.
"""

import csv
import hashlib
import io
import json
import os
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from utils import data, run
from utils.text import clean, printable, read_text

SETS = {"tweets": "tweets", "products": "amazonReviewSnippets", "films": "movieReviewSnippets"}


@dataclass(frozen=True)
class Task:
    """The data and the question; every script of the chapter has these flags."""

    # tweets, products, films, or a .csv or .jsonl file with the columns text and label
    data: str = "tweets"
    threshold: float = 0.5  # ratings run from -4 to 4: texts nearer to zero than this are left out
    pattern: str = "Tweet: {text}\nSentiment:"  # the question
    words: tuple[str, ...] = (" negative", " positive")  # the answers, in the order of the labels
    split: Literal["test", "valid"] = "test"  # what is scored; settings are chosen on valid
    texts: int = 0  # so many texts of it; 0: all


def rated(kind, threshold):
    """The texts of one of SETS as [(text, 0 or 1)]: rated below -threshold, above threshold; the
    rest is left out.
    """
    pairs = []
    for text, rating in data.tweets(SETS[kind]):
        if abs(rating) > threshold:
            pairs.append((text, int(rating > 0)))
    return pairs


def csv_rows(text):
    """Rows of a table with commas and a header: (number of the line, {column: value})."""
    # strict: a quote that is never closed is an error
    reader = csv.DictReader(io.StringIO(text), strict=True)
    columns = [name.strip() for name in reader.fieldnames or ()]
    once = columns.count("text") == columns.count("label") == 1
    run.check(once, "it needs the columns text and label, separated by commas, in its first line")
    reader.fieldnames = columns
    for row in reader:
        whole = None not in row  # where DictReader puts fields beyond the columns
        number = reader.line_num
        run.check(whole, f"line {number} has more fields than columns; put texts in quotes")
        yield reader.line_num, row


def json_rows(text):
    """One JSON object a line: (number of the line, object)."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise run.UserError(f"line {number} is no JSON") from None
            run.check(isinstance(row, dict), f"line {number} is no object with text and label")
            yield number, row


def read(path, words):
    """A .csv or .jsonl file with the columns text and label -> [(text, number of the label)];
    labels are `words`.

    Raises UserError, one line that names the file and the line in it.
    """
    name = printable(path)
    sets = ", ".join(SETS)
    there = os.path.isfile(path)
    run.check(there, f"no data at {name}; there are {sets}, or a .csv or .jsonl file")
    run.check(path.suffix in (".csv", ".jsonl"), f"{name} must be a .csv or .jsonl file")
    rows_of = csv_rows if path.suffix == ".csv" else json_rows
    whole = read_text(path)
    names = [w.strip() for w in words]
    pairs = []
    try:
        for number, row in rows_of(whole):
            # the text
            text = row.get("text")
            run.check(isinstance(text, str) and text.strip(), f"line {number} has no text")
            # the label; JSON may have numbers there, and true is a number to Python
            label = row.get("label")
            plain_value = isinstance(label, (str, int)) and not isinstance(label, bool)
            run.check(plain_value and str(label).strip(), f"line {number} has no label")
            label = str(label).strip()
            shown = printable(label)[:40]
            known = label in names
            run.check(known, f"line {number} has the label '{shown}', --words has only {names}")
            pairs.append((clean(text), names.index(label)))
    except (run.UserError, csv.Error) as error:
        raise run.UserError(f"{name}: {error}") from None
    return pairs


def letters(text):
    """What makes two texts copies of each other: their letters, accents and digits, whatever the
    alphabet.

    Names (@anonymous), addresses, blanks, punctuation and capitals do not count. Accented letters
    of Western Europe are left out as well: a wrong decoding turns them into others, and the copy
    should be recognised all the same.
    """
    # without the accented letters of Western Europe
    composed = unicodedata.normalize("NFC", text)
    western = re.sub("[\x80-\xff]", "", composed)
    # wide letters are letters, ligatures are two; no capitals, names and addresses
    same = unicodedata.normalize("NFKC", western).casefold()
    same = re.sub(r"@[a-z0-9_]+|https?://[!-~]+", "", same)
    if same.isascii():
        return re.sub("[^a-z0-9]", "", same)
    # letters, marks (the vowels of Hindi and Thai) and numbers
    kept = [c for c in same if unicodedata.category(c)[0] in "LMN"]
    # of a text of emoji, these
    if not kept:
        kept = [c for c in same if not c.isascii() and unicodedata.category(c) == "So"]
    return "".join(kept)


@lru_cache(2**17)
def hash_fraction(text):
    """A number in [0, 1), from a hash of the letters of a text: copies get the same."""
    digest = hashlib.sha256(letters(text).encode()).hexdigest()
    return int(digest[:8], 16) / 2**32


def part(text):
    """train, valid or test: 70, 10 and 20 %, the same on every machine; copies stay together."""
    fraction = hash_fraction(text)
    if fraction < 0.7:
        return "train"
    return "valid" if fraction < 0.8 else "test"


def load(task):
    """-> {"train", "valid", "test", "scored": [(text, label)]}. Raises UserError."""
    # flags
    asked = "".join([task.pattern, *task.words])
    run.check(clean(asked) == asked, "--pattern and --words must be UTF-8")
    run.check("{text}" in task.pattern, "--pattern must hold {text}, the place of the text")
    different = len(set(task.words)) == len(task.words) > 1
    run.check(different, "--words must be two or more different answers")
    positive = task.threshold >= 0 and task.texts >= 0
    run.check(positive, "--threshold and --texts must not be negative")
    # texts: rated ones, or those of a file
    if task.data in SETS:
        two = len(task.words) == 2
        run.check(two, f"{task.data} has two labels, negative and positive: --words must be two")
        pairs = rated(task.data, task.threshold)
    else:
        pairs = read(Path(task.data), task.words)
    # dealt to the parts by their hash, in the order of the hash
    parts = {name: [] for name in ("train", "valid", "test")}
    for text, label in sorted(dict(pairs).items(), key=lambda pair: hash_fraction(pair[0])):
        parts[part(text)].append((text, label))
    for name, pairs in parts.items():
        labels = {label for _, label in pairs}
        run.check(len(labels) > 1, f"{task.data}: too few texts, '{name}' lacks a label")
    return parts | {"scored": parts[task.split][: task.texts or None]}
