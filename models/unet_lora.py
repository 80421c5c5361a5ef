"""LoRA of a U-Net: small trainable matrices beside the frozen linear layers of its attention.

Hu et al. 2021, arXiv:2106.09685. W x becomes W x + (alpha / r) B A x, with A random and B zero, so that
nothing changes at first. Only A and B are trained. Merged, B A is added to W, and the network costs what it did.

Shapes: a linear layer maps (..., I) to (..., O); A (r, I), B (O, r).
"""

import math

import torch
from torch import nn

from utils import run

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the linear layers of diffusers' attention


class LoRA(nn.Module):
    """A frozen linear layer with a low-rank update: (..., I) -> (..., O). Eq. 3."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.lora_A.T @ self.lora_B.T)

    def merged(self):
        """The plain linear layer that does the same."""
        self.base.weight.data += self.scale * self.lora_B.data @ self.lora_A.data
        return self.base


def parent_of(model, name):
    """Module that holds the module `name`, and its name there."""
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def add_lora(model, rank, alpha):
    """Freeze the network, put LoRA on the linear layers of its attention, in place -> the names of those layers."""
    run.check(rank > 0, "--rank must be at least 1")
    model.requires_grad_(False)
    names = [name for name, _ in model.named_modules() if name.endswith(TARGETS)]
    for name in names:
        holder, last = parent_of(model, name)
        setattr(holder, last, LoRA(getattr(holder, last), rank, alpha))
    return names


def lora_state(model):
    """The trained matrices by name: what is kept, and all that is."""
    return {k: v for k, v in model.state_dict().items() if k.endswith(("lora_A", "lora_B"))}


def merge(model):
    """Add every update to its weight, in place; the network is a plain one again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRA):
            holder, last = parent_of(model, name)
            setattr(holder, last, module.merged())
    return model
