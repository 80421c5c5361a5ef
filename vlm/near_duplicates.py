"""MinHash near-duplicate removal: of conversations that say nearly the same about one picture, keep the first.

Broder 1997, "On the resemblance and containment of documents" (shingles, MinHash); Indyk & Motwani
1998 (locality-sensitive hashing by bands). Why: Lee et al. 2022, arXiv:2107.06499, Sec. 4.2: models
that are trained on near-duplicates repeat them, and duplicates across a split flatter its scores.

A text is the set of its runs of n words (shingles). Two sets resemble each other by the Jaccard
similarity J = |A and B| / |A or B|, and the smallest hash of each is the same with probability J. A
signature is K such minima; it is cut into b bands of r, and rows that share a band are candidates,
whose J is then computed exactly. Rows are read once, in order.

Shapes: signature (K,), K = b r.
Difference from the paper: candidates are verified by J itself, not by edit distance; K is 128, not
9000; rows about different pictures are no duplicates.

    python vlm/near_duplicates.py                                        # paragraphs of three manuals
    python vlm/near_duplicates.py --data chat.json --image_folder pictures --threshold 0.8
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import data, run
from utils.run import check
from vlm import conversations, image_hashes, prompts

HASHES = 128  # K, of a signature
RECALL = 0.95  # of pairs as similar as the threshold, so many are candidates, or more


@dataclass(frozen=True)
class Config:
    """Remove near-duplicates from conversations."""

    data: str = ""  # a chat.json; empty: paragraphs of three manuals
    image_folder: str = ""  # where its pictures are
    threshold: float = 0.8  # Jaccard similarity from which two texts are duplicates
    words: int = 3  # of a shingle
    perceptual: bool = False  # compare pictures by difference hash, not byte for byte
    seed: int = 0  # of the hash functions
    out: str = "outputs/near_duplicates"


def digest(text, size=4):
    """Deterministic hash of a text -> integer of so many bytes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "little")


