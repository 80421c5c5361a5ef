"""How the attention kernels are compiled for a GPU: types of their arguments, constants, warps.

The same is chosen at a launch on a GPU with bf16 tensors whose lengths are multiples of 16.
"""

# pyright: reportMissingImports=false

from deploy import triton_flash, triton_flash_backward, triton_paged
from deploy.triton_tiles import TILES

HALF = "*bf16:16"
FLOAT = "*fp32:16"
INDEX = "*i64:16"
COUNT = "i32:16"

INPUTS = dict.fromkeys("qkv", HALF)
SIZES = {"scale": "fp32", "T": COUNT, "S": COUNT}
SAVED = {"dout": HALF, "lse": FLOAT, "delta": FLOAT}
KERNELS = {
    "forward": (triton_flash.flash_forward, INPUTS | {"out": HALF, "lse": FLOAT} | SIZES),
    "dq": (triton_flash_backward.flash_dq, INPUTS | SAVED | {"dq": HALF} | SIZES),
    "dkdv": (triton_flash_backward.flash_dkdv, INPUTS | SAVED | {"dk": HALF, "dv": HALF} | SIZES),
}
# other tiles (M, N, warps), to see what they would cost
OTHERS = {
    "forward": [(128, 64, 4), (64, 64, 4)],
    "dq": [(128, 64, 8), (64, 64, 4)],
    "dkdv": [(32, 64, 4), (64, 128, 8)],
}


def flash_builds(D, G, causal, others=False):
    """[(name, kernel, signature, constants, warps)] of heads of D numbers; others: with more tiles."""
    found = []
    for name, (kernel, signature) in KERNELS.items():
        tiles = [TILES[name][D]]
        if others:
            tiles += [tile for tile in OTHERS[name] if tile not in tiles]
        for M, N, warps in tiles:
            about = {"G": G, "D": D, "M": M, "N": N, "CAUSAL": causal, "UPCAST": False}
            found.append((f"{name} {M}x{N}, {warps} warps", kernel, signature, about, warps))
    return found


def paged_build(D, K, G, size):
    """(name, kernel, signature, constants, warps) of a decoding step over blocks of `size` tokens."""
    signature = dict.fromkeys(("q", "keys", "values"), HALF)
    signature |= {"tables": INDEX, "lengths": INDEX, "out": FLOAT, "lse": FLOAT}
    signature |= {"scale": "fp32", "W": "i32", "P": "i32"}
    about = {"K": K, "G": G, "D": D, "SIZE": size, "UPCAST": False}
    about |= {"TILE": triton_paged.TILE, "ROWS": triton_paged.rows_of(G)}
    return f"paged, blocks of {size}", triton_paged.paged_part, signature, about, 4
