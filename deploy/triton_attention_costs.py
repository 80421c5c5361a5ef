"""Costs of attention, predicted: bytes that move, bytes kept for the backward pass, FLOPs.

Dao et al. 2022, arXiv:2205.14135, Theorem 2: eager attention (its Algorithm 0) moves of the order of T D + T S
numbers, FlashAttention T S D^2 / (size of the on-chip memory). Here for tiles of M queries and N keys
the programs' own loads and stores are counted, to the byte; a cache serves many of them, as all tiles of a
head read the same keys. `least_bytes`: each tensor once.

Shapes: B sequences, H heads of queries, K heads of keys and values; T queries, S keys of D numbers.
"""

from dataclasses import dataclass

FLOAT = 4  # bytes of a number of logsumexp and delta


@dataclass(frozen=True)
class Shape:
    """What attention is asked for. number: bytes of a number."""

    B: int
    H: int
    K: int
    T: int
    S: int
    D: int
    causal: bool = True
    number: int = 2


def loaded_keys(shape, tile):
    """For each tile of queries, how many keys it loads: whole tiles, up to the last key that it sees."""
    M, N = tile
    loaded = []
    for first in range(0, shape.T, M):
        end = shape.S
        if shape.causal:
            end = min(shape.S, first + M + shape.S - shape.T)
        loaded.append(min(shape.S, -(-end // N) * N))
    return loaded


def eager_bytes(shape):
    """S = Q K^T is written, read by the softmax, P is written, and read by P V; Q, K, V and O are small beside."""
    scores = 4 * shape.T * shape.S
    others = 2 * shape.T * shape.D + 2 * shape.S * shape.D
    return shape.B * shape.H * shape.number * (scores + others)


def forward_bytes(shape, tile):
    """What programs of `flash_forward` load and store: keys and values once for each tile of queries.

    tile: (M, N).
    """
    rows = 2 * shape.T * shape.D
    keys = sum(2 * end * shape.D for end in loaded_keys(shape, tile))
    return shape.B * shape.H * (shape.number * (rows + keys) + FLOAT * shape.T)


def backward_bytes(shape, dq_tile, dkdv_tile):
    """What programs of `flash_delta`, `flash_dq` and `flash_dkdv` load and store. Tiles: (M, N) of each."""
    heads = shape.B * shape.H
    # delta: O and dO are read, a number a row is written
    delta = heads * (shape.number * 2 * shape.T * shape.D + FLOAT * shape.T)
    # by rows: Q, dO and two numbers a row, dQ; keys and values of each tile
    keys = sum(2 * end * shape.D for end in loaded_keys(shape, dq_tile))
    rows = 3 * shape.T * shape.D
    dq = heads * (shape.number * (rows + keys) + 2 * FLOAT * shape.T)
    # by columns: for each tile of keys the queries from the diagonal on, of each head of its group
    M, N = dkdv_tile
    seen = 0
    for first in range(0, shape.S, N):
        begin = 0
        if shape.causal:
            begin = max(0, first - (shape.S - shape.T)) // M * M
        seen += max(0, shape.T - begin)
    columns = heads * seen * (shape.number * 2 * shape.D + 2 * FLOAT)
    own = shape.B * shape.K * shape.number * 4 * shape.S * shape.D
    return delta + dq + columns + own


def least_bytes(shape):
    """Forward: each of Q, K, V and O once, and the logsumexp."""
    queries = shape.B * shape.H * (shape.number * 2 * shape.T * shape.D + FLOAT * shape.T)
    return queries + shape.B * shape.K * shape.number * 2 * shape.S * shape.D


def kept_bytes(shape, flash):
    """Kept for the backward pass: Q, K, V and P; or Q, K, V, O and the logsumexp."""
    inputs = shape.number * shape.D * shape.B * (shape.H * shape.T + 2 * shape.K * shape.S)
    rows = shape.B * shape.H * shape.T
    if flash:
        return inputs + rows * (shape.number * shape.D + FLOAT)
    return inputs + rows * shape.S * shape.number


def forward_flops(shape):
    """Two products, 2 T S D each; of a causal mask the visible part, half of them if T = S."""
    pairs = shape.T * shape.S
    if shape.causal:
        pairs -= shape.T * (shape.T - 1) // 2
    return 4 * shape.B * shape.H * pairs * shape.D


def decode_bytes(lengths, K, G, D, number=2):
    """One query a sequence over lengths of cached tokens -> {"gathered", "paged"}: bytes that move.

    Gathered: blocks are read, written into one tensor as long as the longest, and that is read. Paged: read
    once.
    """
    tokens = sum(lengths)
    padded = len(lengths) * max(lengths)
    queries = 2 * len(lengths) * K * G * D
    token = 2 * K * D
    return {
        "gathered": number * (3 * padded * token + queries),
        "paged": number * (tokens * token + queries),
    }
