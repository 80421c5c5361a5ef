"""Weight quantisation without second-order information: RTN, HQQ, SmoothQuant, AWQ.

All store integer codes of 3, 4 or 8 bits on a uniform grid, w ~ (code - zero) * scale, with one
scale and one zero point for each group of inputs of a row. RTN (round-to-nearest) lays the grid
from the smallest to the largest weight. HQQ (half-quadratic quantisation, Badri & Shaji 2023,
https://mobiusml.github.io/hqq_blog) moves the zero points. SmoothQuant (Xiao et al. 2022,
arXiv:2211.10438) and AWQ (Lin et al. 2023, arXiv:2306.00978) multiply input channels of the weight
first, and divide the activations by as much.

Shapes: weight (out, in), groups of S inputs, scales and zeros (out, in / S); activations (n, in).
Differences: AWQ is the search for scales, on 10 exponents and not 20, without that for clipping; a
group of 0 is a whole row.
"""

import torch
import torch.nn.functional as F

from deploy.absmax import quantise_int8
from utils.run import check

BITS = (8, 4, 3)


def check_grid(weight, bits, group):
    """Raises UserError unless there are 8, 4 or 3 bits and the group divides the inputs of a row."""
    check(bits in BITS, f"--bits {bits}: known are 8, 4 and 3")
    width = weight.shape[1]
    divides = group >= 0 and width % (group or width) == 0
    fit = f"--group {group} does not divide the {width} inputs of a layer"
    check(divides, f"{fit}; 0 is one group a row")


def grouped(weight, group):
    """(out, in) -> (out, in / S, S); a group of 0 is a whole row."""
    return weight.unflatten(1, (-1, group or weight.shape[1]))


