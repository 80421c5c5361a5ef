"""deploy/stop_strings.py: the end does not depend on the cuts and is that of transformers; nothing of it is shown."""

import random

import pytest
import torch

from deploy import decode, generation, stop_strings
from tests import llamas
from utils import pretrained
from utils.run import UserError


def run(pieces, stops):
    """-> pieces that are shown, the stop string."""
    shown = []
    stream = stop_strings.until_stop(pieces, stops)
    while True:
        try:
            shown.append(next(stream))
        except StopIteration as end:
            return shown, end.value


def cut(text, random_):
    """A text in random pieces, empty ones among them."""
    places = sorted(random_.choices(range(len(text) + 1), k=random_.randrange(8)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


def expected(text, stops):
    """Letter by letter: the first beginning of the text that ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_the_end_does_not_depend_on_the_cuts():
    """Texts of two letters, so that stop strings overlap with themselves and with each other."""
    random_ = random.Random(0)
    stopped = 0
    for _ in range(3000):
        text = "".join(random_.choices("ab", k=random_.randrange(12)))
        stops = [
            "".join(random_.choices("ab", k=random_.randrange(1, 6)))
            for _ in range(random_.randrange(4))
        ]
        wanted = expected(text, stops)
        stopped += wanted[1] is not None
        for _ in range(3):
            shown, stop = run(cut(text, random_), stops)
            assert ("".join(shown), stop) == wanted, (text, stops)
            assert all(shown)  # no piece is empty
    assert 1000 < stopped < 2900


def test_what_cannot_become_a_stop_string_is_shown_at_once():
    """As much is shown as can be: after each letter, only a beginning of a stop string is held back."""
    random_ = random.Random(1)
    for _ in range(500):
        text = "".join(random_.choices("ab", k=10))
        stops = ["".join(random_.choices("ab", k=random_.randrange(1, 6))) for _ in range(2)]
        read = []
        shown = ""
        stream = stop_strings.until_stop((read.append(c) or c for c in text), stops)
        for piece in stream:
            shown += piece
            so_far = "".join(read)
            if len(read) == len(text) or expected(so_far, stops)[1]:
                break
            held = so_far[len(shown) :]
            assert so_far == shown + held
            assert held == "" or any(stop.startswith(held) for stop in stops)
            longer = [so_far[i:] for i in range(len(shown))]
            assert not any(
                stop.startswith(rest) for stop in stops for rest in longer if len(stop) > len(rest)
            )


def test_what_is_held_back():
    texts = ("a", "a\n", "a\n\n", "a\n\nQ", "a\n\nQ: ")
    assert [stop_strings.held_back(text, ["\n\nQ:"]) for text in texts] == [0, 1, 2, 3, 0]
    assert run(["a\n", "\n", "Q", "!"], ["\n\nQ:"]) == (["a", "\n\nQ!"], None)
    assert run(["a\n", "\n"], ["\n\nQ:"]) == (["a", "\n\n"], None)  # the text is over
    assert run(["abc"], []) == (["abc"], None) and run([], "x") == ([], None)
    assert run(["one sto", "pper"], "stop") == (
        ["one "],
        "stop",
    )  # what follows in the token is dropped
    assert stop_strings.find_stop("abcd", ["bcd", "b", "abcd"]) == (1, "b")
    assert stop_strings.find_stop("abcd", ["cd", "bcd"]) == (1, "bcd")


@pytest.mark.parametrize("bad", [[""], "", ["a", ""], [3]])
def test_an_empty_stop_string_is_refused(bad):
    with pytest.raises(UserError, match="at least one letter"):
        list(stop_strings.until_stop(["a"], bad))


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """A tiny model with the real tokenizer that draws, and so says a great many things."""
    return pretrained.language_model(llamas.folder(tmp_path_factory.mktemp("model")))


def test_a_stream_ends_where_generate_does(parrot, parity):
    """Stop strings out of what the model says, cut at random letters; the same number of tokens is made."""
    tokenizer, model = parrot
    random_ = random.Random(2)
    ids = torch.tensor([tokenizer("Once upon a time")["input_ids"]])
    stopped = 0
    mine, theirs = [], []
    for seed in range(6):
        torch.manual_seed(seed)
        everything = generation.sample(model, input_ids=ids, max_new_tokens=24)
        text = tokenizer.decode(everything[0])
        whole = text.encode("ascii", "ignore").decode()
        at = random_.randrange(len(whole) - 4)
        stops = [whole[at : at + random_.randrange(2, 5)], "never said"]
        torch.manual_seed(seed)
        made = []
        tokens = generation.stream(model, generation.sampler(), 24, input_ids=ids)
        stream = stop_strings.stop_stream(
            (made.append(int(t)) or int(t) for t in tokens), tokenizer, stops
        )
        shown = "".join(stream)
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids, max_new_tokens=24, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            eos_token_id=None, pad_token_id=0, stop_strings=stops, tokenizer=tokenizer,
        )  # fmt: skip
        mine.append(len(made))
        theirs.append(out.shape[1] - ids.shape[1])
        assert not any(stop in shown for stop in stops) and text.startswith(shown.rstrip("\ufffd"))
        stopped += len(made) < 24
    assert stopped >= 3
    parity(
        "Decoding",
        "stop_strings.stop_stream",
        "transformers stop_strings",
        torch.tensor(mine),
        torch.tensor(theirs),
        atol=0,
    )


def test_letters_of_several_tokens_can_stop(parrot):
    tokenizer, _ = parrot
    ids = tokenizer("fly 🦜 away")["input_ids"]
    taken = []
    stream = stop_strings.stop_stream((taken.append(i) or i for i in ids), tokenizer, ["🦜"])
    assert "".join(stream) == "fly " and len(taken) == len(ids) - len(
        tokenizer(" away")["input_ids"]
    )
    assert "".join(decode.pieces(ids, tokenizer)) == "fly 🦜 away"
