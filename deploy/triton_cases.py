"""The kernels of this topic side by side: inputs, the fused call, torch's own, and the formula as torch operations.

A case names what is compared, in the interpreter, in bytes and in time. The formula, an operation at a time,
is what a kernel fuses: each operation reads its operands from memory and writes its result there.
"""

# pyright: reportMissingImports=false

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.optim.adamw import adamw

from deploy import triton_adamw, triton_int4, triton_matmul, triton_rmsnorm, triton_softmax

ADAMW = {"lr": 0.01, "eps": 1e-8, "weight_decay": 0.1}
BETAS = (0.9, 0.95)
STEP = 3  # of the optimiser, whose moments are no longer zero
EPS = 1e-6


@dataclass(frozen=True)
class Sizes:
    """How large the inputs are."""

    rows: int  # of softmax, RMSNorm and the products
    columns: int  # of softmax and RMSNorm
    parameters: int  # of AdamW
    inputs: int  # of a product
    outputs: int
    tokens: int  # rows of the product with int4 weights
    group: int  # inputs of a row that share a scale


@dataclass(frozen=True)
class Case:
    """Functions of the same inputs with the same results: a tensor or a tuple."""

    inputs: Callable  # (sizes, dtype, device) -> tuple of tensors
    fused: Callable
    library: Callable
    eager: Callable
    flops: Callable  # (sizes) -> multiplications and additions; 0 where bytes are all that counts


def softmax_eager(x):
    """exp(x - max x) / sum exp(x - max x)."""
    exponentials = torch.exp(x - x.amax(-1, keepdim=True))
    return exponentials / exponentials.sum(-1, keepdim=True)


def softmax_library(x):
    return x.softmax(-1)


def rms_norm_eager(x, w):
    """x / sqrt(mean(x^2) + eps) * w."""
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return x * inverse * w


def with_gradients(norm):
    """A norm (x, w) -> y as (x, w, dy) -> y, dx, dw."""

    def call(x, w, dy):
        x = x.detach().requires_grad_()
        w = w.detach().requires_grad_()
        y = norm(x, w)
        return (y.detach(), *torch.autograd.grad(y, (x, w), dy))

    return call


def rms_norm_fused(x, w):
    return triton_rmsnorm.rms_norm(x, w, EPS)


def rms_norm_library(x, w):
    return F.rms_norm(x, w.shape, w, EPS)


def adamw_eager(p, m, v, g):
    """Algorithm 2 as a + b + c."""
    m_new = BETAS[0] * m + (1 - BETAS[0]) * g
    v_new = BETAS[1] * v + (1 - BETAS[1]) * g * g
    update = (
        m_new / (1 - BETAS[0] ** STEP) / ((v_new / (1 - BETAS[1] ** STEP)).sqrt() + ADAMW["eps"])
    )
    p_new = p - ADAMW["lr"] * ADAMW["weight_decay"] * p - ADAMW["lr"] * update
    return p.copy_(p_new), m.copy_(m_new), v.copy_(v_new)


def adamw_fused(p, m, v, g):
    triton_adamw.adamw_step(p, g, m, v, STEP, betas=BETAS, **ADAMW)
    return p, m, v


def adamw_library(p, m, v, g):
    """torch.optim.AdamW without the object: fused on a GPU."""
    steps = [torch.tensor(STEP - 1.0, device=p.device)]
    ways = {"amsgrad": False, "maximize": False, "foreach": False, "fused": p.is_cuda}
    betas = {"beta1": BETAS[0], "beta2": BETAS[1]}
    adamw([p], [g], [m], [v], [], steps, **ways, **betas, **ADAMW)
    return p, m, v


def product(a, b):
    return a @ b


def int4_eager(x, packed, scales, zeros):
    """Unpack, (code - zero) * scale, product: the whole weight in the type of x goes to memory."""
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    groups = codes.to(x.dtype).unflatten(1, (scales.shape[1], -1))
    weight = (groups - zeros.to(x.dtype)[..., None]) * scales.to(x.dtype)[..., None]
    return x @ weight.flatten(1).T


def rows_of_numbers(sizes, dtype, device):
    return (torch.randn(sizes.rows, sizes.columns, dtype=dtype, device=device),)


def norm_inputs(sizes, dtype, device):
    (x,) = rows_of_numbers(sizes, dtype, device)
    (dy,) = rows_of_numbers(sizes, dtype, device)
    return x, torch.randn(sizes.columns, dtype=dtype, device=device), dy


def norm_inputs_forward(sizes, dtype, device):
    return norm_inputs(sizes, dtype, device)[:2]


def adamw_inputs(sizes, dtype, device):
    """p, m, v, g: always float32."""
    p, m, v, g = torch.randn(4, sizes.parameters, device=device).unbind()
    return p.clone(), m.clone(), v.square(), g.clone()


def matmul_inputs(sizes, dtype, device):
    a = torch.randn(sizes.rows, sizes.inputs, dtype=dtype, device=device)
    return a, torch.randn(sizes.inputs, sizes.outputs, dtype=dtype, device=device)


def int4_inputs(sizes, dtype, device):
    x = torch.randn(sizes.tokens, sizes.inputs, dtype=dtype, device=device)
    grid = (sizes.outputs, sizes.inputs // (sizes.group or sizes.inputs))
    codes = (sizes.outputs, sizes.inputs // 2)
    packed = torch.randint(256, codes, device=device, dtype=torch.uint8)
    scales = torch.rand(grid, device=device).half() / 100
    return x, packed, scales, torch.randint(16, grid, device=device, dtype=torch.uint8)


def no_flops(sizes):
    return 0


def matmul_flops(sizes):
    return 2 * sizes.rows * sizes.inputs * sizes.outputs


def int4_flops(sizes):
    return 2 * sizes.tokens * sizes.inputs * sizes.outputs


CASES = {
    "softmax": Case(
        rows_of_numbers,
        triton_softmax.softmax,
        softmax_library,
        softmax_eager,
        no_flops,
    ),
    "RMSNorm": Case(
        norm_inputs_forward,
        rms_norm_fused,
        rms_norm_library,
        rms_norm_eager,
        no_flops,
    ),
    "RMSNorm and gradients": Case(
        norm_inputs,
        with_gradients(rms_norm_fused),
        with_gradients(rms_norm_library),
        with_gradients(rms_norm_eager),
        no_flops,
    ),
    "AdamW": Case(adamw_inputs, adamw_fused, adamw_library, adamw_eager, no_flops),
    "matmul": Case(matmul_inputs, triton_matmul.matmul, product, product, matmul_flops),
    "int4 matmul": Case(int4_inputs, triton_int4.int4_matmul, int4_eager, int4_eager, int4_flops),
}


def tensors(result):
    """A tensor or a tuple of them -> a tuple."""
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def difference(case, sizes, dtype=torch.float32, device="cpu"):
    """Largest difference of the fused call to torch's own, over all results."""
    given = case.inputs(sizes, dtype, device)
    mine = tensors(case.fused(*(x.clone() for x in given)))
    theirs = tensors(case.library(*(x.clone() for x in given)))
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(mine, theirs))
