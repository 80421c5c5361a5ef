"""Fused AdamW in Triton (Loshchilov & Hutter 2017, arXiv:1711.05101): one pass over p, g, m and v.

Written as torch operations, each of a + b + c makes an intermediate that goes to memory and comes back.
Here a program loads its piece of the four tensors, computes the whole update in registers, and stores
three of them: 28 bytes a parameter in float32, and no step can be cheaper that reads and writes them.

Equation numbers: lines of Algorithm 2 of the paper, with torch's convention that the decay is lr times
weight_decay.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl

from utils.run import check

BLOCK = 1024


@triton.jit
def adamw_kernel(
    p, g, m, v, count, lr, beta1, beta2, eps, decay, correction1, correction2, BLOCK: tl.constexpr
):
    """BLOCK parameters, their gradients and both moments, (count,) each; p, m, v in place."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    parameter = tl.load(p + place, mask=inside).to(tl.float32)
    gradient = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(m + place, mask=inside, other=0.0)
    second = tl.load(v + place, mask=inside, other=0.0)
    # lines 7 and 8: moving averages of the gradient and of its square
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient * gradient
    # lines 9 and 10: both began at zero, which is corrected for
    first_unbiased = first / correction1
    second_unbiased = second / correction2
    # line 12: the decay acts on the weight itself, not through the gradient
    parameter -= lr * decay * parameter
    parameter -= lr * first_unbiased / (tl.sqrt(second_unbiased) + eps)
    tl.store(p + place, parameter, mask=inside)
    tl.store(m + place, first, mask=inside)
    tl.store(v + place, second, mask=inside)


@torch.no_grad()
def adamw_step(p, g, m, v, step, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
    """One step of AdamW, in place: parameter p, its gradient g, moments m and v in float32; step = 1, 2, ...

    Raises UserError unless all four lie contiguous in one shape, and for a step before the first.
    """
    check(step >= 1, f"step {step}: the first one is 1")
    for name, tensor in (("gradient", g), ("first moment", m), ("second moment", v)):
        check(tensor.shape == p.shape, f"{name} {tuple(tensor.shape)} of {tuple(p.shape)}")
        check(tensor.is_contiguous(), f"the {name} is not contiguous")
    check(p.is_contiguous(), "the parameter is not contiguous: it is changed in place")
    check(m.dtype == v.dtype == torch.float32, "both moments are float32")
    correction1 = 1 - betas[0] ** step
    correction2 = 1 - betas[1] ** step
    count = p.numel()
    if count:
        adamw_kernel[(triton.cdiv(count, BLOCK),)](
            p,
            g,
            m,
            v,
            count,
            lr,
            *betas,
            eps,
            weight_decay,
            correction1,
            correction2,
            BLOCK=BLOCK,
        )
