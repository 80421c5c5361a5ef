"""Quantisation of weights: NF4, FP4, INT4, absmax int8, double quantisation, and a linear layer
stored so.

A matrix is cut into blocks, each divided by its largest number, and of each quotient the code of
the nearest of 16 values is kept. Dettmers et al. 2023, arXiv:2305.14314 (QLoRA): equations and
sections, unless LLM.int8() is named (Dettmers et al. 2022, arXiv:2208.07339).

Shapes: weight (out, in), n numbers, blocks of S = 64, a codebook of 16 values in [-1, 1].
Differences from the papers: 8-bit weights are stored, not multiplied, in training (`int8_matmul`
shows the product); scales of the second quantisation are linear int8, not 8-bit floats.
"""

import torch
import torch.nn.functional as F
from torch import nn


def nf4():
    """NF4, 4-bit NormalFloat: 16 quantiles of the normal distribution, scaled into [-1, 1]. Sec. 3;
    values of App. E.

    Eq. 4 has as many values above as below, and no zero, which padding needs. So the authors take
    two sets, 2^(k-1) + 1 values from zero up and 2^(k-1) from zero down, and of the two zeros one.
    """
    # the quantile of the outermost value, as bitsandbytes has it: (1 - 1/30 + 1 - 1/32) / 2
    end = 0.9677083
    # eight quantiles above zero, seven below
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    # with one zero, and into [-1, 1]
    values = torch.cat([below, above.new_zeros(1), above]).sort().values
    return (values / values.max()).float()


def fp4():
    """Sign, two bits of exponent, one of mantissa (E2M1), over 6: the values are denser near zero."""
    positive = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
    return torch.cat([-positive.flip(0), positive])


def int4():
    """Fifteen equal steps, and one value twice: what 4 bits are without a thought."""
    return (torch.arange(-7, 9) / 7).clamp(max=1)


CODEBOOKS = {"nf4": nf4, "fp4": fp4, "int4": int4}


def absmax(x, dim):
    """Eight-bit integers and one scale a row: x ~ codes * scale. LLM.int8(), Eq. 1."""
    scale = x.abs().amax(dim, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round().to(torch.int8), scale


def quantize(weight, values, block=64):
    """-> code of each number (n,) uint8, largest of each block (n / block,). Eq. 1, with the values
    of a codebook.
    """
    # Blocks of numbers, the last one padded, each divided by its largest.
    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    top = blocks.abs().amax(1, keepdim=True)
    quotients = blocks / top.clamp(min=1e-12)
    # The nearest value: between which two middles does the quotient lie?
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(quotients, middles).to(torch.uint8)
    return codes.flatten(), top.flatten()


def dequantize(packed, top, values, shape):
    """Two codes a byte (n / 2,), the largest of each block -> weight of this shape, in the type of
    `values`.

    A byte is one of 256 pairs of codes: a table of the pairs answers both at once.
    """
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)  # (256, 2)
    quotients = F.embedding(packed.int(), pairs).view(len(top), -1)  # (n / S, S)
    # times the largest of the block, without the padding of the last one
    x = quotients * top.to(values.dtype)[:, None]
    return x.flatten()[: shape[0] * shape[1]].view(shape)


def pack(codes):
    """Two codes a byte: (n,) -> (n / 2,)."""
    return codes[::2] << 4 | codes[1::2]


def double_quantize(top, block=256):
    """Double quantisation: the scales of the blocks, their mean subtracted, in 8 bits each, one
    scale for 256. Sec. 3.

    -> codes, scale, mean
    """
    mean = top.mean()
    x = F.pad(top - mean, (0, -len(top) % block)).view(-1, block)
    codes, scale = absmax(x, 1)
    return codes.flatten()[: len(top)], scale.flatten(), mean


def double_dequantize(codes, scale, mean, block=256):
    """What double quantisation left of the scales of the blocks: (n / S,)."""
    scales = scale.repeat_interleave(block)[: len(codes)]
    return codes.float() * scales + mean


def int8_matmul(x, codes, scale, threshold=6.0):
    """x W^T in integers: (N, in), codes (out, in), scale (out, 1) -> (N, out). LLM.int8(), Eq. 8.

    Columns of x with a number above the threshold are multiplied in full precision: one of them
    would cost all others their digits.
    """
    # outlier columns in full precision
    large = (x.abs() > threshold).any(0)
    exact = x[:, large] @ (codes[:, large] * scale).T
    # the others in integers, with one scale for each row of x and of W
    rows, row_scale = absmax(x[:, ~large], 1)
    product = torch._int_mm(rows, codes[:, ~large].T.contiguous())
    return product * row_scale * scale.T + exact


class QuantizedLinearFunction(torch.autograd.Function):
    """x W^T with a quantised W: dequantised when needed and forgotten, again in the backward pass.
    Eq. 5 and 6.

    The gradient of x is exact for the dequantised W, and W has none: nothing is estimated here.
    """

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer  # the codes, not the matrix: kept, it would take 16 bits a weight
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantize(grad.dtype), None


class QuantLinear(nn.Module):
    """A frozen, quantised linear layer: int8 with absmax by rows, or 4 bits with a codebook such as
    NF4.

    `weight` is what the bits stand for, dequantised on every call.
    """

    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, base, bits=4, codebook="nf4", block=64, double=True):
        super().__init__()
        self.shape = tuple(base.weight.shape)
        self.bits = bits
        self.bias = base.bias
        self.in_features = base.in_features
        self.out_features = base.out_features
        if bits == 8:
            # LLM.int8(): one scale a row.
            codes, scale = absmax(base.weight.detach().float(), 1)
            parts = {"codes": codes, "scale": scale}
        else:
            # QLoRA: one scale a block, two codes a byte.
            values = CODEBOOKS[codebook]().to(base.weight.device)
            codes, top = quantize(base.weight, values, block)
            parts = {"codes": pack(codes), "values": values}
            # Double quantisation: the scales in 8 bits, too.
            if double:
                top_codes, top_scale, top_mean = double_quantize(top)
                parts |= {"top_codes": top_codes, "top_scale": top_scale, "top_mean": top_mean}
            else:
                parts["top"] = top
        for name, x in parts.items():
            self.register_buffer(name, x)

    def dequantize(self, dtype=torch.float32):
        if self.bits == 8:
            return self.codes.to(dtype) * self.scale.to(dtype)
        return dequantize(self.codes, self.block_scales(), self.values.to(dtype), self.shape)

    def block_scales(self):
        """The largest number of each block: (n / S,), after double quantisation dequantised."""
        if hasattr(self, "top"):
            return self.top
        return double_dequantize(self.top_codes, self.top_scale, self.top_mean)

    @property
    def weight(self):
        return self.dequantize()

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = QuantizedLinearFunction.apply(x, self)
        return y if self.bias is None else y + self.bias

    def bits_each(self):
        """Bits that a weight really takes, scales included."""
        stored = sum(8 * b.nbytes for n, b in self.named_buffers() if n != "values")
        return stored / (self.shape[0] * self.shape[1])
