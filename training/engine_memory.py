"""Memory footprint of a DeepSpeed engine on a rank: weights, gradients, optimizer states."""

import gc

import numpy as np
import torch

from training import ranks, sft
from utils import figures


def footprint(engine, part):
    """MiB on this rank between two parts: {"weights", "optimizer", "gradients", "gathered"}.

    Gradients: with DeepSpeed's buckets and all that is left. Gathered: weights that are there at
    the fullest moment of a forward pass; ZeRO-3 brings whole ones together before they are used.
    """
    params = list(engine.module.parameters())
    gathered = []

    def weights():
        both = [x for p in params for x in (p.data, getattr(p, "ds_tensor", None))]
        return [x for x in both if x is not None]

    def note(*_):
        gathered.append(ranks.held(*weights()))

    # One part, with a look at the weights before each layer
    leaves = [m for m in engine.module.modules() if not list(m.children())]
    hooks = [m.register_forward_pre_hook(note) for m in leaves]
    # More is to come: stage 1 keeps whole gradients, stage 2 a share
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(sft.loss(engine, *part))
    for hook in hooks:
        hook.remove()
    # Optimizer states: the master weights and all that belongs to them
    states = getattr(engine.optimizer, "optimizer", engine.optimizer).state.items()
    kept = [x for p, state in states for x in (p, *state.values()) if isinstance(x, torch.Tensor)]
    # All tensors that are alive, and what each group adds to those before
    gc.collect()
    _ = [p.grad for p in params]  # what Python never saw is not found below
    alive = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    seen = []
    sums = [0.0]
    for group in (weights(), kept, alive):
        seen += [x for x in group if x.device.type == engine.device.type]
        sums.append(ranks.held(*seen) / 2**20)
    parts = dict(zip(("weights", "optimizer", "gradients"), np.diff(sums).tolist()))
    return parts | {"gathered": max(gathered) / 2**20}


def draw(path, held):
    """A stack for each rank: what it holds between two parts of a batch."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(2.5 + len(held), 3))
    names = [f"rank {i}" for i in range(len(held))]
    bottom = np.zeros(len(held))
    for name in ("weights", "gradients", "optimizer"):
        size = np.array([h[name] for h in held])
        axes.bar(names, size, 0.6, bottom, label=name)
        bottom += size
    axes.set(ylabel="MiB", ylim=(0, 1.4 * bottom.max()))
    axes.legend(fontsize=8, frameon=False)
    return figures.close(figure, path)
