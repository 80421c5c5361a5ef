"""Accuracy and macro F1 of a classifier, with bootstrap intervals."""

import numpy as np


def accuracy(truth, predicted):
    """Labels (N,), or (rounds, N) for many tests -> fraction that is right, () or (rounds,)."""
    return (np.asarray(truth) == np.asarray(predicted)).mean(-1)


def macro_f1(truth, predicted):
    """The F1 of each class, 2 TP / (2 TP + FP + FN), averaged over the classes: the rare one counts
    as much.

    Labels (N,), or (rounds, N) for many tests at once -> () or (rounds,).
    """
    truth = np.asarray(truth)
    predicted = np.asarray(predicted)
    total = 0.0
    classes = 0
    for k in np.unique(truth):
        hit = ((truth == k) & (predicted == k)).sum(-1)  # TP
        wrong = ((truth == k) ^ (predicted == k)).sum(-1)  # FP + FN
        # a class without a text in a test is no part of its mean
        there = (truth == k).any(-1)
        total = total + np.where(there, 2 * hit / np.maximum(2 * hit + wrong, 1), 0)
        classes = classes + there
    return total / classes


def interval(truth, predicted, score=accuracy, rounds=1000, level=0.95):
    """Bootstrap (Efron 1979): the middle `level` of the scores of texts drawn again with
    replacement -> (low, high).
    """
    truth = np.asarray(truth)
    predicted = np.asarray(predicted)
    # as many texts again, with replacement, `rounds` times
    random = np.random.default_rng(0)
    picks = random.integers(len(truth), size=(rounds, len(truth)))
    # their scores, a tenth of the rounds at a time, which is less memory
    drawn = np.concatenate([score(truth[p], predicted[p]) for p in np.array_split(picks, 10)])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def scores(truth, predicted):
    """-> accuracy and macro F1, each with the ends of its 95 % interval."""
    low, high = interval(truth, predicted)
    f1_low, f1_high = interval(truth, predicted, macro_f1)
    return {
        "accuracy": float(accuracy(truth, predicted)),
        "macro_f1": float(macro_f1(truth, predicted)),
        "low": low,
        "high": high,
        "f1_low": f1_low,
        "f1_high": f1_high,
    }
