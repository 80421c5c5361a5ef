"""SUMMA: 2-D tensor parallelism, after Xu et al. 2021 (Optimus), arXiv:2104.05343.

Megatron's layers shard weights, but every rank has the whole activations. On a square grid of ranks
both are sharded: each rank holds one block of A, of B and of their product C. To compute its block
of C, a rank needs a row of blocks of A and a column of blocks of B; they are broadcast one at a
time, along the rows and columns of the grid.
"""

import torch
import torch.distributed as dist

from training import ranks
from training.unsharded import relative_error
from utils import run


class Summa(torch.autograd.Function):
    """C = A B on a square grid of ranks, each of which has one block of each. Xu et al. 2021,
    Algorithms 1 to 3.

    a, b: this rank's blocks; mesh: of two dimensions, rows i and columns j -> its block of C.
    Nobody ever has a whole matrix, nor a whole activation: A is sharded as well.
    """

    @staticmethod
    def forward(ctx, a, b, mesh):
        ctx.save_for_backward(a, b)
        ctx.row = mesh.get_group(1)
        ctx.column = mesh.get_group(0)
        ctx.side = mesh.size(0)
        # C_ij = sum over k of A_ik B_kj
        c = 0
        for k in range(ctx.side):
            c = c + broadcast_block(a, k, ctx.row) @ broadcast_block(b, k, ctx.column)
        return c

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        for k in range(ctx.side):
            # dA_ik = sum over j of dC_ij B_kj^T: reduced along the row
            for_a = grad @ broadcast_block(b, k, ctx.column).T
            # dB_kj = sum over i of A_ik^T dC_ij: reduced along the column
            for_b = broadcast_block(a, k, ctx.row).T @ grad
            dist.reduce(for_a, group_dst=k, group=ctx.row)
            dist.reduce(for_b, group_dst=k, group=ctx.column)
            # The k-th of a row or column keeps the sum.
            if ctx.row.rank() == k:
                grad_a = for_a
            if ctx.column.rank() == k:
                grad_b = for_b
        return grad_a, grad_b, None


def broadcast_block(x, k, group):
    """The block of the k-th rank of a group, on all of the group."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.broadcast(x, group=group, group_src=k)
    return x


def worker(cfg):
    """What every rank does: a random product by blocks, compared with the whole -> differences,
    bytes, place.

    cfg: that of tensor_parallel.py; A is (batch * length, 96 * side), B is square.
    """
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(cfg.seed)
    side = cfg.side
    run.check(dist.get_world_size() == side**2, f"a grid of side {side} takes {side**2} ranks")
    mesh = init_device_mesh(ranks.device().type, (side, side))
    i = mesh.get_local_rank(0)
    j = mesh.get_local_rank(1)

    def block(x):
        """The block of this rank in row i and column j."""
        return x.chunk(side, 0)[i].chunk(side, 1)[j].clone()

    # The same matrices on all ranks, and the gradient of their product.
    rows = cfg.batch * cfg.length
    width = 96 * side
    a = torch.randn(rows, width, device=ranks.device()).requires_grad_()
    b = torch.randn(width, width, device=ranks.device()).requires_grad_()
    grad = torch.randn(rows, width, device=ranks.device())
    # The product and its gradients on one process.
    c = a @ b
    c.backward(grad)
    # The same by blocks.
    block_a = block(a.detach()).requires_grad_()
    block_b = block(b.detach()).requires_grad_()
    block_c = Summa.apply(block_a, block_b, mesh)
    block_c.backward(block(grad))
    return {
        "held": ranks.held(block_a, block_b, block_c),
        "whole": ranks.held(a, b, c),
        "place": [i, j],
        "differences": {
            "C": relative_error(block_c.detach(), block(c.detach())),
            "gradient of A": relative_error(block_a.grad, block(a.grad)),
            "gradient of B": relative_error(block_b.grad, block(b.grad)),
        },
    }
