"""Memory and communication volume of ZeRO: the paper's formulas, and the bytes that a rank really
holds.

Psi: parameters. N: ranks. Rajbhandari et al. 2019, arXiv:1910.02054, Sec. 5 and 7.
"""

from training import ranks


def formula(psi, n, stage, bf16=True):
    """Bytes per rank of weights, gradients and optimizer states: the paper's Fig. 1 and Sec. 5, K =
    12.

    In fp32 the weight is its own copy: 4 + 4 + 8 bytes.
    """
    # Bytes per parameter, then over how many ranks each kind is sharded.
    weight, gradient, optimizer = (2, 2, 12) if bf16 else (4, 4, 8)
    weight_shards = n if stage >= 3 else 1
    gradient_shards = n if stage >= 2 else 1
    optimizer_shards = n if stage >= 1 else 1
    return {
        "weights": weight * psi / weight_shards,
        "gradients": gradient * psi / gradient_shards,
        "optimizer": optimizer * psi / optimizer_shards,
    }


def volume(size, n, stage, accumulate=1):
    """Bytes that a rank sends in one step, `size` those of all weights: Sec. 7. The paper counts 2,
    2, 2 and 3 Psi.

    A ring saves the own shard, (N-1)/N; stages 2 and 3 reduce-scatter for every micro-batch, stage
    3 gathers twice for each.
    """
    times = {0: 2, 1: 2, 2: accumulate + 1, 3: 3 * accumulate}[stage]
    return (n - 1) / n * size * times


def bytes_held(engine, model):
    """Bytes on this rank now: {"weights", "gradients", "optimizer"}."""
    # Weights: shards, and full parameters where they are not freed.
    weights = [f.shard for f in engine.flat_params] + [f.full for f in engine.flat_params]
    # Gradients: those that autograd left, and the shards that stage 2 keeps.
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    gradients += [f.grad_shard for f in engine.trained if f.grad_shard is not None]
    # Optimizer: master copies, unless these are the shards themselves, and AdamW's moments.
    masters = [f.master for f in engine.trained if f.master.dtype != f.full.dtype]
    moments = []
    for adam in engine.adams:
        for state in adam.state.values():
            moments += [x for x in state.values() if x.dim()]  # not the count of steps
    return {
        "weights": ranks.held(*weights, *model.parameters()),
        "gradients": ranks.held(*gradients),
        "optimizer": ranks.held(*masters, *moments),
    }
