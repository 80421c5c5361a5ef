"""Metrics of short answers: VQA accuracy, direct answers of A-OKVQA, multiple choice.

Antol et al. 2015, arXiv:1505.00468 and Goyal et al. 2017, arXiv:1612.00837 (VQA accuracy); Schwenk
et al. 2022, arXiv:2206.01718 (A-OKVQA). The tables are those of the official VQA evaluation.
"""

import re

import numpy as np

from utils.run import check

NUMBERS = {
    word: str(i)
    for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
NUMBERS["none"] = "0"
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
SHORT = {  # ending: the words that take it
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "'ve": "could might must not should they we what where who would you",
    "'d've": "he it she somebody someone something there they we who you",
    "": "ma'am o'clock 'ow's'at 'twas y'all y'all'll y'all'd've",
}
WHOLE = [word + ending for ending, stems in SHORT.items() for word in stems.split()]
# A word that lacks one of its apostrophes gets it back: dont -> don't, couldnt've -> couldn't've.
CONTRACTIONS = {w[:i] + w[i + 1 :]: w for w in WHOLE for i in range(len(w)) if w[i] == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # a slip of the official table, kept: it is the measure


def normalise(answer):
    """An answer as the VQA evaluation compares it: "Two dogs." -> "2 dogs", "the t-shirt" -> "t
    shirt"."""
    text = re.sub(r"[\n\t]", " ", answer).strip()
    number = re.search(r"\d,\d", text)
    out = text
    # punctuation: it goes where it stands beside a space or a number has a comma, else becomes a space
    for mark in PUNCTUATION:
        goes = number or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if goes else " ")
    out = re.sub(r"\.(?!\d)", "", out)  # the point of 3.5 stays
    # words: numbers as digits, no articles, apostrophes of contractions
    found = [NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in found if word not in ARTICLES)


def vqa_accuracy(answer, answers):
    """VQA accuracy, 0..1: right if three people said so. Mean over leaving each person out of
    min(others / 3, 1).

    Ten people: 0, 0.3, 0.6, 0.9, 1 for 0, 1, 2, 3, 4 and more who gave this answer. Both sides are
    normalised; the official code changes only the punctuation of the people's answers, and only if
    they differ.
    """
    check(
        len(answers) > 1, "VQA accuracy leaves one of the people out: it needs two answers or more"
    )
    same = [normalise(a) == normalise(answer) for a in answers]
    return sum(min((sum(same) - own) / 3, 1) for own in same) / len(same)


def direct_answer_accuracy(answer, answers):
    """A-OKVQA without choices, 0..1: min(people who said exactly this / 3, 1), nobody left out."""
    return min(sum(a == answer for a in answers) / 3, 1)


def likeliest(log_p, lengths=None):
    """Index of the choice with the highest log-likelihood; with lengths (in tokens), of the highest
    mean per token."""
    log_p = np.asarray(log_p, float)
    return int(np.argmax(log_p if lengths is None else log_p / np.asarray(lengths)))


NEGATIONS = {"not", "no", "nor", "neither", "never", "without", "cannot"}


def match_choice(text, choices):
    """Index of the choice that a free text names, or None, which counts as wrong.

    It names a choice by being it, by its letter, "(b)", or by its words anywhere; of several the
    longest, if no other is as long. What the text denies it does not name: "not a cat, a dog" is
    the dog.
    """
    # the choice itself
    same = [i for i, c in enumerate(choices) if c.strip().lower() == text.strip().lower()]
    if len(same) == 1:
        return same[0]
    # its letter
    letter = re.fullmatch(r"\(?([a-z])[).:]?", text.strip().lower())
    if letter and ord(letter[1]) - ord("a") < len(choices):
        return ord(letter[1]) - ord("a")
    # its words: the longest choice that the text has and does not deny
    answer = f" {normalise(text)} "
    inside = []
    for i, choice in enumerate(choices):
        wanted = f" {normalise(choice)} "
        if wanted.strip() and wanted in answer and not denied(text, wanted):
            inside.append((-len(wanted), i))
    inside.sort()
    if not inside:
        return None
    tie = len(inside) > 1 and inside[0][0] == inside[1][0]
    return None if tie else inside[0][1]


def denied(text, choice):
    """Does a negation stand before the choice in every clause that has it? Clauses end at , . ; : !
    ? and "but"."""
    clauses = [f" {normalise(part)} " for part in re.split(r"[,.;:!?](?:\s|$)|\bbut\b", text)]
    before = [clause.partition(choice)[0].split() for clause in clauses if choice in clause]
    negated = [any(w in NEGATIONS or w.endswith("n't") for w in words) for words in before]
    return bool(before) and all(negated)
