"""Fully sharded data parallel: ZeRO-3 as PyTorch has it. Zhao et al. 2023, arXiv:2304.11277; FSDP2
is `fully_shard`.

`fully_shard(layer)` replaces the parameters of a layer by DTensors, which know their whole shape
and hold one rank's shard. Before the layer computes they are all-gathered, afterwards freed, and
gradients are reduce-scattered; zero_stages.py shows how. Which modules are wrapped decides what is
gathered at once. AdamW needs no word of all this: it sees shards. fsdp_checkpoint.py has the
checkpoints: sharded, full, and of LoRA the adapter alone. N: ranks.

    python training/fsdp.py
    python training/fsdp.py --method lora --bf16
    python training/fsdp.py --save-every 10 && python training/fsdp.py --ranks 1 --steps 40 --resume
    torchrun --nproc_per_node 2 training/fsdp.py
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from training import fsdp_checkpoint, manifest, ranks, tiny
from utils import figures, run


@dataclass(frozen=True)
class Config:
    """Train a small language model, its weights, gradients and optimizer states sharded."""

    method: Literal["full", "lora"] = "full"  # train all weights, or low-rank adapters
    # what is gathered at once: a layer, or the whole model
    wrap: Literal["layers", "root"] = "layers"
    bf16: bool = False  # compute and send in bf16; shards and optimizer stay in fp32
    ranks: int = 2  # processes; under torchrun or deepspeed theirs count
    width: int = 256  # of the model
    layers: int = 6  # of the model
    steps: int = 20  # training steps
    batch: int = 8  # pieces of text per step, of all ranks together
    length: int = 128  # bytes of a piece
    lr: float = 1e-3  # learning rate
    resume: bool = False  # go on from the last checkpoint in --out, on as many ranks as you like
    save_every: int = 0  # steps between checkpoints; 0: none are written
    seed: int = 0  # same seed, same numbers
    out: str = "outputs/fsdp"  # where the results go


def build(cfg):
    """The model, the same on every rank: all weights trained, or LoRA by PEFT."""
    run.seed(cfg.seed)
    model: Any = tiny.llama(cfg.width, cfg.layers)
    if cfg.method == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    return model.to(ranks.device())


def shard(model, cfg):
    """Each layer by itself and what is left at the root, as ZeRO-3 does; or everything at the root.

    Embedding and head are one weight in this model: both must be sharded at one place, here the
    root. Wrapped one by one they would be two weights with shards of their own that drift apart;
    PyTorch refuses that today, and did not always.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device().type, (dist.get_world_size(),))
    # Mixed precision: gathered and computed in bf16, gradients reduced in fp32.
    policy = MixedPrecisionPolicy()
    if cfg.bf16:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    # What is wrapped by itself is gathered by itself.
    llama = model.get_base_model() if cfg.method == "lora" else model
    if cfg.wrap == "layers":
        for layer in llama.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def train(model, optimizer, text, cfg, start=0):
    """Steps `start` to cfg.steps; yields the loss over all ranks. Gradients are still there."""
    for i in range(start, cfg.steps):
        optimizer.zero_grad()
        # This rank's part of the batch; each layer is gathered as it is needed.
        ids = tiny.share(tiny.batch(text, cfg.seed, i, cfg.batch, cfg.length))
        loss = tiny.loss(model, ids)
        # Gathered again, backwards; gradients are reduce-scattered.
        loss.backward()
        # On shards.
        optimizer.step()
        yield tiny.mean(loss.item())


