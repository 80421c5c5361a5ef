"""Fully sharded data parallel: ZeRO-3 as PyTorch has it. Zhao et al. 2023, arXiv:2304.11277; FSDP2 is `fully_shard`.

`fully_shard(layer)` replaces the weights of a layer by DTensors, which know their whole shape and hold one rank's
slice. Before the layer computes they are gathered, afterwards let go, and gradients come back in slices; zero.py shows
how. Which modules are wrapped decides what is gathered at once. AdamW needs no word of all this: it sees slices.

Checkpoints: sharded (each rank writes its slices, any number of ranks can go on from them), full (one ordinary model
folder) and, for LoRA, the adapter alone, in PEFT's layout. N: ranks.

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

from training import manifest, ranks, tiny
from utils import checkpoint, figures, run


@dataclass(frozen=True)
class Config:
    """Train a small language model whose weights, gradients and optimizer states lie in slices on all ranks."""

    method: Literal["full", "lora"] = "full"  # train all weights, or low-rank corrections
    # what is gathered at once: a layer, or the whole model
    wrap: Literal["layers", "root"] = "layers"
    bf16: bool = False  # compute and send in bf16; slices and optimizer stay in fp32
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

        model = get_peft_model(
            model,
            LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    return model.to(ranks.device())


def shard(model, cfg):
    """Each layer by itself and what is left at the root, as ZeRO-3 does; or everything in one piece.

    Embedding and head are one weight in this model: both must be in one piece, here the root's. Wrapped one by one they
    would be two slices of two weights that drift apart; PyTorch refuses that today, and did not always.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device().type, (dist.get_world_size(),))
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32) if cfg.bf16 else MixedPrecisionPolicy()
    )
    llama = model.get_base_model() if cfg.method == "lora" else model
    for layer in llama.model.layers if cfg.wrap == "layers" else ():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def train(model, optimizer, text, cfg, start=0):
    """Steps `start` to cfg.steps; yields the loss over all ranks, before the gradients are let go."""
    for i in range(start, cfg.steps):
        optimizer.zero_grad()
        loss = tiny.loss(model, tiny.share(tiny.batch(text, cfg.seed, i, cfg.batch, cfg.length)))
        loss.backward()
        optimizer.step()
        yield tiny.mean(loss.item())


def save(folder, model, optimizer, plain):
    """The sharded checkpoint: every rank writes its own slices, under names and places of the whole."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    if dist.get_rank() == 0:
        checkpoint.save_state(folder / "plain.safetensors", **plain)


def plain_of(folder):
    """The plain values of a checkpoint."""
    return checkpoint.load_state(folder / "plain.safetensors")


def load(folder, model, optimizer):
    """Read into the slices of this rank whatever ranks wrote -> the plain values."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return plain_of(folder)


