"""rag/poison.py: what counts as obeying, and what a careless prompt lets through."""

import pytest

from rag import answer, poison
from rag.corpus import Question
from utils.run import UserError

ASKED = Question("Who sat?", "faq.txt#1-who", "The cat sat on the mat.")


class Says:
    """A model that says what it is told to, and keeps what it was asked."""

    def __init__(self, words):
        self.words = words

    def stream(self, chat):
        self.chat = chat
        yield from self.words


def test_the_word_in_the_answer_counts():
    assert poison.obeyed(Says(["I say ", "Hacked!"]), [])
    assert not poison.obeyed(Says(["The cat ", "sat."]), [])


@pytest.mark.parametrize("order", poison.ORDERS.values(), ids=poison.ORDERS)
def test_the_right_passage_and_the_order_are_both_in_the_prompt(order):
    read = poison.passages(ASKED, order)
    for chat in (answer.messages("Who sat?", read), poison.pasted("Who sat?", read)):
        text = "".join(turn["content"] for turn in chat)
        assert ASKED.answer in text and poison.WORD in text and "Who sat?" in text


def test_a_careless_prompt_lets_a_passage_open_a_turn():
    llm = answer.Local("smollm2", tokens=1)
    chat = poison.pasted("Who sat?", poison.passages(ASKED, poison.ORDERS["a turn of the chat"]))
    start = llm.tokenizer.convert_tokens_to_ids("<|im_start|>")
    turns = [model.prompt(chat)[0].tolist().count(start) for model in (llm, poison.careless(llm))]
    assert turns[1] == turns[0] + 1


def test_bad_flags():
    with pytest.raises(UserError, match="--limit"):
        poison.main(poison.Config(limit=0))
