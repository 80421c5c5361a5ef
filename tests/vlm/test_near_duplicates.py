"""vlm/near_duplicates.py: MinHash within its error, bands as the formula says, planted duplicates removed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from utils.data import groceries
from utils.run import UserError
from vlm import conversations, image_hashes
from vlm import near_duplicates as near


def sets_of(similarity, random, size=400):
    """Two random sets of numbers whose Jaccard similarity is known."""
    both = round(size * similarity)
    numbers = random.choice(2**32, 2 * size - both, replace=False).astype(np.uint32)
    alone = (size - both) // 2
    common = numbers[:both]
    one = np.sort(np.concatenate([common, numbers[both : both + alone]]))
    other = np.sort(np.concatenate([common, numbers[both + alone : both + 2 * alone]]))
    return one, other


def test_shingles_are_runs_of_words():
    assert len(near.shingles("The cat sat on the mat.")) == 4
    assert (near.shingles("the CAT, sat") == near.shingles("The cat sat!")).all()
    assert len(near.shingles("one")) == len(near.shingles("")) == 1
    assert len(near.shingles("a b c a b c a b c")) == 3  # a set: repeated runs count once
    # the same in every process: no hash of Python's
    assert near.digest("a red circle") == 1163810713
    assert near.digest("x", 8) >= 2**32 or near.digest("y", 8) >= 2**32


def test_jaccard_is_that_of_sets():
    random = np.random.default_rng(0)
    for _ in range(20):
        one = np.unique(random.integers(50, size=30)).astype(np.uint32)
        other = np.unique(random.integers(50, size=30)).astype(np.uint32)
        expected = len({*one} & {*other}) / len({*one} | {*other})
        assert near.jaccard(one, other) == pytest.approx(expected)


@pytest.mark.parametrize("similarity", [0.1, 0.5, 0.8, 0.95])
def test_the_estimate_is_unbiased_within_its_standard_error(similarity):
    """Mean over 60 draws of hash functions and sets: off by less than four standard errors of it."""
    random = np.random.default_rng(1)
    errors = []
    for seed in range(60):
        one, other = sets_of(similarity, random)
        functions = near.hash_functions(seed=seed)
        j = near.jaccard(one, other)
        assert j == pytest.approx(similarity, abs=0.01)
        guess = near.estimate(near.signature(one, functions), near.signature(other, functions))
        errors.append(guess - j)
    expected = (similarity * (1 - similarity) / near.HASHES) ** 0.5
    assert abs(np.mean(errors)) < 4 * expected / 60**0.5
    assert 0.6 * expected < np.std(errors) < 1.5 * expected


def test_hash_functions_are_as_defined_and_uniform():
    functions = near.hash_functions(8)
    x = np.array([1, 77, 2**32 - 1], np.uint32)
    by_hand = []
    for a, b in functions.T.tolist():
        by_hand.append(min(((a * int(v) + b) % 2**64) >> 32 for v in x))
    assert near.signature(x, functions).tolist() == by_hand
    # minima of 1000 numbers out of 2^32: a thousandth of it, on average
    numbers = np.random.default_rng(0).choice(2**32, 1000, replace=False).astype(np.uint32)
    mean = near.signature(numbers, near.hash_functions(4000)).mean() / 2**32
    assert mean == pytest.approx(1 / 1001, rel=0.1)


@pytest.mark.parametrize("shape", [(32, 4), (16, 8), (4, 32)])
def test_pairs_share_a_band_as_often_as_the_formula_says(shape):
    """Simulation against 1 - (1 - s^r)^b: false positives below the threshold, misses above."""
    random = np.random.default_rng(2)
    count, length = shape
    for similarity in (0.3, 0.5, 0.7, 0.9):
        found = 0
        for seed in range(150):
            functions = near.hash_functions(seed=1000 + seed)
            one, other = (near.signature(x, functions) for x in sets_of(similarity, random, 100))
            found += bool({*near.bands(one, shape)} & {*near.bands(other, shape)})
        expected = near.candidate_probability(similarity, count, length)
        error = max(0.01, (expected * (1 - expected) / 150) ** 0.5)
        assert abs(found / 150 - expected) < 4 * error


def test_bands_are_as_long_as_recall_allows():
    assert near.band_shape(0.8) == (32, 4)
    assert near.candidate_probability(0.8, 32, 4) > 0.99999 > near.RECALL
    assert near.candidate_probability(0.8, 16, 8) < near.RECALL
    assert near.band_shape(0.9) == (16, 8) and near.band_shape(1.0) == (1, 128)
    assert near.candidate_probability(0.5, 1, 1) == 0.5


def test_union_find_groups_what_hangs_together():
    joined = near.UnionFind()
    for _ in range(6):
        joined.add()
    for pair in ((5, 4), (4, 1), (2, 3)):
        joined.join(*pair)
    assert [joined.find(i) for i in range(6)] == [0, 1, 2, 2, 1, 1]


WORDS = [f"word{i}" for i in range(3000)]


def planted(random, image=None):
    """40 texts of 60 random words; of every second one a copy with one word changed, and of every
    fourth an exact copy -> rows, numbers of the copies."""
    rows = []
    copies = []
    for k in range(40):
        words = random.choice(WORDS, 60).tolist()
        versions = [words]
        if k % 2 == 0:
            versions.append([*words[:30], "changed", *words[31:]])
        if k % 4 == 0:
            versions.append(words)
        for i, version in enumerate(versions):
            if i:
                copies.append(len(rows))
            rows.append(conversations.row(f"{k}-{i}", image, [("Say.", " ".join(version))]))
    return rows, copies


def test_planted_duplicates_are_removed_and_nothing_else():
    rows, copies = planted(np.random.default_rng(3))
    kept, removed = near.remove(rows, 0.8)
    assert removed == len(copies) == 30
    assert kept == [row for i, row in enumerate(rows) if i not in copies]
    # a stricter threshold: only exact copies; one word of sixty changes three shingles of some 60
    assert near.remove(rows, 0.95)[1] == 10
    # read once, in order: a generator is as good as a list; the same seed, the same rows
    assert near.remove(iter(rows), 0.8) == (kept, removed)


def test_a_group_keeps_its_first_even_if_joined_by_a_later_one():
    """B and A are too different, C is like both: all three hang together."""
    words = [f"w{i}" for i in range(120)]
    a = " ".join(words)
    b = " ".join([*words[:-16], *(f"x{i}" for i in range(16))])
    c = " ".join([*words[:-8], *(f"x{i}" for i in range(8))])
    texts = [near.shingles(x) for x in (a, b, c)]
    threshold = 0.8
    assert near.jaccard(texts[0], texts[1]) < threshold <= near.jaccard(texts[0], texts[2])
    assert near.jaccard(texts[1], texts[2]) >= threshold
    assert near.groups([("", a), ("", b)], threshold) == [0, 1]
    assert near.groups([("", a), ("", b), ("", c)], threshold) == [0, 0, 0]


def as_file(image, path, size=348, **more):
    Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size)).save(path, **more)


def test_pictures_are_part_of_a_row(tmp_path):
    """The same words about another picture are no duplicate; about a copy of the file they are."""
    photos = groceries(348).images
    as_file(photos[0], tmp_path / "a.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    as_file(photos[0], tmp_path / "a.jpg", 174, quality=75)
    as_file(photos[7], tmp_path / "other.png")
    names = ("a.png", "other.png", "copy.png", "a.jpg")
    rows = [conversations.row(n, n, [("What is it?", "a red circle")]) for n in names]
    kept, _ = near.remove(rows, 0.8, tmp_path)
    assert [row["image"] for row in kept] == ["a.png", "other.png", "a.jpg"]
    # by the difference hash, a smaller compressed copy is the same picture
    kept, _ = near.remove(rows, 0.8, tmp_path, perceptual=True)
    assert [row["image"] for row in kept] == ["a.png", "other.png"]
    # without a folder: by name; without a picture: by words alone
    assert len(near.remove([*rows, rows[0]], 0.8)[0]) == 4
    texts = [conversations.row("x", None, [("What is it?", "a red circle")])] * 3
    assert near.remove(texts, 0.8)[1] == 2


def test_a_difference_hash_compares_neighbours_in_each_colour():
    image = torch.zeros(3, 8, 9, dtype=torch.uint8)
    image[0] = torch.arange(9).flip(0) * 10  # red falls from left to right, blue rises
    image[2] = torch.arange(9) * 10
    bits = image_hashes.difference_hash(image).reshape(8, 8, 3)
    assert bits[..., 0].all() and not bits[..., 1:].any()
    # scaled and compressed, photos stay within the tolerance, others are far from it
    photos = groceries(348).images[::40]
    hashes = np.stack([image_hashes.difference_hash(photo) for photo in photos])
    small = [image_hashes.difference_hash(photo[:, ::2, ::2]) for photo in photos]
    distances = (hashes[:, None] != np.stack(small)).sum(-1)
    own = np.eye(len(photos), dtype=bool)
    assert (distances[own] <= image_hashes.TOLERANCE).mean() > 0.9
    assert distances[~own].min() > 2 * image_hashes.TOLERANCE


def test_the_word_image_is_no_word():
    one = conversations.row("x", "a.png", [("What?", "red")])
    assert "image" not in near.text_of(one) and "What?" in near.text_of(one)


@pytest.mark.parametrize("flags", [{"threshold": 0}, {"threshold": 1.1}, {"words": 0}])
def test_bad_values_are_refused(flags):
    with pytest.raises(UserError, match="--threshold|--words"):
        near.remove([], **flags)


def test_the_command_writes_what_is_kept(tmp_path):
    rows, copies = planted(np.random.default_rng(4))
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    found = near.main(near.Config(data=str(tmp_path / "chat.json"), out=str(out)))
    assert found["removed"] == 30 and found["rows"] == len(rows)
    kept = conversations.read(out / "chat.json", tmp_path)
    assert [row["id"] for row in kept] == [
        row["id"] for i, row in enumerate(rows) if i not in copies
    ]
    with pytest.raises(UserError, match="--image_folder"):
        near.main(near.Config(image_folder="x", out=str(tmp_path / "no")))
    assert not (tmp_path / "no").exists()
