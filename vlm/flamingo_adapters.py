"""LoRA in the language model and in the gated layers of one Flamingo, in PEFT's own files.

LoRA: Hu et al. 2021, arXiv:2106.09685; Flamingo: Alayrac et al. 2022, arXiv:2204.14198. Besides the
low-rank updates, biases can learn (PEFT's `bias`) and modules that are trained whole (PEFT's
`modules_to_save`): the resampler, the gates, the new token embeddings. What `save` writes,
`PeftModel.from_pretrained(flamingo, folder)` of the PEFT library loads, and the reverse.

The flags are those of vlm/flamingo_lora.py: targets, lora_in, rank, lora_alpha, lora_dropout, bias,
modules_to_save.
"""

from typing import Literal

import torch
from torch import nn

from finetune import llama2_lora, lora_inject, peft_io
from utils.run import check

LoraIn = Literal["gated", "language", "both"]
Bias = Literal["none", "lora_only", "all"]
# Where targets are looked for; the resampler has layers of the same names
PARTS = {"gated": ("cross",), "language": ("language",), "both": ("language", "cross")}


def target_names(model, targets, lora_in):
    """Linear layers that `targets` name, ends of names or regular expressions, in the gated layers,
    the language model or both. Raises UserError for a part in which they name none."""
    found = []
    for part in PARTS[lora_in]:
        names = lora_inject.find(model.get_submodule(part), targets)
        found += [f"{part}.{name}" for name in names]
    return found


def saved_modules(model, asked):
    """Modules to train whole: ends of names, a list of modules stands for its members -> names in
    full. Raises UserError for none, and for a decoder layer of the language model."""
    modules = dict(model.named_modules())
    found = []
    for end in asked:
        matching = [name for name in modules if name and f".{name}".endswith(f".{end}")]
        flag = f"--modules_to_save {end}"
        known = "resampler, new_embeddings, gate_attention, gate_mlp, cross"
        check(matching, f"{flag}: there is no such module; there are {known} and others")
        for name in matching:
            # PEFT wraps no list of modules
            listed = isinstance(modules[name], nn.ModuleList)
            found += [f"{name}.{i}" for i in range(len(modules[name]))] if listed else [name]
    for name in found:
        # PEFT copies the module, and with it the hook, which would see no photo
        hooked = any(module._forward_pre_hooks for module in modules[name].modules())
        check(
            not hooked, f"--modules_to_save {name}: a gated layer hangs on it; adapt it with LoRA"
        )
    return list(dict.fromkeys(found))


def check_overlap(targets, saved):
    """Raises UserError for a module that is trained whole and holds a target, or another such
    module."""
    for name in saved:
        inside = [other for other in [*targets, *saved] if other.startswith(f"{name}.")]
        inside += [other for other in targets if other == name]
        check(not inside, f"--modules_to_save {name} holds {inside[:1]}: name one of them")


def check_lora(model, cfg):
    """Names of the targets, and of the modules to train whole; nothing is changed. Raises UserError
    for flags that do not fit."""
    possible = cfg.rank > 0 and cfg.lora_alpha > 0 and 0 <= cfg.lora_dropout < 1
    check(possible, "--rank and --lora_alpha must be above 0, --lora_dropout 0 or more, below 1")
    targets = target_names(model, cfg.targets, cfg.lora_in)
    saved = saved_modules(model, cfg.modules_to_save)
    check_overlap(targets, saved)
    lora_inject.refuse_tied(model, [*targets, *saved])
    return targets, saved


def add_lora(model, cfg):
    """Freeze a Flamingo and put LoRA beside the targets, in place -> names of these.

    Trained then: the low-rank updates, the biases that `bias` says, `modules_to_save` whole.
    """
    targets, saved = check_lora(model, cfg)
    lora_inject.inject_at(
        model, targets, cfg.rank, cfg.lora_alpha, cfg.lora_dropout, also=saved, bias=cfg.bias
    )
    # new modules are born in training mode
    for name in targets:
        model.get_submodule(name).train(model.training)
    return targets


def dropout_on(model):
    """LoRA's dropout in training mode, in place; all else, the language model's own, stays as it
    is."""
    for name in lora_inject.names(model):
        model.get_submodule(name).dropout.train()


def trained_whole(model):
    """Copies of all that learns without LoRA, before it does: {name: tensor}. Biases and
    modules_to_save are overwritten by training."""
    learns = model.trainable_parameters()
    return {name: p.detach().clone() for name, p in learns.items() if ".lora_" not in name}


@torch.no_grad()
def remove_lora(model, before=None):
    """Take LoRA out, in place, and put back what was trained whole (`trained_whole`): the model
    from before."""
    for name, tensor in (before or {}).items():
        model.get_parameter(name).copy_(tensor)
    for name in lora_inject.names(model):
        lora_inject.replace_module(model, name, model.get_submodule(name).base)
    return model


def save(model, folder, cfg):
    """Write the adapter as PEFT does: adapter_config.json, adapter_model.safetensors."""
    lora = llama2_lora.Config(rank=cfg.rank, alpha=cfg.lora_alpha, dropout=cfg.lora_dropout)
    saved = saved_modules(model, cfg.modules_to_save)
    # no task type: PEFT's are for models of transformers
    peft_io.save(model, folder, lora, also=saved, bias=cfg.bias, task_type=None)


def load(model, folder):
    """Put the adapter of a folder, ours or PEFT's, into a Flamingo, in place -> names of the
    layers. Raises UserError if it does not fit."""
    return peft_io.load(model, folder)
