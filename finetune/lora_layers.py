"""LoRA, rsLoRA, DoRA and IA3 as layers: a frozen linear layer with an adapter. Hu et al. 2021,
arXiv:2106.09685.

LoRA adds a low-rank update, W x + s B A x; B starts at zero, so step 0 is the base model. Three
relatives: rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) scales it otherwise, DoRA (Liu et al. 2024,
arXiv:2402.09353) learns the length of each row apart from its direction, IA3 (Liu et al. 2022,
arXiv:2205.05638) multiplies by a vector and adds nothing. Each can be merged into its layer.
Sections are the papers'.

Shapes: x (..., in) -> (..., out), W (out, in), rank r.
Differences from the papers: A starts uniform, as in PEFT, not normal; DoRA's lengths are those of
rows of W (out, in), again as in PEFT.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

Variant = Literal["lora", "rslora", "dora", "ia3"]


class LoRALinear(nn.Module):
    """LoRA, Sec. 4.1: a frozen linear layer and a low-rank update beside it, W x + s B A x with s =
    alpha / r.
    """

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base = base
        self.dropout = nn.Dropout(dropout)
        self.scale = self.scaling(alpha, rank)
        # A is random and B zero: step 0 is the base model, and yet B has a gradient.
        new = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **new))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **new))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @staticmethod
    def scaling(alpha, rank):
        """s, what the update is multiplied by."""
        return alpha / rank

    def low_rank_update(self, x):
        """s B A x: (..., in) -> (..., out). The r numbers of A x are scaled, which are fewer than
        those of B A x.
        """
        # down to r numbers, and up to all outputs
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # A x: (..., r)
        return F.linear(self.scale * low, self.lora_B.to(x.dtype))

    def forward(self, x):
        update = self.low_rank_update(x)
        base_output = self.base(x)
        return base_output + update

    def delta_weight(self):
        """s B A, what merging adds to W: (out, in), of rank r at most."""
        return self.scale * self.lora_B @ self.lora_A

    def merged_weight(self):
        """W + s B A, the weight of one plain layer that does the same: (out, in)."""
        return self.base.weight.float() + self.delta_weight()

    def merge(self):
        """Write the merged weight into the frozen layer -> that layer."""
        self.base.weight.copy_(self.merged_weight())
        return self.base


class RsLoRALinear(LoRALinear):
    """rsLoRA, rank-stabilised LoRA, Theorem 3.2: s = alpha / sqrt(r), so that a larger rank learns
    no more slowly.
    """

    @staticmethod
    def scaling(alpha, rank):
        return alpha / math.sqrt(rank)


class DoRALinear(LoRALinear):
    """DoRA, Eq. 5: the direction of W + s B A row by row, times a learned magnitude m."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        self.magnitude = nn.Parameter(base.weight.float().norm(dim=1))  # m: (out,)

    def gain(self):
        """m / |W + s B A|, what each row of W + s B A is multiplied by: (out,).

        The norm counts as a constant in the gradient (Sec. 4.3).
        """
        norm = super().merged_weight().norm(dim=1).detach()
        return self.magnitude / norm

    def forward(self, x):
        # (W + s B A) x, without the bias, which is not part of W and is not scaled
        update = self.low_rank_update(x)
        base_output = F.linear(x, self.base.weight)
        # each output at the magnitude of its row
        y = self.gain() * (base_output + update)
        return y if self.base.bias is None else y + self.base.bias

    def merged_weight(self):
        return self.gain()[:, None] * super().merged_weight()


class IA3Linear(nn.Module):
    """IA3, Sec. 3.3: a frozen linear layer whose output or input is scaled by a vector l: l * W x,
    or W (l * x).
    """

    def __init__(self, base, feedforward):
        super().__init__()
        self.base = base
        self.feedforward = feedforward  # scales its input
        size = base.in_features if feedforward else base.out_features
        # one: step 0 is the base model
        self.ia3_l = nn.Parameter(torch.ones(size, device=base.weight.device))

    def forward(self, x):
        # in the MLP the inner activations, elsewhere the output
        if self.feedforward:
            scaled_input = (x * self.ia3_l).to(x.dtype)
            return self.base(scaled_input)
        return self.base(x) * self.ia3_l

    def merged_weight(self):
        """Columns of W times l, or rows: (out, in)."""
        scale = self.ia3_l if self.feedforward else self.ia3_l[:, None]
        return self.base.weight.float() * scale

    def merge(self):
        """Write the merged weight into the frozen layer -> that layer."""
        self.base.weight.copy_(self.merged_weight())
        # l * (W x + b) scales the bias, too.
        if not self.feedforward and self.base.bias is not None:
            self.base.bias.mul_(self.ia3_l)
        return self.base


LORA_LAYERS = {"lora": LoRALinear, "rslora": RsLoRALinear, "dora": DoRALinear}
ADAPTERS = (LoRALinear, IA3Linear)
FEEDFORWARD = ("down_proj",)  # IA3 scales the inputs of these: the inner activations of the MLP
