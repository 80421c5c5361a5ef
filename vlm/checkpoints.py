"""Checkpoints of vlm/train.py: trained weights, and states to go on from, of one process or of sharded ranks.

A state of one process is a file, state.safetensors; with --save_total_limit N the last N are kept, as
state-STEP.safetensors. Sharded states (FSDP, DeepSpeed) are a folder of the library's own files, with our numbers
and a list of hashes beside them; files that are not on the list are not read.
"""

import os
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from finetune import llama2_full, llama2_lora
from training import manifest
from utils import checkpoint
from utils.run import UserError, check, same_flags
from vlm.flags import RESAMPLERS
from vlm.train_config import changed, engine_name


def gathered(model):
    """Around reading weights: with ZeRO-3 all ranks gather what is written; else nothing is to be done."""
    wanted = [p for p in model.parameters() if p.requires_grad] + [*model.connector.parameters()]
    wanted += [] if model.newline is None else [model.newline]
    if not any(hasattr(p, "ds_id") for p in wanted):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(dict.fromkeys(wanted)))


def whole(tensor):
    """A tensor, of FSDP's shards the whole one: every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def tensors(model):
    """Trained weights, by the names that vlm/llava_io.py reads. With a sharded model every rank must ask."""
    with gathered(model):
        found = {f"connector.{k}": v for k, v in model.connector.state_dict().items()}
        # LLaVA-1.6: the token that ends a row of tiles
        if model.newline is not None:
            found["newline"] = model.newline
        # LoRA in the language model
        for name in llama2_lora.names(model.language):
            adapter = model.language.get_submodule(name)
            found |= {f"lora.{name}.A": adapter.lora_A, f"lora.{name}.B": adapter.lora_B}
        # parts that were trained whole
        for part in ("vision", "language"):
            network = getattr(model, part)
            if not llama2_lora.names(network):
                for name, p in network.named_parameters():
                    if p.requires_grad:
                        found[f"{part}.{name}"] = p
        return {name: whole(x).detach().cpu().clone() for name, x in found.items()}


def about(cfg, tokenizer=None):
    """What stands beside the weights: enough to put the model together again, from whatever
    folder; with a tokenizer also its chat template."""
    common = {"scale": cfg.lora.alpha / cfg.lora.r}
    if tokenizer is not None:
        common["chat_template"] = tokenizer.chat_template
    # trained from another model: its parts are those of that one
    if cfg.train.ckpt_path:
        return common | base_of(cfg.train.ckpt_path)
    model = cfg.model
    named = {
        "vision": absolute(model.vision_name_or_path),
        "language": absolute(model.text_name_or_path),
        "connector": model.connector,
        "layer": model.vision_layer,
        "select": model.select,
    }
    # only where they say something
    if model.connector in RESAMPLERS:
        named["perceiver"] = asdict(model.perceiver)
    if model.sparsity_plugins:
        named["sparsity_plugins"] = list(model.sparsity_plugins)
    if model.img_size:
        named["img_size"] = model.img_size
    if model.tiles or model.image_grid_pinpoints:
        named["tiles"] = [model.tiles, [list(size) for size in model.image_grid_pinpoints]]
    if cfg.train.seed:
        named["seed"] = cfg.train.seed
    return common | named


def base_of(path):
    """The model that was gone on with: the names of its parts, if only its connector had learned;
    else its path, and of a file its hash, too."""
    if not str(path).endswith(".safetensors"):
        return {"base": absolute(path)}
    weights, meta = checkpoint.read(path)
    new = ("connector.", "newline")
    if "base" not in meta and all(name.startswith(new) for name in weights):
        return {k: v for k, v in meta.items() if k not in ("scale", "chat_template")}
    return {"base": absolute(path), "base_sha256": checkpoint.digest(weights, "")}


def absolute(name):
    """A folder or file by its whole path; a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def sharded(cfg):
    """Does each rank hold a part of the state?"""
    return engine_name(cfg) in ("fsdp", "deepspeed")


def parts_of(engine):
    """What a state of one process holds besides plain values."""
    parts = {
        "weights": llama2_full.Trained(engine.learner.model),
        "optimizer": engine.optimizer,
    }
    if engine.scaler.is_enabled():
        parts["scaler"] = engine.scaler
    return parts


def is_first():
    """Is this the first rank, or the only one?"""
    return not dist.is_initialized() or dist.get_rank() == 0


