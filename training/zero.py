"""ZeRO: no rank keeps what another one keeps. Rajbhandari, Rasley, Ruwase & He 2019, arXiv:1910.02054.

Data parallel training puts the same 16 bytes per weight on every rank: weight and gradient in bf16 (2 + 2), and the
optimizer's copy of the weight, mean and variance in fp32 (4 + 4 + 4). ZeRO cuts the three in slices, one per rank, in
three stages: the optimizer's (1), the gradients too (2), the weights too (3). Each stage below is the one before with
one thing changed. Sections are the paper's.

Psi: weights. N: ranks. A unit is a group of weights that travel together, here a layer of the model: it is cut into N
equal slices. Differences from the paper: slices are of units and not of the whole model, as in FSDP; gradients travel
one unit at a time, so that no bucket size is needed; stage 3 gathers a layer when it is needed and not one ahead.

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
    """Train a small language model with its states cut into slices; count what each rank holds and sends."""

    stages: tuple[int, ...] = (0, 1, 2, 3)  # which stages of ZeRO, one after the other; 0 is plain data parallel
    ranks: int = 2  # processes; under torchrun or deepspeed theirs count
    width: int = 256  # of the model
    layers: int = 6  # of the model
    steps: int = 20  # training steps
    batch: int = 8  # pieces of text per step, of all ranks together
    accumulate: int = 2  # in how many parts a rank takes its share of the batch
    length: int = 128  # bytes of a piece
    lr: float = 1e-3  # learning rate
    bf16: bool = True  # weights and gradients in bf16, the optimizer's numbers in fp32; else all in fp32
    resume: bool = False  # go on from the last checkpoint in --out, bit for bit
    save_every: int = 0  # steps between checkpoints; 0: none are written
    seed: int = 0  # same seed, same numbers
    out: str = "outputs/zero"  # where the results go


class Unit:
    """Weights that travel together: one flat vector, cut into `parts` equal slices; this rank owns slice `part`.

    The weights become views of the vector, so that what happens to it happens to them. All have one type, and either
    all are trained or none. Shapes: flat (parts * size,), the end of it padding; slice (size,), apart if it must
    outlive the vector, else a piece of it.
    """

    def __init__(self, params, parts, part, apart):
        self.params, self.trained = params, params[0].requires_grad
        self.size = -(-sum(p.numel() for p in params) // parts)
        self.flat = params[0].new_zeros(parts * self.size, requires_grad=False)
        self.slice = self.flat[part * self.size : (part + 1) * self.size]
        self.bytes = self.flat.untyped_storage().nbytes()
        for p, place in zip(params, self.split(self.flat)):
            place.copy_(p.data)
            p.data = place
        self.slice = self.slice.clone() if apart else self.slice
        self.gradient: Any = None  # stage 2: of the slice, summed over the parts of a batch
        self.waiting = len(params)  # stage 2: gradients that have not arrived yet

    def split(self, flat):
        """The flat vector as views of the weights' shapes."""
        parts = flat[: sum(p.numel() for p in self.params)].split([p.numel() for p in self.params])
        return [x.view(p.shape) for x, p in zip(parts, self.params)]

    def take_gradients(self):
        """The gradients of the weights, as one flat vector; the weights' own are let go."""
        flat = torch.zeros_like(self.flat)
        for p, place in zip(self.params, self.split(flat)):
            if p.grad is not None:
                place.copy_(p.grad)
                p.grad = None
        return flat


def units(model, parts, part, apart=False):
    """[(module, its units)]: each layer, and last the model itself with all that is in no layer."""
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    seen, found = set(), []
    for module in [*layers, model]:
        kinds = {}
        for p in module.parameters():
            if p not in seen:  # tied weights are met twice
                seen.add(p)
                kinds.setdefault((p.dtype, p.requires_grad), []).append(p)
        found.append((module, [Unit(params, parts, part, apart) for params in kinds.values()]))
    return found


