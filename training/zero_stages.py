"""ZeRO stages 1 to 3, and data parallel as stage 0: engines of which each changes one thing.

Rajbhandari, Rasley, Ruwase & He 2019, arXiv:1910.02054; sections are the paper's. A step, phase by
phase:

    stage 0   backward | all-reduce gradients     | optimizer moves all parameters on every rank
    stage 1   backward | reduce-scatter gradients | optimizer moves the shard | all-gather parameters
    stage 2   backward, and reduce-scatter as soon as a layer has its gradients | optimizer
              | all-gather parameters
    stage 3   all-gather a layer before its forward and its backward, free it after; reduce-scatter
              | optimizer

Psi: parameters. N: ranks. flat_parameter.py makes the flat parameters, one a layer, that are
sharded in N equal parts.
"""

import torch
import torch.distributed as dist
from torch import nn

from training.flat_parameter import flatten


class DataParallel:
    """Stage 0: every rank has all parameters, gradients and optimizer states. 16 Psi bytes.

    A step has three phases: mean gradient, optimizer, updated parameters. Each stage replaces the
    first or the last.
    """

    sharded = False  # does each rank own one shard of every flat parameter, or the whole of it
    keep_shard = False  # must the shard outlive the full parameters, because these are freed

    def __init__(self, model, lr, **adam):
        self.ranks = dist.get_world_size()
        self.rank = dist.get_rank()
        shards = self.ranks if self.sharded else 1
        index = self.rank if self.sharded else 0
        with torch.no_grad():
            self.modules = flatten(model, shards, index, self.keep_shard)
        self.flat_params = [flat for _, group in self.modules for flat in group]
        self.trained = [flat for flat in self.flat_params if flat.trained]
        # What the optimizer moves: the shard's master copy in fp32, or the shard itself if that is
        # no less.
        for flat in self.trained:
            master_type = torch.promote_types(flat.shard.dtype, torch.float32)
            flat.master = nn.Parameter(flat.shard.to(master_type))
        self.adams = [torch.optim.AdamW([flat.master], lr, **adam) for flat in self.trained]

    def backward(self, loss):
        loss.backward()

    @torch.no_grad()
    def step(self):
        for flat, adam in zip(self.trained, self.adams):
            # The mean gradient of what this rank owns, over the ranks.
            flat.master.grad = self.mean_gradient(flat).to(flat.master.dtype)
            # The optimizer moves the master copy, in fp32.
            adam.step()
            flat.master.grad = None
            # The updated shard, rounded to the type of the parameters, goes to all ranks.
            flat.shard.copy_(flat.master)
            self.all_gather_parameters(flat)

    def mean_gradient(self, flat):
        """All-reduce: every rank gets the mean of the whole gradient."""
        gradient = flat.take_gradients()
        dist.all_reduce(gradient)
        return gradient.div_(self.ranks)

    def all_gather_parameters(self, flat):
        """Nothing to gather: all ranks have updated all parameters in the same way."""

    def state_dict(self):
        """What this rank alone knows: master copies of its shards, and the optimizer's states."""
        return {
            "masters": [f.master.data for f in self.trained],
            "adams": [adam.state_dict() for adam in self.adams],
        }

    @torch.no_grad()
    def load_state_dict(self, state):
        parts = zip(self.trained, self.adams, state["masters"], state["adams"])
        for flat, adam, master, numbers in parts:
            flat.master.copy_(master)
            adam.load_state_dict(numbers)
            # The parameters are the master copies, rounded.
            flat.shard.copy_(master)
            self.all_gather_parameters(flat)


class ZeRO1(DataParallel):
    """Stage 1, Sec. 5.1: optimizer states are sharded. 4 Psi + 12 Psi / N bytes.

    An all-reduce is a reduce-scatter and an all-gather. Stage 1 puts the optimizer between the two.
    """

    sharded = True

    def mean_gradient(self, flat):
        """Reduce-scatter: each rank gets the mean of its shard of the gradient, and no other."""
        grad_shard = torch.empty_like(flat.shard)
        dist.reduce_scatter_single(grad_shard, flat.take_gradients())
        return grad_shard.div_(self.ranks)

    def all_gather_parameters(self, flat):
        """All-gather: the shard that each rank has updated goes to all."""
        dist.all_gather_single(flat.full, flat.shard.clone())


