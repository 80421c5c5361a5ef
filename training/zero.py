"""ZeRO, the zero redundancy optimizer: no rank keeps what another one keeps. Rajbhandari, Rasley, Ruwase & He 2019,
arXiv:1910.02054.

Data parallel training puts the same 16 bytes per parameter on every rank: parameter and gradient in bf16 (2 + 2), and
the optimizer's master copy, mean and variance in fp32 (4 + 4 + 4). ZeRO shards the three over the ranks, in three
stages: optimizer states (1), gradients too (2), parameters too (3). Each stage below is the one before with one thing
changed. Sections are the paper's. A step, phase by phase:

    stage 0   backward | all-reduce gradients     | optimizer moves all parameters on every rank
    stage 1   backward | reduce-scatter gradients | optimizer moves the shard | all-gather parameters
    stage 2   backward, and reduce-scatter as soon as a layer has its gradients | optimizer | all-gather parameters
    stage 3   all-gather a layer before its forward and its backward, free it after; reduce-scatter | optimizer

Psi: parameters. N: ranks. A flat parameter (a bucket) is a group of parameters that travel together, here a layer of
the model: it is sharded in N equal parts. Differences from the paper: shards are of layers and not of the whole model,
as in FSDP, so no bucket size is needed; stage 3 gathers a layer when it is needed and does not prefetch the next.

    python training/zero.py                                  # stages 0 to 3 on two ranks
    python training/zero.py --ranks 4 --stages 3
    torchrun --nproc_per_node 2 training/zero.py
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from training import manifest, ranks, tiny
from utils import checkpoint, figures, run


@dataclass(frozen=True)
class Config:
    """Train a small language model with sharded states; count the bytes that each rank holds and sends."""

    # which stages of ZeRO, one after the other; 0 is plain data parallel
    stages: tuple[int, ...] = (0, 1, 2, 3)
    ranks: int = 2  # processes; under torchrun or deepspeed theirs count
    width: int = 256  # of the model
    layers: int = 6  # of the model
    steps: int = 20  # training steps
    batch: int = 8  # pieces of text per step, of all ranks together
    accumulate: int = 2  # gradient accumulation: micro-batches of a rank in a step
    length: int = 128  # bytes of a piece
    lr: float = 1e-3  # learning rate
    # weights and gradients in bf16, the optimizer's numbers in fp32; else all in fp32
    bf16: bool = True
    resume: bool = False  # go on from the last checkpoint in --out, bit for bit
    save_every: int = 0  # steps between checkpoints; 0: none are written
    seed: int = 0  # same seed, same numbers
    out: str = "outputs/zero"  # where the results go


class FlatParameter:
    """A bucket: parameters that travel together, as one flat vector, sharded over the ranks in equal slices.

    The parameters become views of the vector, so that what happens to it happens to them. All have one type, and either
    all are trained or none. Shapes: full (shards * shard_size,), the end of it padding; shard (shard_size,), that of
    this rank, with memory of its own (`keep_shard`) if it must outlive the vector, else a piece of it.
    """

    def __init__(self, params, shards, index, keep_shard):
        self.params = params
        self.trained = params[0].requires_grad
        numbers = sum(p.numel() for p in params)
        self.shard_size = math.ceil(numbers / shards)
        # One vector for all, padded until it can be sharded.
        self.full = params[0].new_zeros(shards * self.shard_size, requires_grad=False)
        self.nbytes = self.full.untyped_storage().nbytes()
        # Each parameter moves into its place of the vector.
        for p, place in zip(params, self.views(self.full)):
            place.copy_(p.data)
            p.data = place
        # What this rank owns.
        start = index * self.shard_size
        self.shard = self.full[start : start + self.shard_size]
        if keep_shard:
            self.shard = self.shard.clone()
        # Stage 2: the gradient of the shard, summed over micro-batches; gradients that are not there yet.
        self.grad_shard: Any = None
        self.pending = len(params)

    def views(self, vector):
        """A flat vector as views of the parameters' shapes, without the padding."""
        sizes = [p.numel() for p in self.params]
        parts = vector[: sum(sizes)].split(sizes)
        return [part.view(p.shape) for part, p in zip(parts, self.params)]

    def take_gradients(self):
        """The gradients of the parameters as one flat vector; their own are freed."""
        vector = torch.zeros_like(self.full)
        for p, place in zip(self.params, self.views(vector)):
            if p.grad is not None:
                place.copy_(p.grad)
                p.grad = None
        return vector


