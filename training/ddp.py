"""Data parallel training: every rank has the model and sees other texts, and an all-reduce makes their gradients one.

The sum over all ranks goes round a ring (Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters
of workstations"), and gradients are sent in buckets as soon as they are there, while the backward pass goes on (Li et
al. 2020, "PyTorch Distributed", arXiv:2006.15704). Both are written out here; then PyTorch's own does the same work.

N: ranks. Differences from PyTorch: buckets are filled in the order of the weights, backwards, and never filled anew; a
weight without a gradient counts as zero (`find_unused_parameters` there), always.

    python training/ddp.py
    python training/ddp.py --backend pytorch
    torchrun --nproc_per_node 2 training/ddp.py --steps 50
"""

import math
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from training import manifest, ranks, tiny
from utils import checkpoint, figures, run


@dataclass(frozen=True)
class Config:
    """Train a small language model on several ranks, each with its share of every batch."""

    backend: Literal["ours", "pytorch"] = "ours"  # who brings the gradients together
    ranks: int = 2  # processes; under torchrun or deepspeed theirs count
    bucket: float = 4.0  # MiB of gradients that travel together
    width: int = 256  # of the model
    layers: int = 4  # of the model
    steps: int = 20  # training steps
    batch: int = 8  # pieces of text per step, of all ranks together
    accumulate: int = 1  # in how many parts a rank takes its share of the batch
    length: int = 128  # bytes of a piece
    lr: float = 1e-3  # learning rate
    resume: bool = False  # go on from the last checkpoint in --out, bit for bit
    save_every: int = 0  # steps between checkpoints; 0: none are written
    seed: int = 0  # same seed, same numbers
    out: str = "outputs/ddp"  # where the results go


def ring(n):
    """The plan of a ring all-reduce of n pieces: step -> (piece that rank 0 sends, "add" or "copy").

    Rank r sends piece (that + r) mod n to rank r + 1. After n - 1 additions rank r has the whole sum of piece r + 1;
    n - 1 copies later everyone has every sum. Each rank has sent 2 (n - 1) / n of the vector: below 2, always.
    """
    return [(-step % n, "add") for step in range(n - 1)] + [
        ((1 - step) % n, "copy") for step in range(n - 1)
    ]


def ring_all_reduce(x):
    """The sum of x over all ranks, in place. x: (size,), any size."""
    n, me = dist.get_world_size(), dist.get_rank()
    pieces = x.tensor_split(n) if n > 1 else ()
    for first, action in ring(n):
        out, into = pieces[(first + me) % n], pieces[(first + me - 1) % n]
        came = torch.empty_like(into)
        right, left = (
            dist.P2POp(dist.isend, out.clone(), (me + 1) % n),
            dist.P2POp(dist.irecv, came, (me - 1) % n),
        )
        # Both at once: one by one, all would wait to be received
        for work in dist.batch_isend_irecv([right, left]):
            work.wait()
        into.add_(came) if action == "add" else into.copy_(came)
    return x


