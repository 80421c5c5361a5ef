"""Profile of a training step: shares of its time and of its FLOPs by kind of operator, and variants of the step.

torch.profiler notes every operator with the time that it spent in itself, and who called it. An operator counts under
the kind of its own name or, if that says nothing, of its caller; what the optimizer calls is the optimizer's.
There is nothing to run here: `bench.py` prints it.
"""

import copy
from types import MethodType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.flop_counter import FlopCounterMode

from models.unet_attention import AttentionBlock

# parts of the names of operators, in lower case; the first kind that has one is taken ("bmm" before "mm")
KINDS = {
    "optimizer": ("optimizer.",),
    "convolution": ("convolution",),
    "attention": ("bmm", "softmax", "div"),
    "linear layers": ("mm", "linear"),
    "GroupNorm, SiLU": ("group_norm", "groupnorm", "silu"),
    "copies, casts, upsampling": ("copy", "clone", "aten::cat", "catbackward", "upsample"),
    "additions": ("aten::add", "aten::sum", "addbackward"),
}


def kind_of_name(name):
    """Kind of an operator by its name alone, or None."""
    for kind, parts in KINDS.items():
        if any(part in name.lower() for part in parts):
            return kind
    return None


def kind_of(event):
    """Kind of an event of the profiler: the optimizer's, or the innermost one that a name says."""
    kinds = []
    while event is not None:
        kinds.append(kind_of_name(event.name))
        event = event.cpu_parent
    if "optimizer" in kinds:
        return "optimizer"
    return next((kind for kind in kinds if kind), "other")


def time_shares(step, steps=12):
    """Shares of the time of `step`, a function that makes a training step -> {kind: share}; they add up to 1.

    The shortest of several steps: the profiler's clock also runs while another program has the processor.
    """
    from torch.profiler import ProfilerActivity, profile

    step()
    times = {kind: [] for kind in [*KINDS, "other"]}
    for _ in range(steps):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        spent = dict.fromkeys(times, 0.0)
        for event in profiler.events() or ():
            spent[kind_of(event)] += event.self_cpu_time_total
        for kind, time in spent.items():
            times[kind].append(time)
    shortest = {kind: min(values) for kind, values in times.items()}
    return {kind: time / sum(shortest.values()) for kind, time in shortest.items()}


def flop_shares(loss):
    """Shares of the FLOPs of a forward and a backward pass; `loss` is a function that returns it -> {kind: share}."""
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    shares = {}
    for operator, flops in counter.get_flop_counts()["Global"].items():
        kind = kind_of_name(str(operator))
        shares[kind] = shares.get(kind, 0) + flops / counter.get_total_flops()
    return shares


def by_kind(times, flops, share_of_rate):
    """A row for each kind: shares of time and FLOPs, and its FLOPs per second over those of a matrix product.

    share_of_rate: of the whole step. Kinds without FLOPs have no rate.
    """
    rows = {}
    for kind, time in sorted(times.items(), key=lambda item: -item[1]):
        rows[kind] = {"time": time}
        if kind in flops:
            rate = share_of_rate * flops[kind] / time
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
