"""Tiled matrix product in Triton: tiles of C, fp32 accumulation, programs in an order that the L2 cache likes.

A program computes one tile of C = A B. It walks along K and multiplies tiles of A and B, so that each value
that it loads is used BLOCK_M or BLOCK_N times. Programs that run at the same time should need the same tiles:
in grouped order they fill a band of GROUP rows of tiles, column after column, where row after row would read
all of B again for each row (Triton's tutorial 03, "L2 cache optimizations").

Shapes: A (M, K), B (K, N), C (M, N).
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl

from utils.run import check

GROUP = 8  # rows of tiles of a band
TILES = (128, 128, 32)  # BLOCK_M, BLOCK_N, BLOCK_K


@triton.jit
def grouped_tile(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Number of a program -> row and column of its tile. The last band may have fewer rows than GROUP."""
    of_a_band = GROUP * tiles_n
    first_row = program // of_a_band * GROUP
    rows = min(tiles_m - first_row, GROUP)
    # inside a band: down a column of tiles, then on to the next
    row = first_row + program % of_a_band % rows
    return row, program % of_a_band // rows


@triton.jit
def matmul_kernel(
    a,
    b,
    c,
    m,
    n,
    k,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_cm,
    stride_cn,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile (BLOCK_M, BLOCK_N) of C. WIDEN: tiles are multiplied in float32, for the interpreter."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # 64 bits: a row times its stride may pass 2^31
    a_tile = a + rows[:, None].to(tl.int64) * stride_am + inner[None, :] * stride_ak
    b_tile = b + inner[:, None] * stride_bk + columns[None, :].to(tl.int64) * stride_bn
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        # outside of A and B there are zeros, which add nothing
        left = inner < k - start
        a_values = tl.load(a_tile, mask=(rows < m)[:, None] & left[None, :], other=0.0)
        b_values = tl.load(b_tile, mask=left[:, None] & (columns < n)[None, :], other=0.0)
        if WIDEN:
            a_values = a_values.to(tl.float32)
            b_values = b_values.to(tl.float32)
        # accumulated in float32, also where operands have 16 bits
        sums = tl.dot(a_values, b_values, sums, input_precision=PRECISION)
        a_tile += BLOCK_K * stride_ak
        b_tile += BLOCK_K * stride_bk
    c_tile = c + rows[:, None].to(tl.int64) * stride_cm + columns[None, :] * stride_cn
    tl.store(c_tile, sums, mask=(rows < m)[:, None] & (columns < n)[None, :])


def widen(x):
    """Whether tiles of x are multiplied in float32: in the interpreter, which has no bfloat16.

    Raises UserError for a type that tensor cores are not asked to multiply here.
    """
    known = (torch.float16, torch.bfloat16, torch.float32)
    check(x.dtype in known, f"tiles of {x.dtype}: there are float16, bfloat16 and float32")
    return not x.is_cuda


def warps_of_tile(block):
    """Warps that share a tile of C: its sums lie in their registers, 64 a thread at (128, 128)."""
    return 8 if block[0] * block[1] >= 128 * 128 else 4


def matmul(a, b, block=TILES, group=GROUP, precision="ieee"):
    """A (M, K) times B (K, N), any strides -> (M, N) in the type of A.

    block: tile sizes (BLOCK_M, BLOCK_N, BLOCK_K), powers of two of at least 16. precision of float32:
    "ieee", or "tf32" on tensor cores, ten bits of mantissa. Raises UserError for shapes that do not fit.
    """
    check(a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0], f"{a.shape} times {b.shape}")
    check(a.dtype == b.dtype, f"{a.dtype} times {b.dtype}: both must be of one type")
    powers = all(size >= 16 and size & (size - 1) == 0 for size in block)
    check(powers and group > 0, f"tiles of {block}: powers of two, 16 or more; bands of 1 or more")
    m, k = a.shape
    n = b.shape[1]
    c = a.new_empty(m, n)
    block_m, block_n, block_k = block
    programs = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    if programs:
        matmul_kernel[(programs,)](
            a,
            b,
            c,
            m,
            n,
            k,
            *a.stride(),
            *b.stride(),
            *c.stride(),
            WIDEN=widen(a),
            PRECISION=precision,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GROUP=group,
            num_warps=warps_of_tile(block),
        )
    return c
