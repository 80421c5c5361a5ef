"""vlm/chat_terminal.py and llava.py --chat: lines from a pipe, commands, Ctrl-C, bits, what is wrong in one line."""

import builtins
import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from deploy.int8_linear import Int8Linear
from deploy.low_bit_layers import Int4Int8Linear
from tests import eyes
from tests.conftest import ROOT
from tests.vlm.chats import Recorded, anew, loud, picture
from utils import pretrained
from utils.run import UserError
from vlm import chat_terminal, llava
from vlm.prompts import IMAGE


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    tokenizer, model = eyes.talker(tmp_path_factory.mktemp("talker"))
    return tokenizer, loud(model)


@pytest.fixture
def typed(monkeypatch, talker):
    """typed(lines): what stands on stdin; an exception among them is raised there. The model is the tiny one."""
    monkeypatch.setattr(llava, "load", lambda *about: talker)

    def give(*lines):
        left = list(lines)

        def read(prompt):
            print(prompt, end="")
            if not left:
                raise EOFError
            line = left.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)

    return give


@pytest.fixture
def photos(tmp_path):
    names = []
    for seed in range(2):
        image = Image.fromarray(picture(seed, (50, 70)).permute(1, 2, 0).numpy())
        image.save(tmp_path / f"{seed}.png")
        names.append(str(tmp_path / f"{seed}.png"))
    return names


def ask(photos, tmp_path, **about):
    about = {"image": tuple(photos), "max_new_tokens": 4, "out": str(tmp_path / "out")} | about
    try:
        return llava.main(llava.Config(**about))
    except KeyboardInterrupt:
        pytest.fail("Ctrl-C came out of the chat")


def turns(tmp_path):
    return json.loads((tmp_path / "out/chat.json").read_text())


def expected(talker, photos, questions):
    """What a conversation without a terminal says."""
    tokenizer, model = talker
    conversation = Recorded(tokenizer, model, max_new_tokens=4)
    for path in photos:
        conversation.add(chat_terminal.read_picture(path, model))
    for question in questions:
        "".join(conversation.ask(question))
    return [list(turn) for turn in conversation.turns]


def test_questions_from_a_pipe(talker, typed, photos, tmp_path, capsys):
    typed("What is it?", "", "Is it green?", KeyboardInterrupt(), "Why?")
    found = ask(photos, tmp_path, chat=True)
    wanted = expected(talker, photos, ["What is it?", "Is it green?", "Why?"])
    assert turns(tmp_path) == wanted and wanted[0][0] == f"{IMAGE}\n{IMAGE}\nWhat is it?"
    printed = capsys.readouterr().out
    for (_, answer), question in zip(wanted, ("What is it?", "Is it green?", "Why?")):
        assert f"> {question}\n" in printed and answer.split()[0] in printed
    assert len(re.findall(r"\(\d+ % sure\)", printed)) == 3 and "/exit ends it" in printed
    assert found["turns"] == 3 and found["tokens found in the cache"] > 40


def test_commands(talker, typed, photos, tmp_path, capsys):
    lines = [
        "A?",
        "/undo",
        "B?",
        f"/image '{photos[1]}'",
        f"C {IMAGE}?",
        "/clear",
        "D?",
        "/exit",
        "E?",
    ]
    typed(*lines)
    ask(photos[:1], tmp_path, chat=True)
    printed = capsys.readouterr().out
    assert "undone; 1 picture waits" in printed and "1 picture waits for the next" in printed
    assert "cleared" in printed and "E?" not in printed
    assert turns(tmp_path) == expected(talker, [], ["D?"])
    typed(*lines[:5])
    ask(photos[:1], tmp_path, chat=True)
    first, second = turns(tmp_path)
    assert first == expected(talker, photos[:1], ["B?"])[0] and second[0] == f"C {IMAGE}?"
    assert second[1] != expected(talker, photos[:1], ["B?", "C?"])[1][1]


def test_what_is_wrong_is_one_line_and_the_chat_goes_on(talker, typed, photos, tmp_path, capsys):
    lines = ["/undo", "/image", "/image none.png", "/picture x", f"{IMAGE}{IMAGE}?", "why " * 600]
    typed(*lines, "What is it?")
    ask(photos[:1], tmp_path, chat=True)
    printed = capsys.readouterr().out
    errors = re.findall("^error: .*$", printed, re.M)
    assert len(errors) == len(lines)
    for error, said in zip(
        errors,
        ("nothing to undo", "name a file", "none.png", "no command", "2 <image>", "positions"),
    ):
        assert said in error
    assert turns(tmp_path) == expected(talker, photos[:1], ["What is it?"])


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    talker, typed, photos, tmp_path, capsys, monkeypatch
):
    whole = chat_terminal.Conversation.read
    reads = []

    def stopped(self, embeds, keys):
        reads.append(1)
        if len(reads) == 3:
            raise KeyboardInterrupt
        return whole(self, embeds, keys)

    monkeypatch.setattr(chat_terminal.Conversation, "read", stopped)
    typed("What is it?", "And?")
    ask(photos[:1], tmp_path, chat=True)
    assert "[stopped]" in capsys.readouterr().out
    monkeypatch.undo()
    first, second = turns(tmp_path)
    full = expected(talker, photos[:1], ["What is it?"])[0][1]
    assert full.startswith(first[1]) and len(first[1]) < len(full)
    tokenizer, model = talker
    conversation = Recorded(tokenizer, model, max_new_tokens=4)
    conversation.add(chat_terminal.read_picture(photos[0], model))
    "".join(conversation.ask("What is it?"))
    conversation.turns = [tuple(first)]
    other = anew(conversation)
    assert second[1] == "".join(other.ask("And?")).strip()


