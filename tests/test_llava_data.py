"""finetune/llava_data.py: LLaVA's format, made, checked and read; what is asked is masked, what ends is learned."""

import json

import numpy as np
import pytest
import torch

from finetune import llava_data
from models import llava
from utils import data, pretrained
from utils.run import UserError


@pytest.fixture(scope="module")
def rows():
    return llava_data.fruit("train")


def test_the_photos_to_learn_from_are_those_of_the_data_set(rows):
    fruit = data.groceries(64)
    assert len(rows) == 732 and len(llava_data.fruit("test")) == 1322
    for one in rows:
        assert fruit.split[int(one["image"][:4])] != "test"
    llava_data.validate(rows, llava_data.photos())


def test_every_answer_is_true(rows):
    fruit = data.groceries(64)
    for one in rows:
        i = int(one["image"][:4])
        group, kind = llava.GROUPS[fruit.coarse_names[fruit.coarse[i]]], llava.name_of(fruit, i)
        said = [turn["value"] for turn in one["conversations"]]
        for question, answer in zip(said[::2], said[1::2]):
            if "yes or no" in question:
                assert answer == ("yes" if f" {group}?" in question else "no")
            else:
                assert kind in answer or answer == group


def test_questions_of_every_sort_and_several_turns(rows):
    said = [turn["value"] for one in rows for turn in one["conversations"][::2]]
    for words in (*llava_data.KIND, *llava_data.GROUP, *llava_data.DESCRIBE, "yes or no"):
        assert sum(words in s for s in said) > 20
    assert sum(len(one["conversations"]) > 2 for one in rows) > 300
    assert rows == llava_data.fruit("train", 0) and rows != llava_data.fruit("train", 1)


def test_labels_are_the_answers_and_their_ends(rows):
    tokenizer, language = pretrained.smollm2()
    image_id = llava.add_words(tokenizer, language)
    for one in rows[:40]:
        sample = llava_data.sample(tokenizer, one, 9, 7)
        assert sample["ids"].count(image_id) == 9 and sample["images"] == [7]
        answers = [turn["value"] for turn in one["conversations"][1::2]]
        learned = [i for i in sample["labels"] if i != llava_data.IGNORE]
        assert tokenizer.decode(learned) == "".join(f"{a}<|im_end|>" for a in answers)
        assert all(a in (b, llava_data.IGNORE) for a, b in zip(sample["labels"], sample["ids"]))


def spoiled(change):
    one = llava_data.row("x", "0000.jpg", [("What?", "an apple"), ("Which?", "Gala")])
    change(one)
    return one


BAD = [
    (lambda one: one.pop("conversations"), "no list 'conversations'"),
    (lambda one: one["conversations"].pop(), "turns are human, gpt"),
    (lambda one: one["conversations"].reverse(), "turns are human, gpt"),
    (lambda one: one["conversations"][1].update(value=" "), "empty turn"),
    (lambda one: one["conversations"][1].update(value=3), "every turn is"),
    (lambda one: one["conversations"][0].update(value="What?"), "0 words <image> for 1 pictures"),
    (lambda one: one["conversations"][1].update(value="<image>"), "in an answer"),
    (lambda one: one.pop("image"), "1 words <image> for 0 pictures"),
    (lambda one: one.update(image="9999.jpg"), "there is no 9999.jpg"),
    (lambda one: one.update(image="../photos.txt"), "there is no ../photos.txt"),
    (lambda one: one.update(image=["a", "b"]), "name of one file"),
]


@pytest.mark.parametrize("change, says", BAD)
def test_a_bad_row_is_named(tmp_path, change, says):
    path = tmp_path / "chat.json"
    good = llava_data.row("x", "0000.jpg", [("What?", "an apple")])
    path.write_text(json.dumps([good, spoiled(change)]))
    with pytest.raises(UserError, match="row 1") as found:
        llava_data.read(path, llava_data.photos())
    assert says in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    (tmp_path / "chat.json").write_text(text)
    with pytest.raises(UserError):
        llava_data.read(tmp_path / "chat.json", tmp_path)


def test_pieces_are_of_the_photo():
    image = torch.arange(3 * 40 * 40).view(3, 40, 40)
    for seed in range(20):
        piece = llava_data.piece(image, np.random.default_rng(seed))
        assert piece.shape[1] == piece.shape[2] >= 28
        rows = piece[0] if piece[0, 0, 1] > piece[0, 0, 0] else piece[0].flip(-1)
        assert (rows[1:] - rows[:-1]).eq(40).all() and (rows[:, 1:] - rows[:, :-1]).eq(1).all()


def test_the_command_writes_what_it_reads(tmp_path):
    llava_data.main(llava_data.Config(emoji=3, out=str(tmp_path)))
    rows = llava_data.read(tmp_path / "chat.json", tmp_path / "pictures")
    assert len(rows) == 735 and rows[-1]["image"].startswith("emoji")
