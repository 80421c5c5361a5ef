"""Linear layers for few rows: a product of one to four tokens that reads the weights at the speed of memory.

Decoding multiplies each weight with one token, verifying a draft with a few. The CPU library that torch calls has a
routine for one row (GEMV), and one for many (GEMM), which is built for rows in plenty and wastes time on two or three.
Written the other way round, x W^T = (W x^T)^T, the long side of W comes first, and few columns are a case that the same
library is good at. Same numbers, up to the order of sums.

Shapes: n rows, I inputs, O outputs of a linear layer.
"""

import torch
import torch.nn.functional as F
from torch import nn

# Beyond so many rows the usual order is as quick, or quicker
FEW = 4


def few_rows_linear(x, weight, bias=None):
    """x (...,I), weight (O,I) -> x W^T + b, (...,O), as (W x^T)^T. An odd number of rows is filled up to an even one,
    for a single column is a GEMV again."""
    # the library looks at strides: rows that lie one after the other are what it is quick at
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    count = len(rows)
    filled = F.pad(rows, (0, 0, 0, count % 2))
    product = torch.mm(weight, filled.T)
    out = product[:, :count].T.contiguous().view(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias


def linear(x, weight, bias=None):
    """x W^T + b: (...,I) -> (...,O); few rows in float32 on a CPU go the other way round."""
    few = x.numel() <= FEW * x.shape[-1]
    if few and x.dtype == torch.float32 and x.device.type == "cpu":
        return few_rows_linear(x, weight, bias)
    return F.linear(x, weight, bias)


class FewRowsLinear(nn.Module):
    """A linear layer with the weights of another, in the quicker order."""

    def __init__(self, linear):
        super().__init__()
        self.in_features = linear.in_features
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x):
        """(...,I) -> (...,O)."""
        return linear(x, self.weight, self.bias)


def use_few_rows(llama):
    """Exchange the linear layers of a Llama of ours, in place, its head too; the transformers model keeps its own."""
    for layer in llama.layers:
        for name, module in list(layer.named_children()):
            if type(module) is nn.Linear:
                setattr(layer, name, FewRowsLinear(module))
    if type(llama.head) is nn.Linear:
        llama.head = FewRowsLinear(llama.head)
    return llama
