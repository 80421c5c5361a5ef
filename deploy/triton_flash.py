"""FlashAttention-2 in Triton: exact attention whose scores never leave the chip, forward and backward.

Dao 2023, arXiv:2307.08691, Algorithm 1; the tiling and its count of bytes: Dao et al. 2022,
arXiv:2205.14135, Theorem 2; the online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867. Eager
attention writes T x S scores and reads them again. Here a program keeps a tile of queries, goes
through the keys tile by tile, and corrects its sums whenever the largest score grows. The backward
pass (triton_flash_backward.py) computes the scores again, from the logsumexp of each row. Differs from
the authors' kernels: tensors are contiguous, exp instead of exp2, every tile masked, no dropout.

Needs Triton; on a CPU the kernels run in its interpreter (triton_offline.py). What they cost:
triton_attention.py; attention over the blocks of a cache: triton_paged.py.

Shapes: B sequences, H heads of queries, K heads of keys and values, each for G = H / K of queries; T
queries and S keys of D numbers; tiles of M queries and N keys.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import math

import torch
import triton
import triton.language as tl

from deploy.triton_flash_backward import backward
from deploy.triton_tiles import (
    TILES,
    keys_end,
    load_tile,
    masked_scores,
    online_softmax,
    store_tile,
)
from utils.run import check


@triton.jit
def flash_forward(
    q, k, v, out, lse, scale, T, S,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Algorithm 1: a tile of M queries of one head -> its outputs, and the logsumexp of its scores.

    q, out (B H,T,D), k, v (B K,S,D), lse (B H,T) float32. Grid: (tiles of queries, B H).
    """
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)  # 64 bits: a large tensor has more than 2^31 numbers
    rows = tile * M + tl.arange(0, M)
    queries = load_tile(q + head * T * D, rows, T, D, UPCAST)
    # G heads of queries share keys and values
    k += head // G * S * D
    v += head // G * S * D
    # of each row: the largest score, the sum of exponentials, the sum of values weighted by them
    m = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, D), tl.float32)
    for start in range(0, keys_end(tile, T, S, M, CAUSAL), N):
        columns = start + tl.arange(0, N)
        keys = load_tile(k, columns, S, D, UPCAST)
        s = masked_scores(queries, keys, rows, columns, scale, T, S, CAUSAL)
        values = load_tile(v, columns, S, D, UPCAST)
        m, total, acc = online_softmax(s, values, m, total, acc)
    # divide once, at the end
    store_tile(out + head * T * D, acc / total[:, None], rows, T, D)
    tl.store(lse + head * T + rows, m + tl.log(total), mask=rows < T)


class FlashAttention(torch.autograd.Function):
    """The kernels as one step of autograd: q, k, v, out and a number a row are kept for the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, causal, scale):
        (B, H, T, D), (_, K, S, _) = q.shape, k.shape
        out = torch.empty_like(q)
        lse = q.new_empty((B, H, T), dtype=torch.float32)
        # UPCAST: products in float32 on a CPU, for the interpreter's bf16 is wrong
        about = {"G": H // K, "D": D, "CAUSAL": causal, "UPCAST": not q.is_cuda}
        M, N, warps = TILES["forward"][D]
        grid = (triton.cdiv(T, M), B * H)
        flash_forward[grid](q, k, v, out, lse, scale, T, S, M=M, N=N, num_warps=warps, **about)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        ctx.about = about
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        gradients = backward(q, k, v, out, lse, dout.contiguous(), ctx.scale, ctx.about)
        return *gradients, None, None


def flash_attention(q, k, v, is_causal=False, scale=None):
    """softmax(scale q k^T) v. Queries (B,H,T,D), keys and values (B,K,S,D) -> (B,H,T,D); gradients, too.

    scale: 1 / sqrt(D) if None. is_causal: the last query sees all keys, each one before it one less.
    Raises UserError for shapes or types that these kernels do not know.
    """
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    check(D in TILES["forward"], f"heads of {D} numbers: these kernels know {list(TILES['dq'])}")
    check(k.shape == v.shape == (B, K, S, D), "keys and values need one shape, (B,K,S,D)")
    check(H % K == 0, f"{H} heads of queries are no multiple of {K} of keys and values")
    check(min(T, S) > 0, "attention needs a query and a key")
    check(not is_causal or S >= T, f"causal: {T} queries are more than {S} keys")
    check(q.dtype == k.dtype == v.dtype, "queries, keys and values need one type")
    half = q.element_size() == 2
    check(half or not q.is_cuda, f"{q.dtype}: on a GPU these kernels take bf16 and fp16")
    scale = scale or 1 / math.sqrt(D)
    return FlashAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), is_causal, scale)


def transformers_attention(module, query, key, value, attention_mask, scaling=None, **about):
    """What `register` tells transformers of: (B,H,T,D), (B,K,S,D) -> (B,T,H,D), and no attention weights.

    Raises UserError for padding, a sliding window or dropout: these kernels have no mask but the causal one.
    """
    check(attention_mask is None, "padded prompts: these kernels take prompts of equal length")
    check(not about.get("sliding_window"), "a sliding window: these kernels attend to all")
    check(not about.get("dropout"), "these kernels have no dropout: set attention_dropout to 0")
    is_causal = about.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    out = flash_attention(query, key, value, is_causal, scaling)
    return out.transpose(1, 2), None


def register(name="triton"):
    """Any model of transformers can be loaded with attn_implementation=name after this."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(name, transformers_attention)
    # the mask of FlashAttention: none, unless there is padding
    AttentionMaskInterface.register(name, flash_attention_mask)
