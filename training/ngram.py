"""n-gram language model of bytes with interpolated Kneser-Ney smoothing: a baseline by counting.

Kneser & Ney 1995, ICASSP; interpolated as in Chen & Goodman 1999, Computer Speech & Language 13. A
gram is a byte and those before it, as one number of 64 bits: the byte is its lowest eight bits,
without it the number is the context.
"""

from typing import NamedTuple

import numpy as np

MASKS = [np.uint64(256 ** (k + 1) - 1) for k in range(8)]  # the last k + 1 bytes of a number


class Counts(NamedTuple):
    """Grams of one order, counted; grams and contexts are sorted. Made by `count`."""

    grams: np.ndarray  # (G,), each once
    times: np.ndarray  # (G,), how often each is there
    contexts: np.ndarray  # (C,), each once
    totals: np.ndarray  # (C,), how often each is there
    kinds: np.ndarray  # (C,), with how many different next bytes
    discount: float  # d, taken from the count of every gram


class KneserNey:
    """p(byte | the k bytes before it) for every k up to `order`."""

    def __init__(self, texts, order):
        self.order = order
        grams = windows(texts, order)
        # How often each gram is in the text
        self.seen = [count(grams & MASKS[k]) for k in range(order + 1)]
        # How many different bytes it was seen after: what counts once the longer gram has failed
        self.after = [count(self.seen[k + 1].grams & MASKS[k]) for k in range(order)]

    def probability(self, grams, order):
        """p of the last byte of each gram (n,), given the `order` bytes before it."""
        # Below order 0 all bytes are alike.
        p = np.full(len(grams), 1 / 256)
        for k in range(order + 1):
            counts = self.seen[k] if k == order else self.after[k]
            gram = grams & MASKS[k]
            context = gram >> np.uint64(8)
            total = find(counts.contexts, counts.totals, context)
            # What is taken from every gram ...
            own = np.maximum(find(counts.grams, counts.times, gram) - counts.discount, 0)
            # ... is given to the order below, by the kinds of bytes that follow the context.
            lower = counts.discount * find(counts.contexts, counts.kinds, context)
            # A context that was never seen leaves all to the order below.
            p = np.where(total > 0, (own + lower * p) / np.maximum(total, 1), p)
        return p

    def bits(self, texts, order):
        """Bits per byte of texts."""
        p = self.probability(windows(texts, self.order), order)
        return float(-np.log2(p).mean())


def windows(texts, order):
    """The gram of every byte, with the `order` bytes before it: (bytes,)."""
    # Zeros stand before every page, and nowhere else
    text = b"".join(bytes(order) + t.encode() for t in texts)
    x = np.frombuffer(text, np.uint8).astype(np.uint64)
    shifted = [x[order - j : len(x) - j] << np.uint64(8 * j) for j in range(order + 1)]
    grams = np.bitwise_or.reduce(shifted)
    return grams[x[order:] != 0]


def count(grams):
    """Counts of grams and their contexts; discount d = n1 / (n1 + 2 n2)."""
    known, times = np.unique(grams, return_counts=True)
    # Sorted grams of one context stand together: where each begins, and how many they are
    contexts, first, kinds = np.unique(known >> np.uint64(8), return_index=True, return_counts=True)
    totals = np.add.reduceat(times, first)
    once = (times == 1).sum()
    twice = (times == 2).sum()
    discount = once / max(1, once + 2 * twice)
    return Counts(known, times, contexts, totals, kinds, discount)


def find(keys, values, wanted):
    """The value of each wanted key; 0 if it is not among the keys, which are sorted."""
    i = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[i] == wanted, values[i], 0)
