"""Injection of adapters: find the target layers of a model, put an adapter around each, merge them
again.

The base model is frozen. A target is the end of a name or a regular expression; one that names
nothing, a layer outside of the part that may change, or a tied weight is a UserError.
"""

import re

import torch
from torch import nn

from finetune.lora_layers import ADAPTERS, FEEDFORWARD, LORA_LAYERS, IA3Linear
from utils import run


def matches(name, targets):
    """A target is the end of a name, in whole words, or a regular expression for all of it."""
    return any(f".{name}".endswith(f".{t}") or re.fullmatch(t, name) for t in targets)


def linear_layers(model):
    """Names of the linear layers of any kind, quantised ones, too."""
    return [name for name, m in model.named_modules() if hasattr(m, "in_features")]


def find(model, targets, within=""):
    """Linear layers that `targets` name. Raises UserError for none, or one outside of `within`."""
    linear = linear_layers(model)
    flag = f"--targets {' '.join(targets)}"
    try:
        found = [name for name in linear if matches(name, targets)]
    except re.error as error:
        raise run.UserError(f"{flag}: not a regular expression ({error})") from None
    # a target that names nothing: say what there is, equal layers once
    kinds = ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in linear))
    run.check(found, f"{flag} names no linear layer; there are: {kinds}")
    # a target that names too much, such as layers of a frozen vision tower
    prefix = f"{within}." if within else ""
    outside = [name for name in found if not f"{name}.".startswith(prefix)]
    listed = ", ".join(outside[:3])
    run.check(not outside, f"{flag} names layers outside of {within}: {listed}")
    return found


def refuse_tied(model, names):
    """Raises UserError for a module that is not there, or whose weights are tied: a head that is
    the embedding, too.
    """
    # the modules that own each weight
    modules = dict(model.named_modules())
    owners = {}
    for name, module in modules.items():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(name)
    # a weight of several owners is tied
    for name in names:
        run.check(name in modules, f"--also {name}: there is no such module")
        for p in modules[name].parameters():
            several = " and ".join(owners[id(p)])
            run.check(
                len(owners[id(p)]) == 1,
                f"{several} are one and the same weight: neither can be adapted alone",
            )


def check_rank(rank, dropout):
    possible = rank > 0 and 0 <= dropout < 1
    run.check(possible, "--rank must be at least 1, --dropout at least 0 and below 1")


def inject(model, targets, rank, alpha, dropout=0.0, variant="lora", within="", also=()):
    """Freeze the model and put an adapter around every target, in place -> the names of the layers.

    within: the part of the model that may be changed; also: names of modules to train whole.
    """
    check_rank(rank, dropout)
    names = find(model, targets, within)
    return inject_at(model, names, rank, alpha, dropout, variant, also)


def inject_at(model, names, rank, alpha, dropout=0.0, variant="lora", also=(), bias="none"):
    """`inject` for layers that are named in full. bias: which biases learn, too (`biases`)."""
    refuse_tied(model, [*names, *also])
    # All of the base model is frozen.
    model.requires_grad_(False)
    # Each target gives its place to an adapter that holds it.
    for name in names:
        base = model.get_submodule(name)
        if variant == "ia3":
            adapter = IA3Linear(base, feedforward=name.rpartition(".")[2] in FEEDFORWARD)
        else:
            adapter = LORA_LAYERS[variant](base, rank, alpha, dropout)
        replace_module(model, name, adapter)
    # PEFT's modules_to_save: trained whole, in fp32.
    for name in also:
        model.get_submodule(name).float().requires_grad_(True)
    # PEFT's bias.
    for name in biases(model, bias):
        model.get_parameter(name).requires_grad_(True)
    return names


def biases(model, bias):
    """Names of the biases that are trained beside the adapters, as PEFT means its option `bias`.

    "none"; "lora_only": those of the layers that carry an adapter; "all": every one of the model.
    """
    found = [n for n, _ in model.named_parameters() if n == "bias" or n.endswith(".bias")]
    if bias == "lora_only":
        adapted = {f"{name}.base.bias" for name in names(model)}
        found = [name for name in found if name in adapted]
    return [] if bias == "none" else found


def replace_module(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def names(model):
    """The layers that carry an adapter."""
    return [name for name, m in model.named_modules() if isinstance(m, ADAPTERS)]


@torch.no_grad()
def merge(model):
    """Merge every adapter into its layer and take it out, in place -> the model, as fast as it was.

    PEFT calls it merge_and_unload. There is no way back (unmerge), for W and s B A are one sum now:
    keep the adapter's file, and `load` it into the base model again.
    """
    for name in names(model):
        adapter = model.get_submodule(name)
        whole = isinstance(adapter.base, nn.Linear)
        run.check(whole, f"{name} is quantised: nothing can be added to it")
        merged = adapter.merge()
        replace_module(model, name, merged)
    return model
