"""Batch samplers: which samples make a batch. Grouped by length or by modality, or mixed from sources by weight.

Grouped by length, less of a rectangle is padding; one modality a batch keeps the ranks in step: Liu
et al. 2023, arXiv:2310.03744, App. A.

A sample is {"ids": [...], "labels": [...], "images": [...]}, as in packing.py.
"""

import numpy as np

from utils.run import check

MEGA = 50  # batches that are sorted by length together


def shuffled(lengths, batch, random):
    """Numbers of all samples in a random order, sorted by length inside each piece of MEGA
    batches."""
    order = random.permutation(len(lengths))
    piece = MEGA * batch
    lengths = np.asarray(lengths)
    pieces = [order[i : i + piece] for i in range(0, len(order), piece)]
    return np.concatenate([piece[np.argsort(-lengths[piece], kind="stable")] for piece in pieces])


def by_length(lengths, batch, seed=0, epoch=0):
    """-> batches, lists of numbers of samples that are about equally long; every sample once, the
    order random."""
    check(len(lengths) > 0 and batch > 0, "there must be samples, and --batch at least 1")
    random = np.random.default_rng([seed, epoch])
    order = shuffled(lengths, batch, random)
    # cut into batches of neighbours, in a random order
    batches = [order[i : i + batch].tolist() for i in range(0, len(order), batch)]
    return [batches[i] for i in random.permutation(len(batches))]


def by_modality(samples, batch, seed=0, epoch=0, ranks=1):
    """-> batches[rank][step], lists of numbers: all with pictures or all without, and the same on
    all ranks of a step.

    A rank whose batch has no picture does not call the vision tower; if its neighbour does, both
    wait for ever in the next collective. Every sample once, about equally long ones in a step;
    sizes differ by one on the ranks, and by little over the steps. Raises UserError where some rank
    would have nothing in some step.
    """
    lengths = [len(s["ids"]) for s in samples]
    pictures = [bool(s["images"]) for s in samples]
    steps = modality_steps(lengths, pictures, batch, seed, epoch, ranks)
    return [[step[rank] for step in steps] for rank in range(ranks)]


def modality_steps(lengths, pictures, batch, seed=0, epoch=0, ranks=1):
    """The same from lengths and whether there is a picture, each (samples,) -> steps[step][rank]."""
    check(
        len(lengths) > 0 and batch > 0 and ranks > 0,
        "there must be samples, and --batch and ranks at least 1",
    )
    random = np.random.default_rng([seed, epoch])
    lengths = np.asarray(lengths)
    pictures = np.asarray(pictures)
    steps = []
    for kind in (True, False):
        # samples of one modality, and steps for them, rounded up
        chosen = np.flatnonzero(pictures == kind)
        count = -(-len(chosen) // (batch * ranks))
        which = "with" if kind else "without"
        what = f"{len(chosen)} samples {which} pictures on {ranks} ranks, --batch {batch}"
        left = len(chosen) % ranks if len(chosen) >= ranks else len(chosen)
        check(
            count * ranks <= len(chosen),
            f"{what}: some rank would have none in a step; leave out {left} of them",
        )
        if not count:
            continue
        # neighbours in length share a step, dealt out to the ranks
        order = chosen[shuffled(lengths[chosen], batch * ranks, random)]
        for part in np.array_split(order, count):
            steps.append([part[rank::ranks].tolist() for rank in range(ranks)])
    # steps of both modalities in a random order, the same on all ranks
    return [steps[i] for i in random.permutation(len(steps))]


class Mixture:
    """Draws for ever from several lists, each as often as its weight says, each anew shuffled when
    it is used up.

    What is drawn when is a function of the seed and the numbers drawn so far, so these numbers are
    the whole state.
    """

    def __init__(self, sources, weights, seed=0):
        check(
            sources and sources.keys() == weights.keys(),
            f"weights are for {[*weights]}, sources are {[*sources]}",
        )
        # weights, one for each source
        values = np.array([weights[name] for name in sources], dtype=float)
        good = np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0
        check(good, f"weights must be numbers of 0 or more, and not all 0: {weights}")
        empty = [name for name in sources if weights[name] > 0 and not len(sources[name])]
        check(not empty, f"nothing to draw from in {empty}; give it weight 0")
        self.sources = sources
        self.seed = seed
        self.bounds = (values / values.sum()).cumsum()
        # what a state must agree with, and the state: draws of each source so far
        self.fixed = {
            "seed": seed,
            "weights": values.tolist(),
            "sizes": {k: len(v) for k, v in sources.items()},
        }
        self.drawn = dict.fromkeys(sources, 0)
        self.orders = {}

    def source(self, draw):
        """The name of the source of a draw, 0, 1, ..."""
        u = np.random.default_rng([self.seed, 0, draw]).random() * self.bounds[-1]
        return [*self.sources][np.searchsorted(self.bounds, u, side="right")]

    def __iter__(self):
        return self

    def __next__(self):
        # a source, and the place in its epoch
        name = self.source(sum(self.drawn.values()))
        items = self.sources[name]
        epoch, place = divmod(self.drawn[name], len(items))
        # every epoch of a source has its own order
        if self.orders.get(name, (-1,))[0] != epoch:
            number = [*self.sources].index(name)
            random = np.random.default_rng([self.seed, 1, number, epoch])
            self.orders[name] = (epoch, random.permutation(len(items)))
        self.drawn[name] += 1
        order = self.orders[name][1]
        return items[order[place]]

    def go_to(self, draws):
        """Stand where so many numbers have been drawn, from any state: the sources of these draws are
        counted."""
        before = sum(self.drawn.values())
        if draws < before:
            self.drawn = dict.fromkeys(self.sources, 0)
            before = 0
        for draw in range(before, draws):
            self.drawn[self.source(draw)] += 1

    def state_dict(self, ahead=0):
        """Plain numbers. ahead: draws that a DataLoader's workers hold ready and nobody has learned
        from yet."""
        drawn = dict(self.drawn)
        total = sum(drawn.values())
        check(0 <= ahead <= total, f"{ahead} draws ahead of {total} cannot be")
        for draw in range(total - ahead, total):
            drawn[self.source(draw)] -= 1
        return {"drawn": drawn, **self.fixed}

    def load_state_dict(self, state):
        """Go on where the state was taken. Raises UserError if sources, weights or seed are
        others."""
        other = [f"{k} {state.get(k)}" for k in self.fixed if state.get(k) != self.fixed[k]]
        check(not other, f"the state is of another mixture: {', '.join(other)}")
        self.drawn = dict(state["drawn"])
        self.orders = {}