class Bucket:
    """Gradients that travel together."""

    def __init__(self, params):
        self.params, self.missing = params, set(params)
        self.sent: Any = None  # the all-reduce under way

    def send(self):
        """Start the all-reduce and do not wait: the backward pass goes on meanwhile."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        self.flat = torch.cat([g.flatten() for g in grads])
        self.sent = dist.all_reduce(self.flat, async_op=True)

    def receive(self):
        """Wait, and put the means where the gradients were."""
        self.sent.wait()
        self.flat.div_(dist.get_world_size())
        for p, mean in zip(self.params, self.flat.split([p.numel() for p in self.params])):
            p.grad = mean.view_as(p)
        self.missing, self.sent = set(self.params), None


class DataParallel(nn.Module):
    """A model whose gradients are the means over all ranks when `backward` has returned."""

    def __init__(self, model, bucket=4.0):
        super().__init__()
        self.model, self.sync = model, True
        for x in [*model.parameters(), *model.buffers()]:
            dist.broadcast(x.data, 0)  # all begin with the weights of the first
        self.buckets, part = [], []
        # About the order of the backward pass
        for p in reversed([p for p in model.parameters() if p.requires_grad]):
            part.append(p)
            if sum(q.numel() * q.element_size() for q in part) >= bucket * 2**20:
                self.buckets, part = [*self.buckets, Bucket(part)], []
        self.buckets += [Bucket(part)] if part else []
        for b in self.buckets:
            for p in b.params:
                p.register_post_accumulate_grad_hook(lambda p, b=b: self.arrived(p, b))

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def arrived(self, p, bucket):
        """A gradient is there. Buckets leave in one order on all ranks, or these would wait for each other for ever."""
        bucket.missing.discard(p)
        for b in self.buckets if self.sync else ():
            if b.missing:
                break
            if b.sent is None:
                b.send()

    def backward(self, loss):
        loss.backward()
        if self.sync:
            for b in self.buckets:  # what got no gradient in this pass leaves now, as zeros
                if b.sent is None:
                    b.send()
            for b in self.buckets:
                b.receive()

    @contextmanager
    def no_sync(self):
        """All parts of a batch but the last: gradients add up here, and nothing is sent."""
        self.sync = False
        try:
            yield
        finally:
            self.sync = True
            for b in self.buckets:
                b.missing = set(b.params)


def wrap(model, cfg) -> Any:
    """The model and the function that makes its gradients means over the ranks: ours or PyTorch's."""
    if cfg.backend == "ours":
        parallel = DataParallel(model, cfg.bucket)
        return parallel, parallel.backward
    device = ranks.device()
    places = [device.index] if device.type == "cuda" else None
    parallel = nn.parallel.DistributedDataParallel(model, places, bucket_cap_mb=cfg.bucket)
    return parallel, torch.Tensor.backward


def train(parallel, backward, optimizer, text, cfg, start=0):
    """Steps `start` to cfg.steps; yields the loss over all ranks."""
    for i in range(start, cfg.steps):
        total, parts = (
            0.0,
            tiny.share(tiny.batch(text, cfg.seed, i, cfg.batch, cfg.length)).chunk(cfg.accumulate),
        )
        for part in parts[:-1]:
            with parallel.no_sync():
                loss = tiny.loss(parallel, part) / cfg.accumulate
                backward(loss)
                total += loss.item()
        loss = tiny.loss(parallel, parts[-1]) / cfg.accumulate
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        yield tiny.mean(total + loss.item())


def worker(cfg):
    """What every rank does -> losses, seconds, and the bytes that it holds and sends."""
    run.seed(cfg.seed)
    device = ranks.device()
    model, text = tiny.llama(cfg.width, cfg.layers).to(device), tiny.corpus().to(device)
    parallel, backward = wrap(model, cfg)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0.01)
    losses, kept = [], {"model": model, "optimizer": optimizer}
    if cfg.resume:
        before = checkpoint.load_state(manifest.load(cfg.out) / "state.safetensors", **kept)
        run.same_flags(cfg, before["config"], cfg.out)
        losses = before["losses"]
    state = kept | {"config": asdict(cfg), "losses": losses}
    start = time.perf_counter()

    def save(place):  # all ranks have the same: one writes
        if dist.get_rank() == 0:
            checkpoint.save_state(place / "state.safetensors", **state)

    first = len(losses)
    for loss in train(parallel, backward, optimizer, text, cfg, first):
        run.check(
            math.isfinite(loss),
            f"the loss is {loss}; the last checkpoint is kept. Try a lower --lr",
        )
        losses.append(loss)
        if cfg.save_every and len(losses) % cfg.save_every == 0:
            manifest.save(cfg.out, len(losses), save)
    found = {
        "losses": losses,
        "seconds_a_step": (time.perf_counter() - start) / max(1, cfg.steps - first),
    }
    # One backward pass more, to count; PyTorch's own all-reduce is not seen
    with ranks.Traffic() as traffic:
        backward(
            tiny.loss(parallel, tiny.share(tiny.batch(text, cfg.seed, 0, cfg.batch, cfg.length)))
        )
    found |= {"held": ranks.states(model, optimizer), "sent": sum(traffic.sent.values())}
    if cfg.backend == "ours":
        found["buckets"] = [ranks.held(b.flat) for b in parallel.buckets]
    return found


