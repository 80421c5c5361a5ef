"""Any-resolution tiles of LLaVA-1.6: a large picture is cut into tiles for an encoder of one size.

Liu et al. 2024, "LLaVA-NeXT: improved reasoning, OCR, and world knowledge" (a report without
equations); what it leaves open was settled by its code, and transformers' LlavaNext is what this
file is proved against. Every size here is (height, width). A picture is seen twice: whole and
small, and in tiles of the encoder's own size; the features of the tiles are put together again,
what was padding is cut off, and a learned token ends every row.

Shapes: a picture (C,H,W), T tiles of S x S pixels, g x g features of width D from each.
"""

import torch
import torch.nn.functional as F
from einops import rearrange

from utils.run import check


def candidates(side, most=4):
    """Sizes to choose from, in tiles of `side` pixels: every grid of rows x columns with 2 to
    `most` tiles."""
    grids = [(r, c) for r in range(1, most + 1) for c in range(1, most + 1) if 2 <= r * c <= most]
    return [(r * side, c * side) for r, c in grids]


def grids(side, tiles=0, pinpoints=()):
    """Sizes that pictures are tiled to, by flags: every grid of at most `tiles` tiles of `side`
    pixels, or `pinpoints` [(height, width), ...], LLaVA's image_grid_pinpoints; none of both: [].

    Raises UserError for both at once, one tile, or a size that is not a multiple of `side`.
    """
    check(not (tiles and pinpoints), "--tiles or --image_grid_pinpoints: one of them")
    check(tiles == 0 or tiles > 1, f"--tiles {tiles}: 0 is none; a picture is cut into 2 or more")
    for height, width in pinpoints or ():
        fits = min(height, width) > 0 and height % side == 0 and width % side == 0
        multiple = f"multiples of the encoder's {side} are needed"
        check(fits, f"--image_grid_pinpoints {height} {width}: {multiple}")
    if tiles:
        return candidates(side, tiles)
    return [(height, width) for height, width in pinpoints or ()]


def fitted(size, into):
    """The size of a picture when it is scaled, shape kept, until it touches a side of `into`:
    (height, width)."""
    h, w = size
    high, wide = into
    if wide / w < high / h:
        return min(-(-h * wide // w), high), wide  # rounded up
    return high, min(-(-w * high // h), wide)


def select_best_resolution(size, candidates):
    """Which of the candidates shows most of a picture, and of those that show as much, wastes
    least. All (h, w)."""
    check(candidates, "there is no resolution to choose from")

    def worth(candidate):
        scale = min(candidate[0] / size[0], candidate[1] / size[1])
        # enlarging shows nothing new
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, shown - candidate[0] * candidate[1]

    return tuple(max(candidates, key=worth))


def resize(image, size):
    """uint8 (C,H,W) -> uint8 (C,*size), bicubic and antialiased."""
    batch = image[None].float()
    x = F.interpolate(batch, size, mode="bicubic", antialias=True, align_corners=False)
    return x[0].round().clamp(0, 255).to(torch.uint8)


def centred(image, size):
    """Put the picture (C,h,w) into the middle of a black one; what is left over goes below and to
    the right."""
    high = size[0] - image.shape[1]
    wide = size[1] - image.shape[2]
    return F.pad(image, (wide // 2, wide - wide // 2, high // 2, high - high // 2))


def tiles(image, side, candidates):
    """uint8 (C,H,W) -> (1+T,C,side,side): the whole picture squeezed into one, then its tiles row
    by row."""
    # the grid that fits best, the image scaled into it, black around it
    best = select_best_resolution(image.shape[1:], candidates)
    large = centred(resize(image, fitted(image.shape[1:], best)), best)
    parts = rearrange(large, "c (r p) (k q) -> (r k) c p q", p=side, q=side)
    return torch.cat([resize(image, (side, side))[None], parts])


def padding(size, shape):
    """Rows and columns of features that are padding, on either side, of a picture of `size` (H,W)
    in a map of `shape` (h,w): (above, beside), one of them 0."""
    high, wide = shape
    h, w = size
    if w / h > wide / high:  # as wide as it gets: bars above and below
        return (high - int(round(h * (wide / w), 7))) // 2, 0
    # as high as it gets: bars at the sides
    return 0, (wide - int(round(w * (high / h), 7))) // 2


def unpad(features, size):
    """Cut off what was padding: features (D,h,w) of a padded picture -> (D,h',w') in the shape of
    `size` (H,W).

    Counted in cells of features, and as much from either side: a cell that is half padding may
    stay.
    """
    high, wide = features.shape[1:]
    above, beside = padding(size, (high, wide))
    return features[:, above : high - above, beside : wide - beside]


def grid_shape(size, side, candidates):
    """Rows and columns of tiles that a picture of `size` (H,W) is cut into."""
    high, wide = select_best_resolution(size, candidates)
    return high // side, wide // side


def count_tiles(size, side, candidates):
    """Pictures that the encoder sees of one: the whole and its tiles, 1 + T."""
    rows, columns = grid_shape(size, side, candidates)
    return 1 + rows * columns


def count_tokens(size, side, g, candidates):
    """Image tokens of a picture of `size` (H,W), as many as `pack` gives with a newline: g x g of
    the whole, and what `unpad` leaves of all tiles, a newline behind each row."""
    rows, columns = grid_shape(size, side, candidates)
    above, beside = padding(size, (rows * g, columns * g))
    high = rows * g - 2 * above
    wide = columns * g - 2 * beside
    return g * g + high * (wide + 1)


def pack(features, size, side, candidates, newline=None):
    """Features of whole and tiles (1+T,g*g,D), of a picture of `size` -> one sequence (N,D): whole,
    then row by row.

    newline (D,): ends each row of the large picture. Without tiles (T = 0) it ends the whole one.
    """
    whole = features[0]
    parts = features[1:]
    if not len(parts):
        return whole if newline is None else torch.cat([whole, newline[None].to(whole)])
    rows, columns = grid_shape(size, side, candidates)
    g = round(whole.shape[0] ** 0.5)
    check(
        rows * columns == len(parts) and g * g == whole.shape[0],
        "these are not the features of tiles of this size",
    )
    # tiles as one large map, without its padding
    large = rearrange(parts, "(r k) (p q) d -> d (r p) (k q)", r=rows, p=g)
    large = unpad(large, size)
    # a newline token at the end of each row
    if newline is not None:
        end = newline.to(large)[:, None, None].expand(-1, large.shape[1], 1)
        large = torch.cat([large, end], dim=2)
    return torch.cat([whole, rearrange(large, "d h w -> (h w) d")])


def pack_all(features, sizes, side, candidates, newline=None):
    """Features (P,g*g,D) of several pictures of `sizes`, of each the whole and its tiles, one
    picture after the other -> their sequences (N,D), joined.

    Raises UserError if these are not the features of so many tiles.
    """
    counts = [count_tiles(size, side, candidates) for size in sizes]
    check(sum(counts) == len(features), f"{len(features)} tiles for pictures that have {counts}")
    packed = []
    for part, size in zip(features.split(counts), sizes):
        packed.append(pack(part, size, side, candidates, newline))
    return torch.cat(packed)
