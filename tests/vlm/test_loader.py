"""Resumable batch samplers and the DataLoader over them: the same batches with any workers, from any step."""

import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from utils import data
from utils.run import UserError
from vlm import lazy_rows, loader, resumable_sampler, samplers
from vlm.collator import Collator
from vlm.image_download import DownloadsOff
from vlm.resumable_sampler import BatchSampler, ByLength, ByModality, Place, Shuffled, Weighted
from vlm.views import random_crop

LENGTHS = np.random.default_rng(5).integers(3, 30, size=41)
MODALITY = np.where(np.arange(41) % 3 > 0, LENGTHS, -LENGTHS)
SOURCES = {"photos": range(0, 30), "words": range(30, 41)}
WEIGHTS = {"photos": 2, "words": 1}
# 41 samples, batches of 3: an epoch ends after five steps of two parts, inside of a batch
PLANS = {
    "shuffled": lambda rank=0, ranks=1: Shuffled(41, 3, 7, rank, ranks, parts=2),
    "by length": lambda rank=0, ranks=1: ByLength(LENGTHS, 3, 7, rank, ranks),
    "by modality": lambda rank=0, ranks=1: ByModality(MODALITY, 3, 7, rank, ranks),
    "weighted": lambda rank=0, ranks=1: Weighted(SOURCES, WEIGHTS, 3, 7, rank, ranks),
}


def numbers(plan, first, last):
    return [number for k in range(first, last) for number in plan(k)]


@pytest.mark.parametrize("name", PLANS)
def test_a_batch_depends_on_its_number_alone(name):
    """In order, backwards, from the middle, with other batches asked in between: the same."""
    plan = PLANS[name]()
    whole = [plan(k) for k in range(40)]
    assert [PLANS[name]()(k) for k in (0, 17, 39)] == [whole[k] for k in (0, 17, 39)]
    assert [plan(k) for k in reversed(range(40))] == whole[::-1]


