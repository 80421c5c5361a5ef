"""Tensor parallelism: every rank has a shard of every matrix. Shoeybi et al. 2019 (Megatron-LM),
arXiv:1909.08053.

A layer that does not fit on one GPU must itself be sharded. megatron.py shards the matrices of a
Llama over ranks by columns and rows (1-D), summa.py shards in two directions, after Xu et al. 2021
(Optimus), arXiv:2104.05343. This script trains one step with Megatron's layers and compares loss,
gradients, bytes and all-reduces with those of the unsharded model and of PyTorch's
`parallelize_module`, and draws who holds what.

Shapes: B texts, L tokens, D width, V words of the vocabulary, N ranks.

    python training/tensor_parallel.py                       # two layers of SmolLM2 on three ranks
    python training/tensor_parallel.py --layers 0            # all 30 of them: 7.5 GB
    torchrun --nproc_per_node 3 training/tensor_parallel.py
"""

import copy
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from training import megatron, ranks, unsharded
from training.unsharded import relative_error
from utils import figures, run


@dataclass(frozen=True)
class Config:
    """Shard a language model over ranks; compare loss, gradients and bytes with the whole model."""

    model: str = "smollm2"  # smollm2, a local folder, or a hub id such as meta-llama/Llama-2-7b-hf
    layers: int = 2  # how many of its layers, from the first; 0: all
    # processes; they must divide its heads: SmolLM2 has 9 of queries, 3 of keys and values
    ranks: int = 3
    batch: int = 2  # B, texts
    length: int = 32  # L, tokens a text
    side: int = 2  # ranks along each side of the square grid of SUMMA
    double: bool = False  # in double precision: is a difference rounding, or a mistake?
    seed: int = 0  # of the random matrices of SUMMA
    out: str = "outputs/tensor_parallel"  # where the results go


def read(cfg):
    """The first layers of the model and real text for it -> model, ids (B, L + 1)."""
    tokenizer, model = unsharded.load(cfg.model)
    megatron.check(model.config)
    # The first layers only; fp32, unless --double.
    depth = len(model.model.layers)
    run.check(
        0 <= cfg.layers <= depth,
        f"--layers must be at most {depth}, those of the model, or 0 for all",
    )
    del model.model.layers[cfg.layers or depth :]
    ids = unsharded.token_batch(tokenizer, cfg.batch, cfg.length + 1)
    model = model.to(ranks.device(), torch.float64 if cfg.double else torch.float32)
    return model.requires_grad_(), ids.to(ranks.device())


def torch_tensor_parallel(model, shared_input=True):
    """The same sharding of the layers by PyTorch's `parallelize_module`, in place -> the model;
    embedding stays whole.

    shared_input: the input of a block becomes a DTensor before its matrices take it. Else each
    matrix makes its own, and each of these is an all-reduce in the backward pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    # Column-parallel first matrices, row-parallel second ones.
    plan = {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        plan[name] = ColwiseParallel()
    plan["self_attn.o_proj"] = RowwiseParallel()
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        plan[name] = ColwiseParallel()
    plan["mlp.down_proj"] = RowwiseParallel()
    # f before each block, once for all of its matrices.
    if shared_input:
        layout = {"hidden_states": Replicate()}
        plan["self_attn"] = PrepareModuleInput(
            input_kwarg_layouts=layout, desired_input_kwarg_layouts=layout
        )
        plan["mlp"] = PrepareModuleInput(
            input_layouts=Replicate(), desired_input_layouts=Replicate()
        )
    mesh = init_device_mesh(ranks.device().type, (dist.get_world_size(),))
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    return model


def unsharded_cross_entropy(states, weight, labels):
    """The same loss as `megatron.cross_entropy`, with the whole vocabulary in one place."""
    return F.cross_entropy((states @ weight.T).flatten(0, 1), labels.flatten())


def forward_backward(model, ids, loss):
    """-> {"loss", "states" (B, L, D), "input gradient" (B, L, D), "gradients" of the weights}."""
    # Forward: embedding, layers, loss.
    x = model.get_input_embeddings()(ids[:, :-1])
    x.retain_grad()
    states = model.model(inputs_embeds=x, use_cache=False).last_hidden_state
    value = loss(states, model.lm_head.weight, ids[:, 1:])
    value.backward()
    return {
        "loss": value.detach(),
        "states": states.detach(),
        "input gradient": x.grad,
        "gradients": {name: p.grad for name, p in model.named_parameters()},
    }


def worker(cfg):
    """What every rank does: a step of the unsharded model, of torch's shards, of ours -> results."""
    from torch.distributed.tensor.debug import CommDebugMode

    # The unsharded model, on every rank; of its gradients those of this rank's shards.
    model, ids = read(cfg)
    whole = forward_backward(model, ids, unsharded_cross_entropy)
    for name, gradient in whole["gradients"].items():
        whole["gradients"][name] = megatron.local_shard(name, gradient)
    sizes = {name: p.nbytes for name, p in model.named_parameters()}
    first = model.model.layers[0]
    matrices = {name: list(p.shape) for name, p in first.named_parameters() if p.dim() == 2}
    model.zero_grad()
    # PyTorch's shards: first each matrix with an input of its own, then one input a block.
    torch_calls = []
    for shared_input in (False, True):
        theirs = None  # of the first time: let go before the second
        twin = torch_tensor_parallel(copy.deepcopy(model), shared_input)
        # Warnings: of hooks that it would like to set
        with warnings.catch_warnings(action="ignore"), CommDebugMode() as counted:
            theirs = forward_backward(twin, ids, unsharded_cross_entropy)
        torch_calls.append(counted.get_total_counts() / len(twin.model.layers))
        del twin
    # Megatron's shards, in place of the unsharded model.
    with ranks.Traffic() as traffic:
        ours = forward_backward(megatron.apply_tensor_parallel(model), ids, megatron.cross_entropy)
    # PyTorch's embedding is whole: with it only the layers are compared.
    gradients = {name: x for name, x in ours["gradients"].items() if ".layers." in name}
    in_layers = ours | {"gradients": gradients}
    to_whole = {key: relative_error(ours[key], whole[key]) for key in ours}
    to_torch = {key: relative_error(in_layers[key], theirs[key]) for key in in_layers}
    sharded = model.model.layers[0]
    return {
        "loss": ours["loss"].item(),
        "layers": len(model.model.layers),
        "message": ours["states"].nbytes,
        "width": model.config.hidden_size,
        "differences": [to_whole, to_torch],
        "whole": sum(sizes.values()),
        "norms": sum(size for name, size in sizes.items() if "norm" in name),
        "held": ranks.states(model)["weights"],
        "sent": traffic.sent["all_reduce"],
        "calls": [traffic.calls, *torch_calls],
        "matrices": matrices,
        "shards": {name: list(p.shape) for name, p in sharded.named_parameters()},
    }


