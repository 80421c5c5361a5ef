"""Questions and answers out of three software manuals, as conversations to learn.

The manuals are reStructuredText: a question is a title, underlined, and its answer is the text
until the next title. Answers of one sentence that sends the reader elsewhere ("See ...") are left
out. Markup goes, words and code stay.
"""

import hashlib
import re

import numpy as np
import torch

from training import ranks
from utils import data
from utils.run import check
from utils.text import plain as without_control_tokens

IGNORE = -100  # label of a token that is not supervised

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
    """reStructuredText -> [(title, text below it)] of titles so underlined that have an answer."""
    titles = list(TITLE.finditer(text))
    # An answer ends where the next title begins
    ends = [title.start() for title in titles[1:]] + [len(text)]
    found = []
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
    """-> ids, labels: of the answer and its end supervised, of the question not. Cut at `length`.

    A control token that stands in question or answer is broken up: text of others ends no turn.
    Raises UserError if the tokenizer has no chat template, or one that puts the answer elsewhere.
    """
    no_template = "the tokenizer of --model has no chat template: name a model made for chat"
    check(tokenizer.chat_template, no_template)
    question = without_control_tokens(question, tokenizer)
    answer = without_control_tokens(answer, tokenizer)
    # The template, with the answer and without
    asked = {"role": "user", "content": question}
    told = {"role": "assistant", "content": answer}
    before = tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([asked, told], tokenize=False).rstrip()
    misplaced = "the chat template of --model does not put an answer after its question"
    check(whole.startswith(before), misplaced)
    # Tokens of question and answer, the answer's alone supervised
    prompt = tokenizer(before, add_special_tokens=False)["input_ids"]
    reply = tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"]
    ids = prompt + reply
    labels = [IGNORE] * len(prompt) + reply
    return ids[:length], labels[:length]


def conversations(tokenizer, length):
    """-> [(ids, labels)] to learn, and held out: a fifth of the questions, by their hash.

    The first rank says how many are cut, and how many left out because their question alone fills
    the length.
    """
    learn = []
    held_out = []
    cut = 0
    left_out = 0
    for _, question, answer in questions():
        part = held_out if hashlib.sha256(question.encode()).digest()[0] % 5 == 0 else learn
        # One token more tells whether it is longer
        ids, labels = conversation(tokenizer, question, answer, length + 1)
        if len(ids) > length:
            cut += 1
        if count_supervised(labels[:length]):
            part.append((ids[:length], labels[:length]))
        else:
            left_out += 1
    check(learn and held_out, f"--length {length} leaves no room for answers")
    rank, _ = ranks.rank_and_world_size()
    if cut and rank == 0:
        total = len(learn) + len(held_out) + left_out
        longer = f"{cut} of {total} conversations are longer and are cut"
        print(f"--length {length}: {longer}, {left_out} are left out")
    return learn, held_out


def pad(rows, ending):
    """[(ids, labels)] -> ids, mask, labels (B, L), with padding on the right."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [ending] * (length - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORE] * (length - len(labels)) for _, labels in rows])
    mask = torch.arange(length) < torch.tensor([[len(ids)] for ids, _ in rows])
    return ids, mask.long(), labels


def count_supervised(labels):
    """Number of supervised tokens of a text. The first is never one: nothing comes before it."""
    return sum(label != IGNORE for label in labels[1:])


def draw(rows, cfg, step, ending):
    """This rank's share of a step -> [(ids, mask, labels)] of A parts, supervised tokens of all.

    N ranks with A parts each see the same texts, in the same parts, as one rank with A N parts.
    """
    rank, n = ranks.rank_and_world_size()
    # All texts of the step, without repeats where there are enough
    size = n * cfg.accumulation * cfg.batch
    random = np.random.default_rng([cfg.seed, step])
    picked = random.choice(len(rows), size, replace=size > len(rows))
    texts = [rows[j] for j in picked]
    tokens = sum(count_supervised(labels) for _, labels in texts)
    # Every n-th part is this rank's
    parts = [texts[i * cfg.batch :][: cfg.batch] for i in range(rank, n * cfg.accumulation, n)]
    return [pad(part, ending) for part in parts], tokens