@pytest.mark.parametrize("name", ["shuffled", "by length", "by modality"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_share_an_epoch_and_every_epoch_has_its_own_order(name, ranks):
    plans = [PLANS[name](rank, ranks) for rank in range(ranks)]
    steps = [plan(k) for k in range(80) for plan in plans]
    if name == "shuffled":
        # of a step each rank takes two batches in a row
        steps = [plan(k + part) for k in range(0, 80, 2) for plan in plans for part in (0, 1)]
    flat = [number for batch in steps for number in batch]
    epochs = [flat[i : i + 41] for i in range(0, 4 * 41, 41)]
    assert all(sorted(epoch) == list(range(41)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_shuffled_is_the_order_that_training_always_had():
    """Sample (step * n + rank) * A * B + i of the permutations of the epochs."""
    expected = []
    for epoch in range(4):
        expected += np.random.default_rng([7, 3, epoch]).permutation(41).tolist()
    for rank in (0, 1):
        for step in (0, 3, 9):
            first = (step * 2 + rank) * 6
            plan = PLANS["shuffled"](rank, 2)
            assert numbers(plan, 2 * step, 2 * step + 2) == expected[first : first + 6]


def test_modality_is_the_same_on_all_ranks_and_weights_hold():
    plans = [PLANS["by modality"](rank, 2) for rank in (0, 1)]
    kinds = set()
    for k in range(30):
        found = {bool(MODALITY[i] > 0) for plan in plans for i in plan(k)}
        assert len(found) == 1
        kinds |= found
    assert kinds == {True, False}
    lengths = [LENGTHS[PLANS["by length"]()(k)] for k in range(14)]
    assert np.mean([max(batch) - min(batch) for batch in lengths]) < 3
    # draws of all ranks together are those of one mixture
    plans = [PLANS["weighted"](rank, 2) for rank in (0, 1)]
    drawn = [number for k in range(300) for plan in plans for number in plan(k)]
    mixture = samplers.Mixture(SOURCES, WEIGHTS, 7)
    assert drawn == [next(mixture) for _ in range(1800)]
    counts = Counter(number >= 30 for number in drawn)
    assert abs(counts[True] / 1800 - 1 / 3) < 0.045  # four standard errors


# the loader


def rows_and_pictures(folder):
    """41 rows about 8 pictures, a third without one; pictures 3 and 6 are cut short."""
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    for i in (3, 6):
        (folder / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes()[:60])
    found = []
    for i in range(41):
        one = {"id": str(i), "length": int(LENGTHS[i])}
        found.append(one | {"image": folder / f"{i % 8}.png"} if MODALITY[i] > 0 else one)
    return found


def tokenise(one):
    """As many ids as the row is long, all of them its number; one of 29 tokens and more does not
    fit, those of 20 to 25 are shortened."""
    if one["length"] >= 29:
        return None
    ids = [int(one["id"])] * one["length"]
    made = {"ids": ids, "labels": list(ids), "images": [one["image"]] if "image" in one else []}
    return made | {"shortened": 20 <= one["length"] <= 25}


def view(path, random):
    """A random crop, and the noise that its generator gives next."""
    image = random_crop(data.read_image(path, 20), random)
    return image[:, :8, :8].float() + float(random.random())


def made(folder, name, workers, start, stop, length=0, ranks=1):
    lazy = loader.LazySamples(rows_and_pictures(folder), tokenise)
    collate = Collator(view, lazy, pad_id=99, length=length, views=True)
    batches = BatchSampler(PLANS[name](ranks - 1, ranks), 7, ranks - 1, 2, start, stop)
    return lazy, collate, loader.Loader(lazy, batches, collate, workers)


def equal(a, b):
    return all((a[key] is None and b[key] is None) or torch.equal(a[key], b[key]) for key in a | b)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("length", [0, 40])
def test_resumed_with_workers_is_uninterrupted_without(tmp_path, name, length):
    """Ten steps of two batches with 0 and with 2 workers; anew from step 4: bit for bit, across epochs,
    with broken pictures, rows too long and random views."""
    ranks = 2 if name == "by modality" else 1
    plain, plain_collate, alone = made(tmp_path, name, 0, 0, 10, length, ranks)
    whole = list(alone)
    lazy, collate, with_workers = made(tmp_path, name, 2, 0, 10, length, ranks)
    assert len(whole) == 20 and all(map(equal, whole, with_workers))
    again = list(made(tmp_path, name, 2, 4, 10, length, ranks)[2])
    assert len(again) == 12 and all(map(equal, whole[8:], again))
    # an interrupted iteration: four steps, then the rest from a new loader
    head = [batch for batch, _ in zip(made(tmp_path, name, 2, 0, None, length, ranks)[2], range(8))]
    assert all(map(equal, head + again, whole))
    # what workers counted is what was counted without them
    assert collate.broken == plain_collate.broken > 0
    assert lazy.left_out == plain.left_out > 0 and lazy.shortened == plain.shortened > 0


def test_views_differ_between_places_and_not_between_runs(tmp_path):
    lazy, collate, _ = made(tmp_path, "shuffled", 0, 0, 1)
    lazy.rows = [
        lazy.rows[i] for i in range(41) if MODALITY[i] > 0 and LENGTHS[i] < 29 and i % 8 == 1
    ]
    places = [Place(0, 7, 5, 1, 2)]
    places += [
        Place(0, 8, 5, 1, 2),
        Place(0, 7, 6, 1, 2),
        Place(0, 7, 5, 0, 2),
        Place(0, 7, 5, 1, 3),
    ]
    views = [collate([lazy[place]])["images"] for place in places]
    for i, one in enumerate(views):
        assert torch.equal(collate([lazy[places[i]]])["images"], one)
        assert not any(torch.equal(one, other) for other in views[:i])
    # one sample twice in a packed batch: a view for each
    collate.length = 60
    first, second = collate([lazy[places[0]], lazy[places[1]]])["images"]
    assert {float(first.sum()), float(second.sum())} == {float(v.sum()) for v in views[:2]}


def test_one_stand_in_for_two_broken_pictures_has_a_view_for_each(tmp_path):
    rows_and_pictures(tmp_path)
    good = {"ids": [1], "labels": [1], "images": [tmp_path / "1.png"]}
    bad = {"ids": [3], "labels": [3], "images": [tmp_path / "3.png"]}
    collate = Collator(view, [good], 99, length=4, views=True)
    batch = collate([bad | {"place": Place(3, 7, 0, 0, i)} for i in range(2)])
    assert batch["ids"].tolist() == [[1, 1]] and not torch.equal(*batch["images"])


def test_places_number_the_samples_of_a_step_and_rank():
    batches = list(BatchSampler(PLANS["shuffled"](1, 2), 7, 1, parts=2, start=3, stop=5))
    assert [len(batch) for batch in batches] == [3, 3, 3, 3]
    assert [place.position for batch in batches for place in batch] == [*range(6), *range(6)]
    assert [batch[0].step for batch in batches] == [3, 3, 4, 4]
    assert {(place.seed, place.rank) for batch in batches for place in batch} == {(7, 1)}
    assert [place.number for place in batches[1]] == PLANS["shuffled"](1, 2)(7)


def test_the_random_state_of_training_does_not_move(tmp_path):
    """A DataLoader draws the seed of its workers from torch's generator: dropout after resuming would differ."""
    for workers in (0, 1):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        list(made(tmp_path, "shuffled", workers, 0, 1)[2])
        assert torch.equal(torch.get_rng_state(), before)


def test_rows_longer_than_the_model_reads(tmp_path):
    lazy = loader.LazySamples(rows_and_pictures(tmp_path), tokenise)
    long = [i for i in range(41) if LENGTHS[i] >= 29]
    for i in long:
        found = lazy[i]
        number = found["ids"][0]
        assert number != i and bool(found["images"]) == (MODALITY[i] > 0)
        assert found == lazy[i] and found["place"] is None
    assert lazy.left_out == 2 * len(long) > 0
    nothing = loader.LazySamples(rows_and_pictures(tmp_path), lambda one: None)
    with pytest.raises(UserError, match="row 5 is too long.*--model_max_length"):
        nothing[5]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_row_in_a_worker_is_one_line(tmp_path, workers):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"id": 1}\n')
    lazy = loader.LazySamples(lazy_rows.Rows(path), tokenise)
    batches = BatchSampler(Shuffled(1, 1))
    with pytest.raises(UserError, match="chat.jsonl: row 0 has no list") as found:
        next(iter(loader.Loader(lazy, batches, list, workers)))
    assert "\n" not in str(found.value) and "Traceback" not in str(found.value)


def end_itself(one):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_was_killed_is_one_line():
    lazy = loader.LazySamples([{"image": None}], end_itself)
    with pytest.raises(UserError, match="DataLoader worker.*fewer --workers") as found:
        next(iter(loader.Loader(lazy, BatchSampler(Shuffled(1, 1)), list, 1)))
    assert "\n" not in str(found.value)


def test_a_bug_in_a_worker_keeps_its_traceback():
    lazy = loader.LazySamples([{"image": None}], lambda one: one.nothing)
    with pytest.raises(AttributeError, match="nothing"):
        next(iter(loader.Loader(lazy, BatchSampler(Shuffled(1, 1)), list, 1)))
    bug = loader.LazySamples([{"image": None}], lambda one: torch.zeros(1, 2) @ torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        next(iter(loader.Loader(bug, BatchSampler(Shuffled(1, 1)), list, 0)))


def test_workers_that_stay_begin_again(tmp_path):
    lazy, collate, _ = made(tmp_path, "shuffled", 0, 0, 1)
    batches = BatchSampler(PLANS["shuffled"](), 7, 0, 2, 0, 2)
    stays = loader.Loader(lazy, batches, collate, 1, persistent_workers=True, prefetch=1)
    first = list(stays)
    assert stays.loader.persistent_workers and stays.loader.prefetch_factor == 1
    assert len(first) == 4 and all(map(equal, first, stays))


def test_pictures_that_may_not_be_downloaded_stop_the_run(tmp_path):
    """They are not broken: to replace them all would train on something else."""

    def refuses(path):
        raise DownloadsOff("--download fetches them")

    lazy = loader.LazySamples(rows_and_pictures(tmp_path), tokenise)
    collate = Collator(refuses, lazy, pad_id=0)
    with pytest.raises(UserError, match="--download fetches"):
        collate([lazy[int(np.flatnonzero(MODALITY > 0)[0])]])
    assert collate.broken == 0


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Shuffled(0, 3), "there must be samples"),
        (lambda: Shuffled(3, 0), "batch of at least 1"),
        (lambda: Weighted(SOURCES, WEIGHTS, 0), "batch of at least 1"),
        (lambda: Weighted(SOURCES, {"photos": 1}, 2), "weights are for"),
        (lambda: ByLength([], 2)(0), "there must be samples"),
        (lambda: ByModality([], 2), "there must be samples"),
        (lambda: loader.Loader([], [], list, -1), "--workers must be 0 or more"),
        (lambda: loader.Loader([], [], list, 1, prefetch=0), "--prefetch must be 1 or more"),
    ],
)
def test_bad_input_is_one_line(make, says):
    with pytest.raises(UserError, match=says) as found:
        make()
    assert "\n" not in str(found.value)


def test_a_packed_batch_may_be_as_long_as_its_longest_sample(tmp_path):
    lazy = loader.LazySamples(rows_and_pictures(tmp_path), tokenise)
    samples = [lazy[Place(i, 7, 0, 0, i)] for i in range(12)]
    grown = Collator(view, lazy, 99, length=10, views=True, longer=True)
    # who stands in for a broken picture depends on its path, and may be the longest
    longest = max(len(grown.read(one)[0]["ids"]) for one in samples)
    with pytest.raises(UserError, match="ask for it by its Place"):
        grown([lazy[1]])
    assert grown(samples)["ids"].shape[1] == longest
    assert (
        Collator(view, lazy, 99, length=64, views=True, longer=True)(samples)["ids"].shape[1] <= 64
    )


def test_the_sampler_counts_draws_without_reading(monkeypatch):
    """To begin at step 1000 is to count sources, not to read a thousand steps."""
    plan = PLANS["weighted"]()
    expected = plan(1000)
    fetched = []
    fresh = PLANS["weighted"]()
    real = samplers.Mixture.__next__
    monkeypatch.setattr(samplers.Mixture, "__next__", lambda self: fetched.append(1) or real(self))
    assert fresh(1000) == expected and len(fetched) == 3
    assert resumable_sampler.epoch_order(41, 7, 0) is resumable_sampler.epoch_order(41, 7, 0)
