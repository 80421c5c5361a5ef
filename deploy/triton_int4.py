"""Product with int4 weights in Triton, dequantised in the kernel: a weight is half a byte until it is in registers.

y = x W^T with W = (code - zero) * scale, as deploy/quantizers.py lays it out: a scale and a zero point for
each group of inputs of a row, two codes a byte, the first in the low bits. A layer at batch 1 reads each
weight once and does two operations with it, so its time is that of the bytes: a quarter of those of fp16.

Shapes: x (..., in), packed (out, in / 2) uint8, scales and zeros (out, groups).
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl

from deploy.triton_matmul import widen
from utils.run import check


@triton.jit
def int4_matmul_kernel(
    x,
    packed,
    scales,
    zeros,
    y,
    m,
    n,
    k,
    groups,
    group_size,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of y: BLOCK_M rows of x (m, k) times BLOCK_N rows of W (n, k). BLOCK_K divides group_size,
    or one group is the whole row."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    in_bytes = tl.arange(0, BLOCK_K // 2)
    real_rows = (rows < m)[:, None]
    real_outputs = outputs < n
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        # x outside of its row is zero: what its weights are does not matter then
        x_mask = real_rows & (inner < k - start)[None, :]
        values = tl.load(x + rows[:, None] * k + (start + inner)[None, :], mask=x_mask, other=0.0)
        # two codes of each byte, one beside the other: (BLOCK_N, BLOCK_K / 2) -> (BLOCK_N, BLOCK_K)
        place = start // 2 + in_bytes
        byte_mask = real_outputs[:, None] & (place < k // 2)[None, :]
        bytes_ = tl.load(packed + outputs[:, None] * (k // 2) + place[None, :], byte_mask, other=0)
        codes = tl.interleave(bytes_ & 15, bytes_ >> 4)
        # all of this step lies in one group
        group = start // group_size
        scale = tl.load(scales + outputs * groups + group, mask=real_outputs, other=0.0)
        zero = tl.load(zeros + outputs * groups + group, mask=real_outputs, other=0.0)
        # w = (code - zero) * scale, in registers
        steps = codes.to(tl.float32) - zero.to(tl.float32)[:, None]
        weight = steps * scale.to(tl.float32)[:, None]
        if WIDEN:
            values = values.to(tl.float32)
        weight = tl.trans(weight.to(values.dtype))
        sums = tl.dot(values, weight, sums, input_precision=PRECISION)
    y_mask = real_rows & real_outputs[None, :]
    tl.store(y + rows[:, None] * n + outputs[None, :], sums, mask=y_mask)


def tile(rows, group_size, whole):
    """(BLOCK_M, BLOCK_N, BLOCK_K): few rows want many programs, so narrow tiles; a step stays in one group."""
    block_m = 16 if rows <= 16 else 64
    block_n = 32 if rows <= 16 else 64
    block_k = 64
    while not whole and group_size % block_k:
        block_k //= 2
    return block_m, block_n, block_k


def int4_matmul(x, packed, scales, zeros, precision="ieee"):
    """x (..., in) times W^T, packed (out, in / 2), scales and zeros (out, groups) -> (..., out).

    Raises UserError for shapes that do not fit, and for groups that 16 does not divide.
    """
    outputs, groups = scales.shape
    inputs = x.shape[-1]
    fits = packed.shape == (outputs, inputs // 2) and inputs % 2 == 0
    check(fits, f"packed codes {tuple(packed.shape)} for {inputs} inputs, {outputs} outputs")
    check(packed.dtype == torch.uint8, f"codes are bytes, not {packed.dtype}")
    check(zeros.shape == scales.shape, f"zeros {tuple(zeros.shape)}, scales {tuple(scales.shape)}")
    check(groups > 0 and inputs % groups == 0, f"{groups} groups do not divide {inputs} inputs")
    group_size = inputs // groups
    whole = groups == 1
    check(whole or group_size % 16 == 0, f"groups of {group_size}: a multiple of 16 is needed")
    rows = x.reshape(-1, inputs).contiguous()
    y = rows.new_empty(len(rows), outputs)
    block_m, block_n, block_k = tile(len(rows), group_size, whole)
    grid = (triton.cdiv(len(rows), block_m), triton.cdiv(outputs, block_n))
    if len(rows):
        int4_matmul_kernel[grid](
            rows,
            packed.contiguous(),
            scales.contiguous(),
            zeros.contiguous(),
            y,
            len(rows),
            outputs,
            inputs,
            groups,
            group_size,
            WIDEN=widen(x),
            PRECISION=precision,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
        )
    return y.view(*x.shape[:-1], outputs)


def int4_linear(layer, x):
    """What a QuantizedLinear of 4 bits puts out, from the codes as it stores them: x (..., in) -> (..., out).

    Raises UserError for a layer of other bits, or one that quantises its activations.
    """
    plain = layer.bits == 4 and layer.activation_bits == 16
    check(plain, f"a layer of {layer.bits} bits, activations of {layer.activation_bits}: 4 and 16")
    if layer.channels is not None:
        x = x / layer.channels.to(x.dtype)
    packed = layer.codes.view(layer.out_features, -1)
    y = int4_matmul(x, packed, layer.scales, layer.zeros)
    return y if layer.bias is None else y + layer.bias.to(x.dtype)
