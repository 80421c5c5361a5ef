"""Classes of pictures and a tokenizer that are known through and through, for the tests of Flamingo's episodes."""

from types import SimpleNamespace

import numpy as np

from vlm import flamingo_data
from vlm.flamingo_data import PictureClass

IMAGE, END, START = 98, 99, 1


class Letters:
    """In the place of a tokenizer: a word is one id, all alike in every text."""

    def __init__(self):
        self.words = {}

    def convert_tokens_to_ids(self, tokens):
        return [IMAGE, END]

    def __call__(self, text, add_special_tokens):
        found = [self.words.setdefault(word, 10 + len(self.words)) for word in text.split()]
        return SimpleNamespace(input_ids=found)


def classes(source="emoji", count=30, each=4, before=0):
    """Class i has the pictures before + i, before + i + count, ... and a colour."""
    found = []
    for i in range(count):
        facts = {flamingo_data.NAME: f"{source}{i}", flamingo_data.COLOUR: f"colour{i % 3}"}
        pictures = before + i + count * np.arange(each)
        found.append(PictureClass(source, f"{source}{i}", pictures, facts))
    return found


def everything():
    return classes() + classes("fruit", 7, 6, 1000) + classes("shapes", 6, 6, 2000)


def class_of(known, picture):
    return next(c for c in known if picture in c.pictures)


def split_chunks(ids, targets):
    """Ids of a text, which are targets -> its chunks [(ids between <image> and the end, targets, end a target)]."""
    assert ids[0] == START and not targets[0]
    found = []
    for token, is_target in zip(ids[1:], targets[1:]):
        if token == IMAGE:
            assert not is_target
            found.append([[], [], None])
        elif token == END:
            found[-1][2] = bool(is_target)
        elif token != START:
            found[-1][0].append(int(token))
            found[-1][1].append(bool(is_target))
        else:
            assert not is_target  # padding
    return found
