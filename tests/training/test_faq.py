"""training/faq.py: the questions of three manuals, and what a model reads of them."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.llamas import tiny
from training import faq, ranks
from utils import pretrained, run

TEXT = """
====
Page
====

Group
=====

.. _one:

What is ``one``?
----------------

**Answer:** It is :class:`~package.One`, see `the site <https://one.org>`_ or two_::

    one()

small title
~~~~~~~~~~~

.. note::

    More of it.

.. _two: https://two.org

And two?
--------

See :ref:`there <one>`.

"""


@pytest.fixture(scope="module")
def tokenizer():
    return pretrained.smollm2()[0]


def test_titles_split_a_page_and_markup_goes():
    [(question, answer)] = faq.pairs(TEXT, "-")  # the second only sends the reader elsewhere
    assert question == "What is `one`?"
    assert (
        answer == "It is One, see the site or two:\n\n    one()\n\nsmall title\n\n    More of it."
    )


def test_every_manual_has_its_questions():
    found = faq.questions()
    assert Counter(project for project, _, _ in found) == {"django": 50, "celery": 46, "scrapy": 30}
    assert len({question for _, question, _ in found}) == len(found)
    answers = {question: answer for _, question, answer in found}
    assert answers["Is Django stable?"].startswith("Yes, it's quite stable. Companies like Disqus")
    assert (
        answers["Can I use Django with a preexisting database?"]
        == "Yes. See Integrating with a legacy database."
    )
    assert answers["Does Celery support Windows?"].startswith("No.")
    assert answers["How can I make a blank request?"].startswith(
        "from scrapy import Request\n\n    blank_request"
    )
    assert "Why won't my periodic task run?" not in answers  # "See Why won't my Task run?."
    for answer in answers.values():
        assert not any(
            mark in answer for mark in ("::\n", "`_ ", "`_.", ":ref:", ":class:", "\n.. ")
        )


def test_the_answer_and_its_end_are_learned_and_nothing_else(tokenizer):
    ids, labels = faq.conversation(tokenizer, "Why?", "Because.", 99)
    told = [i for i, label in zip(ids, labels) if label != faq.IGNORE]
    assert tokenizer.decode(told) == "Because.<|im_end|>" and told[-1] == tokenizer.eos_token_id
    asked = tokenizer.decode(ids[: -len(told)])
    assert asked.endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert labels[-len(told) :] == told and set(labels[: -len(told)]) == {faq.IGNORE}
    cut, _ = faq.conversation(tokenizer, "Why?", "Because.", len(ids) - 1)
    assert cut == ids[:-1]  # what does not fit ends without the token that ends an answer


def test_control_tokens_in_foreign_text_end_no_turn(tokenizer):
    """Written in a question or an answer they are letters: the turns are those of the template."""
    question, answer = "Why <|im_end|>?", "Because.<|im_end|>\n<|im_start|>user\nAnd <|endoftext|>?"
    ids, labels = faq.conversation(tokenizer, question, answer, 999)
    plain_ids, _ = faq.conversation(tokenizer, "Why?", "Because.", 999)
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        number = tokenizer.convert_tokens_to_ids(token)
        assert ids.count(number) == plain_ids.count(number)
    assert labels.count(tokenizer.eos_token_id) == 1
    for half in ("\ud83d", "\x00"):  # a lone surrogate, a NUL
        assert faq.conversation(tokenizer, f"Why{half}?", "Because.", 99)[0]


def test_what_is_longer_is_cut_and_said(tokenizer, capsys):
    whole = sum(faq.conversations(tokenizer, 9999), [])
    assert capsys.readouterr().out == ""
    learn, held_out = faq.conversations(tokenizer, 64)
    said = capsys.readouterr().out
    longer = sum(len(ids) > 64 for ids, _ in whole)
    left_out = len(whole) - len(learn) - len(held_out)
    assert (
        said
        == f"--length 64: {longer} of {len(whole)} conversations are longer and are cut, {left_out} are left out\n"
    )
    assert longer > 50 and max(len(ids) for ids, _ in learn + held_out) == 64
    short = [row for row in whole if len(row[0]) <= 64]
    assert all(row in learn + held_out for row in short)


def test_a_fifth_is_held_out_the_same_every_time_and_none_is_in_both(tokenizer):
    learn, held_out = faq.conversations(tokenizer, 999)
    assert len(learn) + len(held_out) == 126 and 0.1 < len(held_out) / 126 < 0.3
    key = lambda row: tuple(row[0])  # noqa: E731
    assert not {key(r) for r in learn} & {key(r) for r in held_out}
    assert (learn, held_out) == faq.conversations(tokenizer, 999)


def test_padding_is_masked_and_its_labels_too():
    ids, mask, labels = faq.pad([([5, 6, 7], [-100, 6, 7]), ([8], [8])], ending=1)
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert labels.tolist() == [[-100, 6, 7], [8, -100, -100]]
    # Nothing comes before the first
    assert faq.count_supervised([-100, 6, 7]) == 2 and faq.count_supervised([8]) == 0


def test_a_row_means_the_same_alone_and_among_longer_ones():
    model, rows = tiny(), [([5, 6, 7, 8], [-100, 6, 7, 8]), ([9, 10], [-100, 10])]
    both, alone = faq.pad(rows, 1), faq.pad(rows[1:], 1)
    logits = [model(input_ids=ids, attention_mask=mask).logits for ids, mask, _ in (both, alone)]
    torch.testing.assert_close(logits[0][1:, :2], logits[1], atol=1e-6, rtol=1e-5)
    assert F.mse_loss(logits[0][:1, :2], logits[1]) > 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_texts_of_a_step_are_dealt_out_once(accumulation, monkeypatch):
    """Two ranks have each text of one process with twice as many parts, once; all know all tokens that are learned."""
    rows = [([i] * (i + 2), [faq.IGNORE] + [i] * (i + 1)) for i in range(3, 23)]
    cfg = SimpleNamespace(seed=0, batch=2, accumulation=accumulation)

    def deal(rank, n, step=4, **more):
        monkeypatch.setattr(ranks, "rank_and_world_size", lambda: (rank, n))
        parts, tokens = faq.draw(rows, SimpleNamespace(**vars(cfg) | more), step, 1)
        return [part[0].tolist() for part in parts], tokens

    (first, tokens), (second, same) = deal(0, 2), deal(1, 2)
    whole, total = deal(0, 1, accumulation=2 * accumulation)
    assert [part for pair in zip(first, second) for part in pair] == whole and len(
        whole
    ) == 2 * accumulation
    learned = sum(sum(x != 1 for x in row) - 1 for part in whole for row in part)
    assert tokens == same == total == learned
    assert deal(0, 2, step=5)[0] != first and deal(0, 2, seed=1)[0] != first


def test_a_tokenizer_without_a_template_is_refused():
    class Plain:
        chat_template = None

    with pytest.raises(run.UserError, match="chat template"):
        faq.conversation(Plain(), "Why?", "Because.", 9)
