"""Perceiver resampler over the whole and all tiles of a picture: however many there are, K image tokens come out.

With any-resolution tiles (anyres.py) a picture costs (1 + T) g^2 image tokens. Here K learned latents query the
features of all its crops, the whole and the tiles, by cross-attention at once: Flamingo's resampler, which reads the
frames of a video so (Alayrac et al. 2022, arXiv:2204.14198, Sec. 2.1), on the slices of a picture (MiniCPM-V, Yao et
al. 2024, arXiv:2408.01800, which has a resampler with 2D positions for each slice alone).

Keys are a set: without a code of their place, tiles could be exchanged and nothing would change. Each has
    h = W x + crop + scale * place,
crop: a learned vector of the whole, or that of the tile's row plus that of its column; place: the 2D sine-cosine
embedding of the place inside the crop. What is padding, black bars or a shorter row of a batch, is masked.

Shapes: features (P,N,D) of P crops, N = g x g; B pictures of C = 1 + T crops; latents (K,H), image tokens (B,K,E).
"""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from papers.mae import sincos_2d
from utils.run import check
from vlm import anyres
from vlm.perceiver import PerceiverResampler

# rows and columns of tiles that have a learned vector
MOST = 16


def visible(size, shape, g):
    """Features of a picture of `size` (H,W), whole and in rows x columns tiles, that are no padding: bool (1+T,g,g)."""
    rows, columns = shape
    above, beside = anyres.padding(size, (rows * g, columns * g))
    # the tiles as one large map
    large = torch.zeros(rows * g, columns * g, dtype=torch.bool)
    large[above : rows * g - above, beside : columns * g - beside] = True
    tiles = large.unflatten(0, (rows, g)).unflatten(2, (columns, g)).transpose(1, 2).flatten(0, 1)
    return torch.cat([torch.ones(1, g, g, dtype=torch.bool), tiles])


class TileResampler(PerceiverResampler):
    """K latents over all crops of a picture; the options are those of PerceiverResampler."""

    def __init__(self, dim_in, dim_out, **options):
        super().__init__(dim_in, dim_out, **options)
        width = self.latents.shape[1]
        check(width % 4 == 0, f"tile_perceiver: the width {width} is no multiple of 4")
        # one table, so that all of it has a gradient at every step: the whole, rows, columns
        self.crops = nn.Parameter(0.1 * torch.randn(1 + 2 * MOST, width))
        self.scale = nn.Parameter(torch.tensor(0.1))

    def codes(self, shape, n):
        """Codes of the features of the whole and of rows x columns tiles; (0, 0): the whole alone -> (1+T,N,H)."""
        rows, columns = shape
        fits = max(shape) <= MOST
        check(
            fits, f"tile_perceiver knows {MOST} rows and columns of tiles, not {rows} x {columns}"
        )
        g = round(n**0.5)
        check(g * g == n, f"tile_perceiver: {n} features of a crop are no square: --select patch")
        # which crop: (1+T,H), row by row
        whole, row, column = self.crops.split([1, MOST, MOST])
        tiles = row[:rows, None] + column[None, :columns]
        crop = torch.cat([whole, tiles.flatten(0, 1)])
        # where in it: (N,H)
        place = sincos_2d(self.crops.shape[1], g, g).to(crop)
        return crop[:, None] + self.scale * place

    def forward(self, x, tiling=None):
        """Features (P,N,D) -> image tokens (B,K,E).

        tiling: (sizes, side, candidates) of pictures of `sizes` (H,W), of each the whole and its tiles, one picture
        after the other; None: every crop is a picture of its own, seen whole. Raises UserError if these are not the
        features of so many tiles.
        """
        context = self.input_proj(x)  # (P,N,H)
        n = context.shape[1]
        if tiling is None:
            return self.resample(context + self.codes((0, 0), n))
        sizes, side, candidates = tiling
        shapes = [anyres.grid_shape(size, side, candidates) for size in sizes]
        counts = [1 + rows * columns for rows, columns in shapes]
        check(sum(counts) == len(x), f"{len(x)} tiles for pictures that have {counts}")
        keys = []
        kept = []
        for part, size, shape in zip(context.split(counts), sizes, shapes):
            # all crops of a picture side by side: (C*N,H), and which of them are no padding
            keys.append((part + self.codes(shape, n)).flatten(0, 1))
            kept.append(visible(size, shape, round(n**0.5)).flatten())
        # pictures of fewer tiles are filled up, and what fills them up is masked
        mask = pad_sequence(kept, batch_first=True).to(x.device)
        return self.resample(pad_sequence(keys, batch_first=True), mask)
