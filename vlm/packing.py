"""Packing: several samples of pictures and words in one row, none attends to another; or padded batches.

A tweet has 17 tokens, a photo with its question 70, a page of a manual 400. Put side by side in a rectangle, most of
it is padding, which costs as much as words. Sort by length first, and less is wasted; lay several samples end to end in
one row, each blind to its neighbours, and next to nothing is. Krell et al. 2021, arXiv:2107.02027 (packing); Liu et al.
2023, arXiv:2310.03744, App. A (one modality a batch). Here, too: sources mixed by weight, and pictures that cannot be
read.

A sample is {"ids": [...], "labels": [...], "images": [...]}: a picture stands in ids as so many equal ids as it has
features, labels are IGNORE where nothing is learned, images are paths or numbers, or none.
Shapes: B rows of T tokens.
Difference from the paper: best fit decreasing over samples, not over a histogram of their lengths.

    python vlm/packing.py                       # useful tokens a second, three ways: 2 CPU minutes
    python vlm/packing.py --attention sdpa --length 1024
"""

import struct
import time
import zlib
from bisect import bisect, insort
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from finetune import llama2_lora
from utils import data, figures, pretrained, run
from utils.run import UserError, check
from utils.text import plain, printable
from vlm.prompts import IGNORE
from vlm.samplers import Mixture, by_length

# What reading a bad file raises; a bug stays loud
BROKEN = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    UserError,
)


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
    """-> {"ids", "mask", "labels", "positions"}, each (B,T): as long as the longest, filled up on the right."""
    check(samples, "a batch needs at least one sample")
    check(
        all(len(s["ids"]) == len(s["labels"]) > 0 for s in samples),
        "every id of a sample needs a label",
    )
    lengths = torch.tensor([len(s["ids"]) for s in samples])
    shape = len(samples), int(lengths.max())
    ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    for i, s in enumerate(samples):
        ids[i, : lengths[i]], labels[i, : lengths[i]] = (
            torch.tensor(s["ids"]),
            torch.tensor(s["labels"]),
        )
    places = torch.arange(shape[1])
    mask = (places < lengths[:, None]).long()  # 1: a token, 0: padding
    return {"ids": ids, "mask": mask, "labels": labels, "positions": places.repeat(shape[0], 1)}


def pack(samples, length):
    """-> rows: lists of samples that fit into `length` tokens together. Raises UserError for a sample that does not.

    Best fit decreasing (Sec. 3.1): the longest first, each into the row where it leaves least room. Rows come out
    full and long-winded first, crumbs last: shuffle them before training.
    """
    longest = max((len(s["ids"]) for s in samples), default=0)
    check(
        longest <= length,
        f"a sample of {longest} tokens does not fit into rows of {length}: cut it, or take longer",
    )
    rows, rooms = [], []  # rooms: (tokens left, number of the row), sorted
    for s in sorted(samples, key=lambda s: -len(s["ids"])):
        n = len(s["ids"])
        at = bisect(rooms, (n, -1))  # the smallest room that takes it
        room, row = rooms.pop(at) if at < len(rooms) else (length, len(rows))
        rows.extend([[]] if row == len(rows) else [])
        rows[row].append(s)
        insort(rooms, (room - n, row))
    return rows


def packed(rows, pad_id):
    """Rows of samples -> {"ids", "labels", "positions", "segments"}, each (B,T).

    positions start at 0 in every sample; segments number the samples of a row from 1, padding is 0. The first token of
    a sample has no label: it would be predicted by the last one of its neighbour. Pictures are those of the rows, in
    this order.
    """
    joined = [{key: sum((s[key] for s in row), []) for key in ("ids", "labels")} for row in rows]
    batch = pad(joined, pad_id)
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
    """Who sees whom: (B,T) -> bool (B,1,T,T), causal inside a segment, nothing across; padding sees padding only.

    With a dtype: what is added to the scores instead, 0 or the lowest number. transformers hands a mask of four
    dimensions on as it is: "sdpa" takes both kinds, "eager" adds it, and True counts as 1: no error, and no mask.
    """
    same = segments[:, :, None] == segments[:, None, :]
    mask = same.tril()[:, None]
    if dtype is None:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(dtype).min
    )


def positions_of(model):
    """How many positions the model was made for: the longest sample that it can read; None if it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_positions(model, batch):
    """Raises UserError for a position beyond the model's last: a table ends in a crash, rotary ones in noise."""
    room, last = positions_of(model), int(batch["positions"].max())
    check(
        room is None or last < room,
        f"a sample of {last + 1} tokens, but the model has {room} positions: cut it",
    )


def attention_mask(model, batch):
    """What a model of transformers needs as attention_mask for a batch of `pad` or `packed`, whatever its attention.

    Raises UserError for samples longer than the model's positions.
    """
    check_positions(model, batch)
    if "mask" in batch:
        return batch["mask"]
    check(
        model.config._attn_implementation in ("eager", "sdpa"),
        "packed rows need eager or sdpa attention",
    )
    return block_mask(
        batch["segments"], model.dtype if model.config._attn_implementation == "eager" else None
    )


