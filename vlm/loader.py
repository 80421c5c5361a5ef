"""DataLoader for training: rows are tokenised and pictures decoded in worker processes, ahead of the steps.

Order of the data: a batch sampler that begins at any step (resumable_sampler.py). A step: the worker
reads rows by number (lazy_rows.py), makes samples of them (`LazySamples`), reads their pictures and
makes a batch (collator.py); the training loop takes it. What goes wrong in a worker is one line here.
"""

import os

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from utils.run import UserError, check
from vlm.collator import Counter
from vlm.resumable_sampler import Place

# Rows that are tried in the place of one that does not fit, at most
LOOK_AT = 1000


class LazySamples:
    """Rows -> samples {"ids", "labels", "images", "place"}, made when they are asked for.

    rows: any sequence of rows; tokenise: row -> sample, or None if the row is too long for the
    model. Instead of such a row another one stands in, with a picture or without as it had, the same
    one each time; `left_out` counts how often, over all workers. A sample may say "shortened": True,
    which `shortened` counts. Asked with a Place, a sample says it, for the draws of its images.
    """

    def __init__(self, rows, tokenise):
        self.rows = rows
        self.tokenise = tokenise
        self.left_out_counter = Counter()
        self.shortened_counter = Counter()

    @property
    def left_out(self):
        return self.left_out_counter.total()

    @property
    def shortened(self):
        return self.shortened_counter.total()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        # A Place from the sampler, or a plain number
        place = key if isinstance(key, Place) else None
        number = int(key.number if isinstance(key, Place) else key)
        one = self.rows[number]
        # the sample, or another one in the place of a row that is too long
        made = self.tokenise(one)
        if made is None:
            self.left_out_counter.add()
            made = self.stand_in(number, bool(one.get("image")))
        if made.get("shortened"):
            self.shortened_counter.add()
        made = {name: value for name, value in made.items() if name != "shortened"}
        return made | {"place": place}

    def stand_in(self, number, has_picture):
        """Another sample that fits, of the same modality, so that ranks stay in step. Raises UserError
        if none is found."""
        # drawn by the row's own number: every epoch and every worker finds the same one
        random = np.random.default_rng([number])
        for i in random.integers(len(self.rows), size=LOOK_AT).tolist():
            one = self.rows[i]
            if bool(one.get("image")) != has_picture:
                continue
            made = self.tokenise(one)
            if made is not None:
                return made
        kind = "with" if has_picture else "without"
        raise UserError(
            f"row {number} is too long, and {LOOK_AT} others {kind} a picture, too: "
            "raise --model_max_length, or shorten them"
        )


class Keys(Dataset):
    """The data set that the DataLoader sees: a key is its own item, so that all is read in `Fetch`,
    where errors become lines."""

    def __getitem__(self, key):
        return key


class Failure:
    """A UserError on its way out of a worker, without the traceback that torch would add."""

    def __init__(self, line):
        self.line = line


class Fetch:
    """Keys of a batch -> the batch, or a Failure: what a worker does."""

    def __init__(self, samples, collate):
        self.samples = samples
        self.collate = collate

    def __call__(self, keys):
        try:
            return self.collate([self.samples[key] for key in keys])
        except UserError as error:
            return Failure(str(error))


class Loader:
    """Batches for training, in the order of `batches`, whatever the number of workers.

    samples: sequence of samples; batches: lists of keys, such as a BatchSampler; collate: samples ->
    batch; workers: processes, 0: read in this one, between the steps; prefetch: batches that each
    worker reads ahead; persistent_workers: they stay for the next iteration; pin_memory: batches in
    page-locked memory, for copies to a GPU. Raises UserError for what a worker reports, and for a
    worker that was killed.
    """

    def __init__(
        self,
        samples,
        batches,
        collate,
        workers=0,
        pin_memory=False,
        persistent_workers=False,
        prefetch=2,
    ):
        check(workers >= 0, f"--workers must be 0 or more, not {workers}")
        check(prefetch >= 1, f"--prefetch must be 1 or more, not {prefetch}")
        # tokenisers that were used before a fork warn, and would switch their threads off anyway
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.loader = DataLoader(
            Keys(),
            batch_sampler=batches,
            collate_fn=Fetch(samples, collate),
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers and workers > 0,
            prefetch_factor=prefetch if workers else None,
            # a generator of its own: the one of training must not move, or a resumed run differs
            generator=torch.Generator(),
        )

    def __iter__(self):
        try:
            for batch in self.loader:
                if isinstance(batch, Failure):
                    raise UserError(batch.line)
                yield batch
        except RuntimeError as error:
            # torch says so of a worker that was killed, such as for want of memory
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"{' '.join(str(error).split())[:200]}; take fewer --workers, or more memory"
            ) from None
