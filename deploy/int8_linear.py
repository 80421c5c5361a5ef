"""int8 linear layers: weights a scale for each row, activations a scale for each token, products of integers.

Dettmers et al. 2022, arXiv:2208.07339 (LLM.int8()), Sec. 2.1, vector-wise quantisation, without the columns
that they keep in 16 bits. The product is computed in integers and is exact; what is lost is lost in
rounding the factors. torch._int_mm uses the CPU's int8 instructions: a quarter of the bytes of fp32
weights, and more multiplications at a time.

Shapes: x (...,K), weights (N,K), y (...,N).
"""

import torch
from torch import nn

from deploy.absmax import quantise_int8


class Int8Linear(nn.Module):
    """y = x W^T + b with both factors in int8. LLM.int8(), Eq. 3."""

    def __init__(self, linear):
        super().__init__()
        codes, scale = quantise_int8(linear.weight.detach().float())
        self.codes: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.T)
        self.bias = linear.bias
        self.in_features = linear.in_features
        self.out_features = linear.out_features

    def forward(self, x):
        rows = x.reshape(-1, self.in_features).float()
        codes, scale = quantise_int8(rows)
        # integers, summed in int32
        product = torch._int_mm(codes, self.codes.T)
        # back to real numbers: a scale of each token times a scale of each output
        y = product.float() * scale * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)


def int8_layers(model):
    """Replace every linear layer of a model, in place -> the model. Embeddings stay; a head that is tied to
    them gets codes of its own."""
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, module in linears:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Int8Linear(module))
    return model
