"""Profile of a training step: shares of its CPU time and of its FLOPs by kind of operator, and variants of the step.

A TorchDispatchMode is handed every operator that reaches the kernels, forward and backward, and times it. It reads
the CPU time of the thread, which torch.profiler does not: where another program takes its turn, the profiler's clock
runs on, and long operators look longer than they are. There is nothing to run here: `bench.py` prints it.
"""

import copy
import time
from types import MethodType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models.unet_attention import AttentionBlock

KINDS = {
    "convolution": ("convolution", "convolution_backward"),
    "attention": ("bmm", "_softmax", "_softmax_backward_data", "div"),
    "linear layers": ("mm", "addmm"),
    "GroupNorm, SiLU": ("native_group_norm", "native_group_norm_backward", "silu", "silu_backward"),
    "copies, casts": ("clone", "copy_", "_to_copy", "cat"),
    "upsampling": ("upsample_nearest2d", "upsample_nearest2d_backward"),
    "additions": ("add", "add_", "sum"),
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
OPTIMIZER = "optimizer"
OTHER = "other"  # smaller operators, and what lies between operators: Python, autograd


class OperatorTimer(TorchDispatchMode):
    """Seconds of CPU time of the operators called under it, by kind; what the optimizer calls is the optimizer's."""

    def __init__(self):
        super().__init__()
        self.seconds = dict.fromkeys([*KINDS, OPTIMIZER, OTHER], 0.0)
        self.in_optimizer = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.thread_time()
        result = func(*args, **(kwargs or {}))
        seconds = time.thread_time() - start
        kind = KIND_OF.get(func.overloadpacket.__name__, OTHER)
        self.seconds[OPTIMIZER if self.in_optimizer else kind] += seconds
        return result

    def __enter__(self):
        before = register_optimizer_step_pre_hook(lambda *_: setattr(self, "in_optimizer", True))
        after = register_optimizer_step_post_hook(lambda *_: setattr(self, "in_optimizer", False))
        self.hooks = before, after
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)


def time_shares(step, steps=12):
    """Shares of the CPU time of `step`, a function that makes a training step -> {kind: share}; they add up to 1.

    Timing costs time between the operators, so the whole is that of steps without it; `other` is what remains.
    """
    step()
    whole = 0.0
    timer = OperatorTimer()
    for _ in range(steps):
        start = time.thread_time()
        step()
        whole += time.thread_time() - start
        with timer:
            step()
    shares = {kind: seconds / whole for kind, seconds in timer.seconds.items()}
    shares[OTHER] = 1 - sum(share for kind, share in shares.items() if kind != OTHER)
    return shares


def flop_shares(loss):
    """Shares of the FLOPs of a forward and a backward pass; `loss` is a function that returns it -> {kind: share}."""
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    shares = {}
    for operator, flops in counter.get_flop_counts()["Global"].items():
        kind = KIND_OF[operator.__name__]
        shares[kind] = shares.get(kind, 0) + flops / counter.get_total_flops()
    return shares


def by_kind(times, flops, share_of_rate):
    """A row for each kind: shares of time and FLOPs, and its FLOPs per second over those of a matrix product.

    share_of_rate: of the whole step. Kinds without FLOPs have no rate.
    """
    rows = {}
    for kind, share in sorted(times.items(), key=lambda item: -item[1]):
        rows[kind] = {"time": share}
        if kind in flops:
            rate = share_of_rate * flops[kind] / share
            rows[kind] |= {"FLOPs": flops[kind], "share_of_matmul_rate": rate}
    return rows


def fused_attention(block, x, context=None, mask=None):
    """AttentionBlock.forward with torch's fused kernel in the place of softmax(Q K^T / sqrt(d)) V."""
    y = rearrange(block.group_norm(x), "b c h w -> b (h w) c")
    heads = (
        rearrange(layer(y), "b n (h d) -> b h n d", h=block.heads)
        for layer in (block.to_q, block.to_k, block.to_v)
    )
    y = rearrange(F.scaled_dot_product_attention(*heads), "b h n d -> b n (h d)")
    return x + rearrange(block.to_out[0](y), "b (h w) c -> b c h w", h=x.shape[2])


def variants(model, x):
    """{name: (model, images, flags of AdamW)}: the step as it is, and each with one thing changed."""
    fused = copy.deepcopy(model)
    for block in fused.modules():
        if isinstance(block, AttentionBlock):
            block.forward = MethodType(fused_attention, block)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return {
        "as it is": (copy.deepcopy(model), x, {}),
        "fused AdamW": (copy.deepcopy(model), x, {"fused": True}),
        "fused attention": (fused, x, {}),
        "channels last": (last, x.contiguous(memory_format=torch.channels_last), {}),
    }