def expand(values, width):
    """One value a group -> one a weight: (out, groups) -> (out, in)."""
    return values.repeat_interleave(width // values.shape[1], dim=1)


def asymmetric_grid(weight, bits, group):
    """Scales and integer zero points (out, groups): the grid holds the least, the largest and zero."""
    blocks = grouped(weight, group)
    low = blocks.amin(-1).clamp(max=0)
    high = blocks.amax(-1).clamp(min=0)
    scales = (high - low) / (2**bits - 1)
    scales = storable(scales)
    return scales, (-low / scales).round()


def symmetric_grid(weight, bits, group):
    """Scales (out, groups) of the largest absolute values; the zero point is the middle code."""
    largest = grouped(weight, group).abs().amax(-1)
    scales = storable(largest / (2 ** (bits - 1) - 1))
    return scales, torch.full_like(scales, 2 ** (bits - 1))


def storable(scales):
    """Scales as float16 stores them: rounded before codes are chosen, so that these fit them."""
    return scales.clamp(min=1e-6).half().to(scales.dtype)


def to_codes(weight, scales, zeros, bits):
    """The nearest code of each weight (out, in), 0 ... 2^bits - 1, uint8."""
    width = weight.shape[1]
    steps = weight / expand(scales, width) + expand(zeros, width)
    return steps.round().clamp(0, 2**bits - 1).to(torch.uint8)


def dequantize(codes, scales, zeros):
    """w = (code - zero) * scale: codes (out, in), scales and zeros (out, groups) -> (out, in).

    Scales of any number of groups: one a weight, too, where `quantize` folds channel scales in.
    """
    width = codes.shape[1]
    return (codes.to(scales.dtype) - expand(zeros, width)) * expand(scales, width)


def rtn(weight, bits, group):
    """Round-to-nearest: -> codes, scales, zeros."""
    scales, zeros = asymmetric_grid(weight, bits, group)
    return to_codes(weight, scales, zeros, bits), scales, zeros


def absmax(weight, bits, group):
    """Symmetric round-to-nearest, as products of integers need it: -> codes, scales, zeros."""
    scales, zeros = symmetric_grid(weight, bits, group)
    return to_codes(weight, scales, zeros, bits), scales, zeros


def shrink(x, beta, p):
    """Proximal step of the l_p norm, 0 < p < 1: generalised soft-thresholding. HQQ, (sp1)."""
    return x.sign() * F.relu(x.abs() - x.abs() ** (p - 1) / beta)


def half_quadratic_zeros(blocks, scales, zeros, bits, p=0.7, beta=10.0, kappa=1.01, steps=20):
    """Zero points that minimise the l_p norm of the error, by half-quadratic splitting.

    min_{z, E} |E|_p^p + beta / 2 |E - (W - dequantised W)|^2, in turn for E and for z; the scales
    stay. blocks (out, groups, S), scales and zeros (out, groups, 1) -> zeros, real numbers
    """
    best = torch.inf
    for _ in range(steps):
        codes = (blocks / scales + zeros).round().clamp(0, 2**bits - 1)
        error = blocks - (codes - zeros) * scales
        # (sp1): the sparse part of the error, which the grid need not explain
        sparse = shrink(error, beta, p)
        # (sp2): the zero point that explains the rest, a mean
        zeros = (codes - (blocks - sparse) / scales).mean(-1, keepdim=True)
        beta *= kappa
        # Stop when the mean absolute error no longer falls
        mean_error = float(error.abs().mean())
        if mean_error >= best:
            break
        best = mean_error
    return zeros


def hqq(weight, bits, group):
    """HQQ: a grid from the smallest to the largest weight, then better zero points.

    -> codes, scales, zeros
    """
    # Zero need not be on the grid
    blocks = grouped(weight, group)
    low = blocks.amin(-1, keepdim=True)
    high = blocks.amax(-1, keepdim=True)
    scales = storable((high - low) / (2**bits - 1))
    zeros = -low / scales
    # Of 4 bits the authors round the first zero points
    if bits == 4:
        zeros = zeros.round()
    zeros = half_quadratic_zeros(blocks, scales, zeros, bits)
    scales = scales.squeeze(-1)
    zeros = zeros.squeeze(-1).half().to(weight.dtype)
    return to_codes(weight, scales, zeros, bits), scales, zeros


def smoothing_scales(inputs, weight, alpha=0.5):
    """SmoothQuant, Eq. 4: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), one for each input (in,).

    inputs (n, in), weight (out, in): of several layers with the same inputs, one below the other.
    """
    input_max = inputs.abs().amax(0).clamp(min=1e-5)
    weight_max = weight.abs().amax(0).clamp(min=1e-5)
    scales = input_max**alpha / weight_max ** (1 - alpha)
    return storable(scales.clamp(min=1e-3))


@torch.no_grad()
def fold(previous, layers, scales):
    """Smoothing without any cost: divide what comes out, multiply the weights that read it, in place.

    previous: a norm or linear layer with `in` outputs; layers: linear layers that read nothing else.
    The function of the network stays the same. SmoothQuant, Eq. 3.
    """
    # A norm has one weight for each output, a linear layer a row
    shape = (-1,) + (1,) * (previous.weight.dim() - 1)
    previous.weight.div_(scales.view(shape))
    if getattr(previous, "bias", None) is not None:
        previous.bias.div_(scales)
    for layer in layers:
        layer.weight.mul_(scales)


def int8_matmul(x, codes, scales, zeros):
    """x W^T in integers: (n, in), codes (out, in), scales and zeros (out, 1) -> (n, out).

    Activations in 8 bits with one scale for each token, found on the way (dynamic, per-token).
    """
    # Activations: symmetric, one scale a row
    x_codes, x_scales = quantise_int8(x)
    # Weights: codes as signed numbers, their zero points as far moved
    signed = (codes.to(torch.int16) - 128).to(torch.int8)
    product = torch._int_mm(x_codes, signed.T.contiguous())
    # sum_j x_j (c_j - z) = sum_j x_j (c_j - 128) + (128 - z) sum_j x_j
    moved = x_codes.sum(1, keepdim=True) * (128 - zeros).T
    return (product + moved) * x_scales * scales.T


def output_error(weight, quantized, inputs):
    """Mean squared error of what the layer puts out, |X W^T - X Q^T|^2 / (n out)."""
    return float((inputs @ (weight - quantized).T).square().mean())


def awq_scales(weight, bits, group, inputs, points=10, rows=256):
    """AWQ, Eq. 4 and 5: s = mean|X|^alpha, alpha in [0, 1) that gives the least output error.

    alpha = 0 is s = 1, that is RTN: the search is never worse on its inputs. The means are those of
    all inputs, the error that of some `rows` of them. -> (in,)
    """
    salience = inputs.abs().mean(0).clamp(min=1e-4)
    some = inputs[:: max(1, len(inputs) // rows)]
    best = torch.inf
    found = torch.ones_like(salience)
    for point in range(points):
        scales = salience ** (point / points)
        # Around one; only ratios matter
        scales = storable(scales / (scales.max() * scales.min()).sqrt())
        # Q(W s) / s, as the layer computes it
        restored = dequantize(*rtn(weight * scales, bits, group)) / scales
        error = output_error(weight, restored, some)
        if error < best:
            best = error
            found = scales
    return found
