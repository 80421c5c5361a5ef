"""Fused softmax in Triton: a program for each row, which is read once and written once.

Eager softmax(x) = exp(x - max x) / sum exp(x - max x) as four operations writes three intermediates to
memory; a row that fits into the registers of one block needs none.

Shapes: x (..., N), N at most 65536.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl

from utils.run import check

LARGEST = 65536


@triton.jit
def softmax_kernel(x, y, columns, BLOCK: tl.constexpr):
    """One row of x (rows, columns), contiguous -> the same row of y."""
    # 64 bits: rows times columns may pass 2^31
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    # read the row once; a column that there is not must not count: exp(-inf) = 0
    values = tl.load(x + row * columns + column, mask=inside, other=-float("inf")).to(tl.float32)
    # the largest value is taken off, so that no exponential overflows
    exponentials = tl.exp(values - tl.max(values, 0))
    probabilities = exponentials / tl.sum(exponentials, 0)
    tl.store(y + row * columns + column, probabilities, mask=inside)


def warps_of(block):
    """Warps of a block that holds a row: a thread has at most some 16 values."""
    return min(max(block // 512, 1), 16)


def softmax(x):
    """softmax over the last axis, (..., N) -> (..., N). Raises UserError for rows that are too long or empty."""
    columns = x.shape[-1]
    check(0 < columns <= LARGEST, f"a row of {columns}: one block holds 1 to {LARGEST} values")
    x = x.contiguous()
    y = torch.empty_like(x)
    rows = x.numel() // columns
    block = triton.next_power_of_2(columns)
    if rows:
        softmax_kernel[(rows,)](x, y, columns, BLOCK=block, num_warps=warps_of(block))
    return y
