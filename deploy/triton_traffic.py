"""Bytes that move between memory and the processor: of a formula as torch operations, of a kernel, at least.

What a kernel fuses is limited by memory: its time is that of its bytes (the roofline model, Williams et al.
2009). Three counts: `eager_bytes`, each operation reads its operands and writes its result; `least_bytes`,
each input read once, each result written once; `kernel_bytes`, what all programs load and store, counted in
the interpreter. A cache serves some of the last, where programs load the same bytes.
"""

# pyright: reportMissingImports=false

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def size(tensor):
    """Bytes of a tensor; of one that was expanded, those that are there."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


class Traffic(TorchDispatchMode):
    """Adds up what torch operations read and write; views and empty tensors move nothing."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        moves = not func.is_view and "empty" not in func.__name__ and "detach" not in func.__name__
        if moves:
            found = tree_leaves((args, kwargs, result))
            self.bytes += sum(size(x) for x in found if isinstance(x, torch.Tensor))
        return result


def eager_bytes(case, sizes, dtype=torch.float16):
    """Bytes of the formula as torch operations, counted on tensors without memory (device meta)."""
    given = case.inputs(sizes, dtype, "meta")
    with Traffic() as traffic:
        case.eager(*given)
    return traffic.bytes


def least_bytes(case, sizes, dtype=torch.float16):
    """Each input read once, each result written once."""
    given = case.inputs(sizes, dtype, "meta")
    return sum(x.nbytes for x in tree_leaves((given, case.eager(*given))))


@contextmanager
def counted():
    """{"loaded": bytes, "stored": bytes} of all kernels that the interpreter runs meanwhile, masked ones left out."""
    from triton.runtime.interpreter import interpreter_builder as builder

    bytes_ = {"loaded": 0, "stored": 0}

    def watch(operation, way, mask_at):
        def call(pointers, *rest):
            inside = int(rest[mask_at].data.sum())
            bytes_[way] += inside * pointers.get_element_ty().primitive_bitwidth // 8
            return operation(pointers, *rest)

        return call

    builder.create_masked_load = watch(builder.create_masked_load, "loaded", 0)
    builder.create_masked_store = watch(builder.create_masked_store, "stored", 1)
    try:
        yield bytes_
    finally:
        # what the class defines is there again
        del builder.create_masked_load, builder.create_masked_store


def kernel_bytes(case, sizes, dtype=torch.float16):
    """What all programs of the fused call load and store together, counted in the interpreter."""
    given = case.inputs(sizes, dtype, "cpu")
    with counted() as found:
        case.fused(*given)
    return sum(found.values())


def roofline_seconds(moved, flops, bandwidth, peak):
    """Time at least: that of the bytes at `bandwidth` bytes a second, or of the flops at `peak` a second."""
    return max(moved / bandwidth, flops / peak)


def order(tiles_m, tiles_n, group):
    """[(row, column)] of the tile of each program of `triton_matmul.matmul`."""
    from deploy.triton_matmul import grouped_tile

    return [grouped_tile.fn(i, tiles_m, tiles_n, group) for i in range(tiles_m * tiles_n)]


def bands_of_a_wave(tiles, wave):
    """Bands of A and of B, each as long as K, that `wave` programs side by side need: their mean over all waves.

    tiles: [(row, column)] as `order` gives it. A band that many of them need is read from memory once.
    """
    waves = [tiles[start : start + wave] for start in range(0, len(tiles), wave)]
    needed = [len({row for row, _ in part}) + len({column for _, column in part}) for part in waves]
    return sum(needed) / len(needed)