def shingles(text, n=3):
    """Hashes of all runs of n words -> sorted uint32 (S,), S >= 1. Broder 1997, Sec. 2.

    Case and punctuation do not count; a text of fewer words is one run.
    """
    # words, then every run of n of them; a set, so that repetition does not count
    words = re.findall(r"\w+", text.lower())
    runs = {" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}
    return np.array(sorted({digest(one) for one in runs}), np.uint32)


def jaccard(a, b):
    """J = |A and B| / |A or B| of two sets of shingles."""
    # |A or B| = |A| + |B| - |A and B|
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def hash_functions(count=HASHES, seed=0):
    """Random multipliers and offsets -> uint64 (2,K): h(x) = (a x + b mod 2^64) >> 32, which is
    pairwise independent on 32 bits (Dietzfelbinger 1996)."""
    return np.random.default_rng([seed, 10]).integers(0, 2**64, (2, count), dtype=np.uint64)


def signature(found, functions):
    """MinHash signature: the smallest value of each hash function over a set -> uint32 (K,).

    P(two sets have the same k-th value) = J. Broder 1997, Theorem 1.
    """
    a, b = functions
    # each hash function over all shingles, and its minimum over the set
    values = a * found.astype(np.uint64)[:, None] + b  # (S,K), modulo 2^64
    return (values >> np.uint64(32)).min(0).astype(np.uint32)


def estimate(one, other):
    """Estimate of J by two signatures: the fraction of equal values. Its standard error is (J (1 -
    J) / K)^0.5."""
    return float((one == other).mean())


def candidate_probability(s, bands, rows):
    """P(two sets of J = s share a band) = 1 - (1 - s^r)^b. Lee et al. 2022, App. A."""
    return 1 - (1 - s**rows) ** bands


def band_shape(threshold, count=HASHES):
    """-> bands b, rows r with b r = K: the longest bands that still find a pair at the threshold
    with probability RECALL. Long bands let few others through."""
    # longer bands let fewer pairs through: the longest that still finds a pair at the threshold
    fitting = 1
    for rows in range(1, count + 1):
        whole = count % rows == 0
        if whole and candidate_probability(threshold, count // rows, rows) >= RECALL:
            fitting = rows
    return count // fitting, fitting


def bands(one, shape):
    """A signature's bands -> b keys, each with its number."""
    return [(i, part.tobytes()) for i, part in enumerate(one.reshape(shape))]


class UnionFind:
    """Groups of numbers that are joined one pair at a time; a group's root is its smallest number."""

    def __init__(self):
        self.parent = []

    def add(self):
        """A new number, alone in its group -> the number."""
        self.parent.append(len(self.parent))
        return len(self.parent) - 1

    def find(self, i):
        """The root of i's group. Paths are halved on the way."""
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join(self, i, j):
        # two roots: the smaller one stays root, which is the row that is kept
        i, j = self.find(i), self.find(j)
        self.parent[max(i, j)] = min(i, j)


def image_keys(rows, folder=None, perceptual=False):
    """What the picture of each row is compared by: the hash of its file, or the number that similar
    ones share; no folder: its name; no picture: nothing. A generator, in order."""
    similar = image_hashes.SimilarImages()
    known = {}
    for one in rows:
        name = one.get("image")
        if name is None or folder is None:
            yield name
            continue
        # each file is read once
        if name not in known:
            path = Path(folder) / name
            known[name] = similar.number(path) if perceptual else image_hashes.content_hash(path)
        yield known[name]


def text_of(one):
    """All words of a conversation, without the place of the picture."""
    return "\n".join(turn["value"] for turn in one["conversations"]).replace(prompts.IMAGE, "")


def groups(keyed, threshold=0.8, words=3, seed=0):
    """Near-duplicate groups of (key, text) pairs, an iterable that is read once -> root of each:
    the number of the first of its group.

    Only texts of the same key are compared. Two are joined if their J is the threshold or more, and
    a group is whatever hangs together.
    """
    # one set of hash functions for all texts, else signatures could not be compared
    functions = hash_functions(seed=seed)
    shape = band_shape(threshold)
    joined = UnionFind()
    exact = {}
    buckets = {}
    sets = {}
    for key, text in keyed:
        number = joined.add()
        # the same text again: no hashing is needed
        first = exact.setdefault((key, text), number)
        if first != number:
            joined.join(first, number)
            continue
        # candidates: earlier ones that share a band
        sets[number] = shingles(text, words)
        candidates = set()
        for band in bands(signature(sets[number], functions), shape):
            bucket = buckets.setdefault((key, *band), [])
            candidates.update(bucket)
            bucket.append(number)
        # verify each, unless it is of the same group by now
        for other in sorted(candidates):
            together = joined.find(other) == joined.find(number)
            if not together and jaccard(sets[other], sets[number]) >= threshold:
                joined.join(other, number)
    return [joined.find(i) for i in range(len(joined.parent))]


def remove(rows, threshold=0.8, folder=None, words=3, perceptual=False, seed=0):
    """Rows of a chat.json -> rows that are kept, in order, and how many near-duplicates were
    removed. The first of each group is kept.

    Raises UserError for a threshold outside 0 ... 1, or a picture that cannot be read.
    """
    check(0 < threshold <= 1, f"--threshold {threshold}: above 0, and at most 1")
    check(words > 0, "--words must be at least 1")
    # groups by picture and text; of each the first row is kept
    rows = list(rows)
    keyed = zip(image_keys(rows, folder, perceptual), map(text_of, rows))
    roots = groups(keyed, threshold, words, seed)
    # a row that is its own root is the first of its group
    kept = [one for i, one in enumerate(rows) if roots[i] == i]
    return kept, len(rows) - len(kept)


def manuals():
    """Paragraphs of manuals of ten words or more, as rows without a picture."""
    rows = []
    for name, page in data.docs():
        for i, paragraph in enumerate(page.split("\n\n")):
            if len(paragraph.split()) >= 10:
                rows.append(conversations.row(f"{name}-{i}", None, [(name, paragraph)]))
    return rows


def main(cfg: Config) -> dict:
    """Write the rows that are kept, and count those that were removed."""
    check(not cfg.image_folder or cfg.data, "--image_folder goes with --data")
    pictures = cfg.image_folder or (str(Path(cfg.data).parent) if cfg.data else None)
    rows = conversations.read(cfg.data, pictures) if cfg.data else manuals()
    more = {"folder": pictures, "words": cfg.words, "perceptual": cfg.perceptual, "seed": cfg.seed}
    # removed in memory; nothing is written before all rows were read
    kept, removed = remove(rows, cfg.threshold, **more)
    folder = run.output(cfg.out, cfg)
    run.write_json(folder / "chat.json", kept)
    count, length = band_shape(cfg.threshold)
    metrics = {
        "rows": len(rows),
        "kept": len(kept),
        "removed": removed,
        "bands": count,
        "rows of a band": length,
        "p of a candidate, at the threshold": candidate_probability(cfg.threshold, count, length),
        "the same, at half of it": candidate_probability(cfg.threshold / 2, count, length),
    }
    then = f"python vlm/train.py --data {folder / 'chat.json'}" if cfg.data else ""
    return run.report(folder, metrics, then)


if __name__ == "__main__":
    run.cli(main, Config)