class DataParallel:
    """Stage 0: every rank has all of the weights, gradients and optimizer states. 16 Psi bytes."""

    cut, apart = False, False  # are units cut into slices, do these outlive them

    def __init__(self, model, lr, **adam):
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        with torch.no_grad():
            self.tree = units(model, *((self.ranks, self.rank) if self.cut else (1, 0)), self.apart)
        self.units = [unit for _, group in self.tree for unit in group]
        self.trained = [unit for unit in self.units if unit.trained]
        for unit in self.trained:  # what the optimizer moves: a copy of the slice in fp32, or itself if that is no less
            unit.master = nn.Parameter(unit.slice.to(torch.promote_types(unit.slice.dtype, torch.float32)))
        self.adams = [torch.optim.AdamW([unit.master], lr, **adam) for unit in self.trained]

    def backward(self, loss):
        loss.backward()

    @torch.no_grad()
    def step(self):
        for unit, adam in zip(self.trained, self.adams):
            unit.master.grad = self.mean_gradient(unit).to(unit.master.dtype)
            adam.step()
            unit.master.grad = None
            unit.slice.copy_(unit.master)
            self.publish(unit)

    def mean_gradient(self, unit):
        """What the optimizer needs of the gradients: their mean over the ranks."""
        flat = unit.take_gradients()
        dist.all_reduce(flat)
        return flat.div_(self.ranks)

    def publish(self, unit):
        """All ranks have moved all weights in the same way."""

    def state_dict(self):
        """What this rank alone knows: its slices and the optimizer's numbers for them."""
        return {"masters": [u.master.data for u in self.trained], "adams": [a.state_dict() for a in self.adams]}

    @torch.no_grad()
    def load_state_dict(self, state):
        for unit, adam, master, numbers in zip(self.trained, self.adams, state["masters"], state["adams"]):
            unit.master.copy_(master)
            adam.load_state_dict(numbers)
            unit.slice.copy_(master)
            self.publish(unit)


class ZeRO1(DataParallel):
    """Stage 1, Sec. 5.1: each rank moves its slice of the weights only. 4 Psi + 12 Psi / N bytes."""

    cut = True

    def mean_gradient(self, unit):
        """Each rank gets the mean of its slice, and no other: half of what an all-reduce does."""
        mine = torch.empty_like(unit.slice)
        dist.reduce_scatter_single(mine, unit.take_gradients())
        return mine.div_(self.ranks)

    def publish(self, unit):
        """The other half: what each rank moved is sent to all."""
        dist.all_gather_single(unit.flat, unit.slice.clone())


class ZeRO2(ZeRO1):
    """Stage 2, Sec. 5.2: a gradient is summed over the ranks as soon as it is there, and only the slice is kept.

    2 Psi + 14 Psi / N bytes. A batch in several parts pays for it: its gradients travel once for each part.
    """

    def __init__(self, model, lr, **adam):
        super().__init__(model, lr, **adam)
        *layers, root = self.tree
        groups = [group for _, group in [*reversed(layers), root]]  # as the backward pass meets them
        self.order, self.next = [unit for group in groups for unit in group if unit.trained], 0
        for unit in self.trained:
            for p in unit.params:
                p.register_post_accumulate_grad_hook(lambda p, unit=unit: self.arrived(unit))

    def arrived(self, unit):
        """A gradient is there. Units leave in one order on all ranks, or these would wait for each other for ever."""
        unit.waiting -= 1
        while self.next < len(self.order) and self.order[self.next].waiting == 0:
            self.collect()

    @torch.no_grad()
    def collect(self):
        """The backward pass has gone through the next unit: keep the slice of its gradient."""
        unit, self.next = self.order[self.next], self.next + 1
        mine = super().mean_gradient(unit)
        unit.gradient = mine if unit.gradient is None else unit.gradient.add_(mine)
        unit.waiting = len(unit.params)

    def backward(self, loss):
        loss.backward()
        while self.next < len(self.order):  # weights that had no part in this loss: another rank may wait for them
            self.collect()
        self.next = 0

    def mean_gradient(self, unit):
        mine, unit.gradient = unit.gradient, None
        return torch.zeros_like(unit.slice) if mine is None else mine


