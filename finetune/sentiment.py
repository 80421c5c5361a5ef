"""Prompt-based classification, the task of this chapter: sentiment of texts; data, verbalisers, scores.

A language model answers by going on: "Tweet: LMAO, AMAZING!\\nSentiment:" -> " positive". To train it, show it the
prompt and the answer, and count the loss on the answer alone. To ask it, compare how likely it finds each answer.
Every method of this chapter learns these labels and is scored by the functions below.

Texts and ratings: Hutto & Gilbert 2014, "VADER", ICWSM: 20 people rated each text from -4 to 4.
Shapes: B texts a batch, L tokens, V words of the vocabulary, K answers. A network here is any function
(ids (B, L), mask (B, L), last) -> logits of the `last` positions at the end (B, last, V), True in the mask where there
is a token. Padding is on the left, so that all answers end together, and the head, a fifth of a small model, is asked
only where an answer stands.

    python finetune/sentiment.py                          # the data, and what two simple methods score on it
    python finetune/sentiment.py --data films
    python finetune/sentiment.py --data my_texts.csv      # columns text and label
"""

import csv
import hashlib
import io
import json
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from utils import data, figures, run
from utils.text import clean, plain, printable, read_text

SETS = {"tweets": "tweets", "products": "amazonReviewSnippets", "films": "movieReviewSnippets"}
IGNORE = -100  # the label of a token that is not to be learned
# Longer texts are cut, the question is not; a tweet has 28 with its question, and 71 at most
MAX_TOKENS = 64


@dataclass(frozen=True)
class Task:
    """The data and the question; every script of the chapter has these flags."""

    # tweets, products, films, or a .csv or .jsonl file with the columns text and label
    data: str = "tweets"
    threshold: float = 0.5  # ratings run from -4 to 4: texts nearer to zero than this are left out
    pattern: str = "Tweet: {text}\nSentiment:"  # the question
    words: tuple[str, ...] = (" negative", " positive")  # the answers, in the order of the labels
    split: Literal["test", "valid"] = "test"  # what is scored; settings are chosen on valid
    texts: int = 0  # so many texts of it; 0: all


@dataclass(frozen=True)
class Config(Task):
    """Describe the data and score two methods that read no language model."""

    seed: int = 0  # same seed, same numbers
    out: str = "outputs/sentiment"  # where the results go


def rated(kind, threshold):
    """The texts of one of SETS as [(text, 0 or 1)]: rated below -threshold, above threshold; the rest is left out."""
    return [
        (text, int(rating > 0))
        for text, rating in data.tweets(SETS[kind])
        if abs(rating) > threshold
    ]


def csv_rows(text):
    """Rows of a table with commas, its columns named in the first line: (number of the line, {column: value})."""
    # strict: a quote that is never closed is an error
    reader = csv.DictReader(io.StringIO(text), strict=True)
    columns = [name.strip() for name in reader.fieldnames or ()]
    once = columns.count("text") == columns.count("label") == 1
    run.check(once, "it needs the columns text and label, separated by commas, in its first line")
    reader.fieldnames = columns
    for row in reader:
        run.check(
            None not in row,
            f"line {reader.line_num} has more fields than columns; put texts in quotes",
        )
        yield reader.line_num, row


