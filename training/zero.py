"""ZeRO, the zero redundancy optimizer: no rank keeps what another one keeps.

Rajbhandari, Rasley, Ruwase & He 2019, arXiv:1910.02054.

Data parallel training puts the same 16 bytes per parameter on every rank: parameter and gradient in
bf16 (2 + 2), and the optimizer's master copy, mean and variance in fp32 (4 + 4 + 4). ZeRO shards
the three over the ranks, in three stages: optimizer states (1), gradients too (2), parameters too
(3). zero_stages.py has the stages; this script trains with each of them, and compares the bytes
that a rank holds and sends with the formulas of zero_memory.py.

Psi: parameters. N: ranks. Differences from the paper: shards are of layers and not of the whole
model (one flat parameter each, flat_parameter.py), as in FSDP, so no bucket size is needed; stage 3
gathers a layer when it is needed and does not prefetch the next.

    python training/zero.py                                  # stages 0 to 3 on two ranks
    python training/zero.py --ranks 4 --stages 3
    torchrun --nproc_per_node 2 training/zero.py
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from training import manifest, ranks, tiny, zero_memory
from training.zero_stages import DataParallel, ZeRO1, ZeRO2, ZeRO3
from utils import checkpoint, figures, run


@dataclass(frozen=True)
class Config:
    """Train a small language model with sharded states; count bytes that ranks hold and send."""

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


def train(model, engine, text, cfg, start=0):
    """Steps `start` to cfg.steps; yields the loss over all ranks, and the bytes held.

    These are counted between the last backward pass and the optimizer's step.
    """
    for i in range(start, cfg.steps):
        # This rank's part of the batch, in micro-batches.
        ids = tiny.share(tiny.batch(text, cfg.seed, i, cfg.batch, cfg.length))
        total = 0.0
        for micro_batch in ids.chunk(cfg.accumulate):
            # Forward and backward; from stage 2 on, gradients are reduced here.
            loss = tiny.loss(model, micro_batch) / cfg.accumulate
            engine.backward(loss)
            total += loss.item()
        held = zero_memory.bytes_held(engine, model)
        # Gradients to their owners (stages 0 and 1), optimizer, updated parameters to all.
        engine.step()
        yield tiny.mean(total), held


STAGES = [DataParallel, ZeRO1, ZeRO2, ZeRO3]


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
    # Resume: each rank reads the shards that it wrote.
    if cfg.resume:
        before = checkpoint.load_state(manifest.load(folder) / shard_file, engine=engine)
        run.same_flags(cfg, before["config"], folder)
        losses = before["losses"]
    state = {"engine": engine, "config": asdict(cfg), "losses": losses}

    def save(place):
        checkpoint.save_state(place / shard_file, **state)

    # Training, all collectives counted.
    start = len(losses)
    held = zero_memory.bytes_held(engine, model)
    with ranks.Traffic() as traffic:
        for loss, held in train(model, engine, text, cfg, start):  # noqa: B007
            run.check(
                math.isfinite(loss),
                f"the loss is {loss}; the last checkpoint is kept. Try a lower --lr",
            )
            losses.append(loss)
            if cfg.save_every and len(losses) % cfg.save_every == 0:
                manifest.save(folder, len(losses), save)
    # Bytes sent are those of a step.
    steps = max(1, cfg.steps - start)
    sent = {name: size / steps for name, size in traffic.sent.items()}
    psi = sum(p.numel() for p in model.parameters())
    return {"losses": losses, "held": held, "sent": sent, "psi": psi}


COLOURS = {"weights": "tab:blue", "gradients": "tab:orange", "optimizer": "tab:green"}
SENT = {"all_reduce": "tab:gray", "reduce_scatter": "tab:orange", "all_gather": "tab:blue"}


def draw_bytes(path, found, cfg, psi, n):
    """Left: what a rank holds, measured (bars) and by the formula (lines).

    Right: what it sends in a step.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
    weights = psi * (2 if cfg.bf16 else 4)
    for i, (stage, row) in enumerate(found.items()):
        line = [i - 0.42, i + 0.42]
        expected = zero_memory.formula(psi, n, stage, cfg.bf16)
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
        expected_sent = zero_memory.volume(weights, n, stage, cfg.accumulate) / 2**20
        right.plot(line, [expected_sent] * 2, color="black", linewidth=1)
    left.set(ylabel="MiB", title=f"held by one of {n} ranks; lines: the formula")
    title = f"sent in a step of {cfg.accumulate} micro-batches; lines: the formula"
    right.set(ylabel="MiB", title=title)
    names = [f"stage {stage}" if stage else "data parallel" for stage in found]
    for axis in (left, right):
        axis.set_xticks(range(len(found)), names)
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
    # Every rank takes as many micro-batches, all of one size.
    n = ranks.count(cfg.ranks)
    parts = n * cfg.accumulate
    run.check(
        cfg.batch % parts == 0,
        f"--batch {cfg.batch} does not fall into {n} ranks x {cfg.accumulate} parts",
    )
    run.check(cfg.save_every >= 0, "--save-every must be 0 or more")
    # To resume, every stage must have left a checkpoint.
    if cfg.resume:
        folder = Path(cfg.out)
        for stage in cfg.stages:
            manifest.load(folder / f"stage{stage}")
    else:
        folder = run.output(cfg.out, cfg)
    found = ranks.launch(worker, cfg, cfg.ranks)
    if found is None:
        return {}
    # The first rank's bytes, beside the formulas.
    rows = found[0]
    psi = next(iter(rows.values()))["psi"]
    weights = psi * (2 if cfg.bf16 else 4)
    metrics = {}
    for stage, row in rows.items():
        expected = zero_memory.formula(psi, n, stage, cfg.bf16)
        expected_sent = zero_memory.volume(weights, n, stage, cfg.accumulate)
        metrics[f"stage {stage}"] = {
            **{f"{kind}_MiB": size / 2**20 for kind, size in row["held"].items()},
            "total_MiB": sum(row["held"].values()) / 2**20,
            "formula_MiB": sum(expected.values()) / 2**20,
            "sent_MiB": sum(row["sent"].values()) / 2**20,
            "formula_sent_MiB": expected_sent / 2**20,
            "loss": row["losses"][-1],
        }
    draw_bytes(folder / "zero.png", rows, cfg, psi, n)
    figures.curves(folder / "loss.png", {f"stage {s}": row["losses"] for s, row in rows.items()})
    metrics |= {"parameters": psi, "ranks": n}
    return run.report(folder, metrics, then="python training/memory.py")


if __name__ == "__main__":
    run.cli(main, Config)
