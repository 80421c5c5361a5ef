"""Damaged inputs for the readers: the same ones every time, each a fault that disks, networks and editors make.

    for bad in fuzz.damaged(path.read_bytes(), 500, seed=0):      # any file
    for bad in fuzz.retyped({"rank": 8, "layers": [1]}, 500):     # a JSON value: parsed well, of the wrong shape
        fuzz.reads_or_refuses(lambda: reader(write(bad)))         # the result, or None after one line of UserError

A reader may return something right or raise UserError, within two seconds: no other exception, no hang. Whether what it
returned is right is for the test to say, where the format allows it (a hash, a count, a shape, the original).
"""

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from utils.run import UserError

# What is hard to read: a byte order mark, no UTF-8, a NUL, half of a surrogate pair, a control token, long digits
HARD = [
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\x80",
    b"\0",
    b"\\ud800",
    b"<|im_end|>",
    b"1" * 400,
    b"\r",
    b'"',
    b"{",
    b"[",
    b",",
]
WRONG = [
    None,
    True,
    -1,
    0,
    2**63,
    1e400,
    float("nan"),
    "",
    "x",
    "\ud800",
    "../..",
    [],
    [None],
    {},
    {"x": None},
]


def damaged(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` damaged copies of `data`: bits flipped, cut, chunks swapped, doubled, zeroed or made hard to read.

    The first two are the empty file and the first half. A copy that came out undamaged is drawn again.
    """
    draw = random.Random(seed)
    ways = [flip, cut, swap, double, blank, insert]
    made = 0
    for bad in (b"", data[: len(data) // 2]):
        if made < count and bad != data:
            made += 1
            yield bad
    while made < count:
        bad = bytearray(data)
        for _ in range(draw.choice([1, 1, 1, 2, 5])):  # most files have one fault
            draw.choice(ways)(bad, draw)
        if bad != data:
            made += 1
            yield bytes(bad)


def span(data: bytearray, draw: random.Random) -> tuple[int, int]:
    """Begin and end of a random part, at most a quarter."""
    start = draw.randrange(len(data) + 1)
    return start, min(len(data), start + draw.randrange(1, max(2, len(data) // 4)))


def flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice([1, 1, 8])):
        if data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def cut(data: bytearray, draw: random.Random) -> None:
    start, end = span(data, draw)
    del data[start : end if draw.random() < 0.5 else None]  # a hole, or everything from there on


def swap(data: bytearray, draw: random.Random) -> None:
    start, end = span(data, draw)
    part = data[start:end]
    del data[start:end]
    place = draw.randrange(len(data) + 1)
    data[place:place] = part


def double(data: bytearray, draw: random.Random) -> None:
    start, end = span(data, draw)
    data[end:end] = data[start:end]


def blank(data: bytearray, draw: random.Random) -> None:
    """Zeros: what a disk holds where a write never arrived."""
    start, end = span(data, draw)
    data[start:end] = bytes(end - start)


def insert(data: bytearray, draw: random.Random) -> None:
    place = draw.randrange(len(data) + 1)
    data[place:place] = draw.choice(HARD)


def retyped(value: Any, count: int, seed: int = 0) -> Iterator[Any]:
    """`count` copies of a JSON value with one or two parts replaced by a wrong type, taken out, or renamed."""
    draw = random.Random(seed)
    for _ in range(count):
        bad = value
        for _ in range(draw.choice([1, 1, 2])):
            bad = one_wrong(bad, draw)
        yield bad


def one_wrong(value: Any, draw: random.Random) -> Any:
    """Walks down to a random place of nested dicts and lists and spoils it; `value` itself is not changed."""
    deeper = isinstance(value, (dict, list)) and len(value) > 0 and draw.random() < 0.9
    if not deeper:
        return draw.choice(WRONG)
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy: Any = value.copy()
    chance = draw.random()
    if chance < 0.15:
        del copy[key]
    elif chance < 0.25 and isinstance(copy, dict):
        copy[f"{key}_x"] = copy.pop(key)
    else:
        copy[key] = one_wrong(value[key], draw)
    return copy


def reads_or_refuses(read: Callable[[], Any], seconds: float = 2) -> Any:
    """What `read()` returns, or None if it raised a UserError of one printable line. Anything else fails the test."""
    start = time.process_time()
    try:
        result = read()
    except UserError as error:
        line = str(error)
        assert line and "\n" not in line and len(line) < 1000, line
        line.encode("utf-8")
        result = None
    assert time.process_time() - start < seconds, "it took too long"
    return result