def worker(cfg):
    """What every rank does -> losses, and the bytes that it holds and sends."""
    model = shard(build(cfg), cfg)
    text = tiny.corpus().to(ranks.device())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, cfg.lr, weight_decay=0.01)
    folder = Path(cfg.out)
    losses = []
    # Resume, on any number of ranks; flags are compared before anything is loaded.
    if cfg.resume:
        place = manifest.load(folder / "sharded")
        before = fsdp_checkpoint.load_plain(place)["config"]
        run.same_flags(cfg, before | {"ranks": cfg.ranks}, folder)
        losses = fsdp_checkpoint.load_sharded(place, model, optimizer)["losses"]
    plain = {"config": asdict(cfg), "losses": losses}

    def save(place):
        fsdp_checkpoint.save_sharded(place, model, optimizer, plain)

    # Training, all collectives counted.
    start = len(losses)
    with ranks.Traffic() as traffic:
        for loss in train(model, optimizer, text, cfg, start):
            run.check(
                math.isfinite(loss),
                f"the loss is {loss}; the last checkpoint is kept. Try a lower --lr",
            )
            losses.append(loss)
            if cfg.save_every and len(losses) % cfg.save_every == 0:
                manifest.save(folder / "sharded", len(losses), save)
    steps = max(1, cfg.steps - start)
    # Peak memory: what is held, and what one forward and backward pass adds.
    held = ranks.states(model, optimizer)
    ids = tiny.share(tiny.batch(text, cfg.seed, 0, cfg.batch, cfg.length))
    added = ranks.allocated(lambda: tiny.loss(model, ids).backward())
    # DTensors tell the whole shape, and that of the shard.
    shapes = [[k, list(p.shape), list(p.to_local().shape)] for k, p in model.named_parameters()]
    found = {
        "losses": losses,
        "held": held,
        "highest": sum(held.values()) + added,
        "sent": {kind: size / steps for kind, size in traffic.sent.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "shards": shapes,
    }
    (folder / "model").mkdir(parents=True, exist_ok=True)
    fsdp_checkpoint.save_full(model, cfg, folder / "model")
    return found


def draw_shards(path, found):
    """Who holds which rows of the parameters: one layer, the embedding, the last norm."""
    import matplotlib.pyplot as plt

    drawn = []
    for name, whole, _ in found[0]["shards"]:
        if ".layers.0." in name or "embed" in name or name.endswith("model.norm.weight"):
            drawn.append((name, whole))
    figure, axes = plt.subplots(1, len(drawn), figsize=(1.25 * len(drawn), 2.6))
    colours = plt.get_cmap("Set2")
    for i, (axis, (name, whole)) in enumerate(zip(axes, drawn)):
        # The rows of each rank, one below the other.
        top = 0
        for rank, row in enumerate(found):
            rows = next(mine[0] for other, _, mine in row["shards"] if other == name)
            label = f"rank {rank}" if i == 0 else None
            axis.barh(top, 1, rows, align="edge", color=colours(rank % 8), label=label)
            top += rows
        axis.set(ylim=(top, 0), xlim=(0, 1), xticks=[], yticks=[0, top])
        axis.tick_params(labelsize=6)
        short = name.removesuffix(".weight").split(".")[-1].replace("_layernorm", "\nnorm")
        axis.set_title(short, fontsize=7)
        axis.set_xlabel(" x ".join(map(str, whole)), fontsize=7)
    figure.suptitle("who holds which rows", fontsize=10)
    figure.legend(
        ncols=len(found), loc="lower center", frameon=False, fontsize=8, bbox_to_anchor=(0.5, -0.08)
    )
    figure.tight_layout(pad=0.4)
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Train sharded, count bytes, save sharded and full checkpoints."""
    run.check(
        min(cfg.steps, cfg.layers, cfg.batch) > 0 and cfg.lr > 0,
        "--steps, --layers, --batch, --lr: above 0",
    )
    run.check(cfg.width > 0 and cfg.width % 8 == 0, "--width must be a multiple of 8")
    run.check(1 < cfg.length <= 1024, "--length is 2 to 1024 bytes")
    n = ranks.count(cfg.ranks)
    run.check(cfg.batch % n == 0, f"--batch {cfg.batch} does not fall into {n} equal shares")
    run.check(cfg.save_every >= 0, "--save-every must be 0 or more")
    # To resume, there must be a checkpoint.
    if cfg.resume:
        folder = Path(cfg.out)
        manifest.load(folder / "sharded")
    else:
        folder = run.output(cfg.out, cfg)
    found = ranks.launch(worker, cfg, cfg.ranks)
    if found is None:
        return {}
    # The first rank's bytes, beside the formula.
    mine = found[0]
    psi = mine["parameters"]
    metrics = {"loss": mine["losses"][-1], "parameters": psi, "ranks": n}
    metrics |= {f"{kind}_MiB": size / 2**20 for kind, size in mine["held"].items()}
    metrics["total_MiB"] = sum(mine["held"].values()) / 2**20
    metrics["highest_MiB"] = mine["highest"] / 2**20
    if cfg.method == "full":
        metrics["formula_MiB"] = 16 * psi / n / 2**20
    metrics |= {f"{kind}_sent_MiB": size / 2**20 for kind, size in mine["sent"].items()}
    draw_shards(folder / "slices.png", found)
    figures.curves(folder / "loss.png", {"loss": mine["losses"]}, x="step", y="nats a byte")
    return run.report(folder, metrics, then="python training/tensor_parallel.py")


if __name__ == "__main__":
    run.cli(main, Config)