class Collator:
    """Samples -> a batch; pictures are read here, so that workers of a DataLoader do it and none waits in memory.

    load(path) -> tensor; samples: where to look for a stand-in; length: pack into rows of so many tokens, 0: pad.
    If a picture cannot be read, the whole sample is replaced by another one with a picture: the question was about
    the picture. Who stands in depends on the broken sample alone, so a run can be repeated; the batch keeps its size
    and modality, so ranks stay in step. `broken` counts pictures that failed, over all workers.
    """

    def __init__(self, load, samples, pad_id, length=0, tries=10):
        self.load, self.pad_id, self.length, self.tries = load, pad_id, length, tries
        self.pool = [s for s in samples if s["images"] and (not length or len(s["ids"]) <= length)]
        # One a worker: nobody writes into another's
        self.counts = torch.zeros(256, dtype=torch.long).share_memory_()

    @property
    def broken(self):
        return int(self.counts.sum())

    def candidates(self, sample):
        """The sample itself, then others with pictures, in an order that depends on nothing else."""
        yield sample
        random = np.random.default_rng(zlib.crc32(repr(sample["images"]).encode()))
        others = (self.pool[i] for i in random.permutation(len(self.pool)))
        yield from (s for s in others if s["images"] != sample["images"])

    def read(self, sample):
        """-> the sample, or who stands in for it, and the pictures. Raises UserError after so many tries."""
        worker, why = torch.utils.data.get_worker_info(), ""
        for one, _ in zip(self.candidates(sample), range(self.tries)):
            try:
                return one, [self.load(path) for path in one["images"]]
            except BROKEN as error:
                self.counts[worker.id % 255 + 1 if worker else 0] += 1
                why = printable(f"{one['images']}: {error}")
        raise UserError(
            f"no picture that can be read in {self.tries} tries or less; the last one was {why}"
        )

    def __call__(self, samples):
        """-> what `pad` or `packed` give, and "images" (N,...) in the order of the rows, or None."""
        found = [self.read(s) for s in samples]
        if self.length:
            pictures = {id(s): images for s, images in found}
            rows = pack([s for s, _ in found], self.length)
            batch = packed(rows, self.pad_id)
            found = [(s, pictures[id(s)]) for row in rows for s in row]
        else:
            batch = pad([s for s, _ in found], self.pad_id)
        images = [image for _, several in found for image in several]
        return batch | {"images": torch.stack(images) if images else None}


def conversation(tokenizer, question, answer, image, tokens=49):
    """A photo, a question and an answer, of which the answer and the word that ends it are learned."""
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    # Commands written in them are no commands
    question, answer = plain(question, tokenizer), plain(answer, tokenizer)
    place = tokenizer.convert_tokens_to_ids("<file_sep>")  # so this word stands for pictures only
    asked = (
        encode("<|im_start|>user\n")
        + [place] * tokens
        + encode(f"\n{question}<|im_end|>\n<|im_start|>assistant\n")
    )
    said = encode(f"{answer}<|im_end|>")
    return {"ids": asked + said, "labels": [IGNORE] * len(asked) + said, "images": [image]}


def collect(tokenizer, count, length, seed=0):
    """A mixture as for a LLaVA: half pictures, a quarter tweets, a quarter of one to eight paragraphs of manuals."""
    manuals = []
    for k, (_, page) in enumerate(data.docs()):
        paragraphs = page.split("\n\n")
        manuals += [
            "\n\n".join(paragraphs[i : i + 1 + k % 8]) for i in range(0, len(paragraphs), 1 + k % 8)
        ]
    sources = {
        "pictures": [*enumerate(data.emoji()[1])],
        "tweets": [text for text, _ in data.tweets()],
        "manuals": [text for text in manuals if len(text) > 80],
    }
    samples = []
    for _, item in zip(
        range(count), Mixture(sources, {"pictures": 2, "tweets": 1, "manuals": 1}, seed)
    ):
        if isinstance(item, tuple):
            samples.append(conversation(tokenizer, "What does the picture show?", item[1], item[0]))
        else:
            ids = tokenizer(plain(item, tokenizer), truncation=True, max_length=length)["input_ids"]
            samples.append({"ids": ids, "labels": list(ids), "images": []})
    return samples


def loss(model, batch):
    """Sum of -log p over all tokens that are learned; the head is asked there only."""
    mask = attention_mask(model, batch)
    states = model.model(
        batch["ids"], attention_mask=mask, position_ids=batch["positions"], use_cache=False
    )[0]
    labels = batch["labels"][:, 1:]
    logits = model.lm_head(states[:, :-1][labels != IGNORE])
    return F.cross_entropy(logits.float(), labels[labels != IGNORE], reduction="sum")


