"""A decoder layer with fewer, larger operations: q, k and v in one product, gate and up in one.

With weights of 4 bits the products of a token take less time than what surrounds them: each operation on a few
hundred numbers costs microseconds, whatever it does. So layers with the same input are stacked, queries and
keys are rotated together, and the norm is one operation.

Shapes: as in llama.py.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from deploy.int8_linear import Int8Linear
from deploy.llama import Layer, Llama, rotate
from deploy.low_bit_layers import ROWS, Int4Int8Linear, Int4Linear
from utils.run import check


@torch.no_grad()
def stacked(layers):
    """Linear layers with the same input -> one that gives their outputs side by side. The layers stay as they are.

    Raises UserError if their types differ, or if packed rows do not come in whole blocks.
    """
    made = copy.deepcopy(layers[0])
    same = len({type(layer) for layer in layers}) == 1
    check(same, "layers of different types have no product in common")
    if isinstance(made, Int4Int8Linear):
        made.int4 = stacked([layer.int4 for layer in layers])
        made.int8 = stacked([layer.int8 for layer in layers])
    elif isinstance(made, Int4Linear):
        whole = all(layer.out_features % ROWS == 0 for layer in layers)
        check(whole, f"packed rows come in blocks of {ROWS}: these layers cannot be stacked")
        made.packed = torch.cat([layer.packed for layer in layers])
        made.grid = torch.cat([layer.grid for layer in layers], dim=1)
    elif isinstance(made, Int8Linear):
        made.codes = torch.cat([layer.codes for layer in layers])
        made.scale = torch.cat([layer.scale for layer in layers], dim=1)
    else:
        weight = torch.cat([layer.weight for layer in layers])
        made.weight = nn.Parameter(weight, requires_grad=False)
    # rows one below the other, biases too
    made.out_features = sum(layer.out_features for layer in layers)
    if getattr(made, "bias", None) is not None:
        bias = torch.cat([layer.bias for layer in layers])
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


def share(stack, layers):
    """Each layer reads its rows of the stack from now on: codes and weights are held once, scales twice."""
    if isinstance(stack, Int4Int8Linear):
        share(stack.int4, [layer.int4 for layer in layers])
        share(stack.int8, [layer.int8 for layer in layers])
    for name in ("packed", "codes", "weight"):
        if hasattr(stack, name):
            parts = getattr(stack, name).split([layer.out_features for layer in layers])
            for layer, rows in zip(layers, parts):
                getattr(layer, name).data = rows


def bytes_held(*modules):
    """Bytes of their parameters and buffers in memory; what several share counts once."""
    found = {}
    for module in modules:
        for x in [*module.parameters(), *module.buffers()]:
            storage = x.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


class FusedLayer(nn.Module):
    """The decoder layer of llama.py, the same numbers with fewer operations."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.head_dim = layer.head_dim
        self.kv_heads = layer.k.out_features // layer.head_dim
        attention = [layer.q, layer.k, layer.v]
        mlp = [layer.gate, layer.up]
        self.qkv = stacked(attention)
        self.gate_up = stacked(mlp)
        share(self.qkv, attention)
        share(self.gate_up, mlp)
        self.o = layer.o
        self.down = layer.down
        self.norm_attention = layer.norm_attention
        self.norm_mlp = layer.norm_mlp

    def forward(self, x, cos, sin, cache, number):
        # all heads of queries, keys and values in one product
        h = rms_norm(x, self.norm_attention)
        heads = self.qkv(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        turned = rotate(heads[:, : -self.kv_heads], cos, sin)
        q = turned[:, : -self.kv_heads]
        k = turned[:, -self.kv_heads :]
        v = heads[:, -self.kv_heads :]
        seen = cache.attend(number, q, k, v)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        # SwiGLU, both factors in one product
        h = rms_norm(x, self.norm_mlp)
        gate, up = self.gate_up(h).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rms_norm(x, norm):
    """The RMSNorm of a transformers module in one operation: (...,E) -> (...,E)."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def fused(model):
    """A Llama of transformers, with any linear layers -> our Llama, layers fused, with the weights of the model."""
    llama = Llama(model)
    llama.layers = nn.ModuleList(FusedLayer(layer) for layer in llama.layers)
    return llama