def flatten(model, shards, index, keep_shard=False):
    """[(module, its flat parameters)]: each layer, and last the model itself with all that is in no layer."""
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    seen = set()
    found = []
    for module in [*layers, model]:
        # One flat parameter for each type, and for frozen and trained ones.
        kinds = {}
        for p in module.parameters():
            if p not in seen:  # tied weights are met twice
                seen.add(p)
                kinds.setdefault((p.dtype, p.requires_grad), []).append(p)
        found.append(
            (
                module,
                [FlatParameter(params, shards, index, keep_shard) for params in kinds.values()],
            )
        )
    return found


class DataParallel:
    """Stage 0: every rank has all parameters, gradients and optimizer states. 16 Psi bytes.

    A step has three phases: mean gradient, optimizer, updated parameters. Each stage replaces the first or the last.
    """

    sharded = False  # does each rank own one shard of every flat parameter, or the whole of it
    keep_shard = False  # must the shard outlive the full parameters, because these are freed

    def __init__(self, model, lr, **adam):
        self.ranks = dist.get_world_size()
        self.rank = dist.get_rank()
        shards, index = (self.ranks, self.rank) if self.sharded else (1, 0)
        with torch.no_grad():
            self.modules = flatten(model, shards, index, self.keep_shard)
        self.flat_params = [flat for _, group in self.modules for flat in group]
        self.trained = [flat for flat in self.flat_params if flat.trained]
        # What the optimizer moves: the shard's master copy in fp32, or the shard itself if that is no less.
        for flat in self.trained:
            master_type = torch.promote_types(flat.shard.dtype, torch.float32)
            flat.master = nn.Parameter(flat.shard.to(master_type))
        self.adams = [torch.optim.AdamW([flat.master], lr, **adam) for flat in self.trained]

    def backward(self, loss):
        loss.backward()

    @torch.no_grad()
    def step(self):
        for flat, adam in zip(self.trained, self.adams):
            # The mean gradient of what this rank owns, over the ranks.
            flat.master.grad = self.mean_gradient(flat).to(flat.master.dtype)
            # The optimizer moves the master copy, in fp32.
            adam.step()
            flat.master.grad = None
            # The updated shard, rounded to the type of the parameters, goes to all ranks.
            flat.shard.copy_(flat.master)
            self.all_gather_parameters(flat)

    def mean_gradient(self, flat):
        """All-reduce: every rank gets the mean of the whole gradient."""
        gradient = flat.take_gradients()
        dist.all_reduce(gradient)
        return gradient.div_(self.ranks)

    def all_gather_parameters(self, flat):
        """Nothing to gather: all ranks have updated all parameters in the same way."""

    def state_dict(self):
        """What this rank alone knows: the master copies of its shards and the optimizer's numbers for them."""
        return {
            "masters": [f.master.data for f in self.trained],
            "adams": [adam.state_dict() for adam in self.adams],
        }

    @torch.no_grad()
    def load_state_dict(self, state):
        for flat, adam, master, numbers in zip(
            self.trained, self.adams, state["masters"], state["adams"]
        ):
            flat.master.copy_(master)
            adam.load_state_dict(numbers)
            flat.shard.copy_(master)
            self.all_gather_parameters(flat)


class ZeRO1(DataParallel):
    """Stage 1, Sec. 5.1: optimizer states are sharded. 4 Psi + 12 Psi / N bytes.

    An all-reduce is a reduce-scatter and an all-gather. Stage 1 puts the optimizer between the two.
    """

    sharded = True

    def mean_gradient(self, flat):
        """Reduce-scatter: each rank gets the mean of its shard of the gradient, and no other."""
        grad_shard = torch.empty_like(flat.shard)
        dist.reduce_scatter_single(grad_shard, flat.take_gradients())
        return grad_shard.div_(self.ranks)

    def all_gather_parameters(self, flat):
        """All-gather: the shard that each rank has updated goes to all."""
        dist.all_gather_single(flat.full, flat.shard.clone())