class ZeRO3(ZeRO2):
    """Stage 3, Sec. 5.3: a layer's weights are gathered when they are needed and let go at once. 16 Psi / N bytes.

    A weight that was let go keeps its place but not its memory: its storage has no bytes until it is gathered again;
    whoever holds a view of it, as autograd does, finds it filled. All ranks must go through the same layers: who skips
    one does not gather it, and the others wait.
    """

    apart = True

    def __init__(self, model, lr, **adam):
        super().__init__(model, lr, **adam)
        self.gathered, self.in_backward, self.root = set(), False, self.tree[-1][1]
        for module, group in self.tree:
            module.register_forward_pre_hook(lambda *_, group=group: self.gather(group))
            if group is not self.root:  # embedding and head are needed first and last, so they stay
                module.register_full_backward_pre_hook(lambda *_, group=group: self.gather(group))
                module.register_forward_hook(lambda *_, group=group: self.passed(group))
        for unit in self.units:
            unit.flat.untyped_storage().resize_(0)

    @torch.no_grad()
    def gather(self, group):
        """Before a layer computes: its weights from all ranks. In the backward pass the layer before is done."""
        if self.in_backward:
            self.release([unit for unit in self.gathered if unit not in group and unit not in self.root])
        for unit in group:
            if unit not in self.gathered:
                unit.flat.untyped_storage().resize_(unit.bytes)
                dist.all_gather_single(unit.flat, unit.slice)
                self.gathered.add(unit)

    def passed(self, group):
        """After a layer has computed; not when it computes again in the backward pass, for a checkpoint."""
        if not self.in_backward:
            self.release(group)

    def release(self, group):
        for unit in self.gathered.intersection(group):
            unit.flat.untyped_storage().resize_(0)
            self.gathered.remove(unit)

    def backward(self, loss):
        self.in_backward = True
        super().backward(loss)
        self.in_backward = False
        self.release(self.units)

    def publish(self, unit):
        """Nothing to send: who needs a weight gathers it."""


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

    A ring saves the own slice, (N-1)/N; stages 2 and 3 pay for every part of the batch, stage 3 gathers twice for each.
    """
    return (n - 1) / n * size * {0: 2, 1: 2, 2: accumulate + 1, 3: 3 * accumulate}[stage]


def held(engine, model):
    """Bytes on this rank, between two steps or two parts of a batch."""
    slices = [u.slice for u in engine.units] + [u.flat for u in engine.units]
    masters = [u.master for u in engine.trained if u.master.dtype != u.flat.dtype]
    moments = [x for adam in engine.adams for s in adam.state.values() for x in s.values() if x.dim()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    gradients += [u.gradient for u in engine.trained if u.gradient is not None]
    return {
        "weights": ranks.held(*slices, *model.parameters()),
        "gradients": ranks.held(*gradients),
        "optimizer": ranks.held(*masters, *moments),
    }


def train(model, engine, text, cfg, start=0):
    """Steps `start` to cfg.steps; yields the loss over all ranks, and what this rank holds before it moves."""
    for i in range(start, cfg.steps):
        total = 0.0
        for part in tiny.share(tiny.batch(text, cfg.seed, i, cfg.batch, cfg.length)).chunk(cfg.accumulate):
            loss = tiny.loss(model, part) / cfg.accumulate
            engine.backward(loss)
            total += loss.item()
        holds = held(engine, model)
        engine.step()
        yield tiny.mean(total), holds


def build(cfg, stage):
    """-> model and engine of a stage, the same weights on every rank."""
    run.seed(cfg.seed)
    model = tiny.llama(cfg.width, cfg.layers, dtype=torch.bfloat16 if cfg.bf16 else torch.float32).to(ranks.device())
    return model, STAGES[stage](model, cfg.lr, weight_decay=0.01)


def worker(cfg):
    """What every rank does -> {stage: its losses, bytes held and sent}."""
    found, text = {}, tiny.corpus().to(ranks.device())
    for stage in cfg.stages:
        model, engine = build(cfg, stage)
        folder, losses = Path(cfg.out) / f"stage{stage}", []
        if cfg.resume:
            before = checkpoint.load_state(manifest.load(folder) / f"rank{engine.rank}.safetensors", engine=engine)
            run.same_flags(cfg, before["config"], folder)
            losses = before["losses"]
        holds = held(engine, model)
        state = {"engine": engine, "config": asdict(cfg), "losses": losses}
        save = lambda place, state=state: checkpoint.save_state(place / f"rank{dist.get_rank()}.safetensors", **state)  # noqa: E731
        start = len(losses)
        with ranks.Traffic() as traffic:
            for loss, holds in train(model, engine, text, cfg, start):  # noqa: B007
                run.check(math.isfinite(loss), f"the loss is {loss}; the last checkpoint is kept. Try a lower --lr")
                losses.append(loss)
                if cfg.save_every and len(losses) % cfg.save_every == 0:
                    manifest.save(folder, len(losses), save)
        sent = {name: size / max(1, cfg.steps - start) for name, size in traffic.sent.items()}
        found[stage] = {
            "losses": losses,
            "held": holds,
            "sent": sent,
            "psi": sum(p.numel() for p in model.parameters()),
        }
    return found


def picture(path, found, cfg, psi, n):
    """Left: what a rank holds, measured (bars) and by the formula (lines). Right: what it sends in a step."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
    for i, (stage, row) in enumerate(found.items()):
        bottom, expected = 0.0, 0.0
        for kind, colour in COLOURS.items():
            size, said = row["held"][kind] / 2**20, formula(psi, n, stage, cfg.bf16)[kind] / 2**20
            left.bar(i, size, 0.7, bottom, color=colour, label=kind if i == 0 else None)
            bottom, expected = bottom + size, expected + said
            left.plot([i - 0.42, i + 0.42], [expected] * 2, color="black", linewidth=1)
        bottom = 0.0
        for kind, colour in SENT.items():
            size = row["sent"].get(kind, 0) / 2**20
            right.bar(i, size, 0.7, bottom, color=colour, label=kind.replace("_", "-") if i == 0 else None)
            bottom += size
        said = volume(psi * (2 if cfg.bf16 else 4), n, stage, cfg.accumulate) / 2**20
        right.plot([i - 0.42, i + 0.42], [said] * 2, color="black", linewidth=1)
    left.set(ylabel="MiB", title=f"held by one of {n} ranks; lines: the formula")
    right.set(ylabel="MiB", title=f"sent in a step of {cfg.accumulate} parts; lines: the formula")
    for axis in (left, right):
        axis.set_xticks(range(len(found)), [f"stage {s}" if s else "data parallel" for s in found])
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Every stage in turn, on the same texts -> bytes and losses."""
    run.check(cfg.stages and set(cfg.stages) <= set(range(4)), "--stages are numbers from 0 to 3")
    counts = (cfg.steps, cfg.layers, cfg.batch, cfg.accumulate)
    run.check(min(counts) > 0 and cfg.lr > 0, "--steps, --layers, --batch, --accumulate and --lr must be above 0")
    run.check(1 < cfg.length <= 1024, "--length is 2 to 1024 bytes")
    run.check(cfg.width > 0 and cfg.width % 8 == 0, "--width must be a multiple of 8")
    n = ranks.count(cfg.ranks)
    parts = n * cfg.accumulate
    run.check(cfg.batch % parts == 0, f"--batch {cfg.batch} does not fall into {n} ranks x {cfg.accumulate} parts")
    run.check(cfg.save_every >= 0, "--save-every must be 0 or more")
    for stage in cfg.stages if cfg.resume else ():
        manifest.load(Path(cfg.out) / f"stage{stage}")
    folder = Path(cfg.out) if cfg.resume else run.output(cfg.out, cfg)
    found = ranks.launch(worker, cfg, cfg.ranks)
    if found is None:
        return {}
    mine = found[0]
    psi, metrics = next(iter(mine.values()))["psi"], {}
    for stage, row in mine.items():
        total, said = sum(row["held"].values()), sum(formula(psi, n, stage, cfg.bf16).values())
        metrics[f"stage {stage}"] = {
            **{f"{kind}_MiB": size / 2**20 for kind, size in row["held"].items()},
            "total_MiB": total / 2**20,
            "formula_MiB": said / 2**20,
            "sent_MiB": sum(row["sent"].values()) / 2**20,
            "formula_sent_MiB": volume(psi * (2 if cfg.bf16 else 4), n, stage, cfg.accumulate) / 2**20,
            "loss": row["losses"][-1],
        }
    picture(folder / "zero.png", mine, cfg, psi, n)
    figures.curves(folder / "loss.png", {f"stage {s}": row["losses"] for s, row in mine.items()})
    return run.report(folder, metrics | {"parameters": psi, "ranks": n}, then="python training/memory.py")


if __name__ == "__main__":
    run.cli(main, Config)
