"""Ranking metrics with bootstrap intervals: hit rate, MRR, nDCG.

One passage per question is right. `ranks` is (Q,): where the first passage out of the right section
stands, counted from 1, or 0 if it was not found. With one right answer, recall at k and hit at k
are the same, and the ideal DCG is 1. Intervals: Efron 1979. Questions are drawn again with
replacement, the score is computed anew, and 95 % of these scores lie between low and high. Two
retrievers that answered the same questions are compared question by question.
"""

import time

import numpy as np

DEPTH = 10  # passages that are looked at
DRAWS = 10_000  # of the bootstrap


def hit(ranks, k):
    """Is the right passage among the first k? (Q,) of 0 and 1. One minus its mean is the failure
    rate at k."""
    return ((ranks > 0) & (ranks <= k)).astype(float)


def reciprocal_rank(ranks, k=DEPTH):
    """1 for the first place, 1/2 for the second, 0 behind k: (Q,). Its mean is the MRR."""
    return hit(ranks, k) / np.maximum(ranks, 1)


def ndcg(ranks, k=DEPTH):
    """Discounted gain: 1 / log2(1 + rank), 0 behind k: (Q,). Jarvelin & Kekalainen 2002, with one
    relevant passage."""
    return hit(ranks, k) / np.log2(1 + np.maximum(ranks, 1))


def all_of(ranks):
    """{name: (Q,)} of every score that this chapter prints."""
    hits = {f"hit@{k}": hit(ranks, k) for k in (1, 5, 10)}
    return hits | {"MRR@10": reciprocal_rank(ranks), "nDCG@10": ndcg(ranks)}


def interval(values, seed=0):
    """(Q,) -> mean, low, high: the mean, and the 95 % interval of it over bootstrap draws of
    questions."""
    values = np.asarray(values, float)
    if len(values) == 0:
        return float("nan"), float("nan"), float("nan")
    # Each draw is a test set of the same size, with replacement
    draws = np.random.default_rng(seed).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def fewer_failures(ranks, baseline, k=5, seed=0):
    """By what part the failure rate at k is below that of the baseline on the same questions:
    value, low, high."""
    fails = 1 - hit(ranks, k)
    before = 1 - hit(baseline, k)
    # The same questions are drawn for both
    draws = np.random.default_rng(seed).integers(0, len(fails), (DRAWS, len(fails)))
    cut = reduction(fails[draws].mean(1), before[draws].mean(1))
    low, high = np.quantile(cut, [0.025, 0.975])
    return float(reduction(fails.mean(), before.mean())), float(low), float(high)


def reduction(fails, before):
    """By what part a failure rate is below another; 0 if neither fails at all."""
    return np.where(np.maximum(fails, before) > 0, 1 - fails / np.maximum(before, 1e-9), 0.0)


def rank(documents, gold):
    """Place of the first document out of the section `gold`, from 1; 0 if there is none."""
    for place, d in enumerate(documents, 1):
        if gold in (d.metadata.get("section"), d.metadata["id"]):
            return place
    return 0


def measure(retriever, questions, bar=iter):
    """Ask every question: ranks (Q,), wall milliseconds of each query (Q,), and what was found."""
    ranks = []
    times = []
    found = []
    for question in bar(questions):
        # Retrieve, timed
        start = time.perf_counter()
        documents = retriever.invoke(question.text)
        times.append(1000 * (time.perf_counter() - start))
        # Rank of the right passage
        ranks.append(rank(documents, question.gold))
        found.append(documents)
    return np.array(ranks), np.array(times), found


def table(rows):
    """{name: {score: (value, low, high) or number}} -> aligned lines to print."""
    # Every column that a row has, in the order of their first use
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    cells = [["", *columns]]
    for name, row in rows.items():
        cells.append([name, *(cell(row[c]) if c in row else "" for c in columns)])
    # Each column as wide as its widest cell
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns) + 1)]
    lines = []
    for line in cells:
        padded = [c.ljust(width) for c, width in zip(line, widths)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def cell(x):
    """A value with its interval, or a number, as text."""
    if isinstance(x, tuple):
        value, low, high = x
        return f"{value:.3f} [{low:.3f}, {high:.3f}]"
    return f"{x:.4g}"
