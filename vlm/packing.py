"""Packing: several samples of images and text in one row, none attends to another; or padded batches.

A tweet has 17 tokens, a photo with its question 70, a page of a manual 400. Put side by side in a
rectangle, most of it is padding, which costs as much as words. Sort by length first, and less is
wasted; lay several samples end to end in one row, each blind to its neighbours, and next to nothing
is. Krell et al. 2021, arXiv:2107.02027 (packing); Liu et al. 2023, arXiv:2310.03744, App. A (one
modality a batch: samplers.py). The collator that reads images is in collator.py.

A sample is {"ids": [...], "labels": [...], "images": [...]}: a picture stands in ids as so many
equal ids as it has features, labels are IGNORE where nothing is supervised, images are paths or
numbers, or none.
Shapes: B rows of T tokens.
Difference from the paper: best fit decreasing over samples, not over a histogram of their lengths.

    python vlm/packing.py                       # useful tokens a second, three ways: 2 CPU minutes
    python vlm/packing.py --attention sdpa --length 1024
"""

import time
from bisect import bisect, insort
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from finetune import llama2_lora
from utils import pretrained, run
from utils.run import check
from vlm import packing_figures, packing_samples
from vlm.prompts import IGNORE
from vlm.samplers import by_length


@dataclass(frozen=True)
class Config:
    """Train on the same samples in three ways and count useful tokens a second."""

    samples: int = 48  # photos with questions, tweets, pages of manuals
    batch: int = 8  # samples a step
    length: int = 512  # tokens of a packed row, and of the longest sample
    rank: int = 8  # of the LoRA that is trained
    attention: Literal["eager", "sdpa"] = "eager"  # on a CPU eager wins up to about 512 tokens
    seed: int = 0  # same seed, same samples
    out: str = "outputs/packing"  # where the results go


def pad(samples, pad_id):
    """Right-padded batch, as long as the longest sample -> {"ids", "mask", "labels", "positions"},
    each (B,T)."""
    check(samples, "a batch needs at least one sample")
    check(
        all(len(s["ids"]) == len(s["labels"]) > 0 for s in samples),
        "every id of a sample needs a label",
    )
    lengths = torch.tensor([len(s["ids"]) for s in samples])
    shape = (len(samples), int(lengths.max()))
    # padding everywhere, then each sample over it
    ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORE)
    for i, s in enumerate(samples):
        ids[i, : lengths[i]] = torch.tensor(s["ids"])
        labels[i, : lengths[i]] = torch.tensor(s["labels"])
    positions = torch.arange(shape[1])
    mask = (positions < lengths[:, None]).long()  # 1: a token, 0: padding
    return {"ids": ids, "mask": mask, "labels": labels, "positions": positions.repeat(shape[0], 1)}


def pack(samples, length):
    """-> rows: lists of samples that fit into `length` tokens together. Raises UserError for a
    sample that does not.

    Best fit decreasing (Sec. 3.1): the longest first, each into the row where it leaves least room.
    Rows come out full and long-winded first, crumbs last: shuffle them before training.
    """
    # a sample is never cut
    longest = max((len(s["ids"]) for s in samples), default=0)
    check(
        longest <= length,
        f"a sample of {longest} tokens does not fit into rows of {length}: cut it, or take longer",
    )
    # the longest sample first; rooms: (tokens left, number of the row), sorted
    rows = []
    rooms = []
    for s in sorted(samples, key=lambda s: -len(s["ids"])):
        n = len(s["ids"])
        at = bisect(rooms, (n, -1))  # the smallest room that takes it
        room, row = rooms.pop(at) if at < len(rooms) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(s)
        insort(rooms, (room - n, row))
    return rows


def packed(rows, pad_id):
    """Packed batch: rows of samples -> {"ids", "labels", "positions", "segments"}, each (B,T).

    positions start at 0 in every sample; segments number the samples of a row from 1, padding is 0.
    The first token of a sample has no label: it would be predicted by the last one of its
    neighbour. Pictures are those of the rows, in this order.
    """
    # samples of a row end to end
    joined = []
    for row in rows:
        ids = sum((s["ids"] for s in row), [])
        labels = sum((s["labels"] for s in row), [])
        joined.append({"ids": ids, "labels": labels})
    batch = pad(joined, pad_id)
    # segments, and positions that start anew in each
    batch["segments"] = batch.pop("mask")
    for i, row in enumerate(rows):
        start = 0
        for number, s in enumerate(row, 1):
            span = slice(start, start + len(s["ids"]))
            batch["segments"][i, span] = number
            batch["positions"][i, span] = torch.arange(len(s["ids"]))
            batch["labels"][i, start] = IGNORE  # no prediction across the border
            start = span.stop
        batch["positions"][i, start:] = 0
    return batch


def block_mask(segments, dtype=None):
    """Packing mask: segments (B,T) -> bool (B,1,T,T), causal inside a segment, nothing across;
    padding sees itself.

    With a dtype: what is added to the scores instead, 0 or the lowest number. transformers hands a
    mask of four dimensions on as it is: "sdpa" takes both kinds, "eager" adds it, and True counts
    as 1: no error, and no mask.
    """
    same = segments[:, :, None] == segments[:, None, :]
    mask = same.tril()[:, None]
    if dtype is None:
        return mask
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask, torch.finfo(dtype).min)