def three_ways(samples, cfg):
    """-> {way: [batch of rows of samples, ...]}; all of them see every sample once, about cfg.batch a step."""
    random, n = np.random.default_rng(cfg.seed), cfg.batch
    order = random.permutation(len(samples)).tolist()
    grouped = by_length([len(s["ids"]) for s in samples], n, cfg.seed)
    rows = pack(samples, cfg.length)
    a_step = max(1, round(len(rows) * n / len(samples)))
    rows = [rows[i] for i in random.permutation(len(rows))]
    return {
        "naive": [[[samples[i]] for i in order[k : k + n]] for k in range(0, len(order), n)],
        "grouped": [[[samples[i]] for i in numbers] for numbers in grouped],
        "packed": [rows[k : k + a_step] for k in range(0, len(rows), a_step)],
    }


def measure(model, ways, pad_id):
    """Forward and backward over every batch of every way in turn -> {way: tokens, padding, CPU seconds, loss}."""
    found = {
        name: {"tokens": 0, "places": 0, "steps": 0, "cpu_seconds": 0.0, "loss": 0.0}
        for name in ways
    }
    turns = [
        (name, k)
        for k in range(max(map(len, ways.values())))
        for name in ways
        if k < len(ways[name])
    ]
    # a first step is slower, and counts for nobody
    loss(model, packed(ways["packed"][0][:1], pad_id)).backward()
    for name, k in run.bar(turns, len(turns), name="batches"):
        rows = ways[name][k]
        batch = (
            packed(rows, pad_id)
            if name == "packed"
            else pad([s for row in rows for s in row], pad_id)
        )
        start = time.process_time()
        value = loss(model, batch)
        value.backward()
        found[name]["cpu_seconds"] += time.process_time() - start
        found[name]["tokens"] += sum(len(s["ids"]) for row in rows for s in row)
        found[name]["places"] += batch["ids"].numel()
        found[name]["loss"] += value.item()
        found[name]["steps"] += 1
    return found


def draw(path, ways, titles, length):
    """The batches as pictures on one scale: rows are sequences, colours samples, grey is padding; the area is work."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(ways), figsize=(3.7 * len(ways), 4.6), sharex=True, sharey=True
    )
    shades = {
        True: plt.get_cmap("Oranges")(np.linspace(0.45, 0.75, 4)),
        False: plt.get_cmap("Blues")([0.4, 0.6, 0.8]),
    }
    for axis, (name, batches) in zip(axes, ways.items()):
        y, k = 0.0, 0
        for rows in batches:
            widest = max(sum(len(s["ids"]) for s in row) for row in rows)
            for row in rows:
                axis.barh(y, widest, 0.84, color="0.88", align="edge")
                x = 0
                for s in row:
                    colours = shades[bool(s["images"])]
                    axis.barh(
                        y,
                        len(s["ids"]),
                        0.84,
                        left=x,
                        color=colours[k % len(colours)],
                        align="edge",
                    )
                    x, k = x + len(s["ids"]), k + 1
                y += 1
            y += 0.9  # a gap between batches
        axis.set_title(titles[name], fontsize=9, loc="left")
        axis.set(xlim=(0, length), xlabel="tokens", yticks=[])
        axis.spines[["left", "right", "top"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[0].set_ylabel("rows, batch by batch")
    named = {"with a picture": shades[True][2], "words alone": shades[False][1], "padding": "0.88"}
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in named.values()]
    axes[-1].legend(handles, named, fontsize=9, frameon=False, loc="lower right")
    figure.tight_layout()
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """The same samples in three ways: useful tokens a second, the share of padding, and a picture of the batches."""
    check(
        cfg.samples > 1 and cfg.batch > 0 and cfg.rank > 0,
        "--samples must be at least 2, --batch and --rank 1",
    )
    check(
        cfg.length >= 96,
        "--length must be at least 96: a picture has 49 tokens, and a question stands beside it",
    )
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
    samples = collect(tokenizer, cfg.samples, cfg.length, cfg.seed)
    ways = three_ways(samples, cfg)
    found = measure(model.train(), ways, tokenizer.pad_token_id)
    metrics, titles = {}, {}
    for name, x in found.items():
        rate, waste = x["tokens"] / x["cpu_seconds"], 1 - x["tokens"] / x["places"]
        metrics[name] = {"useful tokens a CPU second": rate, "padding": waste, **x}
        titles[name] = f"{name}: {waste:.0%} padding\n{rate:.0f} useful tokens a CPU second"
    speed = {name: metrics[name]["useful tokens a CPU second"] for name in found}
    metrics |= {
        f"{name} against naive": speed[name] / speed["naive"] for name in ("grouped", "packed")
    }
    draw(folder / "batching.png", ways, titles, cfg.length)
    return run.report(folder, metrics, then="python vlm/train.py --packing")


if __name__ == "__main__":
    run.cli(main, Config)
