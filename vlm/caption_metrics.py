"""Caption metrics: BLEU, ROUGE-L and CIDEr.

A caption has many right wordings, so a candidate is compared with what people wrote: which runs of
n words (n-grams) do both have? The scores differ in what they count and in what a rare word is
worth. Papineni et al. 2002 (BLEU), Lin 2004 (ROUGE-L), Vedantam et al. 2015, arXiv:1411.5726
(CIDEr). Equation numbers are theirs.

Shapes: N images, one candidate each, any number of references each; scores are (N,), or one number
for BLEU.
Differences from the papers: ROUGE-L and CIDEr are those of the COCO caption evaluation (beta 1.2;
CIDEr-D with sigma 6, without its stemming). Its tokeniser is a Java program; here a regular
expression gives both sides the same words.
"""

import math
import re
from collections import Counter

import numpy as np

from utils.run import check


def words(text):
    """Lower-case words and numbers, with hyphens, apostrophes and points inside them: "It's 3.5 m!"
    -> it's 3.5 m."""
    return re.findall(r"\w+(?:['’.-]\w+)*", text.lower())


def ngrams(tokens, n):
    """How often each run of n words occurs."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def pairs(candidates, references):
    """Sentences, or lists of their tokens -> [(words of the candidate, [words of each reference])],
    one entry an image."""
    check(
        len(candidates) == len(references) > 0,
        "one candidate and one list of references for each image",
    )
    check(
        not any(isinstance(r, str) for r in references),
        "the references of an image are a list, even if it is one",
    )
    check(all(references), "every image needs at least one reference")

    def tokens(text):
        return words(text) if isinstance(text, str) else list(text)

    return [(tokens(c), [tokens(r) for r in rs]) for c, rs in zip(candidates, references)]


def bleu(candidates, references, n=4):
    """BLEU-1 ... BLEU-n of the whole corpus, (n,) in 0..1. Papineni et al. 2002; counts are added
    over the images."""
    match = np.zeros(n)
    total = np.zeros(n)
    length = 0
    reference_length = 0
    for candidate, refs in pairs(candidates, references):
        # n-gram matches of each order
        for k in range(1, n + 1):
            counts = ngrams(candidate, k)
            most = Counter()
            for ref in refs:
                most |= ngrams(ref, k)  # the largest count in any one reference
            # clipped: "the the the" gets no more than is there. Sec. 2.1
            match[k - 1] += (counts & most).total()
            total[k - 1] += counts.total()
        # the closest reference, or the shorter of two
        length += len(candidate)
        reference_length += min((abs(len(r) - len(candidate)), len(r)) for r in refs)[1]
    precision = match / np.maximum(total, 1)
    # brevity penalty. Sec. 2.2
    penalty = 1 if length > reference_length else math.exp(1 - reference_length / max(length, 1e-9))
    # geometric mean of the orders, uniform weights. Sec. 2.3
    with np.errstate(divide="ignore"):  # log 0: one order without any match makes it 0
        return penalty * np.exp(np.log(precision).cumsum() / np.arange(1, n + 1))


def lcs_length(a, b):
    """Length of the longest common subsequence: words of both in the same order, gaps allowed."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = row
        row = [0]
        for j, y in enumerate(b):
            row.append(before[j] + 1 if x == y else max(before[j + 1], row[j]))
    return row[-1]


def rouge_l(candidates, references, beta=1.2):
    """ROUGE-L of each image, (N,) in 0..1; of several references the best recall and the best
    precision count."""
    scores = []
    for candidate, refs in pairs(candidates, references):
        common = [lcs_length(candidate, r) for r in refs]
        recall = max(f / max(len(r), 1) for f, r in zip(common, refs))  # Lin 2004, Eq. 2
        precision = max(common) / max(len(candidate), 1)  # Eq. 3
        # F-score. Eq. 4
        scores.append((1 + beta**2) * recall * precision / max(recall + beta**2 * precision, 1e-12))
    return np.array(scores)


def tf_idf(tokens, n, images, count):
    """n-gram vector of a sentence: how often each occurs, times log(count / images that have it).
    Eq. 1."""
    vector = {}
    for gram, tf in ngrams(tokens, n).items():
        vector[gram] = tf * math.log(count / max(images[gram], 1))
    return vector


def cider(candidates, references, n=4, sigma=6.0):
    """CIDEr-D of each image, (N,) in 0..10: the cosine of n-gram vectors in which what all images
    share weighs little.

    Raises UserError for fewer than two images: how rare an n-gram is, is counted over the
    references of all images.
    """
    corpus = pairs(candidates, references)
    check(len(corpus) > 1, "CIDEr counts in how many images an n-gram occurs: give at least two")
    scores = np.zeros(len(corpus))
    for k in range(1, n + 1):
        # document frequency: of how many images the references have an n-gram
        images = Counter()
        for _, refs in corpus:
            images.update(set().union(*(ngrams(r, k) for r in refs)))
        for i, (candidate, refs) in enumerate(corpus):
            g = tf_idf(candidate, k, images, len(corpus))
            score = 0.0
            for ref in refs:
                r = tf_idf(ref, k, images, len(corpus))
                # CIDEr-D: clipped to the reference's weight, and less for another length
                clipped = sum(min(w, r.get(gram, 0)) * r.get(gram, 0) for gram, w in g.items())
                norm = math.hypot(*g.values()) * math.hypot(*r.values())
                length = math.exp(-((len(candidate) - len(ref)) ** 2) / (2 * sigma**2))
                score += length * clipped / norm if norm else 0.0  # Eq. 2
            scores[i] += 10 * score / len(refs) / n  # Eq. 3: the mean over n
    return scores


def scores(candidates, references):
    """{"BLEU-1", "BLEU-4", "ROUGE-L" in 0..1, "CIDEr" in 0..10} of a corpus."""
    orders = bleu(candidates, references)
    return {
        "BLEU-1": float(orders[0]),
        "BLEU-4": float(orders[3]),
        "ROUGE-L": float(rouge_l(candidates, references).mean()),
        "CIDEr": float(cider(candidates, references).mean()),
    }