def export(model, cfg, folder):
    """The full checkpoint: all slices come to rank 0, which writes an ordinary folder; of LoRA adapter and base."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=cfg.method == "lora"
    )
    weights = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        if cfg.method == "full":
            weights.pop("lm_head.weight", None)  # is the embedding
            checkpoint.write(folder / "model.safetensors", weights)
            model.config.save_pretrained(folder)
        else:
            tensors = {name.replace(".default", ""): x for name, x in weights.items()}
            checkpoint.write(folder / "adapter_model.safetensors", tensors)
            # the base was drawn by the seed and stands still: without it the adapter would be of no use
            run.seed(cfg.seed)
            base = (folder / "base").resolve()
            tiny.llama(cfg.width, cfg.layers).save_pretrained(base)
            model.peft_config["default"].base_model_name_or_path = str(base)
            model.peft_config["default"].save_pretrained(folder)
    manifest.wait()


def worker(cfg):
    """What every rank does -> losses, and the bytes that it holds and sends."""
    model, text = shard(build(cfg), cfg), tiny.corpus().to(ranks.device())
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, cfg.lr, weight_decay=0.01)
    folder, losses = Path(cfg.out), []
    if cfg.resume:
        place = manifest.load(folder / "sharded")
        # Before anything is loaded
        run.same_flags(cfg, plain_of(place)["config"] | {"ranks": cfg.ranks}, folder)
        losses = load(place, model, optimizer)["losses"]
    plain = {"config": asdict(cfg), "losses": losses}
    with ranks.Traffic() as traffic:
        start = len(losses)
        for loss in train(model, optimizer, text, cfg, start):
            run.check(
                math.isfinite(loss),
                f"the loss is {loss}; the last checkpoint is kept. Try a lower --lr",
            )
            losses.append(loss)
            if cfg.save_every and len(losses) % cfg.save_every == 0:
                manifest.save(
                    folder / "sharded",
                    len(losses),
                    lambda place: save(place, model, optimizer, plain),
                )
    found = {"losses": losses, "held": ranks.states(model, optimizer)}
    ids = tiny.share(tiny.batch(text, cfg.seed, 0, cfg.batch, cfg.length))
    found["highest"] = sum(found["held"].values()) + ranks.allocated(
        lambda: tiny.loss(model, ids).backward()
    )
    found["sent"] = {kind: size / max(1, cfg.steps - start) for kind, size in traffic.sent.items()}
    # DTensors tell the whole shape
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["slices"] = [
        [name, list(p.shape), list(p.to_local().shape)] for name, p in model.named_parameters()
    ]
    (folder / "model").mkdir(parents=True, exist_ok=True)
    export(model, cfg, folder / "model")
    return found


def draw(path, found):
    """Who holds which rows of the weights of one layer, of the embedding and of the last norm."""
    import matplotlib.pyplot as plt

    kept = [
        x
        for x in found[0]["slices"]
        if ".layers.0." in x[0] or "embed" in x[0] or x[0].endswith("model.norm.weight")
    ]
    figure, axes = plt.subplots(1, len(kept), figsize=(1.25 * len(kept), 2.6))
    colours = plt.get_cmap("Set2")
    for i, (axis, (name, whole, _)) in enumerate(zip(axes, kept)):
        top = 0
        for rank, row in enumerate(found):
            rows = next(mine[0] for other, _, mine in row["slices"] if other == name)
            axis.barh(
                top,
                1,
                rows,
                align="edge",
                color=colours(rank % 8),
                label=f"rank {rank}" if i == 0 else None,
            )
            top += rows
        axis.set(ylim=(top, 0), xlim=(0, 1), xticks=[], yticks=[0, top])
        axis.tick_params(labelsize=6)
        axis.set_title(
            name.removesuffix(".weight").split(".")[-1].replace("_layernorm", "\nnorm"), fontsize=7
        )
        axis.set_xlabel(" x ".join(map(str, whole)), fontsize=7)
    figure.suptitle("who holds which rows", fontsize=10)
    figure.legend(
        ncols=len(found), loc="lower center", frameon=False, fontsize=8, bbox_to_anchor=(0.5, -0.08)
    )
    figure.tight_layout(pad=0.4)
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Train in slices, count, save in three ways."""
    run.check(
        min(cfg.steps, cfg.layers, cfg.batch) > 0 and cfg.lr > 0,
        "--steps, --layers, --batch, --lr: above 0",
    )
    run.check(cfg.width > 0 and cfg.width % 8 == 0, "--width must be a multiple of 8")
    run.check(1 < cfg.length <= 1024, "--length is 2 to 1024 bytes")
    n = ranks.count(cfg.ranks)
    run.check(cfg.batch % n == 0, f"--batch {cfg.batch} does not fall into {n} equal shares")
    run.check(cfg.save_every >= 0, "--save-every must be 0 or more")
    if cfg.resume:
        manifest.load(Path(cfg.out) / "sharded")
    folder = run.output(cfg.out, cfg) if not cfg.resume else Path(cfg.out)
    found = ranks.launch(worker, cfg, cfg.ranks)
    if found is None:
        return {}
    mine, psi = found[0], found[0]["parameters"]
    metrics = {"loss": mine["losses"][-1], "parameters": psi, "ranks": n}
    metrics |= {f"{kind}_MiB": size / 2**20 for kind, size in mine["held"].items()}
    metrics |= {
        "total_MiB": sum(mine["held"].values()) / 2**20,
        "highest_MiB": mine["highest"] / 2**20,
    }
    if cfg.method == "full":
        metrics["formula_MiB"] = 16 * psi / n / 2**20
    metrics |= {f"{kind}_sent_MiB": size / 2**20 for kind, size in mine["sent"].items()}
    draw(folder / "slices.png", found)
    figures.curves(folder / "loss.png", {"loss": mine["losses"]}, x="step", y="nats a byte")
    return run.report(folder, metrics, then="python training/tensor_parallel.py")


if __name__ == "__main__":
    run.cli(main, Config)
