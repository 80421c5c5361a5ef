"""Steps that attention kernels share: load and store a tile, mask its scores, online softmax.

Dao 2023, arXiv:2307.08691, Sec. 3.1; Milakov & Gimelshein 2018, arXiv:1805.02867.

Shapes: matrices of T or S rows of D numbers, contiguous; tiles of M
queries and N keys.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import triton
import triton.language as tl

# (M, N, warps) by kernel and head size: none of them spills registers, on sm_80 nor on sm_90
TILES = {
    "forward": {64: (128, 64, 8), 128: (128, 64, 8)},
    "dq": {64: (64, 64, 4), 128: (64, 32, 4)},
    "dkdv": {64: (32, 64, 8), 128: (32, 64, 8)},
}


@triton.jit
def load_tile(x, rows, length, D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows (M,) of a matrix (length,D) -> (M,D); those past the end are zeros. UPCAST: to float32."""
    numbers = rows[:, None] * D + tl.arange(0, D)[None, :]
    tile = tl.load(x + numbers, mask=rows[:, None] < length, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_tile(x, values, rows, length, D: tl.constexpr):
    """Values (M,D) to rows (M,) of a matrix (length,D), in its type; nothing past the end."""
    numbers = rows[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(x + numbers, values.to(x.dtype.element_ty), mask=rows[:, None] < length)


@triton.jit
def masked_scores(queries, keys, rows, columns, scale, T, S, CAUSAL: tl.constexpr):
    """s = scale q k^T, -inf where a query does not see a key: (M,D), (N,D) -> (M,N) in float32.

    The last query sees all keys: with T < S the queries are the last T tokens.
    """
    s = tl.dot(queries, tl.trans(keys)) * scale
    visible = columns[None, :] < S
    if CAUSAL:
        visible = visible & (columns[None, :] <= rows[:, None] + S - T)
    return tl.where(visible, s, float("-inf"))


@triton.jit
def keys_end(tile, T, S, M: tl.constexpr, CAUSAL: tl.constexpr):
    """How many keys a tile of queries sees: tiles of keys beyond the diagonal are skipped."""
    end = S
    if CAUSAL:
        end = tl.minimum(S, (tile + 1) * M + S - T)
    return end


@triton.jit
def online_softmax(s, values, m, total, acc):
    """One more tile of keys. Scores (M,N) and values (N,D) -> m, total (M,) and acc (M,D) with them in it.

    m: the largest score of each row so far; total: sum of exp(s - m); acc: sum of exp(s - m) v. What was summed
    under the old maximum shrinks by alpha. Milakov & Gimelshein 2018, Algorithm 3.
    """
    m_new = tl.maximum(m, tl.max(s, 1))
    alpha = tl.exp(m - m_new)
    p = tl.exp(s - m_new[:, None])
    total = total * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None] + tl.dot(p.to(values.dtype), values)
    return m_new, total, acc
