"""FLOPs of a Llama by formula and as PyTorch counts them, and what this machine can do at best.

Kaplan et al. 2020, arXiv:2001.08361: forward and backward pass make 6 N FLOPs a token, N the
weights of matrices; Chowdhery et al. 2022, arXiv:2204.02311, add attention, 12 L D T, and divide by
the peak of the machine: model FLOPs utilisation. The other limit is the memory's bandwidth: Williams,
Waterman, Patterson 2009, "Roofline", doi:10.1145/1498765.1498785.
"""

import time

import torch

from training.pretrain_model import losses
from utils.run import check


def forward_flops(config, rows, length):
    """FLOPs of all matrix products of a forward pass; multiply and add are two."""
    d = config.hidden_size
    kv = config.num_key_value_heads * config.head_dim
    # Multiplications a token and layer: q and o, k and v, the MLP
    layer = 2 * d**2 + 2 * d * kv + 3 * d * config.intermediate_size
    # Queries with keys, weights with values: those that the mask hides are computed, too
    layer += 2 * d * length
    token = 2 * (config.num_hidden_layers * layer + d * config.vocab_size)
    return rows * length * token


def flops_per_token(model, length):
    """FLOPs of forward and backward pass, 6 N + 12 L D T: a backward pass has twice the products.

    N: weights of the matrices; the embedding is among them as the last layer.
    """
    n = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    # Scores and weighted values: 4 D T a layer forward, three times that with the backward pass
    attention = 12 * model.config.num_hidden_layers * model.config.hidden_size * length
    return 6 * n + attention


def counted_flops(model, pieces):
    """FLOPs of forward and backward pass as PyTorch counts them: every product that it makes."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        losses(model, pieces).sum().backward()
    model.zero_grad()
    return counter.get_total_flops()


def peak_flops(on, dtype):
    """FLOPs a second of the fastest of ten products of two large matrices, on this machine."""
    n = 8192 if on.type == "cuda" else 1024
    a = torch.randn(n, n, device=on).to(dtype)
    seconds = []
    for _ in range(10):
        then = time.perf_counter()
        (a @ a)[0, 0].item()  # a number that is read is there
        seconds.append(time.perf_counter() - then)
    return 2 * n**3 / min(seconds)


def mfu(flops_per_step, seconds, peak):
    """Model FLOPs utilisation: FLOPs that the model needs, by those that the machine could have made.

    flops_per_step: of the model, without what checkpointing computes again (with it, the quotient is
    hardware FLOPs utilisation, HFU); peak: FLOPs a second of all devices. Chowdhery et al., App. B.
    Raises UserError for seconds or a peak that are not above 0.
    """
    check(seconds > 0 and peak > 0, "MFU needs seconds and a peak above 0")
    return flops_per_step / (seconds * peak)


def attainable(intensity, peak, bandwidth):
    """Roofline: FLOPs a second at best of a kernel that makes `intensity` FLOPs per byte it moves.

    peak: FLOPs a second; bandwidth: bytes a second. Below peak / bandwidth FLOPs per byte, the ridge,
    a kernel is memory-bound. Williams et al., Sec. 3.
    """
    return min(peak, intensity * bandwidth)