def positions_of(model):
    """How many positions the model was made for: the longest sample that it can read; None if it
    does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_positions(model, batch):
    """Raises UserError for a position beyond the model's last: a table ends in a crash, rotary ones
    in noise."""
    room = positions_of(model)
    last = int(batch["positions"].max())
    check(
        room is None or last < room,
        f"a sample of {last + 1} tokens, but the model has {room} positions: cut it",
    )


def attention_mask(model, batch):
    """What a model of transformers needs as attention_mask for a batch of `pad` or `packed`,
    whatever its attention.

    Raises UserError for samples longer than the model's positions.
    """
    check_positions(model, batch)
    if "mask" in batch:
        return batch["mask"]
    kind = model.config._attn_implementation
    check(kind in ("eager", "sdpa"), "packed rows need eager or sdpa attention")
    return block_mask(batch["segments"], model.dtype if kind == "eager" else None)


def loss(model, batch):
    """Sum of -log p over all supervised tokens; logits there only."""
    mask = attention_mask(model, batch)
    states = model.model(
        batch["ids"], attention_mask=mask, position_ids=batch["positions"], use_cache=False
    )[0]
    labels = batch["labels"][:, 1:]
    supervised = labels != IGNORE
    logits = model.lm_head(states[:, :-1][supervised])
    return F.cross_entropy(logits.float(), labels[supervised], reduction="sum")


def three_ways(samples, cfg):
    """-> {way: [batch of rows of samples, ...]}; all of them see every sample once, about cfg.batch
    a step."""
    n = cfg.batch
    random = np.random.default_rng(cfg.seed)
    # naive: at random
    order = random.permutation(len(samples)).tolist()
    naive = [[[samples[i]] for i in order[k : k + n]] for k in range(0, len(order), n)]
    # grouped by length
    numbers = by_length([len(s["ids"]) for s in samples], n, cfg.seed)
    grouped = [[[samples[i]] for i in batch] for batch in numbers]
    # packed: as many rows a step as hold n samples on average
    rows = pack(samples, cfg.length)
    a_step = max(1, round(len(rows) * n / len(samples)))
    rows = [rows[i] for i in random.permutation(len(rows))]
    in_rows = [rows[k : k + a_step] for k in range(0, len(rows), a_step)]
    return {"naive": naive, "grouped": grouped, "packed": in_rows}


def measure(model, ways, pad_id):
    """Forward and backward over every batch of every way in turn -> {way: tokens, padding, CPU
    seconds, loss}."""
    found = {}
    for name in ways:
        found[name] = {"tokens": 0, "places": 0, "steps": 0, "cpu_seconds": 0.0, "loss": 0.0}
    # the ways in turn, batch by batch
    turns = []
    for k in range(max(map(len, ways.values()))):
        turns += [(name, k) for name in ways if k < len(ways[name])]
    # a first step is slower, and counts for nobody
    loss(model, packed(ways["packed"][0][:1], pad_id)).backward()
    for name, k in run.bar(turns, len(turns), name="batches"):
        rows = ways[name][k]
        samples = [s for row in rows for s in row]
        batch = packed(rows, pad_id) if name == "packed" else pad(samples, pad_id)
        # one step, timed
        start = time.process_time()
        value = loss(model, batch)
        value.backward()
        found[name]["cpu_seconds"] += time.process_time() - start
        found[name]["tokens"] += sum(len(s["ids"]) for s in samples)
        found[name]["places"] += batch["ids"].numel()
        found[name]["loss"] += value.item()
        found[name]["steps"] += 1
    return found


def main(cfg: Config) -> dict:
    """The same samples in three ways: useful tokens a second, the share of padding, and a picture
    of the batches."""
    check(
        cfg.samples > 1 and cfg.batch > 0 and cfg.rank > 0,
        "--samples must be at least 2, --batch and --rank 1",
    )
    check(
        cfg.length >= 96,
        "--length must be at least 96: a picture has 49 tokens, and a question stands beside it",
    )
    # model with LoRA
    run.seed(cfg.seed)
    tokenizer, model = pretrained.smollm2()
    room = positions_of(model)
    check(
        room is None or cfg.length <= room,
        f"--length {cfg.length}: the model has {room} positions, take no more",
    )
    folder = run.output(cfg.out, cfg)
    llama2_lora.inject(model, ("q_proj", "v_proj"), cfg.rank, 2 * cfg.rank)
    model.set_attn_implementation(cfg.attention)
    # samples, batched in three ways, and the time of each
    samples = packing_samples.collect(tokenizer, cfg.samples, cfg.length, cfg.seed)
    ways = three_ways(samples, cfg)
    found = measure(model.train(), ways, tokenizer.pad_token_id)
    metrics = {}
    titles = {}
    speed = {}
    for name, x in found.items():
        speed[name] = x["tokens"] / x["cpu_seconds"]
        waste = 1 - x["tokens"] / x["places"]
        metrics[name] = {"useful tokens a CPU second": speed[name], "padding": waste, **x}
        titles[name] = f"{name}: {waste:.0%} padding\n{speed[name]:.0f} useful tokens a CPU second"
    for name in ("grouped", "packed"):
        metrics[f"{name} against naive"] = speed[name] / speed["naive"]
    packing_figures.draw(folder / "batching.png", ways, titles, cfg.length)
    return run.report(folder, metrics, then="python vlm/train.py --packing")


if __name__ == "__main__":
    run.cli(main, Config)
