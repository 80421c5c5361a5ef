"""GPTQ: weights are rounded column by column, and the columns to come make up for each error.

The error of a layer's output is a quadratic form of the error of its weights, with the Hessian
H = 2 X^T X of the calibration inputs. Optimal brain surgeon says how the other weights move best
when one is fixed; GPTQ fixes the same column of all rows at once, and reads what it needs of all
inverse Hessians to come from one Cholesky factor. Frantar et al. 2022, arXiv:2210.17323; equation
numbers are the paper's.

Shapes: weight (out, in), inputs (n, in), H (in, in).
Differences: the grids of all groups are laid before the first column is rounded ("static groups"
in the authors' code), so that with any order of columns a group is a run of neighbours.
"""

import torch

from deploy.quantizers import asymmetric_grid, expand


def hessian(inputs, damping=0.01):
    """H = 2 X^T X / n, plus `damping` times its mean diagonal on the diagonal (Sec. 3.3, step 3)."""
    h = 2 * inputs.T @ inputs / len(inputs)
    # An input that is always zero: any weight will do
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    return h


def inverse_factor(h):
    """Upper triangular U with H^-1 = U^T U: row j holds what column j needs of the inverse of H
    without the columns before it.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True)


def activation_order(h):
    """Columns by falling diagonal of H: those with the largest inputs first, while many are left to
    make up for their errors.
    """
    return h.diagonal().argsort(descending=True)


def round_block(weight, scales, zeros, factor, bits):
    """Round the columns of a block one by one; -> codes, and errors for the columns behind it.

    weight, scales, zeros (out, B), one for each weight; factor (B, B). `weight` is changed.
    """
    codes = torch.empty_like(weight)
    errors = torch.empty_like(weight)
    for j in range(weight.shape[1]):
        # Round column j to its grid
        column = weight[:, j]
        steps = (column / scales[:, j] + zeros[:, j]).round()
        codes[:, j] = steps.clamp(0, 2**bits - 1)
        rounded = (codes[:, j] - zeros[:, j]) * scales[:, j]
        # Eq. 2: the error, over the diagonal of the inverse, moves the columns to come
        errors[:, j] = (column - rounded) / factor[j, j]
        weight[:, j + 1 :] -= errors[:, j : j + 1] * factor[j, j + 1 :]
    return codes, errors


def gptq(weight, bits, group, inputs, order=True, block=128):
    """GPTQ, Algorithm 1: -> codes, scales, zeros.

    order: begin with the columns of the largest inputs (the authors' --act-order).
    block: columns between two updates of all that come behind (lazy batch updates); the codes do
    not depend on it.
    """
    width = weight.shape[1]
    h = hessian(inputs)
    columns = activation_order(h) if order else torch.arange(width, device=weight.device)
    # Grids of the weights as they are, one for each weight
    scales, zeros = asymmetric_grid(weight, bits, group)
    each_scale = expand(scales, width)[:, columns]
    each_zero = expand(zeros, width)[:, columns]
    # Weights and inverse Hessian in the order in which columns are rounded
    left = weight[:, columns].clone()
    factor = inverse_factor(h[columns][:, columns])
    codes = torch.empty_like(left)
    for start in range(0, width, block):
        now = slice(start, start + block)
        behind = slice(start + block, width)
        # Round a block, moving its own columns at once
        codes[:, now], errors = round_block(
            left[:, now], each_scale[:, now], each_zero[:, now], factor[now, now], bits
        )
        # Eq. 4: all columns behind it, in one product
        left[:, behind] -= errors @ factor[now, behind]
    # Back to the order of the inputs
    restored = torch.empty_like(codes)
    restored[:, columns] = codes
    return restored.to(torch.uint8), scales, zeros
