"""Checkpoints and metric loggers of vlm/train.py: weights, states of one process or of DeepSpeed's ranks, records.

A checkpoint of DeepSpeed is a folder of its own files, with our numbers and a list of hashes beside
them; files that are not on the list are not read.
"""

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from finetune import llama2_full, llama2_lora
from training import manifest, zero_config
from utils import checkpoint
from utils.run import check, same_flags

LORA_SCALE = 2.0  # alpha over rank, of every adapter


def tensors(model):
    """Trained weights, by the names that vlm/llava_parts.py reads."""
    found = {f"connector.{k}": v for k, v in model.connector.state_dict().items()}
    # LoRA in the language model
    for name in llama2_lora.names(model.language):
        adapter = model.language.get_submodule(name)
        found |= {f"lora.{name}.A": adapter.lora_A, f"lora.{name}.B": adapter.lora_B}
    # parts that were trained whole
    for part in ("vision", "language"):
        network = getattr(model, part)
        if not llama2_lora.names(network):
            found |= {f"{part}.{k}": p for k, p in network.named_parameters() if p.requires_grad}
    return found


def about(cfg):
    """What stands beside the weights: enough to put the model together again, from whatever
    folder."""
    named = {k: getattr(cfg, k) for k in ("vision", "language", "connector", "layer", "select")}
    for part in ("vision", "language"):
        if Path(named[part]).is_dir():
            named[part] = str(Path(named[part]).resolve())
    return named | {"scale": LORA_SCALE}


def engine_of(learner, every, cfg):
    """DeepSpeed's engine around it, as training/configs/zero*.json says: it shards, sums parts,
    averages and steps.

    It casts every parameter to --precision and no buffer, and batch norms need both alike. So a
    tower that learns nothing is left as it is, and one that learns and has batch norms is refused
    in bf16.
    """
    # a tower whose batch norms would see two precisions
    tower = learner.model.vision
    learns = any(p.requires_grad for p in tower.parameters())
    has_batch_norm = any(isinstance(m, torch.nn.BatchNorm2d) for m in tower.modules())
    alike = cfg.precision == "fp32" or not has_batch_norm
    check(
        alike or not learns,
        "--train_type none: under DeepSpeed this tower learns in --precision fp32 only",
    )
    # configuration and optimizer
    flags = SimpleNamespace(
        zero_stage=cfg.zero_stage,
        config="",
        offload="none",
        precision=cfg.precision,
        batch=cfg.per_device_train_batch_size,
        accumulation=cfg.gradient_accumulation_steps,
    )
    config = zero_config.read(flags)
    optimizer = torch.optim.AdamW(every, weight_decay=cfg.weight_decay)
    # the engine casts the frozen tower: its values are put back
    kept = [] if learns else [(p, p.data) for p in tower.parameters()]
    engine = zero_config.quiet().initialize(model=learner, optimizer=optimizer, config=config)[0]
    for parameter, values in kept:
        parameter.data = values
    return engine


def save(cfg, model, optimizer, losses, engine=None):
    """Write a checkpoint of this step, whole or not at all. With DeepSpeed every rank calls it and
    writes its part."""
    if engine:

        def put(folder):
            engine.save_checkpoint(
                folder.parent, folder.name, save_latest=False, exclude_frozen_parameters=True
            )
            if dist.get_rank() == 0:
                ranks = {"ranks": dist.get_world_size()}
                checkpoint.save_state(
                    folder / "run.safetensors", config=asdict(cfg) | ranks, losses=losses
                )

        manifest.save(Path(cfg.out) / "checkpoints", len(losses), put)
    elif not dist.is_initialized() or dist.get_rank() == 0:
        kept = {"weights": llama2_full.Trained(model), "optimizer": optimizer}
        checkpoint.save_state(
            Path(cfg.out) / "state.safetensors", **kept, config=asdict(cfg), losses=losses
        )


def load(cfg, model, optimizer, engine=None):
    """Put the last checkpoint back -> the losses so far. Raises UserError: there is none, or it is
    of another run."""
    # one process, or plain ranks
    if not engine:
        found = Path(cfg.out) / "state.safetensors"
        return checkpoint.load_state(
            found, cfg, weights=llama2_full.Trained(model), optimizer=optimizer
        )["losses"]
    # DeepSpeed: as many ranks as wrote it
    folder = manifest.load(Path(cfg.out) / "checkpoints")
    state = checkpoint.load_state(folder / "run.safetensors")
    n = dist.get_world_size()
    check(
        state["config"]["ranks"] == n,
        f"--resume: {folder} was written by {state['config']['ranks']} ranks, not {n}",
    )
    same_flags(replace(cfg, ranks=n), state["config"], folder)
    engine.load_checkpoint(folder.parent, folder.name, load_module_strict=False)
    return state["losses"]


def metric_loggers(cfg, folder):
    """Metric loggers -> functions of (step, loss): TensorBoard's file, Weights & Biases' folder,
    which stays here."""
    loggers = []
    if cfg.enable_tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(folder / "tensorboard")

        def to_tensorboard(step, value):
            board.add_scalar("loss", value, step)
            board.flush()

        loggers.append(to_tensorboard)
    if cfg.enable_wandb:
        import wandb  # pyright: ignore[reportMissingImports]

        log = wandb.init(project="llava", dir=folder, mode="offline", config=asdict(cfg))
        loggers.append(lambda step, value: log.log({"loss": value}, step=step))
    return loggers
