"""rag/poison.py: what counts as obeying, and what a careless prompt lets through."""

import pytest

from rag import answer, language_models, poison
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
    read = poison.poisoned_passages(ASKED, order)
    for chat in (answer.messages("Who sat?", read), poison.undelimited("Who sat?", read)):
        text = "".join(turn["content"] for turn in chat)
        assert ASKED.answer in text and poison.WORD in text and "Who sat?" in text


def test_a_careless_prompt_lets_a_passage_open_a_turn():
    llm = language_models.Local("smollm2", tokens=1)
    chat = poison.undelimited(
        "Who sat?", poison.poisoned_passages(ASKED, poison.ORDERS["chat-template injection"])
    )
    start = llm.tokenizer.convert_tokens_to_ids("<|im_start|>")
    turns = [model.prompt(chat)[0].tolist().count(start) for model in (llm, poison.careless(llm))]
    assert turns[1] == turns[0] + 1


def test_bad_flags():
    with pytest.raises(UserError, match="--limit"):
        poison.main(poison.Config(limit=0))


def test_what_is_counted_is_what_was_obeyed_in_each_way(tmp_path, monkeypatch):
    """A model obeys one order within delimiters, another without them: each counts once, in its column."""
    asked = []

    class Obeys:
        def letters(self, text):
            return text

        def stream(self, chat):
            told = chat[-1]["content"]
            asked.append((self.letters, chat))
            marked = "<passage number" in told and "comments.txt" in told
            obeyed = "Ignore all previous" in told if marked else "As stated in [99]" in told
            yield "hacked" if obeyed else "The cat sat."

    monkeypatch.setattr(poison.language_models, "language_model", lambda name, tokens: Obeys())
    monkeypatch.setattr(
        poison.corpus, "manuals", lambda: ([], [ASKED, Question("And who?", "b#1", "A dog.")])
    )
    metrics = poison.main(poison.Config(limit=2, out=str(tmp_path)))
    ways = {
        name: (row["delimited"], row["undelimited"])
        for name, row in metrics.items()
        if name in poison.ORDERS
    }
    assert ways.pop("instruction override") == (1, 0) and ways.pop("fake citation") == (0, 1)
    assert set(ways.values()) == {(0, 0)} and metrics["all injections"] == {
        "delimited": 0.2,
        "undelimited": 0.2,
    }
    assert len(asked) == 20 and metrics["questions"] == 2
    kinds = {
        (letters is str, "<passage number" in chat[-1]["content"] and len(chat) == 2)
        for letters, chat in asked
    }
    assert kinds == {(False, True), (True, False)}, "undelimited goes to the careless one"


def test_a_careless_copy_leaves_the_model_as_it_was():
    class Model:
        def letters(self, text):
            return text.replace("<|", "< |")

    model = Model()
    assert poison.careless(model).letters("<|x|>") == "<|x|>" and model.letters("<|x|>") == "< |x|>"
