"""Symmetric (absmax) int8 quantisation: each row by its largest value.

Dettmers et al. 2022, arXiv:2208.07339 (LLM.int8()), Sec. 2. Rows are tokens of a KV cache (caches.py), tokens
of activations and outputs of weights (int8_linear.py, quantizers.py). Shapes: (...,D).
"""

import torch


def quantise_int8(x):
    """(...,D) -> codes int8 (...,D), scale float32 (...,1). A step is the scale, the largest error half a
    step. LLM.int8(), Eq. 1."""
    # the number of largest size becomes 127; a row of zeros has any scale
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    codes = (x.float() / scale).round().to(torch.int8)
    return codes, scale


def dequantise_int8(codes, scale, dtype=torch.float32):
    """(...,D) int8 and (...,1) -> (...,D)."""
    return (codes * scale).to(dtype)
