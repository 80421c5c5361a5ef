"""Flat parameters: the parameters of a layer as one vector, sharded over the ranks in equal parts.

What ZeRO and FSDP send is never a single parameter but a bucket of them. Here a bucket is a layer
of the model: its parameters become views of one flat vector, and each rank owns an equal part of
that vector.
"""

import math
from typing import Any

import torch
from torch import nn


class FlatParameter:
    """A bucket: parameters that travel together, as one flat vector, sharded over the ranks in
    equal slices.

    The parameters become views of the vector, so that what happens to it happens to them. All have
    one type, and either all are trained or none. Shapes: full (shards * shard_size,), the end of it
    padding; shard (shard_size,), that of this rank, with memory of its own (`keep_shard`) if it
    must outlive the vector, else a piece of it.
    """

    def __init__(self, params, shards, index, keep_shard):
        self.params = params
        self.trained = params[0].requires_grad
        numbers = sum(p.numel() for p in params)
        self.shard_size = math.ceil(numbers / shards)
        # One vector for all, padded until it can be sharded.
        self.full = params[0].new_zeros(shards * self.shard_size, requires_grad=False)
        self.nbytes = self.full.untyped_storage().nbytes()
        # Each parameter moves into its place of the vector.
        for p, place in zip(params, self.views(self.full)):
            place.copy_(p.data)
            p.data = place
        # What this rank owns.
        start = index * self.shard_size
        self.shard = self.full[start : start + self.shard_size]
        if keep_shard:
            self.shard = self.shard.clone()
        # Stage 2: gradient of the shard, summed over micro-batches; gradients not there yet.
        self.grad_shard: Any = None
        self.pending = len(params)

    def views(self, vector):
        """A flat vector as views of the parameters' shapes, without the padding."""
        sizes = [p.numel() for p in self.params]
        parts = vector[: sum(sizes)].split(sizes)
        return [part.view(p.shape) for part, p in zip(parts, self.params)]

    def take_gradients(self):
        """The gradients of the parameters as one flat vector; their own are freed."""
        vector = torch.zeros_like(self.full)
        for p, place in zip(self.params, self.views(vector)):
            if p.grad is not None:
                place.copy_(p.grad)
                p.grad = None
        return vector


def flatten(model, shards, index, keep_shard=False):
    """[(module, its flat parameters)]: each layer, and last the model with all that is in none."""
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    seen = set()
    found = []
    for module in [*layers, model]:
        # One flat parameter for each type, and for frozen and trained ones.
        kinds = {}
        for p in module.parameters():
            if p not in seen:  # tied weights are met twice
                seen.add(p)
                kinds.setdefault((p.dtype, p.requires_grad), []).append(p)
        group = [FlatParameter(params, shards, index, keep_shard) for params in kinds.values()]
        found.append((module, group))
    return found
