"""PagedAttention in Triton: one query of each sequence attends to keys and values where their blocks lie.

Kwon et al. 2023, arXiv:2309.06180, Sec. 4.3. A decoding step without it gathers the blocks of each sequence
into one tensor first: all keys and values are read, written, and read again. Here a program looks each
token's block up in the block table. A long sequence is split into parts, so that one sequence keeps a whole
GPU busy: each part has its own softmax, and its logsumexp says what it weighs (Flash-Decoding, Dao et al.
2023). Differs from vLLM's: a tile may begin within a block, so that blocks can have any size.

Needs Triton; on a CPU the kernels run in its interpreter (triton_offline.py).

Shapes: B sequences, K heads of keys and values, each for G heads of queries, H = K G; D numbers a head; N
blocks of `size` tokens (paged_cache.py); a block table of W blocks a sequence; P parts.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import math

import torch
import triton
import triton.language as tl

from deploy.paged_cache import PagedCache
from deploy.triton_tiles import load_tile, online_softmax, store_tile
from utils.run import check

TILE = 64  # tokens of a tile
PART = 512  # a longer sequence is split
PARTS = 16  # into so many parts at most


@triton.jit
def paged_part(
    q, keys, values, tables, lengths, out, lse, scale, W, P,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attention of the G queries of one head of keys to one part of a sequence.

    q (B,K,G,D), keys, values (N,SIZE,K,D), tables (B,W), lengths (B,) -> out (B,P,K,G,D), lse (B,P,K,G),
    both float32. Grid: (B, K, P). ROWS: a power of two of 16 or more, G rows of which are queries.
    """
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    part = tl.program_id(2)
    # tokens of this part: whole tiles, the same number for each part
    length = tl.load(lengths + sequence)
    each = tl.cdiv(tl.cdiv(length, TILE), P) * TILE
    begin = part * each
    end = tl.minimum(begin + each, length)
    rows = tl.arange(0, ROWS)
    queries = load_tile(q + (sequence * K + head) * G * D, rows, G, D, UPCAST)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    for start in range(begin, end, TILE):
        tokens = start + tl.arange(0, TILE)
        there = tokens < end
        # where the tokens lie: block x size + place in the block
        blocks = tl.load(tables + sequence * W + tokens // SIZE, mask=there, other=0)
        slots = blocks.to(tl.int64) * SIZE + tokens % SIZE
        k = load_tokens(keys + head * D, slots, there, K, D, UPCAST)
        s = tl.dot(queries, tl.trans(k)) * scale
        s = tl.where(there[None, :], s, float("-inf"))
        v = load_tokens(values + head * D, slots, there, K, D, UPCAST)
        m, total, acc = online_softmax(s, v, m, total, acc)
    # a part without tokens: nothing, and its weight is exp(-inf)
    some = tl.where(total > 0, total, 1.0)
    row = ((sequence * P + part) * K + head) * G
    store_tile(out + row * D, acc / some[:, None], rows, G, D)
    tl.store(lse + row + rows, m + tl.log(some), mask=rows < G)


@triton.jit
def load_tokens(x, slots, there, K: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr):
    """Numbers of one head of the tokens in these slots (TILE,) -> (TILE,D); zeros where none is there."""
    numbers = slots[:, None] * K * D + tl.arange(0, D)[None, :]
    tile = tl.load(x + numbers, mask=there[:, None], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def merge_parts(parts, lse, out, P, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Parts (B,P,H,D), each by the weight exp(its logsumexp) -> out (B,H,D). Grid: (B, H)."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    numbers = tl.arange(0, BLOCK)
    rows = (sequence * P + numbers) * H + head
    row_lse = tl.load(lse + rows, mask=numbers < P, other=float("-inf"))
    weights = tl.exp(row_lse - tl.max(row_lse, 0))
    weights = weights / tl.sum(weights, 0)
    columns = tl.arange(0, D)
    found = tl.load(parts + rows[:, None] * D + columns, mask=numbers[:, None] < P, other=0.0)
    result = tl.sum(weights[:, None] * found, 0)
    tl.store(out + (sequence * H + head) * D + columns, result.to(out.dtype.element_ty))


def rows_of(G):
    """Rows of a tile of G queries: tensor cores want 16 or more, ranges of Triton a power of two."""
    return max(16, triton.next_power_of_2(G))


def paged_attention(q, keys, values, tables, lengths, scale=None, parts=None):
    """Queries (B,H,D), one a sequence; blocks (N,size,K,D); block tables (B,W) -> (B,H,D).

    lengths (B,): tokens of each sequence, at least one, its last the query's own. scale: 1 / sqrt(D) if
    None. parts: how many parts a sequence is split into; None: one for PART tokens, by the longest table.
    Raises UserError for shapes that do not fit together.
    """
    B, H, D = q.shape
    N, size, K, width = keys.shape
    check(width == D and keys.shape == values.shape, "queries, keys and values differ in shape")
    check(D >= 16 and D & (D - 1) == 0, f"heads of {D} numbers: a power of two, 16 or more")
    check(H % K == 0, f"{H} heads of queries are no multiple of {K} of keys and values")
    fits = tables.shape[0] == lengths.shape[0] == B
    check(fits, f"{B} queries need as many block tables and lengths")
    W = tables.shape[1]
    P = parts or min(triton.cdiv(W * size, PART), PARTS)
    G = H // K
    found = q.new_empty((B, P, H, D), dtype=torch.float32)
    lse = q.new_empty((B, P, H), dtype=torch.float32)
    about = {"K": K, "G": G, "D": D, "SIZE": size, "TILE": TILE, "UPCAST": not q.is_cuda}
    about["ROWS"] = rows_of(G)
    blocks = [x.contiguous() for x in (keys, values, tables, lengths)]
    scale = scale or 1 / math.sqrt(D)
    paged_part[(B, K, P)](q.contiguous(), *blocks, found, lse, scale, W, P, **about)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    merge_parts[(B, H)](found, lse, out, P, H=H, D=D, BLOCK=triton.next_power_of_2(P))
    return out


class TritonPagedCache(PagedCache):
    """A paged cache whose sequences with one new token attend with the kernel; chunks of prompts as before."""

    def attend_group(self, q, keys, values, tables, mask):
        if q.shape[2] > 1:
            return super().attend_group(q, keys, values, tables, mask)
        lengths = mask.sum(-1).flatten()
        return paged_attention(q[:, :, 0], keys, values, tables, lengths)[:, :, None]
