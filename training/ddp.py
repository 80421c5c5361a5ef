"""Data parallel training (DDP): ranks see other texts, and an all-reduce makes gradients one.

Every rank has the whole model. The sum over all ranks goes round a ring (ring_all_reduce.py), and
gradients are sent in buckets as soon as they are there, while the backward pass goes on (Li et al.
2020, "PyTorch Distributed", arXiv:2006.15704). Both are written out; then PyTorch's own does the
same work.

N: ranks. Differences from PyTorch: buckets are filled in the order of the weights, backwards, and
never filled anew; a weight without a gradient counts as zero (`find_unused_parameters` there),
always.

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

import torch
import torch.distributed as dist
from torch import nn

from training import manifest, ranks, ring_all_reduce, tiny
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


class Bucket:
    """Gradients that travel together, in one flat vector."""

    def __init__(self, params):
        self.params = params
        self.missing = set(params)  # whose gradients are not there yet
        self.work: Any = None  # the all-reduce under way

    def start_all_reduce(self):
        """Start the all-reduce and do not wait: the backward pass goes on meanwhile."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        self.flat = torch.cat([g.flatten() for g in grads])
        self.work = dist.all_reduce(self.flat, async_op=True)

    def finish_all_reduce(self):
        """Wait, and put the means where the gradients were."""
        self.work.wait()
        self.flat.div_(dist.get_world_size())
        means = self.flat.split([p.numel() for p in self.params])
        for p, mean in zip(self.params, means):
            p.grad = mean.view_as(p)
        # Ready for the next backward pass.
        self.missing = set(self.params)
        self.work = None


class DataParallel(nn.Module):
    """A model whose gradients are the means over all ranks when `backward` has returned."""

    def __init__(self, model, bucket=4.0):
        super().__init__()
        self.model = model
        self.sync = True
        # All begin with the weights of the first.
        for x in [*model.parameters(), *model.buffers()]:
            dist.broadcast(x.data, 0)
        # Buckets of `bucket` MiB, about in the order of the backward pass.
        self.buckets = []
        part = []
        for p in reversed([p for p in model.parameters() if p.requires_grad]):
            part.append(p)
            if sum(q.numel() * q.element_size() for q in part) >= bucket * 2**20:
                self.buckets.append(Bucket(part))
                part = []
        if part:
            self.buckets.append(Bucket(part))
        # Every parameter tells when the backward pass has made its gradient.
        for b in self.buckets:
            for p in b.params:
                p.register_post_accumulate_grad_hook(lambda p, b=b: self.gradient_ready(p, b))

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def gradient_ready(self, p, bucket):
        """Hook: a gradient is there.

        Full buckets leave in one order on all ranks, or these would wait for ever.
        """
        bucket.missing.discard(p)
        if not self.sync:
            return
        for b in self.buckets:
            if b.missing:
                break
            if b.work is None:
                b.start_all_reduce()

    def backward(self, loss):
        loss.backward()
        if not self.sync:
            return
        # What got no gradient in this pass leaves now, as zeros.
        for b in self.buckets:
            if b.work is None:
                b.start_all_reduce()
        for b in self.buckets:
            b.finish_all_reduce()

    @contextmanager
    def no_sync(self):
        """Gradient accumulation: gradients add up here, and nothing is sent."""
        self.sync = False
        try:
            yield
        finally:
            self.sync = True
            for b in self.buckets:
                b.missing = set(b.params)


def wrap(model, cfg) -> Any:
    """Data parallel model and its function for the backward pass: ours or PyTorch's."""
    if cfg.backend == "ours":
        parallel = DataParallel(model, cfg.bucket)
        return parallel, parallel.backward
    # PyTorch's: its hooks on the parameters all-reduce during the ordinary backward pass.
    device = ranks.device()
    places = [device.index] if device.type == "cuda" else None
    parallel = nn.parallel.DistributedDataParallel(model, places, bucket_cap_mb=cfg.bucket)
    return parallel, torch.Tensor.backward


