"""Fused RMSNorm in Triton, forward and backward (Zhang & Sennrich 2019, arXiv:1910.07467).

y = x / rms(x) * w, rms(x) = sqrt(mean(x^2) + eps). With xn = x / rms(x) and g = w dy the gradients are
dx = (g - xn mean(g xn)) / rms(x) and dw = sum over rows of dy xn. The forward pass keeps one number a
row, 1 / rms(x); the backward pass reads x and dy once. A program takes several rows, adds up its part
of dw in registers, and the parts are added at the end: no two programs write to one place.

Shapes: x (..., N), w (N,), N at most 65536. Arithmetic in float32, whatever x is.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl

from deploy.triton_softmax import LARGEST, warps_of
from utils.run import check

ROWS_OF_A_PROGRAM = 16  # of the backward pass: as many fewer parts of dw


@triton.jit
def rms_norm_kernel(x, w, y, inverse_rms, columns, eps, BLOCK: tl.constexpr):
    """One row of x (rows, columns) -> the row of y (rows, columns), and 1 / rms of it (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    values = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(w + column, mask=inside, other=0.0).to(tl.float32)
    # columns that there are not hold zeros, which add nothing to the sum; the mean is over those that are
    mean_square = tl.sum(values * values, 0) / columns
    inverse = 1.0 / tl.sqrt(mean_square + eps)
    tl.store(inverse_rms + row, inverse)
    tl.store(y + row * columns + column, values * inverse * weight, mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    x, w, dy, inverse_rms, dx, dw_parts, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """ROWS rows -> their dx (rows, columns), and this program's row of dw_parts (programs, columns)."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    weight = tl.load(w + column, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    # the last program may have fewer rows
    first = program * ROWS
    for number in range(first, min(first + ROWS, rows)):
        row = tl.cast(number, tl.int64)
        values = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(dy + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_rms + row)
        # xn = x / rms, and the gradient of what is multiplied by it
        normalised = values * inverse
        weighted = gradient * weight
        # the part of the gradient along xn is taken off: a longer x gives the same y
        along = tl.sum(weighted * normalised, 0) / columns
        tl.store(
            dx + row * columns + column, (weighted - normalised * along) * inverse, mask=inside
        )
        dw += gradient * normalised
    tl.store(dw_parts + program * columns + column, dw, mask=inside)


class RMSNorm(torch.autograd.Function):
    """rms_norm as autograd sees it."""

    @staticmethod
    def forward(ctx, x, w, eps):
        x = x.contiguous()
        columns = x.shape[-1]
        rows = x.numel() // columns
        y = torch.empty_like(x)
        inverse_rms = x.new_empty(rows, dtype=torch.float32)
        block = triton.next_power_of_2(columns)
        rms_norm_kernel[(rows,)](
            x, w, y, inverse_rms, columns, eps, BLOCK=block, num_warps=warps_of(block)
        )
        ctx.save_for_backward(x, w, inverse_rms)
        return y

    @staticmethod
    def backward(ctx, *gradients):
        x, w, inverse_rms = ctx.saved_tensors
        dy = gradients[0].contiguous()
        columns = x.shape[-1]
        rows = inverse_rms.numel()
        programs = triton.cdiv(rows, ROWS_OF_A_PROGRAM)
        dx = torch.empty_like(x)
        dw_parts = x.new_empty(programs, columns, dtype=torch.float32)
        block = triton.next_power_of_2(columns)
        rms_norm_backward_kernel[(programs,)](
            x,
            w,
            dy,
            inverse_rms,
            dx,
            dw_parts,
            rows,
            columns,
            ROWS=ROWS_OF_A_PROGRAM,
            BLOCK=block,
            num_warps=warps_of(block),
        )
        return dx, dw_parts.sum(0).to(w.dtype), None


def rms_norm(x, w, eps=1e-6):
    """RMSNorm over the last axis, with gradients: x (..., N), w (N,) -> (..., N).

    Raises UserError for a weight that does not fit, and for rows that are empty or too long for a block.
    """
    columns = x.shape[-1]
    check(w.shape == (columns,), f"a weight of {tuple(w.shape)} for rows of {columns}")
    check(0 < columns <= LARGEST, f"a row of {columns}: one block holds 1 to {LARGEST} values")
    check(x.numel() > 0, "no rows")
    return RMSNorm.apply(x, w.contiguous(), eps)
