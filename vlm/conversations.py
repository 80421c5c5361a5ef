"""Conversation format of LLaVA: rows of a chat.json, checked, read, cut into tokens and labels.

A file chat.json is a list of {"id", "image", "conversations": [{"from": "human", "value": ...},
{"from": "gpt", "value": ...}, ...]}; the first question says <image> where the image stands, and a
row without "image" is text alone ("image": null says the same). Liu et al. 2023, arXiv:2304.08485,
Sec. 3.
"""

import json
from bisect import bisect
from pathlib import Path

import numpy as np

from utils import data
from utils.run import UserError, check
from utils.text import clean, printable, read_text
from vlm import prompts
from vlm.prompts import IGNORE

MEGABYTES = 2048  # of a chat.json; LLaVA's own mixture of 665 000 conversations has 1030


def row(name, image, turns):
    """One row of chat.json: turns are [(question, answer), ...]."""
    values = []
    for question, answer in turns:
        values.append({"from": "human", "value": question})
        values.append({"from": "gpt", "value": answer})
    if not image:
        return {"id": name, "conversations": values}
    values[0]["value"] = f"{prompts.IMAGE}\n{values[0]['value']}"
    return {"id": name, "image": image, "conversations": values}


def turns_of(one):
    """[(question, answer), ...] of a row."""
    # questions are at even places, answers at odd ones
    values = [turn["value"] for turn in one["conversations"]]
    return list(zip(values[::2], values[1::2]))