def draw_ring(path, n=4):
    """Who holds how many ranks' part of each piece, before and after every step of the ring."""
    import matplotlib.pyplot as plt

    holds = np.ones((n, n))  # rank, piece: how many parts the sum here has
    frames = [holds.copy()]
    for first, action in ring(n):
        before = holds.copy()
        for rank in range(n):
            piece, to = (first + rank) % n, (rank + 1) % n
            holds[to, piece] = before[rank, piece] + (before[to, piece] if action == "add" else 0)
        frames.append(holds.copy())
    figure, axes = plt.subplots(1, len(frames), figsize=(1.55 * len(frames), 2.1), sharey=True)
    for i, (axis, frame) in enumerate(zip(axes, frames)):
        axis.imshow(frame, cmap="Greens", vmin=0, vmax=n * 1.3)
        for rank in range(n):
            for piece in range(n):
                axis.text(
                    piece, rank, f"{frame[rank, piece]:.0f}", ha="center", va="center", fontsize=9
                )
        axis.set_title("start" if i == 0 else f"{i}: {ring(n)[i - 1][1]}", fontsize=9)
        axis.set_xticks(range(n), [f"p{k}" for k in range(n)], fontsize=8)
        axis.set_yticks(range(n), [f"rank {k}" for k in range(n)], fontsize=8)
    figure.suptitle(
        "ring all-reduce: from how many ranks the sum of each piece comes", fontsize=10, y=1.04
    )
    figure.tight_layout(pad=0.3)
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Train, compare with the formula, draw the ring."""
    counts = (cfg.steps, cfg.layers, cfg.batch, cfg.accumulate)
    run.check(
        min(counts) > 0 and cfg.lr > 0,
        "--steps, --layers, --batch, --accumulate and --lr must be above 0",
    )
    run.check(cfg.bucket > 0, "--bucket must be above 0 MiB")
    run.check(cfg.width > 0 and cfg.width % 8 == 0, "--width must be a multiple of 8")
    run.check(1 < cfg.length <= 1024, "--length is 2 to 1024 bytes")
    n = ranks.count(cfg.ranks)
    parts = n * cfg.accumulate
    run.check(
        cfg.batch % parts == 0,
        f"--batch {cfg.batch} does not fall into {n} ranks x {cfg.accumulate} parts",
    )
    run.check(cfg.save_every >= 0, "--save-every must be 0 or more")
    if cfg.resume:
        manifest.load(cfg.out)
    folder = Path(cfg.out) if cfg.resume else run.output(cfg.out, cfg)
    found = ranks.launch(worker, cfg, cfg.ranks)
    if found is None:
        return {}
    mine = found[0]
    metrics = {"loss": mine["losses"][-1], "ranks": n, "seconds_a_step": mine["seconds_a_step"]}
    metrics |= {f"{kind}_MiB": size / 2**20 for kind, size in mine["held"].items()}
    metrics["formula_sent_MiB"] = 2 * (n - 1) / n * mine["held"]["gradients"] / 2**20
    if cfg.backend == "ours":
        metrics |= {"sent_MiB": mine["sent"] / 2**20, "buckets": len(mine["buckets"])}
    draw_ring(folder / "ring.png")
    figures.curves(folder / "loss.png", {"loss": mine["losses"]}, x="step", y="nats a byte")
    return run.report(folder, metrics, then="python training/fsdp.py")


if __name__ == "__main__":
    run.cli(main, Config)
