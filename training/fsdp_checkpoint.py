"""Checkpoints of FSDP2: sharded, full, and of LoRA the adapter alone.

Sharded: every rank writes its shards under names and places of the whole, so that any number of
ranks can go on from them. Full: one ordinary model folder, for `from_pretrained`. LoRA: the adapter
in PEFT's layout, and the base that it names.
"""

import torch.distributed as dist

from training import manifest, tiny
from utils import checkpoint, run


def save_sharded(folder, model, optimizer, plain):
    """The sharded checkpoint: every rank writes its own shards, under names and places of the
    whole.

    plain: what is no tensor, numbers and strings, the same on all ranks.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    if dist.get_rank() == 0:
        checkpoint.save_state(folder / "plain.safetensors", **plain)


def load_plain(folder):
    """The plain values of a sharded checkpoint."""
    return checkpoint.load_state(folder / "plain.safetensors")


def load_sharded(folder, model, optimizer):
    """Read into the shards of this rank whatever ranks wrote -> the plain values."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    # Each rank reads, of all files, the rows that are its own now.
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return load_plain(folder)


def save_full(model, cfg, folder):
    """The full checkpoint: all shards are gathered on rank 0, which writes an ordinary folder.

    Of LoRA the adapter, and beside it the base.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    # All ranks gather; of LoRA only what was trained.
    lora = cfg.method == "lora"
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=lora)
    weights = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        if lora:
            tensors = {name.replace(".default", ""): x for name, x in weights.items()}
            checkpoint.write(folder / "adapter_model.safetensors", tensors)
            # The base was drawn by the seed and is frozen: without it the adapter would be of no
            # use.
            run.seed(cfg.seed)
            base = (folder / "base").resolve()
            tiny.llama(cfg.width, cfg.layers).save_pretrained(base)
            checkpoint.shared_mode(base)
            model.peft_config["default"].base_model_name_or_path = str(base)
            model.peft_config["default"].save_pretrained(folder)
        else:
            weights.pop("lm_head.weight", None)  # is the embedding
            checkpoint.write(folder / "model.safetensors", weights)
            model.config.save_pretrained(folder)
    manifest.wait()