class ZeRO2(ZeRO1):
    """Stage 2, Sec. 5.2: gradients are sharded, too: reduce-scatter during the backward pass, and keep the shard.

    2 Psi + 14 Psi / N bytes. A batch of several micro-batches pays for it: its gradients travel once for each.
    """

    def __init__(self, model, lr, **adam):
        super().__init__(model, lr, **adam)
        # The order in which gradients are reduced: as the backward pass meets the layers, from the last to the first.
        *layers, root = self.modules
        self.order = [
            flat for _, group in [*reversed(layers), root] for flat in group if flat.trained
        ]
        self.next = 0
        for flat in self.trained:
            for p in flat.params:
                p.register_post_accumulate_grad_hook(lambda p, flat=flat: self.gradient_ready(flat))

    def gradient_ready(self, flat):
        """Hook: a gradient is there. All ranks reduce in one order, or these would wait for each other for ever."""
        flat.pending -= 1
        while self.next < len(self.order) and self.order[self.next].pending == 0:
            self.reduce_scatter_gradients()

    @torch.no_grad()
    def reduce_scatter_gradients(self):
        """All gradients of the next flat parameter are there: reduce-scatter them, and keep the shard of the mean."""
        flat = self.order[self.next]
        self.next += 1
        # The whole gradient is freed here; of its sum over the ranks this one gets its shard.
        grad_shard = torch.empty_like(flat.shard)
        dist.reduce_scatter_single(grad_shard, flat.take_gradients())
        grad_shard.div_(self.ranks)
        # Gradient accumulation: shards of micro-batches add up.
        if flat.grad_shard is None:
            flat.grad_shard = grad_shard
        else:
            flat.grad_shard.add_(grad_shard)
        flat.pending = len(flat.params)

    def backward(self, loss):
        loss.backward()
        # Parameters that had no part in this loss: another rank may wait for them.
        while self.next < len(self.order):
            self.reduce_scatter_gradients()
        self.next = 0

    def mean_gradient(self, flat):
        """Already reduced in the backward pass."""
        grad_shard = flat.grad_shard
        flat.grad_shard = None
        return torch.zeros_like(flat.shard) if grad_shard is None else grad_shard


class ZeRO3(ZeRO2):
    """Stage 3, Sec. 5.3: parameters are sharded, too: all-gather a layer before it computes, free it after.

    16 Psi / N bytes. A parameter that was freed keeps its place but not its memory: its storage has no bytes until the
    next all-gather; whoever holds a view of it, as autograd does, finds it filled. All ranks must go through the same
    layers: who skips one does not gather it, and the others wait.
    """

    keep_shard = True

    def __init__(self, model, lr, **adam):
        super().__init__(model, lr, **adam)
        self.gathered = set()
        self.in_backward = False
        self.root = self.modules[-1][1]
        for module, group in self.modules:
            # Before its forward a module gathers its parameters.
            module.register_forward_pre_hook(lambda *_, group=group: self.unshard(group))
            # Layers gather them again before their backward, and free them after the forward. Embedding and head, in
            # the root, are needed first and last, so they stay.
            if group is not self.root:
                module.register_full_backward_pre_hook(lambda *_, group=group: self.unshard(group))
                module.register_forward_hook(
                    lambda *_, group=group: self.reshard_after_forward(group)
                )
        for flat in self.flat_params:
            flat.full.untyped_storage().resize_(0)

    @torch.no_grad()
    def unshard(self, group):
        """All-gather the parameters of a layer before it computes. In the backward pass the layer before is done."""
        if self.in_backward:
            self.reshard(
                [flat for flat in self.gathered if flat not in group and flat not in self.root]
            )
        for flat in group:
            if flat not in self.gathered:
                flat.full.untyped_storage().resize_(flat.nbytes)
                dist.all_gather_single(flat.full, flat.shard)
                self.gathered.add(flat)

    def reshard_after_forward(self, group):
        """Not when a layer computes again in the backward pass, for a checkpoint."""
        if not self.in_backward:
            self.reshard(group)

    def reshard(self, group):
        """Free the full parameters; the shards stay."""
        for flat in self.gathered.intersection(group):
            flat.full.untyped_storage().resize_(0)
            self.gathered.remove(flat)

    def backward(self, loss):
        self.in_backward = True
        super().backward(loss)
        self.in_backward = False
        self.reshard(self.flat_params)

    def all_gather_parameters(self, flat):
        """Nothing to gather after the step: who needs a layer's parameters gathers them (`unshard`)."""