def train(parallel, backward, optimizer, text, cfg, start=0):
    """Steps `start` to cfg.steps; yields the loss over all ranks."""
    for i in range(start, cfg.steps):
        # This rank's part of the batch, in micro-batches.
        ids = tiny.share(tiny.batch(text, cfg.seed, i, cfg.batch, cfg.length))
        parts = ids.chunk(cfg.accumulate)
        total = 0.0
        # All but the last: gradients add up on this rank.
        for part in parts[:-1]:
            with parallel.no_sync():
                loss = tiny.loss(parallel, part) / cfg.accumulate
                backward(loss)
                total += loss.item()
        # The last: buckets are all-reduced while its backward pass goes on.
        loss = tiny.loss(parallel, parts[-1]) / cfg.accumulate
        backward(loss)
        # The same step on every rank.
        optimizer.step()
        optimizer.zero_grad()
        yield tiny.mean(total + loss.item())


def worker(cfg):
    """What every rank does -> losses, seconds, and the bytes that it holds and sends."""
    run.seed(cfg.seed)
    device = ranks.device()
    model = tiny.llama(cfg.width, cfg.layers).to(device)
    text = tiny.corpus().to(device)
    parallel, backward = wrap(model, cfg)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0.01)
    kept = {"model": model, "optimizer": optimizer}
    losses = []
    # Resume: all ranks read the same checkpoint.
    if cfg.resume:
        before = checkpoint.load_state(manifest.load(cfg.out) / "state.safetensors", **kept)
        run.same_flags(cfg, before["config"], cfg.out)
        losses = before["losses"]
    state = kept | {"config": asdict(cfg), "losses": losses}

    def save(place):  # all ranks have the same: one writes
        if dist.get_rank() == 0:
            checkpoint.save_state(place / "state.safetensors", **state)

    # Training, on the clock.
    start = time.perf_counter()
    first = len(losses)
    for loss in train(parallel, backward, optimizer, text, cfg, first):
        run.check(
            math.isfinite(loss),
            f"the loss is {loss}; the last checkpoint is kept. Try a lower --lr",
        )
        losses.append(loss)
        if cfg.save_every and len(losses) % cfg.save_every == 0:
            manifest.save(cfg.out, len(losses), save)
    seconds = time.perf_counter() - start
    # One backward pass more, to count; PyTorch's own all-reduce is not seen
    ids = tiny.share(tiny.batch(text, cfg.seed, 0, cfg.batch, cfg.length))
    with ranks.Traffic() as traffic:
        backward(tiny.loss(parallel, ids))
    found = {
        "losses": losses,
        "seconds_a_step": seconds / max(1, cfg.steps - first),
        "held": ranks.states(model, optimizer),
        "sent": sum(traffic.sent.values()),
    }
    if cfg.backend == "ours":
        found["buckets"] = [ranks.held(b.flat) for b in parallel.buckets]
    return found


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
    # Every rank takes as many micro-batches, all of one size.
    n = ranks.count(cfg.ranks)
    parts = n * cfg.accumulate
    run.check(
        cfg.batch % parts == 0,
        f"--batch {cfg.batch} does not fall into {n} ranks x {cfg.accumulate} parts",
    )
    run.check(cfg.save_every >= 0, "--save-every must be 0 or more")
    # To resume, there must be a checkpoint.
    if cfg.resume:
        manifest.load(cfg.out)
        folder = Path(cfg.out)
    else:
        folder = run.output(cfg.out, cfg)
    found = ranks.launch(worker, cfg, cfg.ranks)
    if found is None:
        return {}
    # The first rank's bytes, beside the formula.
    mine = found[0]
    metrics = {"loss": mine["losses"][-1], "ranks": n, "seconds_a_step": mine["seconds_a_step"]}
    metrics |= {f"{kind}_MiB": size / 2**20 for kind, size in mine["held"].items()}
    metrics["formula_sent_MiB"] = 2 * (n - 1) / n * mine["held"]["gradients"] / 2**20
    if cfg.backend == "ours":
        metrics |= {"sent_MiB": mine["sent"] / 2**20, "buckets": len(mine["buckets"])}
    ring_all_reduce.draw(folder / "ring.png")
    figures.curves(folder / "loss.png", {"loss": mine["losses"]}, x="step", y="nats a byte")
    return run.report(folder, metrics, then="python training/fsdp.py")


if __name__ == "__main__":
    run.cli(main, Config)
