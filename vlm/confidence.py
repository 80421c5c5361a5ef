"""Confidence of a classifier: agreement of prompts, temperature scaling, calibration error, coverage.

A probability is calibrated if of all answers given with 0.8 four in five are right. Guo et al. 2017,
arXiv:1706.04599: one temperature, fitted on labelled samples, mends most of it and moves no answer.
An answer below a threshold is an abstention: the fewer are kept (coverage), the more of these are right.

Shapes: P prompts, N samples, C classes; p (P,N,C) or (N,C), truth (N,), confidence and right (N,).
"""

import torch
import torch.nn.functional as F

from utils.run import check


def votes(answers, classes, smoothing=0.1):
    """Answers of P prompts, indices (P,N), -1 for none -> probabilities (N,C): shares of the votes.

    `smoothing` is added to each class, so that none is impossible (Laplace)."""
    counts = torch.zeros(answers.shape[1], classes)
    for row in answers:
        given = row >= 0
        counts[given] += F.one_hot(row[given], classes)
    counts += smoothing
    return counts / counts.sum(-1, keepdim=True)


def consensus(p):
    """Mean over the prompts of p (P,N,C) -> (N,C)."""
    return p.mean(0)


def agreement(answers, label):
    """Share of the P prompts, answers (P,N), that give the label (N,): (N,) in 0..1."""
    return (answers == label).float().mean(0)


def scale(p, temperature):
    """softmax(log p / T): above 1 less sure, below 1 surer; the order stays. Guo et al., Eq. 9."""
    return (p.clamp_min(1e-12).log() / temperature).softmax(-1)


def fit_temperature(p, truth):
    """Temperature of the lowest cross-entropy for labelled samples, between 0.05 and 20.

    Convex in 1/T: the derivative changes its sign once, which bisection finds. Raises UserError
    without samples."""
    check(len(p), "a temperature is fitted on labelled samples, and there are none")
    log_p = p.double().clamp_min(1e-12).log()
    low, high = 1 / 20, 1 / 0.05
    for _ in range(60):
        inverse = (low + high) / 2
        # d/dβ of -log softmax(β log p)[truth]: expected minus observed log p
        expected = ((inverse * log_p).softmax(-1) * log_p).sum(-1)
        slope = (expected - log_p.gather(1, truth[:, None])[:, 0]).mean()
        if slope > 0:
            high = inverse
        else:
            low = inverse
    return 2 / (low + high)


def reliability(confidence, right, bins=10):
    """Rows of the reliability diagram: (samples, mean confidence, accuracy) of each bin that has any.

    Bins are of equal width, open below."""
    bounds = torch.linspace(0, 1, bins + 1)[1:-1].to(confidence)
    place = torch.bucketize(confidence.contiguous(), bounds)
    rows = []
    for b in range(bins):
        inside = place == b
        if inside.any():
            means = float(confidence[inside].mean()), float(right[inside].float().mean())
            rows.append((int(inside.sum()), *means))
    return rows


def expected_calibration_error(confidence, right, bins=10):
    """ECE: |accuracy - confidence| of each bin, weighted by its samples. Guo et al., Eq. 3."""
    rows = reliability(confidence, right, bins)
    return sum(n * abs(sure - share) for n, sure, share in rows) / max(1, len(confidence))


def coverage_curve(confidence, right):
    """Threshold, coverage, accuracy of what is kept: one entry (K,) each for every confidence that
    occurs, from the largest. Samples of equal confidence are kept together."""
    thresholds = confidence.unique().flip(0)
    coverage = []
    accuracy = []
    for threshold in thresholds:
        kept = confidence >= threshold
        coverage.append(float(kept.float().mean()))
        accuracy.append(float(right[kept].float().mean()))
    return thresholds, torch.tensor(coverage), torch.tensor(accuracy)


def choose_threshold(confidence, right, wanted):
    """Lowest threshold above which at least the share `wanted` is right, on labelled samples.

    2.0, which keeps nothing, if there is none."""
    thresholds, _, accuracy = coverage_curve(confidence, right)
    enough = thresholds[accuracy >= wanted]
    return float(enough.min()) if len(enough) else 2.0