def validate(rows, folder):
    """Raises UserError, which names the row: not this format, turns that do not alternate, a
    picture that is not there, a word <image> where no picture is or where the answer is."""
    check(isinstance(rows, list) and rows, "the file holds no list of conversations")
    for number, one in enumerate(rows):
        at = f"row {number}"
        check(
            isinstance(one, dict) and isinstance(one.get("conversations"), list),
            f"{at} has no list 'conversations'",
        )
        turns = one["conversations"]
        # turns: human and gpt in alternation, none empty
        texts = all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns)
        check(turns and texts, f"{at}: every turn is {{'from': ..., 'value': text}}")
        who = [turn.get("from") for turn in turns]
        order = f"{at}: turns are human, gpt, human, gpt ..., not {printable(who)}"
        check(who == ["human", "gpt"] * (len(turns) // 2), order)
        check(all(turn["value"].strip() for turn in turns), f"{at} has an empty turn")
        # <image>: in questions only, once if there is an image
        there = sum(turn["value"].count(prompts.IMAGE) for turn in turns)
        asked = sum(turn["value"].count(prompts.IMAGE) for turn in turns[::2])
        check(there == asked, f"{at}: {prompts.IMAGE} in an answer")
        image = one.get("image")
        check(image is None or isinstance(image, str), f"{at}: 'image' is the name of one file")
        pictures = int(image is not None)
        check(there == pictures, f"{at}: {there} words {prompts.IMAGE} for {pictures} pictures")
        # the file of the image
        if image is not None:
            nowhere = f"{at}: there is no {printable(image)} in {printable(folder)}"
            check(is_inside(Path(folder), image), nowhere)
    return rows


def is_inside(folder, name):
    """Is there a file of this name in the folder, or below it?"""
    try:
        # a link, or a name with .., may lead out of the folder
        path = folder / name
        return path.resolve().is_relative_to(folder.resolve()) and path.is_file()
    # a name that no file can have: too long, with a NUL or half a character in it
    except (OSError, ValueError):
        return False


def read(path, folder):
    """-> the rows of a chat.json, checked: {"id", "conversations"}, and "image" where there is a
    picture.

    Half characters in a text become U+FFFD. Raises UserError: one line that names the file and the
    row.
    """
    name = printable(path)
    text = read_text(path, MEGABYTES)
    # JSON
    try:
        rows = json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise UserError(f"{name} is no readable JSON file: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{name} is no readable JSON file: {printable(error)}") from None
    # format
    try:
        validate(rows, folder)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return [tidy(one) for one in rows]


def unique_keys(pairs):
    """The pairs of a JSON object as a dict. Raises ValueError for a key that is there twice: JSON
    would keep one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice in one object")
    return found


def tidy(one):
    """A checked row as the rest of this file expects it."""
    turns = []
    for turn in one["conversations"]:
        turns.append({"from": turn["from"], "value": clean(turn["value"])})
    image = {} if one.get("image") is None else {"image": one["image"]}
    return {"id": one.get("id"), **image, "conversations": turns}


def replace_undecodable(rows, folder):
    """Replacement of undecodable images: -> rows, as many as before, and how many were replaced by
    others.

    Without its image a question has no answer, so the whole row is replaced. Which row stands in
    depends on the rows alone, so all ranks choose alike.
    """
    # which images can be decoded
    decodable = {}
    for name in sorted({one["image"] for one in rows if one.get("image")}):
        try:
            data.read_image(Path(folder) / name, 32)
            decodable[name] = True
        except UserError as error:
            print(f"{error}; another one stands in", flush=True)
            decodable[name] = False
    whole = [one for one in rows if decodable.get(one.get("image"))]
    broken = [i for i, one in enumerate(rows) if not decodable.get(one.get("image"), True)]
    check(whole or not broken, f"none of the pictures in {folder} can be read")
    # a random row with an image for each of the others
    rows = list(rows)
    random = np.random.default_rng(len(rows))
    for i, place in zip(broken, random.integers(len(whole) or 1, size=len(broken))):
        rows[i] = whole[place]
    return rows, len(broken)


def sample(tokenizer, one, count, image=None):
    """A row -> {"ids", "labels", "images"}: every question is masked, the end token of an answer
    supervised.

    What is written in a question or an answer is text, even if it reads "<|im_end|>".
    """
    ids, supervised = prompts.chat(tokenizer, turns_of(one), count)
    labels = [i if target else IGNORE for i, target in zip(ids, supervised)]
    return {"ids": ids, "labels": labels, "images": [] if image is None else [image]}


def shorten(tokenizer, one, count, longest):
    """The row with as many whole turns, from the first on, as fit into `longest` tokens; None if
    the first does not.

    A turn is never cut in the middle: the model would learn to stop anywhere, or not to stop.
    """
    turns = turns_of(one)

    def tokens(n):
        """Tokens of the first n turns."""
        return len(prompts.chat(tokenizer, turns[:n], count)[0])

    # the length grows with every turn: bisection for the last that fits
    fitting = bisect(range(1, len(turns) + 1), longest, key=tokens)
    if not fitting:
        return None
    return one | {"conversations": one["conversations"][: 2 * fitting]}


def tokens_of(count, image):
    """Image tokens of a picture by its number: the same for all, or with tiles an entry of a list."""
    if isinstance(count, int):
        return count
    return 0 if image is None else count[image]


def samples(tokenizer, rows, count, numbers, longest=None):
    """Rows -> samples of at most `longest` tokens, how many of them lost turns at their end, and
    rows left out.

    count: tokens of a picture, or of each by its number; numbers: {name of a picture: its number}.
    Raises UserError if no row is left.
    """
    found = []
    shortened = 0
    left_out = 0
    for one in rows:
        image = numbers.get(one.get("image"))
        tokens = tokens_of(count, image)
        made = sample(tokenizer, one, tokens, image)
        # too long: whole turns at the end go
        if longest is not None and len(made["ids"]) > longest:
            one = shorten(tokenizer, one, tokens, longest)
            if one is None:
                left_out += 1
                continue
            shortened += 1
            made = sample(tokenizer, one, tokens, image)
        found.append(made)
    check(
        found,
        f"no conversation fits into {longest} tokens: raise --model_max_length, or shorten them",
    )
    return found, shortened, left_out