def draw_shards(path, found):
    """Who holds which shard of a layer: inputs down, outputs across, a colour for each rank."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 5.2), layout="constrained")
    width = found[0]["width"]

    def label(x, y, text):
        axis.text(x, y, text, ha="center", va="center", fontsize=9)

    blocks = [("self_attn", ["q", "k", "v", "o"], 0), ("mlp", ["gate", "up", "down"], 1.8)]
    for block, names, top in blocks:
        x = 0.0  # in widths of the model
        for name in names:
            # Between first and second matrices no rank needs another.
            if name == names[-1]:
                label(x + 0.2, top + 0.5, "each rank\nby itself")
                x += 0.75
            axis.text(x, top - 0.08, f"$W_{{{name}}}$", fontsize=10)
            # The shards of a matrix: beside each other, or below each other.
            key = f"{block}.{name}_proj.weight"
            across = x
            down = top
            for rank, one in enumerate(found):
                outputs, inputs = (n / width for n in one["shards"][key])
                box = plt.Rectangle(
                    (across, down),
                    outputs,
                    inputs,
                    facecolor=f"C{rank}",
                    alpha=0.7,
                    edgecolor="white",
                )
                axis.add_patch(box)
                label(across + outputs / 2, down + inputs / 2, rank)
                if megatron.SHARD_DIM[f"{name}_proj"] == megatron.COLUMNS:
                    across += outputs
                else:
                    down += inputs
            x += found[0]["matrices"][key][0] / width + 0.4
        # The two operators at the ends of a block.
        label(-0.55, top + 0.5, "$\\bf{f}$\nbackward:\nall-reduce")
        label(x + 0.05, top + 0.5, "$\\bf{g}$\nforward:\nall-reduce")
    # The last matrix is the lowest.
    lowest = top + found[0]["matrices"]["mlp.down_proj.weight"][1] / width
    axis.set(xlim=(-1, x + 0.5), ylim=(lowest + 0.1, -0.3), aspect="equal")
    caption = "attention above, MLP below; a number is the rank that holds the shard"
    axis.text(0, 1.35, caption, fontsize=10)
    axis.axis("off")
    figures.close(figure, path)


def mebibytes(**sizes):
    return {name: size / 2**20 for name, size in sizes.items()}


def main(cfg: Config) -> dict:
    """One step in three ways, compared; writes the picture of who holds what."""
    run.check(min(cfg.batch, cfg.length) > 0, "--batch and --length must be at least 1")
    found = ranks.launch(worker, cfg, cfg.ranks)
    if found is None:
        return {}
    one = found[0]
    n = len(found)
    layers = one["layers"]
    message = one["message"]  # bytes of (B, L, D) numbers
    # Formula of the weights: all but the norms is sharded.
    held = (one["whole"] - one["norms"]) / n + one["norms"]
    # Formula of the traffic: all-reduces over a ring, of four messages a layer, two for embedding
    # and head, and three numbers a token in the loss.
    layer_sent = 8 * (n - 1) / n * message
    three = 3 * message / one["width"]
    sent = 2 * (n - 1) / n * ((4 * layers + 2) * message + three)
    # The largest relative error of all ranks, to the unsharded model and to PyTorch's shards.
    worst = []
    for i in (0, 1):
        errors = [x["differences"][i] for x in found]
        worst.append({what: max(x[what] for x in errors) for what in errors[0]})
    ours, naive, shared = one["calls"]
    metrics = {
        "loss": one["loss"],
        "layers": layers,
        "ranks": n,
        "ours and the whole": worst[0],
        "ours and torch": worst[1],
        "weights, MiB": mebibytes(whole=one["whole"], rank=one["held"], formula=held),
        "sent by a rank, MiB": mebibytes(measured=one["sent"], formula=sent, layer=layer_sent),
        "errors of the formulas": {
            "weights": one["held"] / held - 1,
            "sent": one["sent"] / sent - 1,
        },
        "all-reduces a layer": {
            "ours": (ours - megatron.VOCABULARY_ALL_REDUCES) / layers,
            "torch": shared,
            "torch, each matrix its own": naive,
        },
    }
    folder = run.output(cfg.out, cfg)
    draw_shards(folder / "slices.png", found)
    then = f"open {folder}/slices.png; then python training/pipeline.py"
    return run.report(folder, metrics, then=then)


if __name__ == "__main__":
    run.cli(main, Config)
