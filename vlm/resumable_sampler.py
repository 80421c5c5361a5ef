"""Resumable batch samplers: batch k of a rank is a function of (seed, k, rank, number of ranks) alone.

A DataLoader whose workers read ahead has no state worth saving: what it has drawn nobody has learned
from yet. So nothing is saved. Training that goes on at step s asks for the batches from s on, and
gets those of an uninterrupted run, with any number of workers.

What is drawn besides, such as random views of pictures, depends on the `Place` of a sample in
training: seed, step, rank, position; never on a worker's random state.

B samples a batch, A batches a step (gradient accumulation), n ranks; batch k = step * A + part.
"""

from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np

from utils.run import check
from vlm import samplers


class Place(NamedTuple):
    """Which sample is read, and where in training it stands."""

    number: int
    seed: int
    step: int
    rank: int
    position: int  # among the samples of this step and rank

    def random(self):
        """A random generator for the draws of this sample: the same in any worker, and after
        resuming."""
        return np.random.default_rng([self.seed, 4, self.step, self.rank, self.position])


@lru_cache(maxsize=4)
def epoch_order(size, seed, epoch):
    """Every epoch has its own order of the samples, the same on all ranks: (size,)."""
    return np.random.default_rng([seed, 3, epoch]).permutation(size)


class Shuffled:
    """Batches at random: every sample once an epoch, over all ranks; an epoch may end inside of a
    batch."""

    def __init__(self, size, batch, seed=0, rank=0, ranks=1, parts=1):
        check(size > 0 and batch > 0, "there must be samples, and a batch of at least 1")
        self.size = size
        self.batch = batch
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.parts = parts

    def __call__(self, k):
        # samples before this batch: whole steps of all ranks, ranks of this step, parts of this rank
        step, part = divmod(k, self.parts)
        first = ((step * self.ranks + self.rank) * self.parts + part) * self.batch
        numbers = []
        # draw n is place n of all epochs in a row, each in its own order
        for draw in range(first, first + self.batch):
            epoch, place = divmod(draw, self.size)
            numbers.append(int(epoch_order(self.size, self.seed, epoch)[place]))
        return numbers


class ByLength:
    """Batches of samples that are about equally long (samplers.by_length), dealt out to the ranks."""

    def __init__(self, lengths, batch, seed=0, rank=0, ranks=1):
        check(len(lengths) > 0 and batch > 0, "there must be samples, and a batch of at least 1")
        self.lengths = lengths
        self.batch = batch
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.epoch = -1

    def __call__(self, k):
        # batches of an epoch, rounded up, dealt out in turn: rank r takes every R-th one
        a_epoch = -(-len(self.lengths) // self.batch)
        epoch, place = divmod(k * self.ranks + self.rank, a_epoch)
        if epoch != self.epoch:
            # the order of this epoch, computed once for all its batches
            self.batches = samplers.by_length(self.lengths, self.batch, self.seed, epoch)
            self.epoch = epoch
        return self.batches[place]


class ByModality:
    """Batches of one modality, the same on all ranks of a step, about equally long
    (samplers.by_modality).

    lengths: as LLaVA writes them, below zero where there is no picture (lazy_rows.modality_length).
    """

    def __init__(self, lengths, batch, seed=0, rank=0, ranks=1):
        self.lengths = np.asarray(lengths)
        self.batch = batch
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.epoch = 0
        self.batches = self.of_epoch(0)

    def of_epoch(self, epoch):
        # the sign says the modality, the size the length
        pictures = self.lengths > 0
        lengths = abs(self.lengths)
        steps = samplers.modality_steps(lengths, pictures, self.batch, self.seed, epoch, self.ranks)
        # of every step the batch of this rank
        return [step[self.rank] for step in steps]

    def __call__(self, k):
        # batch k is a function of k alone, so a resumed run finds it again
        epoch, place = divmod(k, len(self.batches))
        if epoch != self.epoch:
            self.batches = self.of_epoch(epoch)
            self.epoch = epoch
        return self.batches[place]


class Weighted:
    """Batches from several sources, each drawn as often as its weight says (samplers.Mixture).

    sources: {name: numbers of its samples}. How often each source was drawn before batch k is
    counted anew when k is not the batch after the last one: some 30 s for a million draws.
    """

    def __init__(self, sources, weights, batch, seed=0, rank=0, ranks=1):
        check(batch > 0, "a batch of at least 1")
        self.mixture = samplers.Mixture(sources, weights, seed)
        self.batch = batch
        self.rank = rank
        self.ranks = ranks

    def __call__(self, k):
        # draws before this batch, those of the other ranks, too
        first = (k * self.ranks + self.rank) * self.batch
        self.mixture.go_to(first)
        return [int(next(self.mixture)) for _ in range(self.batch)]


class BatchSampler:
    """For a DataLoader: the batches of this rank from step `start` on, lists of `Place`.

    batches: k -> numbers of samples, one of the classes above; parts: batches a step; stop: the step
    before which it ends, None: never.
    """

    def __init__(self, batches, seed=0, rank=0, parts=1, start=0, stop=None):
        self.batches = batches
        self.seed = seed
        self.rank = rank
        self.parts = parts
        self.start = start
        self.stop = stop

    def __iter__(self):
        # from the step where the run goes on
        steps = count(self.start) if self.stop is None else range(self.start, self.stop)
        for step in steps:
            # places count through all parts of a step: the draws of a sample hang on its place
            position = 0
            for part in range(self.parts):
                places = []
                for number in self.batches(step * self.parts + part):
                    places.append(Place(number, self.seed, step, self.rank, position))
                    position += 1
                yield places