STAGES = [DataParallel, ZeRO1, ZeRO2, ZeRO3]
COLOURS = {"weights": "tab:blue", "gradients": "tab:orange", "optimizer": "tab:green"}
SENT = {"all_reduce": "tab:gray", "reduce_scatter": "tab:orange", "all_gather": "tab:blue"}


def formula(psi, n, stage, bf16=True):
    """Bytes per rank of weights, gradients and optimizer states: the paper's Fig. 1 and Sec. 5, K = 12.

    In fp32 the weight is its own copy: 4 + 4 + 8 bytes.
    """
    weight, gradient, optimizer = (2, 2, 12) if bf16 else (4, 4, 8)
    return {
        "weights": weight * psi / (n if stage >= 3 else 1),
        "gradients": gradient * psi / (n if stage >= 2 else 1),
        "optimizer": optimizer * psi / (n if stage >= 1 else 1),
    }


def volume(size, n, stage, accumulate=1):
    """Bytes that a rank sends in one step, `size` those of all weights: Sec. 7. The paper counts 2, 2, 2 and 3 Psi.

    A ring saves the own shard, (N-1)/N; stages 2 and 3 reduce-scatter for every micro-batch, stage 3 gathers twice for
    each.
    """
    times = {0: 2, 1: 2, 2: accumulate + 1, 3: 3 * accumulate}[stage]
    return (n - 1) / n * size * times


def bytes_held(engine, model):
    """Bytes on this rank, between two steps or two micro-batches: {"weights", "gradients", "optimizer"}."""
    weights = [f.shard for f in engine.flat_params] + [f.full for f in engine.flat_params]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    gradients += [f.grad_shard for f in engine.trained if f.grad_shard is not None]
    masters = [f.master for f in engine.trained if f.master.dtype != f.full.dtype]
    moments = [
        x for adam in engine.adams for s in adam.state.values() for x in s.values() if x.dim()
    ]
    return {
        "weights": ranks.held(*weights, *model.parameters()),
        "gradients": ranks.held(*gradients),
        "optimizer": ranks.held(*masters, *moments),
    }


def train(model, engine, text, cfg, start=0):
    """Steps `start` to cfg.steps; yields the loss over all ranks, and the bytes held before the optimizer's step."""
    for i in range(start, cfg.steps):
        # This rank's part of the batch, in micro-batches.
        ids = tiny.share(tiny.batch(text, cfg.seed, i, cfg.batch, cfg.length))
        total = 0.0
        for micro_batch in ids.chunk(cfg.accumulate):
            # Forward and backward; from stage 2 on, gradients are reduced here.
            loss = tiny.loss(model, micro_batch) / cfg.accumulate
            engine.backward(loss)
            total += loss.item()
        held = bytes_held(engine, model)
        # Gradients to their owners (stages 0 and 1), optimizer, updated parameters to all.
        engine.step()
        yield tiny.mean(total), held


def build(cfg, stage):
    """-> model and engine of a stage, the same weights on every rank."""
    run.seed(cfg.seed)
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    model = tiny.llama(cfg.width, cfg.layers, dtype=dtype).to(ranks.device())
    return model, STAGES[stage](model, cfg.lr, weight_decay=0.01)


def worker(cfg):
    """What every rank does -> {stage: its losses, bytes held and sent}."""
    text = tiny.corpus().to(ranks.device())
    return {stage: run_stage(cfg, stage, text) for stage in cfg.stages}


def run_stage(cfg, stage, text):
    """Train with one stage -> {"losses", "held", "sent", "psi"}, bytes of this rank."""
    model, engine = build(cfg, stage)
    folder = Path(cfg.out) / f"stage{stage}"
    shard_file = f"rank{engine.rank}.safetensors"
    losses = []
    if cfg.resume:
        before = checkpoint.load_state(manifest.load(folder) / shard_file, engine=engine)
        run.same_flags(cfg, before["config"], folder)
        losses = before["losses"]
    state = {"engine": engine, "config": asdict(cfg), "losses": losses}

    def save(place):
        checkpoint.save_state(place / shard_file, **state)

    start = len(losses)
    held = bytes_held(engine, model)
    with ranks.Traffic() as traffic:
        for loss, held in train(model, engine, text, cfg, start):  # noqa: B007
            run.check(
                math.isfinite(loss),
                f"the loss is {loss}; the last checkpoint is kept. Try a lower --lr",
            )
            losses.append(loss)
            if cfg.save_every and len(losses) % cfg.save_every == 0:
                manifest.save(folder, len(losses), save)
    sent = {name: size / max(1, cfg.steps - start) for name, size in traffic.sent.items()}
    psi = sum(p.numel() for p in model.parameters())
    return {"losses": losses, "held": held, "sent": sent, "psi": psi}


