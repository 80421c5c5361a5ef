"""Layers whose weights stay in 4 bits: int4 products of the CPU, an 8-bit table, int8 for many rows.

A token alone costs what it costs to read the weights, so it wants few bytes: torch's packed int4 product,
group-wise, w = (c - 8) s + z with a scale s and a zero point z for each 32 weights. A prompt costs arithmetic,
and there integers win: `Int4Int8Linear` takes int4 for few rows and int8 (int8_linear.py) for many.

Activations are float32. The int4 product takes bfloat16, so its input, its scales and its output are rounded
to 8 bits of mantissa; codes are exact, sums are float32.

Shapes: x (...,K), weights (N,K), y (...,N), G = K / 32 groups a row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deploy.int8_linear import Int8Linear
from deploy.low_bit_gguf import BLOCK, dequantise_q4_1, q4_1, q8_0, read_smollm2
from utils.run import check

ROWS = 64  # rows that the CPU's product packs together
FEW = 12  # rows up to which int4 is quicker than int8


class Int4Linear(nn.Module):
    """y = x W^T + b, weights in 4-bit codes (N,K) 0..15 with scale and zero point (N,G): w = (c - 8) s + z."""

    def __init__(self, codes, scale, zero, bias=None):
        super().__init__()
        self.out_features, self.in_features = codes.shape
        # the packed product wants rows in blocks of 64; those that are added are cut off again
        more = -self.out_features % ROWS
        codes = F.pad(codes, (0, 0, 0, more))
        grid = F.pad(torch.stack([scale, zero], dim=2), (0, 0, 0, 0, 0, more))
        self.packed: torch.Tensor
        self.grid: torch.Tensor
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        self.register_buffer("packed", pack(codes.int(), 1))  # uint8 (N,K/2)
        # scales and zero points of a group, side by side: (G,N,2)
        self.register_buffer("grid", grid.transpose(0, 1).contiguous().bfloat16())
        self.bias = bias

    def forward(self, x):
        rows = x.reshape(-1, self.in_features).bfloat16()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        # what was added to fill a block of rows is cut off
        y = product(rows, self.packed, BLOCK, self.grid)
        y = y[:, : self.out_features].to(x.dtype)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


def from_q4_1(codes, scale, minimum, bias=None):
    """Int4Linear of a Q4_1 matrix: c d + m = (c - 8) d + (m + 8 d)."""
    return Int4Linear(codes, scale, minimum + 8 * scale, bias)


class NibbleLinear(Int4Linear):
    """y = x W^T + b with the 8-bit codes of Q8_0, as an int4 product of twice as many columns.

    c + 128 = 16 h + l, two nibbles, so c s = (h - 8) 16 s + (l - 8) s + 8 s: x meets both.
    """

    def __init__(self, codes, scale, bias=None):
        unsigned = codes.int() + 128
        # high nibbles, then low ones, each with its scale
        nibbles = torch.cat([unsigned >> 4, unsigned & 15], dim=1)
        scales = torch.cat([16 * scale, scale], dim=1)
        zeros = torch.cat([torch.zeros_like(scale), 8 * scale], dim=1)
        super().__init__(nibbles, scales, zeros, bias)

    def forward(self, x):
        return super().forward(torch.cat([x, x], dim=-1))


class Q8Embedding(nn.Module):
    """A table of embeddings in int8 codes (V,E), a float16 scale for each 32: ids (...) -> float32 (...,E)."""

    def __init__(self, codes, scale):
        super().__init__()
        self.codes: torch.Tensor
        self.scale: torch.Tensor
        self.weight: torch.Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.half())
        # caches take type and device of what they keep from here
        self.register_buffer("weight", torch.empty(0, codes.shape[1]), persistent=False)

    def forward(self, ids):
        blocks = self.codes[ids].unflatten(-1, (-1, BLOCK)).float()
        return (blocks * self.scale[ids].float().unsqueeze(-1)).flatten(-2)


class Int4Int8Linear(nn.Module):
    """The same weights twice: int4 for up to FEW rows (decode), int8 for more (prefill)."""

    def __init__(self, int4, int8):
        super().__init__()
        self.int4 = int4
        self.int8 = int8
        self.in_features = int4.in_features
        self.out_features = int4.out_features

    def forward(self, x):
        few = x.numel() <= FEW * self.in_features
        return self.int4(x) if few else self.int8(x)


def int8_of(codes, scale, minimum, bias=None):
    """Int8Linear of a Q4_1 matrix, a scale for each row: rounded once more."""
    linear = nn.Linear(codes.shape[1], codes.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(dequantise_q4_1(codes, scale, minimum), requires_grad=False)
    made = Int8Linear(linear)
    made.bias = bias
    return made


def quantised(model) -> dict[str, Any]:
    """Q4_1 codes of every linear layer of a model but the head, Q8_0 codes of the head:
    {name: (codes, scale, minimum) or (codes, scale)}."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            fits = module.in_features % BLOCK == 0
            check(fits, f"{name} has {module.in_features} inputs: blocks of {BLOCK} do not fit")
            found[name] = q8_0(module.weight) if name == "lm_head" else q4_1(module.weight)
    return found


@torch.no_grad()
def int4_layers(model, codes=None, prefill_int8=False):
    """Replace all linear layers of a Llama of transformers, and its embedding, in place -> the model, float32.

    codes: what `read_smollm2` gives, or None: they are made of the weights. prefill_int8: int8 layers for many
    rows, too, at a byte more for each weight. Raises UserError for widths that are no multiples of 32.
    """
    kept = quantised(model) if codes is None else codes
    # norms, biases, an embedding that is not tied; scales of the layers below stay in 16 bits
    model.float()
    for name, parts in kept.items():
        bias = model.get_submodule(name).bias
        if name != "lm_head":
            made = from_q4_1(*parts, bias=bias)
            if prefill_int8:
                made = Int4Int8Linear(made, int8_of(*parts, bias=bias))
        else:
            # head and embeddings are one table
            made = NibbleLinear(*parts, bias=bias)
            if model.lm_head.weight is model.get_input_embeddings().weight:
                model.set_input_embeddings(Q8Embedding(*parts))
        model.set_submodule(name, made)
    return model


def int4_smollm2(model, prefill_int8=False):
    """SmolLM2 with the very codes of its file, in place -> the model."""
    return int4_layers(model, read_smollm2(model.config), prefill_int8)
