"""Several vision encoders in one row of tokens: spatial vision aggregator (SVA), concatenation of channels.

Cambrian-1, Tong et al. 2024, arXiv:2406.16860, Sec. 3. An L x L grid of learned queries; each attends to
its own region of every encoder's map, and to nothing else. A map of m L x m L places gives a query m x m
of them: encoders of other resolutions need not be resized. The other way is to average each region and put
the channels of all encoders side by side.

Shapes: K encoders, features (B,N_k,D_k) with N_k = (m_k L)^2, row by row -> tokens (B,L*L,E).
Differences from the paper: one head, one place before the language model, queries of C = E.
"""

import torch
from einops import rearrange
from torch import nn

from utils.run import check
from vlm.connector import mlp
from vlm.token_sparsity import grid


def regions(x, side):
    """(B,N,D) -> the places of each region of a grid of `side` x `side`: (B,side*side,m*m,D).

    Raises UserError if the map does not fall into such regions."""
    maps = grid(x)
    g = maps.shape[1]
    check(g % side == 0, f"a map of {g} x {g} does not fall into {side} x {side} equal regions")
    return rearrange(maps, "b (h p) (w q) d -> b (h w) (p q) d", h=side, w=side)


class SvaLayer(nn.Module):
    """Cross-attention of each query (B,Q,E) to its own region (B,Q,R,E), then a feed-forward network."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.LayerNorm(width), mlp(2, width, width))

    def attention_weights(self, queries, context):
        """softmax(q k / sqrt(C)) over the places of its region, of all encoders: (B,Q,R). Eq. 1."""
        q = self.query(self.norm(queries))
        logits = torch.einsum("bqe,bqre->bqr", q, self.key(context))
        return (logits / q.shape[-1] ** 0.5).softmax(-1)

    def forward(self, queries, context):
        weights = self.attention_weights(queries, context)
        read = torch.einsum("bqr,bqre->bqe", weights, self.value(context))
        x = queries + self.out(read)
        return x + self.feed_forward(x)


class SpatialAggregator(nn.Module):
    """Features of K encoders, widths `dims` -> L*L tokens of width E, by `depth` layers of SVA."""

    def __init__(self, dims, width, side, depth=2):
        super().__init__()
        self.side = side
        # one width for all encoders, and each normalised: the loudest would have all attention
        self.project = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width)) for dim in dims]
        )
        self.queries = nn.Parameter(torch.randn(side * side, width) / width**0.5)
        self.layers = nn.ModuleList([SvaLayer(width) for _ in range(depth)])

    def context(self, features):
        """Places of each query's region, those of all encoders: (B,L*L,R,E), R = sum of m_k^2."""
        projected = [join(x) for join, x in zip(self.project, features)]
        return torch.cat([regions(x, self.side) for x in projected], 2)

    def forward(self, features):
        context = self.context(features)
        x = self.queries.expand(len(context), -1, -1)
        for layer in self.layers:
            x = layer(x, context)
        return x


class ChannelConcat(nn.Module):
    """The mean of each region, channels of all encoders side by side, an MLP: (B,L*L,E)."""

    def __init__(self, dims, width, side):
        super().__init__()
        self.side = side
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for dim in dims])
        self.mlp = mlp(2, sum(dims), width)

    def forward(self, features):
        parts = [norm(x) for norm, x in zip(self.norms, features)]
        means = [regions(x, self.side).mean(2) for x in parts]
        return self.mlp(torch.cat(means, -1))
