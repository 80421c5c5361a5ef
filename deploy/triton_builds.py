"""How each kernel of this topic is compiled for a GPU: types of its arguments, constants, warps, stages.

The same is chosen when a kernel is launched on a GPU with tensors of float16 whose sizes are multiples of 16:
Triton's launcher looks at each argument, and finds out which are divisible by 16 and which strides are 1.
"""

# pyright: reportMissingImports=false

from deploy import triton_offline
from deploy.triton_adamw import BLOCK, adamw_kernel
from deploy.triton_int4 import int4_matmul_kernel, tile
from deploy.triton_matmul import GROUP, TILES, matmul_kernel, warps_of_tile
from deploy.triton_rmsnorm import ROWS_OF_A_PROGRAM, rms_norm_backward_kernel, rms_norm_kernel
from deploy.triton_softmax import softmax_kernel, warps_of

HALF = "*fp16:16"
FLOAT = "*fp32:16"
BYTE = "*u8:16"
COUNT = "i32:16"
NUMBER = "fp32"


def rows_of(columns):
    """[softmax, RMSNorm, its backward pass] as (name, kernel, signature, constants, warps)."""
    block = 1 << (columns - 1).bit_length()
    warps = warps_of(block)
    row = {"x": HALF, "y": HALF, "columns": COUNT}
    forward = {"x": HALF, "w": HALF, "y": HALF, "inverse_rms": FLOAT}
    forward |= {"columns": COUNT, "eps": NUMBER}
    backward = {"x": HALF, "w": HALF, "dy": HALF, "inverse_rms": FLOAT, "dx": HALF}
    backward |= {"dw_parts": FLOAT, "rows": COUNT, "columns": COUNT}
    many = {"BLOCK": block, "ROWS": ROWS_OF_A_PROGRAM}
    return [
        ("softmax", softmax_kernel, row, {"BLOCK": block}, warps),
        ("RMSNorm", rms_norm_kernel, forward, {"BLOCK": block}, warps),
        ("RMSNorm, backward", rms_norm_backward_kernel, backward, many, warps),
    ]


def adamw_build():
    scalars = ("lr", "beta1", "beta2", "eps", "decay", "correction1", "correction2")
    signature = dict.fromkeys("pgmv", FLOAT) | {"count": COUNT} | dict.fromkeys(scalars, NUMBER)
    return "AdamW", adamw_kernel, signature, {"BLOCK": BLOCK}, 4


def matmul_build(tiles=TILES, precision="ieee", pointer=HALF, count=COUNT):
    """A, B and C row after row. count: "i32" for sizes and strides of which nothing is known."""
    signature = dict.fromkeys("abc", pointer) | dict.fromkeys("mnk", count)
    signature |= dict.fromkeys(("stride_am", "stride_bk", "stride_cm"), count)
    constants = dict.fromkeys(("stride_ak", "stride_bn", "stride_cn"), 1)
    constants |= {"WIDEN": False, "PRECISION": precision, "GROUP": GROUP}
    constants |= dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tiles))
    return "matmul", matmul_kernel, signature, constants, warps_of_tile(tiles)


def int4_build(tokens, group):
    signature = {"x": HALF, "packed": BYTE, "scales": HALF, "zeros": BYTE, "y": HALF, "m": "i32"}
    signature |= dict.fromkeys(("n", "k", "groups", "group_size"), COUNT)
    tiles = tile(tokens, group, group == 0)
    constants = {"WIDEN": False, "PRECISION": "ieee"}
    constants |= dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tiles))
    return f"int4 matmul, {tokens} tokens", int4_matmul_kernel, signature, constants, 4


def builds(columns, tokens, group):
    """All of them: [(name, kernel, signature, constants, warps)]."""
    many = 256
    products = [matmul_build(), int4_build(tokens, group), int4_build(many, group)]
    name, *unknown = matmul_build(pointer="*fp16", count="i32")
    return [
        *rows_of(columns),
        adamw_build(),
        *products,
        (f"{name}, no divisibility", *unknown),
    ]


def compiled(chosen, architectures=triton_offline.ARCHITECTURES):
    """{name: {arch: what compile_for gives}} of kernels as `builds` gives them."""
    wanted = [
        (name, arch, triton_offline.request(kernel, signature, constants, arch, warps))
        for name, kernel, signature, constants, warps in chosen
        for arch in architectures
    ]
    found = triton_offline.compile_all([request for _, _, request in wanted])
    table = {}
    for (name, arch, _), resources in zip(wanted, found):
        table.setdefault(name, {})[arch] = resources
    return table
