"""deploy/text_stream.py: texts in whole letters without stop strings, the same as all tokens decoded at once."""

import random

import pytest

from deploy.stop_strings import until_stop
from deploy.text_stream import TextStream
from tests import llamas

TEXT = "Grüße, 你好 🙂👩‍👩‍👧‍👦 naïve\n\tcafé – ﷽ क्षि"


@pytest.fixture(scope="module")
def tokenizer():
    return llamas.tokenizer()


def run(stream, ids):
    """-> pieces; `finish` is the last one."""
    pieces = []
    for i, token in enumerate(ids):
        pieces.append(stream.push(token, i))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


def test_pieces_are_whole_letters(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) > len(TEXT)  # many letters have several tokens
    pieces = run(TextStream(tokenizer), ids)
    assert "".join(pieces) == TEXT and pieces[-1] == ""
    assert "\ufffd" not in "".join(pieces)
    # each as soon as it is whole
    for i in range(len(ids)):
        so_far = tokenizer.decode(ids[: i + 1])
        if not so_far.endswith("\ufffd"):
            assert "".join(pieces[: i + 1]) == so_far


def test_random_tokens_are_what_decode_makes_of_them(tokenizer):
    """Bytes that are no letters, special tokens, letters that are never completed."""
    random_ = random.Random(0)
    for _ in range(300):
        ids = [random_.randrange(len(tokenizer)) for _ in range(random_.randrange(1, 30))]
        ids += tokenizer(TEXT)["input_ids"][: random_.randrange(30)]
        random_.shuffle(ids)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(run(TextStream(tokenizer), ids)) == text


def test_stop_strings_end_a_text_where_until_stop_ends_it(tokenizer):
    random_ = random.Random(1)
    stopped = 0
    for _ in range(300):
        ids = [random_.randrange(3, 3000) for _ in range(20)] + tokenizer(TEXT)["input_ids"]
        random_.shuffle(ids)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        at = random_.randrange(len(text) - 4)
        stops = [text[at : at + random_.randrange(1, 5)], "never said"]
        stream = TextStream(tokenizer, stops)
        assert "".join(run(stream, ids)) == "".join(until_stop([text], stops))
        stopped += stream.stopped
    assert stopped == 300


def test_what_is_known_of_tokens_comes_with_their_text(tokenizer):
    """A token of a held letter, or of what may be a stop string, waits; those of the stop string never come."""
    ids = tokenizer("one two🙂 three four")["input_ids"]
    stream = TextStream(tokenizer, ["three four five"])
    found = []
    shown = ""
    for i, token in enumerate(ids):
        shown += stream.push(token, i)
        found += stream.take()
        assert all(start < len(shown) for start, _ in found)
    held = len(found)
    assert held < len(ids)
    shown += stream.finish()
    found += stream.take()
    assert [about for _, about in found] == list(range(len(ids)))
    starts = [start for start, _ in found]
    assert starts == sorted(starts) and starts[0] == 0 and shown == "one two🙂 three four"
    stream = TextStream(tokenizer, ["two"])
    run(stream, ids)
    assert [about for _, about in stream.take()] == [0, 1] or len(found) > 2
    assert not any(start >= len("one ") for start, _ in stream.take())
