"""Quantised ONNX files: dynamic int8 with a choice of what it may touch, and weights in blocks of 8 or 4 bits.

Dynamic quantisation stores weights in int8 and rounds the inputs of each product when they come, to 8
bits with one scale for the whole tensor (DynamicQuantizeLinear of ONNX). Where a few numbers are a
hundred times larger than the others, these are rounded to nothing (outlier features: Dettmers et al.
2022, arXiv:2208.07339, Sec. 3). MatMulNBits has a scale for each block of weights, and, with
accuracy_level 4, for each block of inputs.

Shapes: T tokens, n pieces of text.
"""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from deploy.export_onnx import quiet
from utils.run import check

# Linear layers of a decoder layer, in the order in which it calls them
KINDS = ("q", "k", "v", "o", "gate", "up", "down")


def dynamic_quantise(x):
    """Any tensor -> the same after 8 bits: s = (max - min) / 255, z = round(-min / s), x ~ s (c - z), c in 0 ... 255.
    The range always holds 0, so that 0 stays 0.
    """
    # range, scale and zero point of the whole tensor
    low = x.min().clamp(max=0)
    high = x.max().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(x.dtype).tiny)
    zero = torch.round(-low / scale).clamp(0, 255)
    # to codes and back
    codes = (torch.round(x / scale) + zero).clamp(0, 255)
    return scale * (codes - zero)


def linear_layers(step):
    """DecodeStep -> {kind: its linear layers}, the head last."""
    found = {kind: [getattr(layer, kind) for layer in step.llama.layers] for kind in KINDS}
    return found | {"head": [step.llama.head]}


@contextmanager
def quantised_inputs(layers):
    """The inputs of these linear layers pass through 8 bits, weights stay as they are."""
    hooks = []
    for layer in layers:

        def round_inputs(module, args):
            return (dynamic_quantise(args[0]),)

        hooks.append(layer.register_forward_pre_hook(round_inputs))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def score(logits_of, ids):
    """Pieces of text (n,T), each read in one pass -> mean of -log p, argmax tokens (n,T-1).

    logits_of: ids (1,T) -> logits (1,T,V).
    """
    summed = 0.0
    tokens = []
    for row in ids:
        logits = logits_of(row[None])[0, :-1].float()
        summed += float(F.cross_entropy(logits, row[1:], reduction="sum"))
        tokens.append(logits.argmax(-1))
    return summed / ids[:, 1:].numel(), torch.stack(tokens)


def sensitivity(step, ids):
    """{kind: nats that a token costs more when the inputs of these layers alone have 8 bits}, on calibration text."""
    # each kind alone, against none
    full, _ = score(step.logits, ids)
    lost = {}
    for kind, layers in linear_layers(step).items():
        with quantised_inputs(layers):
            rounded, _ = score(step.logits, ids)
        lost[kind] = rounded - full
    return lost


def kinds_of_nodes(graph):
    """Graph of a DecodeStep -> {name of a MatMul with a weight: its kind}: they stand in the order of the calls."""
    # products with weights, not those of attention
    weights = {tensor.name for tensor in graph.initializer}
    nodes = [n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    layers = (len(nodes) - 1) // len(KINDS)
    kinds = [*KINDS * layers, "head"]
    # a weight behind a Transpose, as that of a tied head, is no input of its MatMul
    check(len(nodes) == len(kinds), f"{len(nodes)} products with weights: not those of a decoder")
    return dict(zip(nodes, kinds))


def write_dynamic(source, target, **about):
    """ONNX file -> file with dynamic int8. about: what `quantize_dynamic` of onnxruntime takes."""
    from onnxruntime.quantization import quantize_dynamic

    with quiet():
        quantize_dynamic(source, target, **about)
    return Path(target)


def write_static(source, target, batches, per_channel=True):
    """ONNX file -> file with static int8: the scales of inputs are fixed before, from the largest and smallest values
    that calibration batches, {name: tensor} each, give. per_channel: a weight scale for each output channel.

    Inputs are unsigned, weights signed: for this pair CPUs have an instruction (VNNI).
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        """One batch after the other, then None."""

        def __init__(self):
            self.batches = iter(batches)

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return batch and {name: x.numpy() for name, x in batch.items()}

    check(batches, "static int8 needs calibration batches")
    with quiet():
        quantize_static(
            source, target, Reader(), per_channel=per_channel, activation_type=QuantType.QUInt8
        )
    return Path(target)


def write_chosen(source, target, kinds):
    """Dynamic int8 of the products of these kinds only, a weight scale for each channel."""
    import onnx

    # what is not chosen stays in float32
    graph = onnx.load(source, load_external_data=False).graph
    left = [name for name, kind in kinds_of_nodes(graph).items() if kind not in kinds]
    about = {"op_types_to_quantize": ["MatMul"], "per_channel": True, "nodes_to_exclude": left}
    return write_dynamic(source, target, **about)


def write_blocks(source, target, bits, block=32):
    """Weights in blocks of 8 or 4 bits (MatMulNBits), products in int8 (accuracy_level 4): without it the weights
    would be unpacked to float32 for each token.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    check(bits in (4, 8), f"{bits} bits: MatMulNBits has kernels for 4 and 8")
    power = block >= 16 and block & (block - 1) == 0
    check(power, f"--block {block}: 16, 32, 64 ... weights share a scale")
    with quiet():
        quantiser: Any = MatMulNBitsQuantizer(
            onnx.load(source), bits=bits, block_size=block, accuracy_level=4
        )
        quantiser.process()
        quantiser.model.save_model_to_file(str(target), False)
    return Path(target)


def perplexity(nats):
    """exp of the mean of -log p."""
    return float(np.exp(nats))