def picture(path, found, cfg, psi, n):
    """Left: what a rank holds, measured (bars) and by the formula (lines). Right: what it sends in a step."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
    weights = psi * (2 if cfg.bf16 else 4)
    for i, (stage, row) in enumerate(found.items()):
        line = [i - 0.42, i + 0.42]
        expected = formula(psi, n, stage, cfg.bf16)
        # Bytes held, one kind on the other; a line where the formula says that each ends.
        measured_top = 0.0
        formula_top = 0.0
        for kind, colour in COLOURS.items():
            size = row["held"][kind] / 2**20
            left.bar(i, size, 0.7, measured_top, color=colour, label=kind if i == 0 else None)
            measured_top += size
            formula_top += expected[kind] / 2**20
            left.plot(line, [formula_top] * 2, color="black", linewidth=1)
        # Bytes sent, one collective on the other; one line for the sum of the formula.
        sent_top = 0.0
        for kind, colour in SENT.items():
            size = row["sent"].get(kind, 0) / 2**20
            label = kind.replace("_", "-") if i == 0 else None
            right.bar(i, size, 0.7, sent_top, color=colour, label=label)
            sent_top += size
        expected_sent = volume(weights, n, stage, cfg.accumulate) / 2**20
        right.plot(line, [expected_sent] * 2, color="black", linewidth=1)
    left.set(ylabel="MiB", title=f"held by one of {n} ranks; lines: the formula")
    right.set(
        ylabel="MiB", title=f"sent in a step of {cfg.accumulate} micro-batches; lines: the formula"
    )
    for axis in (left, right):
        axis.set_xticks(range(len(found)), [f"stage {s}" if s else "data parallel" for s in found])
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Every stage in turn, on the same texts -> bytes and losses."""
    run.check(cfg.stages and set(cfg.stages) <= set(range(4)), "--stages are numbers from 0 to 3")
    counts = (cfg.steps, cfg.layers, cfg.batch, cfg.accumulate)
    run.check(
        min(counts) > 0 and cfg.lr > 0,
        "--steps, --layers, --batch, --accumulate and --lr must be above 0",
    )
    run.check(1 < cfg.length <= 1024, "--length is 2 to 1024 bytes")
    run.check(cfg.width > 0 and cfg.width % 8 == 0, "--width must be a multiple of 8")
    n = ranks.count(cfg.ranks)
    parts = n * cfg.accumulate
    run.check(
        cfg.batch % parts == 0,
        f"--batch {cfg.batch} does not fall into {n} ranks x {cfg.accumulate} parts",
    )
    run.check(cfg.save_every >= 0, "--save-every must be 0 or more")
    for stage in cfg.stages if cfg.resume else ():
        manifest.load(Path(cfg.out) / f"stage{stage}")
    folder = Path(cfg.out) if cfg.resume else run.output(cfg.out, cfg)
    found = ranks.launch(worker, cfg, cfg.ranks)
    if found is None:
        return {}
    rows = found[0]
    psi = next(iter(rows.values()))["psi"]
    weights = psi * (2 if cfg.bf16 else 4)
    metrics = {}
    for stage, row in rows.items():
        metrics[f"stage {stage}"] = {
            **{f"{kind}_MiB": size / 2**20 for kind, size in row["held"].items()},
            "total_MiB": sum(row["held"].values()) / 2**20,
            "formula_MiB": sum(formula(psi, n, stage, cfg.bf16).values()) / 2**20,
            "sent_MiB": sum(row["sent"].values()) / 2**20,
            "formula_sent_MiB": volume(weights, n, stage, cfg.accumulate) / 2**20,
            "loss": row["losses"][-1],
        }
    picture(folder / "zero.png", rows, cfg, psi, n)
    figures.curves(folder / "loss.png", {f"stage {s}": row["losses"] for s, row in rows.items()})
    return run.report(
        folder, metrics | {"parameters": psi, "ranks": n}, then="python training/memory.py"
    )


if __name__ == "__main__":
    run.cli(main, Config)
