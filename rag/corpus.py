"""Corpus: three software manuals and their frequent questions with gold answers; or any folder.

The manuals hold pages of frequent questions: there a section is an answer, its question is taken
away from it, and the pair (question, id of the answer) is what retrieval is scored by. A reader of
ours asks what the authors' readers asked, and the answer is where the authors put it.

`document_loaders.py` reads files into sections, `chunking.py` splits these into passages.
"""

import random
import re
from dataclasses import dataclass
from functools import lru_cache

from rag import document_loaders
from rag.markup import rst_titles, rst_to_text, split_at_titles
from utils import data
from utils.run import UserError, check

# An answer of one sentence that only names another page
POINTER = re.compile(r"See (?:(?!\.\s).)*", re.S)


@dataclass(frozen=True)
class Question:
    """A question, and the id of the one section that answers it."""

    text: str
    gold: str
    answer: str


@lru_cache(maxsize=1)
def manuals():
    """-> sections of three manuals, and the questions whose answers are among them.

    The same every time.
    """
    sections = []
    questions = []
    for source, text in data.docs():
        titles = rst_titles(text)
        # On pages of questions: the deeper of the titles underlined with = and with -
        question_depth = None
        if "/faq" in source:
            question_depth = max(t.depth for t in titles if t.underline in "=-")
            # Small titles within an answer are part of it
            titles = [t for t in titles if t.depth <= question_depth]
        for number, (above, title, body) in enumerate(split_at_titles(text, titles)):
            body = rst_to_text(body)
            is_question = title is not None and 0 < title.depth == question_depth
            # The section; a question is not shown above its answer
            if body:
                name = title.text if title else ""
                found = document_loaders.section(
                    source, number, above, name, body, show=not is_question
                )
                sections.append(found)
            # The question, if what stands below it answers
            if title and is_question and body and not POINTER.fullmatch(body):
                questions.append(Question(title.text, sections[-1].metadata["id"], body))
    return sections, questions


def sample(sections, questions, distractors, seed=0):
    """The sections that answer a question, and so many random others (-1: all).

    In the order of the manuals.
    """
    check(distractors >= -1, "--distractors: 0 or more, or -1 for all")
    gold = {q.gold for q in questions}
    others = [s.metadata["id"] for s in sections if s.metadata["id"] not in gold]
    if distractors >= 0:
        others = random.Random(seed).sample(others, min(distractors, len(others)))
    keep = gold | set(others)
    return [s for s in sections if s.metadata["id"] in keep]


def load(cfg):
    """-> sections, questions: of the manuals, or those of --docs, which has no questions."""
    try:
        skip = re.compile(cfg.skip) if cfg.skip else None
    except re.error as error:
        raise UserError(f"--skip is no regular expression: {error}") from None
    # A folder, or the manuals with as many distractors as this run wants
    if cfg.docs:
        sections = document_loaders.load_folder(cfg.docs)
        questions = []
    else:
        sections, questions = manuals()
        sections = sample(sections, questions, cfg.distractors, cfg.seed)
    # Leave out the files that --skip names
    if skip:
        sections = [s for s in sections if not skip.search(s.metadata["source"])]
    check(sections, f"--skip {cfg.skip} leaves nothing to search")
    return sections, questions
