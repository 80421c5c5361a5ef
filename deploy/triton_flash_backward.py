"""Backward pass of FlashAttention-2 in Triton: the scores are computed again, gradients tile by tile.

Dao 2023, arXiv:2307.08691, Algorithm 2; Dao et al. 2022, arXiv:2205.14135, App. B. With P = exp(S - L), L the
logsumexp of each row that the forward pass saved:

    dV = P^T dO,   dP = dO V^T,   dS = P * (dP - delta),   dQ = scale dS K,   dK = scale dS^T Q

Differs from the paper: dQ has a pass of its own, so that no two programs add to the same numbers.

Shapes: B sequences, H heads of queries, K heads of keys and values, each for G = H / K of queries; T
queries and S keys of D numbers; tiles of M queries and N keys.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl

from deploy.triton_tiles import TILES, keys_end, load_tile, masked_scores, store_tile


@triton.jit
def flash_delta(out, dout, delta, T, D: tl.constexpr, M: tl.constexpr):
    """delta = rowsum(dO * O), which stands for rowsum(dP * P): (B H,T,D) twice -> (B H,T) float32."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * M + tl.arange(0, M)
    o = load_tile(out + head * T * D, rows, T, D, True)
    do = load_tile(dout + head * T * D, rows, T, D, True)
    tl.store(delta + head * T + rows, tl.sum(o * do, 1), mask=rows < T)


@triton.jit
def flash_dq(
    q, k, v, dout, lse, delta, dq, scale, T, S,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Algorithm 2, by rows: a tile of M queries of one head goes through the keys -> dQ (B H,T,D).

    Grid: (tiles of queries, B H).
    """
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    rows = tile * M + tl.arange(0, M)
    queries = load_tile(q + head * T * D, rows, T, D, UPCAST)
    do = load_tile(dout + head * T * D, rows, T, D, UPCAST)
    row_lse = tl.load(lse + head * T + rows, mask=rows < T, other=0.0)
    row_delta = tl.load(delta + head * T + rows, mask=rows < T, other=0.0)
    k += head // G * S * D
    v += head // G * S * D
    acc = tl.zeros((M, D), tl.float32)
    for start in range(0, keys_end(tile, T, S, M, CAUSAL), N):
        columns = start + tl.arange(0, N)
        keys = load_tile(k, columns, S, D, UPCAST)
        values = load_tile(v, columns, S, D, UPCAST)
        # the scores once more, and from the saved logsumexp their softmax
        s = masked_scores(queries, keys, rows, columns, scale, T, S, CAUSAL)
        p = tl.exp(s - row_lse[:, None])
        # dS = P * (dP - delta)
        dp = tl.dot(do, tl.trans(values))
        ds = p * (dp - row_delta[:, None])
        acc += tl.dot(ds.to(keys.dtype), keys)
    store_tile(dq + head * T * D, acc * scale, rows, T, D)


@triton.jit
def flash_dkdv(
    q, k, v, dout, lse, delta, dk, dv, scale, T, S,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Algorithm 2, by columns: a tile of N keys goes through the queries -> dK, dV (B K,S,D).

    The G heads of queries that share the keys are summed here. Grid: (tiles of keys, B K).
    """
    first = tl.program_id(0) * N
    head = tl.program_id(1).to(tl.int64)
    columns = first + tl.arange(0, N)
    keys = load_tile(k + head * S * D, columns, S, D, UPCAST)
    values = load_tile(v + head * S * D, columns, S, D, UPCAST)
    acc_k = tl.zeros((N, D), tl.float32)
    acc_v = tl.zeros((N, D), tl.float32)
    # queries before the diagonal see none of these keys: their tiles are skipped
    begin = 0
    if CAUSAL:
        begin = tl.maximum(0, first - (S - T)) // M * M
    for query_head in range(head * G, head * G + G):
        for start in range(begin, T, M):
            rows = start + tl.arange(0, M)
            queries = load_tile(q + query_head * T * D, rows, T, D, UPCAST)
            do = load_tile(dout + query_head * T * D, rows, T, D, UPCAST)
            row_lse = tl.load(lse + query_head * T + rows, mask=rows < T, other=0.0)
            row_delta = tl.load(delta + query_head * T + rows, mask=rows < T, other=0.0)
            s = masked_scores(queries, keys, rows, columns, scale, T, S, CAUSAL)
            p = tl.exp(s - row_lse[:, None])
            # dV = P^T dO
            acc_v += tl.dot(tl.trans(p.to(values.dtype)), do)
            # dK = dS^T Q
            dp = tl.dot(do, tl.trans(values))
            ds = p * (dp - row_delta[:, None])
            acc_k += tl.dot(tl.trans(ds.to(keys.dtype)), queries)
    store_tile(dk + head * S * D, acc_k * scale, columns, S, D)
    store_tile(dv + head * S * D, acc_v, columns, S, D)


def backward(q, k, v, out, lse, dout, scale, about):
    """Gradients of q (B,H,T,D), k and v (B,K,S,D), given that of the output (B,H,T,D).

    out, lse: what the forward pass saved; about: the constants that its kernel was compiled for.
    """
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    # delta is needed by rows and by columns
    delta = torch.empty_like(lse)
    flash_delta[(triton.cdiv(T, 64), B * H)](out, dout, delta, T, D=D, M=64)
    inputs = (q, k, v, dout, lse, delta)
    # by rows
    dq = torch.empty_like(q)
    M, N, warps = TILES["dq"][D]
    grid = (triton.cdiv(T, M), B * H)
    flash_dq[grid](*inputs, dq, scale, T, S, M=M, N=N, num_warps=warps, **about)
    # by columns
    dk = torch.empty_like(k)
    dv = torch.empty_like(v)
    M, N, warps = TILES["dkdv"][D]
    grid = (triton.cdiv(S, N), B * K)
    flash_dkdv[grid](*inputs, dk, dv, scale, T, S, M=M, N=N, num_warps=warps, **about)
    return dq, dk, dv