def json_rows(text):
    """One JSON object a line: (number of the line, object)."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise run.UserError(f"line {number} is no JSON") from None
            run.check(isinstance(row, dict), f"line {number} is no object with text and label")
            yield number, row


def read(path, words):
    """A .csv or .jsonl file with the columns text and label -> [(text, number of the label)]; labels are `words`.

    Raises UserError, one line that names the file and the line in it.
    """
    name = printable(path)
    run.check(
        os.path.isfile(path),
        f"no data at {name}; there are {', '.join(SETS)}, or a .csv or .jsonl file",
    )
    run.check(path.suffix in (".csv", ".jsonl"), f"{name} must be a .csv or .jsonl file")
    whole = read_text(path)
    names = [w.strip() for w in words]
    pairs = []
    try:
        for number, row in csv_rows(whole) if path.suffix == ".csv" else json_rows(whole):
            text, label = row.get("text"), row.get("label")
            run.check(isinstance(text, str) and text.strip(), f"line {number} has no text")
            # JSON may have numbers as labels; true is a number to Python
            named = (
                isinstance(label, (str, int)) and not isinstance(label, bool) and str(label).strip()
            )
            run.check(named, f"line {number} has no label")
            label = str(label).strip()
            known = label in names
            run.check(
                known,
                f"line {number} has the label '{printable(label)[:40]}', --words has only {names}",
            )
            pairs.append((clean(text), names.index(label)))
    except (run.UserError, csv.Error) as error:
        raise run.UserError(f"{name}: {error}") from None
    return pairs


def letters(text):
    """What makes two texts copies of each other: their letters, accents and digits, whatever the alphabet.

    Names (@anonymous), addresses, blanks, punctuation and capitals do not count. Accented letters of Western Europe
    are left out as well: a wrong decoding turns them into others, and the copy should be recognised all the same.
    """
    composed = unicodedata.normalize("NFC", text)
    western = re.sub("[\x80-\xff]", "", composed)
    # Wide letters are letters, ligatures are two
    same = unicodedata.normalize("NFKC", western).casefold()
    same = re.sub(r"@[a-z0-9_]+|https?://[!-~]+", "", same)
    if same.isascii():
        return re.sub("[^a-z0-9]", "", same)
    # marks: the vowels of Hindi and Thai are marks
    kept = [c for c in same if unicodedata.category(c)[0] in "LMN"]
    if not kept:  # emoji
        kept = [c for c in same if not c.isascii() and unicodedata.category(c) == "So"]
    return "".join(kept)


@lru_cache(2**17)
def share(text):
    """A number in [0, 1), from a hash of the letters of a text: copies get the same."""
    return int(hashlib.sha256(letters(text).encode()).hexdigest()[:8], 16) / 2**32


def part(text):
    """train, valid or test: 70, 10 and 20 %, the same on every machine; copies stay together."""
    return "train" if share(text) < 0.7 else "valid" if share(text) < 0.8 else "test"


def load(task):
    """-> {"train", "valid", "test", "scored": [(text, label)]}, the same on every machine. Raises UserError."""
    asked = "".join([task.pattern, *task.words])
    run.check(clean(asked) == asked, "--pattern and --words must be UTF-8")
    run.check("{text}" in task.pattern, "--pattern must hold {text}, the place of the text")
    run.check(
        len(set(task.words)) == len(task.words) > 1, "--words must be two or more different answers"
    )
    run.check(
        task.threshold >= 0 and task.texts >= 0, "--threshold and --texts must not be negative"
    )
    if task.data in SETS:
        run.check(
            len(task.words) == 2,
            f"{task.data} has two labels, negative and positive: --words must be two",
        )
        pairs = rated(task.data, task.threshold)
    else:
        pairs = read(Path(task.data), task.words)
    parts = {name: [] for name in ("train", "valid", "test")}
    for text, label in sorted(dict(pairs).items(), key=lambda pair: share(pair[0])):
        parts[part(text)].append((text, label))
    for name, pairs in parts.items():
        run.check(
            len({label for _, label in pairs}) > 1,
            f"{task.data}: too few texts, '{name}' lacks a label",
        )
    return parts | {"scored": parts[task.split][: task.texts or None]}


def prompt(tokenizer, task, text):
    """The question about a text, as a string; the text is cut to MAX_TOKENS, the question never."""
    text = plain(text, tokenizer)  # a control token that a stranger wrote is letters, no command
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > MAX_TOKENS:
        text = tokenizer.decode(ids[:MAX_TOKENS])
    return task.pattern.replace("{text}", text)


def answers(tokenizer, task):
    """The tokens of each answer, as they are behind a question: some tokenizers see a word alone differently."""
    end = task.pattern.split("{text}")[-1] or "."
    before = tokenizer(end)["input_ids"]
    whole = [tokenizer(end + word)["input_ids"] for word in task.words]
    fits = all(ids[: len(before)] == before and len(ids) > len(before) for ids in whole)
    run.check(
        fits,
        "--pattern and --words: a blank at the end of the pattern belongs to the words, and none is empty",
    )
    return [ids[len(before) :] for ids in whole]


def encode(tokenizer, question, answer):
    """-> ids, labels (lists): the prompt's labels are IGNORE; the answer and the end token are what is learned."""
    before = tokenizer(question)["input_ids"]
    after = answer + [tokenizer.eos_token_id]
    return before + after, [IGNORE] * len(before) + after