def numbered(folder):
    """{step: its file state-STEP.safetensors}, the newest first."""
    found = {}
    for path in Path(folder).glob("state-*.safetensors"):
        step = path.stem.removeprefix("state-")
        if step.isdecimal():
            found[int(step)] = path
    return dict(sorted(found.items(), reverse=True))


def save_file(cfg, engine, losses):
    """Write the state of one process; then drop older ones, all but the last --save_total_limit."""
    folder = Path(cfg.out)
    step = len(losses)
    limit = cfg.train.save_total_limit
    path = folder / (f"state-{step}.safetensors" if limit else "state.safetensors")
    # halves of files, of a run that was killed while it wrote them
    for half in folder.glob(".*.safetensors.*"):
        half.unlink(missing_ok=True)
    checkpoint.save_state(path, **parts_of(engine), config=asdict(cfg), losses=losses)
    # its name is on the disk, too: only then others may go
    there = os.open(folder, os.O_RDONLY)
    os.fsync(there)
    os.close(there)
    # those of later steps are of an earlier run in this folder
    kept = [old for number, old in numbered(folder).items() if number <= step][:limit]
    for old in [folder / "state.safetensors", *numbered(folder).values()]:
        if old != path and old not in kept:
            with suppress(OSError):
                old.unlink()


def load_file(cfg, engine):
    """Put the newest whole state of one process back -> the losses so far. Raises UserError."""
    folder = Path(cfg.out)
    found = [*numbered(folder).values(), folder / "state.safetensors"]
    found = [path for path in found if path.exists()]
    other = folder / "checkpoints"
    hint = f"{other} was written under --fsdp or --zero_stage: resume with the same"
    check(found or not other.exists(), hint)
    check(found, f"no checkpoint in {folder} to go on from; leave out --resume")
    # of several the newest whole one; the last one says itself what is wrong with it
    while len(found) > 1:
        try:
            checkpoint.read(found[0])
            break
        except UserError as error:
            if is_first():
                print(f"{error}; going on from {found[1]}", flush=True)
            del found[0]
    return checkpoint.load_state(found[0], cfg, **parts_of(engine))["losses"]


def save(cfg, engine, losses):
    """Write a checkpoint of this step, whole or not at all. Sharded, every rank calls it and
    writes its part."""
    if not sharded(cfg):
        if is_first():
            save_file(cfg, engine, losses)
        return

    def put(folder):
        if engine_name(cfg) == "deepspeed":
            engine.engine.save_checkpoint(
                folder.parent, folder.name, save_latest=False, exclude_frozen_parameters=True
            )
        else:
            save_shards(folder, engine)
        if dist.get_rank() == 0:
            flags = asdict(changed(cfg, ranks=dist.get_world_size()))
            checkpoint.save_state(folder / "run.safetensors", config=flags, losses=losses)

    keep = max(1, cfg.train.save_total_limit)
    manifest.save(Path(cfg.out) / "checkpoints", len(losses), put, keep)


def load(cfg, engine):
    """Put the last checkpoint back -> the losses so far. Raises UserError: there is none, or it is
    of another run."""
    # one process, or ranks that all hold the same
    if not sharded(cfg):
        return load_file(cfg, engine)
    folder = manifest.load(Path(cfg.out) / "checkpoints")
    state = checkpoint.load_state(folder / "run.safetensors")
    ranks = dist.get_world_size()
    before = state["config"]
    # FSDP: any number of ranks; DeepSpeed: as many as wrote it
    if engine_name(cfg) == "fsdp":
        before["train"]["ranks"] = ranks
    wrote = before["train"]["ranks"]
    check(wrote == ranks, f"--resume: {folder} was written by {wrote} ranks, not {ranks}")
    same_flags(changed(cfg, ranks=ranks), before, folder)
    if engine_name(cfg) == "deepspeed":
        engine.engine.load_checkpoint(folder.parent, folder.name, load_module_strict=False)
    else:
        load_shards(folder, engine)
    return state["losses"]


def shards(engine):
    """FSDP: the shards of this rank, of what learns, under names and places of the whole."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(engine.learner, engine.optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def save_shards(folder, engine):
    """FSDP: every rank writes its own shards."""
    import torch.distributed.checkpoint as dcp

    dcp.save(shards(engine), checkpoint_id=folder)


def load_shards(folder, engine):
    """FSDP: each rank reads, of all files, the rows that are its own now, whatever ranks wrote them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    state = shards(engine)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        engine.learner,
        engine.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )
