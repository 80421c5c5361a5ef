"""Pretraining of a tiny Llama: bits per byte beside n-gram baselines, FLOPs, model FLOPs utilisation.

A language model gives each next token a probability; -log2 of it is what an ideal coder would spend
on it, in bits. Bits per byte do not depend on how a text is cut into tokens, so that a Llama can be
compared with n-grams of bytes (ngram.py). The model is that of Touvron et al. 2023,
arXiv:2302.13971, made small (pretrain_model.py); the text are pages of three manuals
(pretrain_text.py). The run is made as large ones are.

Shapes: B pieces of text a step, of all ranks together; T tokens a piece, V tokens in the
vocabulary, D width, L layers. Differences from the paper: some million tokens instead of 10^12; the
embedding is the last layer too; weight decay on matrices only; the learning rate ends at zero and
not at a tenth.

    python training/pretrain_tiny_llama.py
    python training/pretrain_tiny_llama.py --resume --steps 20000             # goes on from the last checkpoint
    python training/pretrain_tiny_llama.py --vocabulary 257                   # a token is a byte
    torchrun --nproc_per_node 2 training/pretrain_tiny_llama.py               # any number of ranks, also with --resume
"""

import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from training import ranks
from training.flops import counted_flops, flops_per_token, peak_flops
from training.lr_schedule import learning_rate
from training.ngram import KneserNey
from training.pretrain_model import adamw, llama, losses, sample
from training.pretrain_plot import draw_curve
from training.pretrain_text import as_transformers, draw, split, tokens
from utils import checkpoint, data, pretrained, run


@dataclass(frozen=True)
class Config:
    """Train a small Llama from nothing on three manuals; bits per byte of pages held out, against n-grams."""

    steps: int = 4500  # training steps
    batch: int = 8  # pieces of text per step, of all ranks together
    length: int = 64  # tokens of a piece
    # tokens, found by byte-pair encoding; 257: every byte is one, and the end
    vocabulary: int = 4096
    width: int = 128  # of the model, a multiple of 64
    layers: int = 2  # of the model
    # peak learning rate: up in a line over a twentieth of the steps, then a cosine to zero
    lr: float = 8e-3
    decay: float = 0.1  # weight decay, of matrices only
    order: int = 6  # bytes that the longest n-gram looks back, at most 7
    # what the samples begin with; no space at its end, which would be a rare token
    prompt: str = "How do I"
    bf16: bool = True  # matrix products in bf16, weights in fp32; else all in fp32
    # go on from the last checkpoint in --out, bit for bit; the number of ranks may change
    resume: bool = False
    save_every: int = 500  # steps between checkpoints; 0: one at the end
    seed: int = 0  # same seed, same numbers
    out: str = "outputs/pretrain_tiny_llama"  # where the results go


def average(tensors):
    """The mean of each tensor over all ranks, in place.

    They travel as one vector: many small messages are slow.
    """
    _, n = ranks.rank_and_world_size()
    if n > 1:
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        sizes = [x.numel() for x in tensors]
        for x, mean in zip(tensors, flat.div_(n).split(sizes)):
            x.copy_(mean.view_as(x))


def train(model, optimizer, ids, cfg, on, start=0):
    """Steps `start` to cfg.steps; yields the loss of each, over the pieces of all ranks."""
    rank, n = ranks.rank_and_world_size()
    weights = list(model.parameters())
    for i in range(start, cfg.steps):
        # Learning rate of this step
        rate = learning_rate(i, cfg.steps, cfg.lr, warmup=cfg.steps // 20, decay="cosine")
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Equal shares, so that the mean of means is the mean
        pieces = draw(ids, cfg, i).chunk(n)[rank].to(on)
        # Forward and backward pass
        with run.autocast(on) if cfg.bf16 else nullcontext():
            value = losses(model, pieces).mean()
        value.backward()
        # Mean over ranks, then clip: every rank makes the same step
        average([value.detach(), *(p.grad for p in weights)])
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield value.item()


@torch.no_grad()
def bits_per_byte(model, ids, size, cfg, on):
    """Bits per byte of the pages held out: ids (m,), which stand for `size` bytes.

    Pieces overlap by half, and of each but the first only the later half counts: what is scored has
    been led up to.
    """
    rank, n = ranks.rank_and_world_size()
    half = cfg.length // 2
    # Overlapping pieces, the last ones padded; none of padding alone
    count = -(-(len(ids) - 1) // half)
    padded = torch.cat([ids.long(), ids.new_zeros(2 * cfg.length).long()])
    pieces = padded.unfold(0, cfg.length + 1, half)[:count]
    total = torch.zeros((), dtype=torch.float64, device=on)
    # Each rank takes every n-th group of 64 pieces
    for first in range(64 * rank, len(pieces), 64 * n):
        part = pieces[first : first + 64]
        # The end token stands for no byte; n-grams do not have to foresee it either
        counts = part[:, 1:] != 0
        # The earlier half was scored in the piece before, if there is one
        begin = 1 if first == 0 else 0
        counts[begin:, : cfg.length - half] = False
        with run.autocast(on) if cfg.bf16 else nullcontext():
            total += losses(model, part.to(on)).double()[counts.to(on)].sum()
    # The sum over ranks, from nats to bits
    average([total])
    return n * total.item() / math.log(2) / size


def worker(cfg):
    """What every rank does -> what it found. All read the state, the first rank writes it."""
    rank, n = ranks.rank_and_world_size()
    folder = Path(cfg.out)
    on = ranks.device() if dist.is_initialized() else run.device()
    # Text and model
    ids, (tokenizer, size) = tokens(cfg)
    model = llama(cfg).to(on)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    found["before"] = sample(model, tokenizer, cfg, on)
    # FLOPs: by formula, as counted, and what all ranks together could do at best
    found["flops_per_token"] = flops_per_token(model, cfg.length)
    piece = draw(ids["learn"], cfg, 0)[:1].to(on)
    found["counted"] = counted_flops(model, piece) / cfg.length
    peak = torch.tensor(peak_flops(on, torch.bfloat16 if cfg.bf16 else torch.float32), device=on)
    average([peak])
    found["peak"] = n * peak.item()
    if on.type == "cuda":
        # On a CPU, with pieces as short as ours, it is no faster
        model.set_attn_implementation("sdpa")
    # A new run, or the last checkpoint
    parts = {"model": model, "optimizer": adamw(model, cfg)}
    done = {}
    if cfg.resume:
        done = checkpoint.load_state(folder / "state.safetensors", cfg, **parts)
    kept = {k: done.get(k, []) for k in ("losses", "seconds", "scores")}

    def save():
        if rank == 0:
            checkpoint.save_state(folder / "state.safetensors", **parts, **kept, config=asdict(cfg))

    # Train; score after a 32nd of the run, a 16th, ... and all of it
    scored = {cfg.steps >> k for k in range(6)}
    start = len(kept["losses"])
    steps = train(model, parts["optimizer"], ids["learn"], cfg, on, start)
    shown = run.progress(steps, cfg.steps, start, cfg.save_every, save)
    then = time.perf_counter()
    for i, value in enumerate(shown, start + 1):
        kept["seconds"].append(time.perf_counter() - then)
        kept["losses"].append(value)
        if i in scored:
            kept["scores"].append([i, bits_per_byte(model, ids["held"], size, cfg, on)])
        then = time.perf_counter()
    # Checkpoint, model folder, numbers
    save()
    if rank == 0:
        pretrained.save(model, as_transformers(tokenizer), folder / "model")
    found["after"] = sample(model, tokenizer, cfg, on)
    found["bytes_per_token"] = size / int((ids["held"] != 0).sum())
    found["speed"] = cfg.batch * cfg.length / float(np.median(kept["seconds"]))
    return found | kept


def check_flags(cfg, n):
    """Raises UserError for flags that make no sense, or not on n ranks."""
    positive = min(cfg.steps, cfg.batch, cfg.layers) > 0
    run.check(positive, "--steps, --batch and --layers must be at least 1")
    run.check(cfg.lr > 0 and cfg.decay >= 0, "--lr must be above 0, --decay at least 0")
    run.check(cfg.length > 1, "--length must be at least 2")
    heads = cfg.width > 0 and cfg.width % 64 == 0
    run.check(heads, "--width must be a multiple of 64, the size of a head")
    least = "--vocabulary must be at least 257: all bytes, and the end of a page"
    run.check(cfg.vocabulary > 256, least)
    run.check(0 <= cfg.order <= 7, "--order must be from 0 to 7: a gram is one number of 64 bits")
    shares = f"--batch {cfg.batch} cannot be dealt out in equal shares to {n} ranks"
    run.check(cfg.batch % n == 0, shares)


def main(cfg: Config) -> dict:
    """Train on one process or on those of torchrun; then count n-grams, draw and write."""
    n = int(os.environ.get("WORLD_SIZE", 1))
    check_flags(cfg, n)
    # The first rank makes the folder and the tokens, which all read.
    if os.environ.get("RANK", "0") == "0":
        run.output(cfg.out, cfg)
        tokens(cfg)
    found = ranks.launch(worker, cfg, n) if "RANK" in os.environ else [worker(cfg)]
    if found is None:
        return {}
    one = found[0]
    folder = Path(cfg.out)
    # The baselines
    clock = run.Clock()
    learn, held = split(data.docs())
    baseline = KneserNey(learn, cfg.order)
    ngrams = {f"n-gram, {k} bytes back": baseline.bits(held, k) for k in range(cfg.order + 1)}
    draw_curve(folder / "bits.png", one, ngrams, cfg)
    # Samples before and after
    story = f"-- before\n{one['before']}\n-- after {cfg.steps} steps\n{one['after']}\n"
    (folder / "samples.txt").write_text(story, "utf-8")
    print(story)
    # Report
    _, bits = one["scores"][-1]
    rate = one["flops_per_token"] * one["speed"]
    metrics = {
        "parameters": one["parameters"],
        "tokens": len(one["losses"]) * cfg.batch * cfg.length,
        "bytes_per_token": one["bytes_per_token"],
        "final_loss": float(np.mean(one["losses"][-100:])),
        "bits_per_byte": bits,
        "uniform": 8.0,
        **ngrams,
        "ngrams_beaten": sum(bits < x for x in ngrams.values()),
        "train_seconds": sum(one["seconds"]),
        "ngram_seconds": clock(),
        "ranks": n,
        "tokens_per_second": one["speed"],
        "flops_per_token": one["flops_per_token"],
        "counted_by_torch": one["counted"],
        "difference": one["flops_per_token"] / one["counted"] - 1,
        "GFLOPs_per_second": rate / 1e9,
        "matmul_GFLOPs_per_second": one["peak"] / 1e9,
        "utilisation": rate / one["peak"],
    }
    then = f"open {folder}/bits.png; then --resume with more --steps"
    return run.report(folder, metrics, then)


if __name__ == "__main__":
    run.cli(main, Config)
