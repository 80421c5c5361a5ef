"""Lazy rows of a chat.json or a JSON lines file: read on demand by byte offset, checked when they are read.

LLaVA's mixture of 665 000 conversations is a file of 1 GB and several GB of Python objects, on every
rank and in every worker. Here the file is scanned once for where its rows begin and end; these byte
offsets, 16 bytes a row, are kept in the cache under a hash of the file's path, size and time of
change. A row is read when it is asked for, and checked by the rules of vlm/conversations.py. Whether
its picture can be read shows when the picture is read (vlm/image_store.py, vlm/collator.py).

A JSON array begins with "["; anything else is read as JSON lines, one row a line.
"""

import hashlib
import json
import mmap
import operator
import os
import re
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from utils import assets, data
from utils.run import UserError, check
from utils.text import decode, printable
from vlm import conversations

# Of how rows are found: raise it with any change, or offsets of the old way are read
VERSION = 1
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A bracket that opens (group 1), one that closes (2), or a whole string, whose brackets do not count
TOKEN = re.compile(rb'([{\[])|([}\]])|"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
WHITE = b" \t\r\n"
BLANK = re.compile(rb"[ \t\r\n]*")


def stamp(path):
    """What changes with the content of a file: its path, size and time of change. Raises UserError
    if it cannot be read."""
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
    except OSError as error:
        raise UserError(f"cannot read {printable(path)}: {error.strerror}") from None
    return str(Path(path).resolve()), found.st_size, found.st_mtime_ns


def cache_file(kind, stamped):
    """Where an index of a file is kept: under a hash of all that `stamp` gave."""
    name = hashlib.sha256(repr((VERSION, kind, stamped)).encode()).hexdigest()[:16]
    return assets.cache() / "rows" / f"{kind}-{name}.safetensors"


def array_offsets(text, begin, name):
    """Byte offsets of the elements of a JSON array in `text`, any buffer -> [start, end, start, end,
    ...]. Raises UserError if it is cut short or holds something between its objects."""
    # one pass over brackets and strings; objects are not parsed, only their ends are found
    found = array("q")
    depth = 0
    last = begin + 1

    def check_between(start, expected):
        number = len(found) // 2
        between = text[last:start].strip(WHITE)
        wrong = f"{name} is no readable JSON file: near row {number}: {printable(between[:40])}"
        check(between == expected, wrong)

    for token in TOKEN.finditer(text, begin):
        if token.lastindex == 1:
            depth += 1
            # an element begins; a comma stands before it, if it is not the first
            if depth == 2:
                check_between(token.start(), b"," if found else b"")
                last = token.start()
        elif token.lastindex == 2:
            depth -= 1
            # an element ends
            if depth == 1:
                found.extend((last, token.end()))
                last = token.end()
            # the array ends, and with it the file
            if depth == 0:
                check_between(token.start(), b"")
                rest = BLANK.match(text, token.end())
                more = f"{name} is no readable JSON file: it goes on after its list"
                check(rest and rest.end() == len(text), more)
                return found
    raise UserError(
        f"{name} is no readable JSON file: it is cut short after {len(found) // 2} rows"
    )


def line_offsets(text, begin):
    """Byte offsets of the lines of `text` that are not blank -> [start, end, start, end, ...]."""
    found = array("q")
    # JSON lines: a row is what stands between two ends of lines
    start = begin
    while start < len(text):
        end = text.find(b"\n", start)
        end = len(text) if end < 0 else end
        if text[start:end].strip(WHITE):
            found.extend((start, end))
        start = end + 1
    return found


def offsets(path, name):
    """Byte offsets of all rows of a file: int64 (rows, 2). Raises UserError for a file without
    rows."""
    with open(path, "rb") as file:
        empty = os.fstat(file.fileno()).st_size == 0
        # an empty file cannot be mapped
        check(not empty, f"{name} is empty: it holds no list of conversations")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            # past a byte-order mark and blanks, the first byte tells an array from lines
            marked = text[:3] == BYTE_ORDER_MARK
            blank = BLANK.match(text, 3 if marked else 0)
            begin = blank.end() if blank else 0
            # the match holds on to the file
            del blank
            if text[begin : begin + 1] == b"[":
                found = array_offsets(text, begin, name)
            else:
                found = line_offsets(text, begin)
    check(found, f"{name}: the file holds no list of conversations")
    return torch.frombuffer(found, dtype=torch.int64).clone().view(-1, 2)


def stand_in(image, there):
    """The field "image" of a row with each name replaced by that of a file which is there."""
    if isinstance(image, str):
        return there.name
    if isinstance(image, list) and all(isinstance(name, str) for name in image):
        return [there.name] * len(image)
    return image


def parse(text, at):
    """Bytes of a row -> the value of its JSON. `at` names it in messages. Raises UserError."""
    decoded = decode(text, at)
    try:
        return json.loads(decoded, object_pairs_hook=conversations.unique_keys)
    except RecursionError:
        raise UserError(f"{at} is no readable JSON: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{at} is no readable JSON: {printable(error)}") from None


def checked(one, at, there):
    """A row of LLaVA's format, tidied. `there` is any file that exists: it stands for the pictures,
    which are not looked for here. Raises UserError for a row of another format."""
    # the names of pictures are not looked up: a million of them would take minutes
    shown = one
    if isinstance(one, dict) and one.get("image") is not None:
        shown = one | {"image": stand_in(one["image"], there)}
    try:
        conversations.validate([shown], there.parent)
    except UserError as error:
        raise UserError(f"{at}{str(error).removeprefix('row 0')}") from None
    return conversations.tidy(one)


class Rows(Sequence):
    """Rows of a chat.json or a JSON lines file, read when they are asked for: rows[i], len(rows).

    Holds 16 bytes a row, and nothing open: workers of a DataLoader may share it. Raises UserError,
    one line that names the file and the row: when it is made, for a file that is no list of rows;
    when a row is read, for a row that is not of LLaVA's format.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.name = printable(path)
        self.stamp = stamp(path)
        kept = cache_file("offsets", self.stamp)
        tensors, _ = data.cached(kept, self.scan)
        self.offsets = tensors["offsets"]

    def scan(self):
        return {"offsets": offsets(self.path, self.name)}, None

    def __len__(self):
        return len(self.offsets)

    def text(self, number):
        """Bytes of a row. Raises UserError if the file is no longer the one that was scanned."""
        # opened anew for every row: workers share no file position
        start, end = self.offsets[number].tolist()
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                file.seek(start)
                text = file.read(end - start)
        except OSError as error:
            raise UserError(f"cannot read {self.name}: {error.strerror}") from None
        # offsets are those of the file that was scanned
        same = (found.st_size, found.st_mtime_ns) == self.stamp[1:]
        check(same, f"{self.name} has changed while it was being read: start again")
        return text

    def __getitem__(self, number):
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = operator.index(number)
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        number %= len(self)
        at = f"{self.name}: row {number}"
        return checked(parse(self.text(number), at), at, self.path)

    def modality_lengths(self):
        """Words of each row, below zero where it has no picture: int64 (rows,), read once and kept.
        LLaVA groups its batches by these."""

        def count():
            return {"lengths": torch.tensor([modality_length(one) for one in self])}, None

        tensors, _ = data.cached(cache_file("lengths", self.stamp), count)
        return tensors["lengths"].numpy()


def modality_length(one):
    """Words of the conversation of a row, below zero if the row has no picture."""
    words = sum(len(turn["value"].split()) for turn in one["conversations"])
    return words if one.get("image") else -words


def sources(data_sets):
    """{name: rows} -> {name: range of its numbers} in all of them one after the other, as
    torch.utils.data.ConcatDataset counts them: what samplers.Mixture draws from."""
    found = {}
    first = 0
    for name, rows in data_sets.items():
        found[name] = range(first, first + len(rows))
        first += len(rows)
    return found


def open_rows(paths, weights=()):
    """Files of `--data` and numbers of `--weights` -> rows of all of them, {file: numbers},
    {file: weight}; without weights every row counts the same. Raises UserError for flags that do not
    fit."""
    # one weight a file; without weights a file weighs as much as it has rows
    fit = not weights or len(weights) == len(paths)
    check(fit, f"--weights: {len(weights)} numbers for {len(paths)} files of --data")
    names = [str(path) for path in paths]
    check(len(set(names)) == len(names), "--data names a file twice: give it twice the weight")
    data_sets = {name: Rows(path) for name, path in zip(names, paths)}
    drawn = dict(zip(names, weights or [len(rows) for rows in data_sets.values()]))
    joined = torch.utils.data.ConcatDataset(list(data_sets.values()))
    return joined, sources(data_sets), drawn


def all_lengths(joined):
    """`modality_lengths` of all rows that `open_rows` gave: int64 (rows,)."""
    return np.concatenate([rows.modality_lengths() for rows in joined.datasets])
