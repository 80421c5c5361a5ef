"""Training data that does not fit into memory: rows read when a batch needs them, pictures in worker processes.

The same batches as train_data.py makes, for `--data` of any size: chat.json, JSON lines, or tar shards
(lazy_rows.py, tar_shards.py), pictures in a folder, in shards, or at addresses of the web (image_store.py), in
an order that is a function of seed and step (resumable_sampler.py), by a DataLoader (loader.py).

Shapes: B conversations in a batch, N vision features of width D of a picture.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.run import UserError, check
from utils.text import printable
from vlm import (
    conversations,
    evaluate,
    lazy_rows,
    packing,
    resumable_sampler,
    tar_shards,
    tile_data,
    views,
)
from vlm.collator import Collator
from vlm.image_download import is_address
from vlm.image_store import ImageStore
from vlm.loader import LazySamples, Loader
from vlm.train_data import MIN_ROW, TEXT_LOSS_PAGES, text_sample


class WithText(Sequence):
    """Rows, and behind them pages of text: {"text": page}, so that the model stays what it was."""

    def __init__(self, rows: Any, pages):
        self.rows = rows
        self.pages = pages

    def __len__(self):
        return len(self.rows) + len(self.pages)

    def __getitem__(self, number):
        if number < len(self.rows):
            return self.rows[number]
        return {"text": self.pages[number - len(self.rows)]}


def tokenise(tokenizer, image_tokens, longest, row):
    """A row -> its sample, whose images are names; None if not even its first turn fits.

    image_tokens: of every picture, or with tiles a function of its name.
    """
    if "text" in row:
        return text_sample(tokenizer, row["text"], longest)
    image = row.get("image")
    count = image_tokens if isinstance(image_tokens, int) else image_tokens(image)
    made = conversations.sample(tokenizer, row, count, image)
    if longest is None or len(made["ids"]) <= longest:
        return made
    # too long: whole turns at the end go
    shorter = conversations.shorten(tokenizer, row, count, longest)
    if shorter is None:
        return None
    made = conversations.sample(tokenizer, shorter, count, image)
    return made | {"shortened": True}


class FeaturesByName:
    """Vision features of pictures by their names, a view drawn for each: what a frozen tower sees, from the disk."""

    def __init__(self, features, names):
        self.features = features
        self.number = {name: i for i, name in enumerate(names)}
        self.unreadable = set(features.unreadable())

    def __call__(self, name, random):
        """-> (N,D) of a view. Raises UserError for a picture that could not be read."""
        number = self.number[name]
        if number in self.unreadable:
            raise UserError(f"{name} could not be read when its features were computed")
        view = int(random.integers(len(self.features)))
        return self.features[view, number].float()


class Lazy:
    """Data of `--data`, read while it is trained on: batches(cfg, start), counts()."""

    def __init__(self, cfg, tokenizer, model, longest, rank=0, ranks=1):
        flags = cfg.data
        paths = flags.paths
        self.rank = rank
        self.ranks = ranks
        self.model = model
        self.pad = tokenizer.pad_token_id
        # rows, and which belong to which source
        in_shards = len(paths) == 1 and (Path(paths[0]).is_dir() or paths[0].endswith(".tar"))
        if in_shards:
            rows: Any = tar_shards.TarRows(paths[0])
            self.sources = {paths[0]: range(len(rows))}
            weights = {paths[0]: 1.0}
            check(not flags.weights, "--weights are for several files of rows")
        else:
            rows, self.sources, weights = lazy_rows.open_rows(paths, flags.weights)
        self.weights = dict(weights)
        self.lengths = None if in_shards else partial(lazy_rows.all_lengths, rows)
        self.add_text(rows, flags.text_share)
        # pictures, as features that a frozen tower has computed once, or as pixels
        folder = flags.image_folder or (paths[0] if in_shards else Path(paths[0]).parent)
        store = ImageStore(folder, flags.download)
        frozen = cfg.train.train_type != "none"
        image_tokens: Any = model.count
        self.load: Any = partial(pixels, store, model.vision.size)
        if model.grids:
            # LLaVA-1.6: the number of image tokens follows from the size of a picture
            self.load = tile_data.TiledPictures(store, model)
            image_tokens = self.load.image_tokens
        if frozen:
            named = (row.get("image") for row in rows)
            names = sorted({name for name in named if name})
            addresses = [name for name in names if is_address(name)][:1]
            check(
                flags.download or not addresses,
                f"{printable(addresses)}: an address of the web; --download fetches its picture",
            )
            about = (flags.views, cfg.train.seed, store)
            if names and model.grids:
                self.load.compute_features(names)
            elif names:
                found = views.features(model.vision, names, *about, skip_unreadable=True)
                self.load = FeaturesByName(found, names)
        make = partial(tokenise, tokenizer, image_tokens, longest)
        self.samples = LazySamples(self.rows, make)
        self.collate: Any = None

    def add_text(self, rows, share):
        """Pages of manuals are so large a share of the samples; other pages than those of the text loss."""
        count = round(len(rows) * share / (1 - share))
        pages = evaluate.paragraphs(TEXT_LOSS_PAGES + count)[TEXT_LOSS_PAGES:] if count else []
        self.rows = WithText(rows, pages)
        if pages:
            self.sources["text"] = range(len(rows), len(self.rows))
            self.weights["text"] = sum(self.weights.values()) * share / (1 - share)

    def __len__(self):
        return len(self.rows)

    def plan(self, cfg):
        """k -> numbers of the samples of batch k of this rank."""
        size = cfg.train.batch_size
        seed = cfg.train.seed
        if cfg.data.weights:
            check(
                not cfg.data.group_by_modality_length,
                "--weights and --group_by_modality_length: one at a time",
            )
            about = (size, seed, self.rank, self.ranks)
            return resumable_sampler.Weighted(self.sources, self.weights, *about)
        if cfg.data.group_by_modality_length:
            check(self.lengths, "--group_by_modality_length needs rows in files, not in shards")
            text = [-len(page.split()) for page in self.rows.pages]
            lengths: Any = self.lengths
            lengths = np.concatenate([lengths(), np.array(text, dtype=np.int64)])
            return resumable_sampler.ByModality(lengths, size, seed, self.rank, self.ranks)
        parts = cfg.train.gradient_accumulation_steps
        about = (seed, self.rank, self.ranks, parts)
        return resumable_sampler.Shuffled(len(self.rows), size, *about)

    def batches(self, cfg, start):
        """Steps from `start` on: lists of A (batch, features or pixels, or None)."""
        flags = cfg.data
        parts = cfg.train.gradient_accumulation_steps
        about = (cfg.train.seed, self.rank, parts, start, cfg.train.steps)
        order = resumable_sampler.BatchSampler(self.plan(cfg), *about)
        length = MIN_ROW if flags.packing else 0
        self.collate = Collator(self.load, self.samples, self.pad, length, views=True, longer=True)
        loader = Loader(
            self.samples,
            order,
            self.collate,
            flags.dataloader_num_workers,
            flags.dataloader_pin_memory,
            flags.dataloader_persistent_workers,
            flags.dataloader_prefetch_factor,
        )
        step = []
        for batch in loader:
            images = batch.pop("images")
            if images is not None and images.dtype == torch.uint8:
                images = self.model.vision.pixels(images)
            batch["mask"] = packing.attention_mask(self.model.language, batch)
            step.append((batch, images))
            if len(step) == parts:
                yield step
                step = []

    def counts(self):
        """How many pictures could not be read, and conversations that were too long, so far."""
        return {
            "broken pictures": self.collate.broken if self.collate else 0,
            "conversations shortened": self.samples.shortened,
            "conversations left out": self.samples.left_out,
        }


def pixels(store, size, name, random):
    """A picture as a learning tower sees it, uint8 (3,S,S), the middle square."""
    return store.image(name, size)
