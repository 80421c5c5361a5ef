"""Training data of vlm/train.py: rows become samples, samples the batches of a step, photos their vision features.

Shapes: B conversations in a batch, N vision features of width D of a photo, V views of it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.data import read_image
from utils.text import plain
from vlm import conversations, data, evaluate, packing, resumable_sampler, tile_data, views
from vlm.prompts import IGNORE

# Tokens of a packed row, at least
MIN_ROW = 256
# Pages of manuals that the text loss is measured on, before and after: none of them is learned
TEXT_LOSS_PAGES = 40


@dataclass
class Photos:
    """Photos by number: their vision features (V,photos,N,D), or their files, if the tower
    learns."""

    paths: list
    features: Any = None
    vision_tower: Any = None
    sizes: Any = None  # of photos that are tiled: TiledPhotos of tile_data.py

    def __call__(self, numbers, random):
        """-> features (len,N,D) or pixels (len,3,S,S) of these photos, a view of each drawn by
        `random`."""
        if self.features is not None:
            drawn = random.integers(len(self.features), size=len(numbers))
            return self.features[torch.from_numpy(drawn), torch.tensor(numbers)].float()
        images = [read_image(self.paths[i], self.vision_tower.size) for i in numbers]
        return self.vision_tower.pixels(torch.stack(images))


def read_rows(cfg):
    """-> rows to learn from, the folder of their photos, how many rows had a photo that cannot be
    decoded."""
    if cfg.data.paths:
        path = cfg.data.paths[0]
        folder = Path(cfg.data.image_folder or Path(path).parent)
        rows, broken = conversations.replace_undecodable(conversations.read(path, folder), folder)
        return rows, folder, broken
    rows = data.fruit("train", cfg.train.seed)
    folder = data.photos()
    if cfg.data.emoji:
        rows += data.emoji(folder, cfg.data.emoji, cfg.train.seed)
    return rows, folder, 0


def read_samples(cfg, tokenizer, model, longest):
    """-> samples, their Photos, how many rows were replaced, shortened and left out."""
    rows, folder, broken = read_rows(cfg)
    # photos, each once: their vision features, unless the tower learns
    names = sorted({row["image"] for row in rows if row.get("image")})
    paths = [folder / name for name in names]
    photos: Any = Photos(paths, vision_tower=model.vision)
    image_tokens: Any = model.count
    frozen = cfg.train.train_type != "none"
    if model.grids:
        # LLaVA-1.6: the number of image tokens follows from the size of a photo
        photos = tile_data.TiledPhotos(paths, model, frozen)
        image_tokens = [model.count_of(size) for size in photos.sizes]
    elif frozen and paths:
        photos.features = views.features(model.vision, paths, cfg.data.views, cfg.train.seed)
    # conversations as token ids and labels
    number = {name: i for i, name in enumerate(names)}
    made = conversations.samples(tokenizer, rows, image_tokens, number, longest)
    samples, shortened, left_out = made
    # text alone: other pages than those of the text loss
    if cfg.data.text_share:
        count = round(len(samples) * cfg.data.text_share / (1 - cfg.data.text_share))
        pages = evaluate.paragraphs(TEXT_LOSS_PAGES + count)[TEXT_LOSS_PAGES:]
        samples += [text_sample(tokenizer, text, longest) for text in pages]
    counts = {
        "broken pictures": broken,
        "conversations shortened": shortened,
        "conversations left out": left_out,
    }
    return samples, photos, counts


def text_sample(tokenizer, text, longest=None):
    """A paragraph without a photo: all of it is supervised, so that the language model stays what
    it was."""
    most = min(128, longest or 128)
    ids = tokenizer(plain(text, tokenizer), truncation=True, max_length=most).input_ids
    return {"ids": ids, "labels": list(ids), "images": []}


class InMemory:
    """Samples and the features of their photos, all read at once: batches(cfg, start), counts()."""

    def __init__(self, cfg, tokenizer, model, longest, rank=0, ranks=1):
        self.samples, self.photos, self.changed = read_samples(cfg, tokenizer, model, longest)
        self.model = model
        self.pad = tokenizer.pad_token_id
        self.rank = rank
        self.ranks = ranks

    def __len__(self):
        return len(self.samples)

    def counts(self):
        """How many rows were changed."""
        return self.changed

    def batches(self, cfg, start):
        """Steps from `start` on: lists of A (batch, features or pixels, or None)."""
        return read_batches(self, cfg, start)


def read_batches(source, cfg, start):
    """Batches of the steps of a rank, one after the other."""
    for step in range(start, cfg.train.steps):
        random = np.random.default_rng([cfg.train.seed, 4, step, source.rank])
        parts = step_batches(source.samples, cfg, step, source.rank, source.ranks)
        made = []
        for part in parts:
            made.append(collate(part, cfg, source.model, source.pad, source.photos, random))
        yield made


def step_batches(samples, cfg, step, rank, n):
    """Batches of a step on this rank: A parts of B samples. Every epoch has its own order, the same
    on all ranks."""
    size = cfg.train.batch_size
    parts = cfg.train.gradient_accumulation_steps
    about = (size, cfg.train.seed, rank, n)
    if cfg.data.group_by_modality_length:
        # below zero: without a picture
        lengths = [len(s["ids"]) if s["images"] else -len(s["ids"]) for s in samples]
        numbers = resumable_sampler.ByModality(lengths, *about)
    else:
        numbers = resumable_sampler.Shuffled(len(samples), *about, parts)
    batches = range(step * parts, (step + 1) * parts)
    return [[samples[i] for i in numbers(k)] for k in batches]


def collate(part, cfg, model, pad, photos, random):
    """Samples -> a batch as `Learner` takes it, and the features of their photos, in order."""
    if cfg.data.packing:
        # several samples a row, under a block-diagonal mask
        rows = packing.pack(part, max(MIN_ROW, max(len(s["ids"]) for s in part)))
        batch = packing.packed(rows, pad)
        batch["mask"] = packing.attention_mask(model.language, batch)
        part = [sample for row in rows for sample in row]
    else:
        batch = packing.pad(part, pad)
        packing.check_positions(model.language, batch)
    numbers = [i for sample in part for i in sample["images"]]
    if photos.sizes is not None and numbers:
        batch["sizes"] = torch.tensor([photos.sizes[i] for i in numbers])
    return batch, photos(numbers, random) if numbers else None


def count_supervised(batch):
    """Supervised tokens of a batch: a first token has nothing before it and is none."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def report_lengths(counts, cfg):
    """One line, if there were conversations longer than the model can read."""
    shortened = counts["conversations shortened"]
    left_out = counts["conversations left out"]
    if not shortened and not left_out:
        return
    most = "the model's positions"
    if cfg.data.model_max_length:
        most = f"--model_max_length {cfg.data.model_max_length}"
    print(
        f"longer than {most}: {shortened} conversations lost turns at their end, {left_out} are left out"
    )