def ends(ids, last):
    """Numbers of the `last` positions, of all if it is 0. As a slice they would make the head four times slower."""
    return torch.arange(-(last or ids.shape[1]), 0, device=ids.device)


def room(model, positions):
    """Raises UserError if the model has been trained for fewer positions than are needed."""
    most = getattr(model.config, "max_position_embeddings", None) or positions
    run.check(positions <= most, f"a question can have {positions} positions, this model has {most}: shorten --pattern "
              "or what stands before it (--shots, --tokens)")  # fmt: skip


def network(model):
    """A causal language model of transformers as a network of this chapter.

    Padding is masked. Positions count the tokens that are there: a Llama sees distances alone and would not mind, a
    model with learned positions would, and so would soft words that stand before the padding.
    """

    def forward(ids, mask, last=0):
        room(model, ids.shape[1])
        position = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return model(
            input_ids=ids, attention_mask=mask.long(), position_ids=position, use_cache=False,
            logits_to_keep=ends(ids, last),
        ).logits  # fmt: skip

    return forward


def pad(rows, fill):
    """[[...], ...] -> (B, L), shorter rows filled up on the left: all end together, and go on from there."""
    length = max(map(len, rows))
    return torch.tensor([[fill] * (length - len(row)) + row for row in rows])


def batch(tokenizer, task, pairs):
    """[(text, label)] -> ids, mask, labels, each (B, L). Padding is masked and not learned."""
    words = answers(tokenizer, task)
    ids, labels = zip(*(encode(tokenizer, prompt(tokenizer, task, x), words[y]) for x, y in pairs))
    mask = pad([[True] * len(row) for row in ids], False)
    return pad(ids, tokenizer.eos_token_id), mask, pad(labels, IGNORE)