def test_several_photos_with_one_prompt(talker, typed, photos, tmp_path, capsys):
    typed()
    for prompt in ("Which?", f"Is {IMAGE} like {IMAGE}?"):
        found = ask(photos, tmp_path, prompt=prompt)
        assert turns(tmp_path) == expected(talker, photos, [prompt]) and found["turns"] == 1
    # a place for one photo
    ask(photos[:1], tmp_path, prompt=f"Is this {IMAGE} green?")
    assert turns(tmp_path) == expected(talker, photos[:1], [f"Is this {IMAGE} green?"])


@pytest.mark.parametrize(
    "about, line",
    [
        ({"prompt": f"{IMAGE}?"}, "1 <image> in the question, 2 pictures"),
        ({"prompt": IMAGE * 3}, "3 <image> in the question, 2 pictures"),
        ({"prompt": "why " * 600}, "512 positions"),
        ({"prompt": "a b c", "max_prompt": 20}, "--max-prompt is 20"),
        ({"image": ("none.png", "b.png")}, "none.png is not a readable image"),
        ({"image": (), "prompt": f"{IMAGE}?"}, "a place for an --image"),
        ({"save": "x", "bits": 8}, "--save goes with one --image"),
        ({"save": "x", "chat": True}, "--save goes with one --image"),
        ({"save": "x"}, "--save goes with one --image"),
    ],
)
def test_bad_flags_are_one_line_and_nothing_is_written(about, line, typed, photos, tmp_path):
    typed("What?")
    with pytest.raises(UserError, match=line):
        ask(photos, tmp_path, **about)
    assert not (tmp_path / "out").exists()


def test_bits_are_of_the_language_model_alone(talker, tmp_path):
    tokenizer, model = eyes.talker(tmp_path)
    chat_terminal.low_bit(model, "x", 0)
    assert type(model.language.model.layers[0].mlp.up_proj) is torch.nn.Linear
    with pytest.raises(UserError, match="blocks of 32"):
        chat_terminal.low_bit(model, "x", 4)
    chat_terminal.low_bit(model, "x", 8)
    assert isinstance(model.language.model.layers[0].mlp.up_proj, Int8Linear)
    assert not [m for m in model.vision.modules() if isinstance(m, Int8Linear)]
    conversation = Recorded(tokenizer, model, max_new_tokens=4)
    conversation.add(picture(0))
    assert "".join(conversation.ask("What?")) is not None and conversation.fed > 16


@pytest.mark.long
def test_the_line_of_the_page_and_fewer_bits(tmp_path):
    """vlm/llava.md pipes questions in; with the shipped weights, whole, in 8 and in 4 bits."""
    page = (ROOT / "vlm/llava.md").read_text("utf-8")
    line = re.search(r"^printf .*--chat$", page, re.M)
    assert line, "the page has no such line"
    said = {}
    for bits in ("0", "8", "4"):
        words = f"{line[0]} --bits {bits} --out {tmp_path / bits}"
        words = words.replace("| python ", f"| {sys.executable} ")
        done = subprocess.run(words, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        said[bits] = [
            answer for _, answer in json.loads((tmp_path / bits / "chat.json").read_text())
        ]
    # int8 keeps the answer; codes of 4 bits round what LoRA learned away
    assert said["0"][0] == said["8"][0] == "cantaloupe melon" != said["4"][0]


@pytest.mark.long
def test_4_bits_round_what_lora_learned_away():
    """The base model is on a grid of 4-bit codes; rounded to such a grid again, it is nearly the base model."""
    tokenizer, model = llava.load(llava.WEIGHTS)
    _, base = pretrained.smollm2()
    name = "model.layers.5.self_attn.q_proj"
    before = base.get_submodule(name).weight.float()
    learned = model.language.get_submodule(name).weight.float() - before
    chat_terminal.low_bit(model, str(llava.WEIGHTS), 4)
    made = model.language.get_submodule(name)
    assert isinstance(made, Int4Int8Linear)
    # columns of the matrix that is computed with, by unit vectors; few rows take the 4-bit product
    kept = torch.cat([made(rows) for rows in torch.eye(made.in_features).split(8)]).T - before
    both = torch.stack([kept.flatten(), learned.flatten()])
    assert learned.abs().max() > 0 and float(torch.corrcoef(both)[0, 1]) < 0.2


def test_pictures_are_read_before_the_weights():
    with pytest.raises(UserError, match="no/such.png"):
        llava.check_flags(llava.Config(image=("no/such.png",)))
