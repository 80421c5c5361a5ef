"""Calibration activations: what the linear layers of a decoder are given, layer after layer.

The first decoder layer is caught in the forward pass of the whole model; from there on one layer at
a time runs, so that memory holds the inputs of one layer only. This is how GPTQ's authors walk
through a model (Frantar et al. 2022, arXiv:2210.17323, Sec. 4).

Shapes: hidden states (B, T, D), inputs of a linear layer (n, in), n = all tokens of all batches.
"""

import torch
from torch import nn

from utils.run import check


def decoder_layers(model):
    """The stack of decoder layers: the longest list of modules with linear layers in them.

    Raises UserError if there is none.
    """
    stacks = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and linear_layers(module):
            stacks.append(module)
    check(stacks, "the model has no stack of layers with linear layers in them")
    return max(stacks, key=len)


def linear_layers(module):
    """{name: layer} of all linear layers."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


class Caught(Exception):
    """Ends a forward pass when the inputs of the first layer are there."""


def first_inputs(model, layers, batches):
    """What the first decoder layer is called with: [(hidden states, keyword arguments)], a batch each."""
    caught = []

    def catch(layer, args, kwargs):
        caught.append((args[0], kwargs))
        raise Caught

    hook = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for batch in batches:
        try:
            model(**batch, use_cache=False)
        except Caught:
            continue
    hook.remove()
    return caught


def run_layer(layer, calls):
    """One decoder layer on every batch -> what the next one is called with."""
    passed = []
    for hidden, kwargs in calls:
        out = layer(hidden, **kwargs)
        passed.append((out[0] if isinstance(out, tuple) else out, kwargs))
    return passed


def layer_inputs(layer, calls):
    """{name: inputs (n, in)} of all linear layers of a decoder layer, over all batches."""
    seen = {name: [] for name in linear_layers(layer)}
    hooks = []
    for name, linear in linear_layers(layer).items():

        def keep(module, args, rows=seen[name]):
            rows.append(args[0].flatten(0, -2).float())

        hooks.append(linear.register_forward_pre_hook(keep))
    run_layer(layer, calls)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}