class ZeRO2(ZeRO1):
    """Stage 2, Sec. 5.2: gradients are sharded, too: reduce-scatter during the backward pass, and
    keep the shard.

    2 Psi + 14 Psi / N bytes. A batch of several micro-batches pays for it: its gradients travel
    once for each.
    """

    def __init__(self, model, lr, **adam):
        super().__init__(model, lr, **adam)
        # The order in which gradients are reduced: as the backward pass meets the layers, from the
        # last to the first.
        *layers, root = self.modules
        self.order = []
        for _, group in [*reversed(layers), root]:
            self.order += [flat for flat in group if flat.trained]
        self.next = 0
        # Every parameter tells when the backward pass has made its gradient.
        for flat in self.trained:
            for p in flat.params:
                p.register_post_accumulate_grad_hook(lambda p, flat=flat: self.gradient_ready(flat))

    def gradient_ready(self, flat):
        """Hook: a gradient is there.

        All ranks reduce in one order, or these would wait for each other for ever.
        """
        flat.pending -= 1
        while self.next < len(self.order) and self.order[self.next].pending == 0:
            self.reduce_scatter_gradients()

    @torch.no_grad()
    def reduce_scatter_gradients(self):
        """Reduce-scatter the gradients of the next flat parameter; keep the shard of their mean."""
        flat = self.order[self.next]
        self.next += 1
        # The whole gradient is freed here; of its sum over the ranks this one gets its shard.
        grad_shard = torch.empty_like(flat.shard)
        dist.reduce_scatter_single(grad_shard, flat.take_gradients())
        grad_shard.div_(self.ranks)
        # Gradient accumulation: shards of micro-batches add up.
        if flat.grad_shard is None:
            flat.grad_shard = grad_shard
        else:
            flat.grad_shard.add_(grad_shard)
        flat.pending = len(flat.params)

    def backward(self, loss):
        loss.backward()
        # Parameters that had no part in this loss: another rank may wait for them.
        while self.next < len(self.order):
            self.reduce_scatter_gradients()
        self.next = 0

    def mean_gradient(self, flat):
        """Already reduced in the backward pass."""
        grad_shard = flat.grad_shard
        flat.grad_shard = None
        return torch.zeros_like(flat.shard) if grad_shard is None else grad_shard


class ZeRO3(ZeRO2):
    """Stage 3, Sec. 5.3: parameters are sharded, too: all-gather a layer before it computes, free
    it after.

    16 Psi / N bytes. A parameter that was freed keeps its place but not its memory: its storage has
    no bytes until the next all-gather; whoever holds a view of it, as autograd does, finds it
    filled. All ranks must go through the same layers: who skips one does not gather it, and the
    others wait.
    """

    keep_shard = True

    def __init__(self, model, lr, **adam):
        super().__init__(model, lr, **adam)
        self.gathered = set()
        self.in_backward = False
        self.root = self.modules[-1][1]
        for module, group in self.modules:
            # Before its forward a module gathers its parameters.
            module.register_forward_pre_hook(lambda *_, group=group: self.unshard(group))
            # Layers gather them again before their backward, and free them after the forward.
            # Embedding and head, in the root, are needed first and last, so they stay.
            if group is not self.root:
                module.register_full_backward_pre_hook(lambda *_, group=group: self.unshard(group))
                module.register_forward_hook(
                    lambda *_, group=group: self.reshard_after_forward(group)
                )
        # Until the first forward a rank holds its shards alone.
        for flat in self.flat_params:
            flat.full.untyped_storage().resize_(0)

    @torch.no_grad()
    def unshard(self, group):
        """All-gather the parameters of a layer before it computes.

        In the backward pass the layer before is done.
        """
        if self.in_backward:
            done = [x for x in self.gathered if x not in group and x not in self.root]
            self.reshard(done)
        # A storage for the full parameters, and all shards into it.
        for flat in group:
            if flat not in self.gathered:
                flat.full.untyped_storage().resize_(flat.nbytes)
                dist.all_gather_single(flat.full, flat.shard)
                self.gathered.add(flat)

    def reshard_after_forward(self, group):
        """Not when a layer computes again in the backward pass, for a checkpoint."""
        if not self.in_backward:
            self.reshard(group)

    def reshard(self, group):
        """Free the full parameters; the shards stay."""
        for flat in self.gathered.intersection(group):
            flat.full.untyped_storage().resize_(0)
            self.gathered.remove(flat)

    def backward(self, loss):
        self.in_backward = True
        super().backward(loss)
        self.in_backward = False
        # What the backward pass has left: its last layer, embedding and head.
        self.reshard(self.flat_params)

    def all_gather_parameters(self, flat):
        """Nothing to gather after the step: `unshard` does it when a layer needs them."""