def batches(rows, size, fill):
    """Rows of token numbers, those of equal length together -> (their places, ids, mask), `size` rows at a time."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for k in range(0, len(order), size):
        pick = order[k : k + size]
        yield (
            pick,
            pad([rows[i] for i in pick], fill),
            pad([[True] * len(rows[i]) for i in pick], False),
        )


@torch.no_grad()
def likelihood(network, tokenizer, questions, answers, device, size=32):
    """log p(answer | question): questions (N strings), answers (K lists of tokens) -> (N, K).

    An answer of several tokens is a product: log p(a1 | question) + log p(a2 | question, a1) + ...
    """
    scores = torch.zeros(len(questions), len(answers))
    # One pass serves all answers that end differently
    for stem in dict.fromkeys(tuple(a[:-1]) for a in answers):
        rows = [tokenizer(q)["input_ids"] + list(stem) for q in questions]
        for pick, ids, mask in batches(rows, size, tokenizer.eos_token_id):
            with run.autocast(device):
                logits = network(ids.to(device), mask.to(device), len(stem) + 1)
            logp = logits.float().log_softmax(-1).cpu()  # (B, tokens of the answer, V)
            for k, a in enumerate(answers):
                if tuple(a[:-1]) == stem:
                    scores[pick, k] = sum(logp[:, j, token] for j, token in enumerate(a))
    return scores


@torch.no_grad()
def generate(network, tokenizer, questions, device, tokens=4, size=32):
    """What the network writes after each question, greedily, up to the end token: [str]."""
    texts, end = [""] * len(questions), tokenizer.eos_token_id
    for pick, ids, mask in batches([tokenizer(q)["input_ids"] for q in questions], size, end):
        ids, mask = ids.to(device), mask.to(device)
        start = ids.shape[1]
        for _ in range(tokens):
            with run.autocast(device):
                new = network(ids, mask, 1)[:, -1:].argmax(-1)
            ids, mask = (
                torch.cat([ids, new], 1),
                torch.cat([mask, torch.ones_like(new, dtype=torch.bool)], 1),
            )
        for i, row in zip(pick, ids[:, start:].tolist()):
            texts[i] = tokenizer.decode(row[: row.index(end)] if end in row else row)
    return texts


def named(texts, words):
    """Generated texts -> label numbers: the answer with which the text begins, -1 if it is none of them."""
    longest = sorted(range(len(words)), key=lambda i: -len(words[i].strip()))
    starts = [
        [i for i in longest if text.strip().lower().startswith(words[i].strip().lower())]
        for text in texts
    ]
    return [found[0] if found else -1 for found in starts]


def accuracy(truth, said):
    """Labels (N,), or (rounds, N) for many tests at once -> share of the right ones, () or (rounds,)."""
    return (np.asarray(truth) == np.asarray(said)).mean(-1)


def macro_f1(truth, said):
    """The F1 of each class, 2 TP / (2 TP + FP + FN), averaged over the classes: the rare one counts as much.

    Labels (N,), or (rounds, N) for many tests at once -> () or (rounds,).
    """
    truth, said = np.asarray(truth), np.asarray(said)
    total, classes = 0.0, 0
    for k in np.unique(truth):
        hit = ((truth == k) & (said == k)).sum(-1)
        wrong = ((truth == k) ^ (said == k)).sum(-1)
        there = (truth == k).any(-1)  # a class without a text in a test is no part of its mean
        total = total + np.where(there, 2 * hit / np.maximum(2 * hit + wrong, 1), 0)
        classes = classes + there
    return total / classes


def interval(truth, said, score=accuracy, rounds=1000, level=0.95):
    """Bootstrap (Efron 1979): the middle `level` of the scores of texts drawn again with replacement -> (low, high)."""
    truth, said, random = np.asarray(truth), np.asarray(said), np.random.default_rng(0)
    picks = random.integers(len(truth), size=(rounds, len(truth)))
    drawn = np.concatenate([score(truth[p], said[p]) for p in np.array_split(picks, 10)])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def scores(truth, said):
    """-> accuracy and macro F1, each with the ends of its 95 % interval."""
    low, high = interval(truth, said)
    f1_low, f1_high = interval(truth, said, macro_f1)
    ends = {"low": low, "high": high, "f1_low": f1_low, "f1_high": f1_high}
    return {
        "accuracy": float(accuracy(truth, said)),
        "macro_f1": float(macro_f1(truth, said)),
    } | ends


def judge(network, tokenizer, task, pairs, device):
    """The scores of a network by likelihood of the answers, and of what it writes -> {"likelihood", "generated"}."""
    questions, truth = [prompt(tokenizer, task, x) for x, _ in pairs], [y for _, y in pairs]
    words = answers(tokenizer, task)
    likely = likelihood(network, tokenizer, questions, words, device).argmax(-1).tolist()
    written = named(
        generate(network, tokenizer, questions, device, max(map(len, words))), task.words
    )
    return {"likelihood": scores(truth, likely), "generated": scores(truth, written)}


def majority(parts):
    """The most frequent label of the training set, for every text that is scored."""
    return [Counter(y for _, y in parts["train"]).most_common(1)[0][0]] * len(parts["scored"])


def vader(texts):
    """VADER's own rules and word list: 1 where it hears more good than bad. Hutto & Gilbert 2014."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    rules = SentimentIntensityAnalyzer()
    return [int(rules.polarity_scores(text)["compound"] >= 0) for text in texts]


def main(cfg: Config) -> dict:
    """Print the data, draw the ratings, score the majority and VADER."""
    run.seed(cfg.seed)
    parts, folder = load(cfg), run.output(cfg.out, cfg)
    metrics = {name: len(pairs) for name, pairs in parts.items()}
    texts, truth = zip(*parts["scored"])
    metrics["positive_share"] = float(np.mean(truth))
    metrics["majority"] = scores(truth, majority(parts))
    if len(cfg.words) == 2:
        metrics["vader"] = scores(truth, vader(texts))
    if cfg.data in SETS:
        import matplotlib.pyplot as plt

        ratings = np.array([rating for _, rating in data.tweets(SETS[cfg.data])])
        figure, axis = plt.subplots(figsize=(5.2, 2.8))
        for ask, colour, name in ((ratings < -cfg.threshold, "tab:red", "negative"),
                                  (abs(ratings) <= cfg.threshold, "lightgrey", "left out"),
                                  (ratings > cfg.threshold, "tab:green", "positive")):  # fmt: skip
            axis.hist(
                ratings[ask],
                bins=np.arange(-4, 4.01, 0.25),
                color=colour,
                label=f"{name}: {ask.sum()}",
            )
        axis.set(xlabel="mean rating by 20 people", ylabel="texts")
        axis.legend(frameon=False)
        figures.close(figure, folder / "ratings.png")
    for text, label in parts["scored"][:6]:
        print(f"{cfg.words[label]:>12}  {text[:90]}")
    return run.report(folder, metrics, then="python finetune/llama2_hard_prompt.py")


if __name__ == "__main__":
    run.cli(main, Config)
