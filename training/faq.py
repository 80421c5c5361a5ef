"""Questions and answers out of three software manuals, and what a language model reads when it learns to answer.

The manuals are reStructuredText: a question is a title, underlined, and its answer is the text until the next title.
Answers of one sentence that sends the reader elsewhere ("See ...") are left out. Markup goes, words and code stay.
"""

import hashlib
import re

import numpy as np
import torch
import torch.distributed as dist

from utils import data
from utils.run import check
from utils.text import plain as without_control_tokens

IGNORE = -100  # a label that is not learned

UNDERLINE = {"django": "=", "celery": "-", "scrapy": "-"}  # of a question
# The title of a page has a line above it, too
TITLE = re.compile(r"(?<!=\n)^(\S.*)\n(=+|-+)$", re.M)
# One sentence: to another page, and no more than that
POINTER = re.compile(r"See (?:(?!\.\s).)*", re.S)
MARKUP = [  # what it looks like, and what a reader sees of it
    (r"^\.\. _.*:( .*)?\n(?:[ \t]+http.*\n)?", ""),  # where a link leads
    # a directive; what stands in it stays
    (r"^[ \t]*\.\. [\w-]+::?( .*)?\n(?:[ \t]+:\w.*\n)*", ""),
    # :role:`words <target>`; ~a.b.c is c
    (r":[\w:+-]+:`!?(?:~[\w.]*\.)?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1"),
    (r"`([^`<]+?)(?:\s*<[^`]*>)?`__?", r"\1"),  # `words <target>`_
    (r"\b(\w+)_(?!\w)", r"\1"),  # word_
    (r"::$", ":"),  # code follows
    (r"^~+\n", ""),  # the line below a small title
    (r"^\*\*Answer:?\*\*:? ", ""),
    (r"``", "`"),
    (r"\\", ""),
    (r"\n{3,}", "\n\n"),
]


def questions():
    """-> [(project, question, answer)], in the order of the manuals."""
    found = []
    for path, text in data.docs():
        project = path.split("/")[0]
        if "/faq" in path:
            found += [(project, *pair) for pair in pairs(text, UNDERLINE[project])]
    return found


def pairs(text, underline):
    """reStructuredText -> [(title, the text below it)] of the titles that are underlined so and have an answer."""
    titles, found = list(TITLE.finditer(text)), []
    ends = [title.start() for title in titles[1:]] + [len(text)]
    for title, end in zip(titles, ends):
        answer = plain(text[title.end() : end])
        if title[2][0] == underline and answer and not POINTER.fullmatch(answer):
            found.append((plain(title[1]), answer))
    return found


def plain(text):
    """reStructuredText as a reader sees it, more or less."""
    text += "\n"
    for markup, words in MARKUP:
        text = re.sub(markup, words, text, flags=re.M)
    return text.strip()


def conversation(tokenizer, question, answer, length):
    """-> ids, labels: those of the answer and its end are learned, those of the question are not. Cut at `length`.

    A control token that stands in question or answer is broken up: text of others ends no turn. Raises UserError if
    the tokenizer has no chat template, or one that puts the answer elsewhere.
    """
    question, answer = (without_control_tokens(text, tokenizer) for text in (question, answer))
    check(
        tokenizer.chat_template,
        "the tokenizer of --model has no chat template: name a model made for chat",
    )
    asked, told = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    before = tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([asked, told], tokenize=False).rstrip()
    check(
        whole.startswith(before),
        "the chat template of --model does not put an answer after its question",
    )
    prompt, reply = (
        tokenizer(x, add_special_tokens=False)["input_ids"] for x in (before, whole[len(before) :])
    )
    return (prompt + reply)[:length], ([IGNORE] * len(prompt) + reply)[:length]


def conversations(tokenizer, length):
    """-> [(ids, labels)] to learn, and held out: a fifth of the questions, by a hash of their letters.

    The first rank says how many are cut, and how many left out because their question alone fills the length.
    """
    parts, cut, left_out = ([], []), 0, 0
    for _, question, answer in questions():
        held_out = hashlib.sha256(question.encode()).digest()[0] % 5 == 0
        ids, labels = conversation(tokenizer, question, answer, length + 1)
        cut += len(ids) > length
        if learned(labels[:length]):
            parts[held_out].append((ids[:length], labels[:length]))
        else:
            left_out += 1
    check(all(parts), f"--length {length} leaves no room for answers")
    if cut and (not dist.is_initialized() or dist.get_rank() == 0):
        total = sum(map(len, parts)) + left_out
        print(
            f"--length {length}: {cut} of {total} conversations are longer and are cut, {left_out} are left out"
        )
    return parts


def pad(rows, ending):
    """[(ids, labels)] -> ids, mask, labels (B, L), filled up on the right."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [ending] * (length - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORE] * (length - len(labels)) for _, labels in rows])
    mask = torch.arange(length) < torch.tensor([[len(ids)] for ids, _ in rows])
    return ids, mask.long(), labels


def learned(labels):
    """How many tokens of a text are learned. The first is never: nothing comes before it."""
    return sum(label != IGNORE for label in labels[1:])


def draw(rows, cfg, step, ending):
    """This rank's share of the texts of a step -> [(ids, mask, labels)] of A parts, tokens to learn in all A N parts.

    N ranks with A parts each see the same texts, in the same parts, as one rank with A N parts.
    """
    n, rank = dist.get_world_size(), dist.get_rank()
    size = n * cfg.accumulation * cfg.batch
    pick = np.random.default_rng([cfg.seed, step]).choice(len(rows), size, replace=size > len(rows))
    texts = [rows[j] for j in pick]
    parts = [texts[i * cfg.batch :][: cfg.batch] for i in range(rank, n * cfg.accumulation, n)]
    return [pad(part, ending) for part in parts], sum(learned(labels) for _, labels in texts)
