"""Tensor parallelism: every rank has a shard of every matrix. Shoeybi et al. 2019 (Megatron-LM), arXiv:1909.08053.

A layer that does not fit on one GPU must itself be sharded. Shard the first matrix of a pair by columns
(column-parallel) and the second by rows (row-parallel), and each rank computes its part from one end to the other
alone; the partial sums are then added up. Two operators say where ranks talk: f copies to the model-parallel region
(backward: all-reduce), g reduces from it (forward: all-reduce). Sections and equations are the paper's. `Summa` shards
in two directions, after Xu et al. 2021 (Optimus), arXiv:2104.05343.

Shapes: B texts, L tokens, D width, H heads of d numbers each, M width of the MLP, V words, N ranks.
Differences from the paper: Llama instead of GPT-2, so the MLP is a SwiGLU of three matrices, there are no biases, and
several heads of queries share one of keys and values: what is sharded are groups of heads.

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
from einops import rearrange
from torch import nn

from training import ranks
from utils import data, figures, pretrained, run


@dataclass(frozen=True)
class Config:
    """Shard a language model over ranks; compare loss, gradients, bytes held and bytes sent with the whole model."""

    model: str = "smollm2"  # smollm2, a local folder, or a hub id such as meta-llama/Llama-2-7b-hf
    layers: int = 2  # how many of its layers, from the first; 0: all
    # processes; they must divide its heads: SmolLM2 has 9 of queries, 3 of keys and values
    ranks: int = 3
    batch: int = 2  # B, texts
    length: int = 32  # L, tokens a text
    side: int = 2  # ranks along each side of the square grid, for the two-dimensional form
    double: bool = False  # in double precision: is a difference rounding, or a mistake?
    seed: int = 0  # of the random matrices of that form
    out: str = "outputs/tensor_parallel"  # where the results go


def all_reduce(x):
    """The sum of x over all ranks, on all ranks."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


class CopyToModelParallel(torch.autograd.Function):
    """f of Fig. 3: forward nothing, for all have x. Backward: add up the gradients through the shards of all ranks."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad)


class ReduceFromModelParallel(torch.autograd.Function):
    """g of Fig. 3: forward the partial sums are added up. Backward nothing: all have the gradient of the sum."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


f = CopyToModelParallel.apply
g = ReduceFromModelParallel.apply

# The paper's A, in Y = X A, is (in, out); torch keeps its transpose (out, in): columns of A are along dimension 0.
COLUMNS, ROWS = 0, 1
SHARD_DIM = dict.fromkeys(["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], COLUMNS)
SHARD_DIM |= dict.fromkeys(["embed_tokens", "lm_head"], COLUMNS)  # vocabulary-parallel
SHARD_DIM |= dict.fromkeys(["o_proj", "down_proj"], ROWS)
# all-reduces that are no layer's: after the embedding, before the head (backward), three in the loss
WORDS = 5


def local_shard(name, x):
    """This rank's shard of the weight or gradient `name`, e.g. "model.layers.0.mlp.up_proj.weight"; norms: all."""
    dim = SHARD_DIM.get(name.split(".")[-2])
    if dim is None:
        return x
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone()


def shard_linear(module, name):
    """This rank's shard of the nn.Linear `name` of a module, as a smaller nn.Linear."""
    weight = local_shard(f"{name}.weight", getattr(module, name).weight.detach())
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


class MLP(nn.Module):
    """SwiGLU with M / N of its M hidden units: (B, L, D) -> (B, L, D). Sec. 3, Fig. 3a."""

    def __init__(self, dense):
        super().__init__()
        # Column-parallel: M / N hidden units.
        self.gate_proj = shard_linear(dense, "gate_proj")
        self.up_proj = shard_linear(dense, "up_proj")
        # Row-parallel: what these units add to the output.
        self.down_proj = shard_linear(dense, "down_proj")

    def forward(self, x):
        x = f(x)  # once for both matrices: each use would be an all-reduce of its own
        # (B, L, M/N); Eq. 3: the nonlinearity needs no other rank
        y = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return g(self.down_proj(y))  # Y_1 B_1 + Y_2 B_2


class Attention(nn.Module):
    """H / N of the heads, with the keys and values that they read: (B, L, D) -> (B, L, D). Sec. 3, Fig. 3b."""

    def __init__(self, dense):
        super().__init__()
        self.size = dense.head_dim
        # Column-parallel: H / N heads of queries, and their keys and values.
        self.q_proj = shard_linear(dense, "q_proj")
        self.k_proj = shard_linear(dense, "k_proj")
        self.v_proj = shard_linear(dense, "v_proj")
        # Row-parallel: what these heads add to the output.
        self.o_proj = shard_linear(dense, "o_proj")

    def forward(self, hidden_states, position_embeddings, **_):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        x = f(hidden_states)
        q, k, v = (
            rearrange(p(x), "b l (h d) -> b h l d", d=self.size)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        # (B, H/N, L, d)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return g(self.o_proj(rearrange(y, "b h l d -> b l (h d)"))), None


def local(ids, size):
    """Numbers of words -> their numbers among this rank's `size` words, and which are another rank's (0 for those)."""
    here = ids - dist.get_rank() * size
    foreign = (here < 0) | (here >= size)
    return here.masked_fill(foreign, 0), foreign


class Embedding(nn.Module):
    """V / N of the words: ids (B, L) -> (B, L, D). Exactly one rank has something to add for each id. Sec. 3."""

    def __init__(self, dense):
        super().__init__()
        self.weight = nn.Parameter(local_shard("embed_tokens.weight", dense.weight.detach()))

    def forward(self, ids):
        here, foreign = local(ids, len(self.weight))
        return g(F.embedding(here, self.weight).masked_fill(foreign[..., None], 0))


def cross_entropy(states, weight, labels):
    """Vocabulary-parallel cross-entropy, mean of -log p(label). End of Sec. 3.

    states (B, L, D), weight: this rank's words (V/N, D), labels (B, L) -> ().

    No rank ever has all V logits of a token: three numbers a token travel instead.
    """
    logits = f(states) @ weight.T  # (B, L, V/N)
    # The largest logit of all ranks, so that exp stays finite.
    highest = logits.detach().amax(-1)  # (B, L)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    # The logit of the label, which one rank has.
    here, foreign = local(labels, len(weight))
    right = g(logits.gather(-1, here[..., None])[..., 0].masked_fill(foreign, 0))  # (B, L)
    # The log of the sum of exp over all words.
    exp_sum = g((logits - highest[..., None]).exp().sum(-1))  # (B, L)
    return (exp_sum.log() + highest - right).mean()


def check(config):
    """Raises UserError unless a Llama of this configuration can be dealt to the ranks there are."""
    c, n = config, dist.get_world_size()
    run.check(
        c.model_type == "llama", f"--model is a {c.model_type}; only a Llama can be sharded here"
    )
    run.check(
        not c.attention_bias and not c.mlp_bias,
        "--model has biases; only a Llama without can be sharded here",
    )
    sizes = {
        "query heads": c.num_attention_heads,
        "heads of keys and values": c.num_key_value_heads,
    }
    for what, size in (
        sizes | {"hidden units": c.intermediate_size, "words": c.vocab_size}
    ).items():
        run.check(
            size % n == 0,
            f"{size} {what} cannot be dealt to {n} ranks; take --ranks that divide {size}",
        )


def apply_tensor_parallel(model):
    """Replace what is large in a Llama by this rank's shards, in place -> the model. Names of weights stay."""
    check(model.config)
    for layer in model.model.layers:
        layer.self_attn = Attention(layer.self_attn)
        layer.mlp = MLP(layer.mlp)
    model.lm_head = shard_linear(model, "lm_head")
    model.model.embed_tokens = Embedding(model.model.embed_tokens)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def through_torch(model, once=True):
    """The same sharding of the layers by torch's own tools, in place -> the model; words stay whole.

    once: the input of a block becomes a DTensor before its matrices take it. Else each matrix makes its own, and each
    of these is an all-reduce in the backward pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    plan: dict = {f"self_attn.{x}_proj": ColwiseParallel() for x in "qkv"} | {
        "self_attn.o_proj": RowwiseParallel()
    }
    plan |= {f"mlp.{x}_proj": ColwiseParallel() for x in ("gate", "up")} | {
        "mlp.down_proj": RowwiseParallel()
    }
    if once:
        here = {"hidden_states": Replicate()}
        plan["self_attn"] = PrepareModuleInput(
            input_kwarg_layouts=here, desired_input_kwarg_layouts=here
        )
        plan["mlp"] = PrepareModuleInput(
            input_layouts=Replicate(), desired_input_layouts=Replicate()
        )
    mesh = init_device_mesh(ranks.device().type, (dist.get_world_size(),))
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    return model


class Summa(torch.autograd.Function):
    """C = A B on a square grid of ranks, each of which has one block of each. Xu et al. 2021, Algorithms 1 to 3.

    a, b: this rank's blocks; mesh: of two dimensions, rows i and columns j -> its block of C. Nobody ever has a whole
    matrix, nor, as above, a whole activation: A is sharded as well.
    """

    @staticmethod
    def forward(ctx, a, b, mesh):
        ctx.save_for_backward(a, b)
        ctx.row, ctx.column, ctx.side = mesh.get_group(1), mesh.get_group(0), mesh.size(0)
        # C_ij = sum A_ik B_kj
        return sum(share(a, k, ctx.row) @ share(b, k, ctx.column) for k in range(ctx.side))

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        for k in range(ctx.side):
            # dA_ik = sum over j of dC_ij B_kj^T: added up along the row
            for_a = grad @ share(b, k, ctx.column).T
            # dB_kj = sum over i of A_ik^T dC_ij: along the column
            for_b = share(a, k, ctx.row).T @ grad
            dist.reduce(for_a, group_dst=k, group=ctx.row)
            dist.reduce(for_b, group_dst=k, group=ctx.column)
            if ctx.row.rank() == k:
                grad_a = for_a
            if ctx.column.rank() == k:
                grad_b = for_b
        return grad_a, grad_b, None


def share(x, k, group):
    """The block of the k-th of a group, on all of it."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.broadcast(x, group=group, group_src=k)
    return x


def on_a_grid(cfg):
    """Worker: a random product on side x side ranks -> how it differs from the whole one, bytes of both, place."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(cfg.seed)
    run.check(
        dist.get_world_size() == cfg.side**2, f"a grid of side {cfg.side} takes {cfg.side**2} ranks"
    )
    mesh = init_device_mesh(ranks.device().type, (cfg.side, cfg.side))
    i, j = mesh.get_local_rank(0), mesh.get_local_rank(1)
    rows, width = cfg.batch * cfg.length, 96 * cfg.side
    whole = [
        torch.randn(n, m, device=ranks.device())
        for n, m in ((rows, width), (width, width), (rows, width))
    ]
    block = lambda x: x.chunk(cfg.side, 0)[i].chunk(cfg.side, 1)[j].clone()  # noqa: E731
    a, b, grad = whole[0].requires_grad_(), whole[1].requires_grad_(), whole[2]
    mine_a, mine_b = block(a.detach()).requires_grad_(), block(b.detach()).requires_grad_()
    c, mine_c = a @ b, Summa.apply(mine_a, mine_b, mesh)
    c.backward(grad)
    mine_c.backward(block(grad))
    pairs = {
        "C": (mine_c.detach(), c.detach()),
        "gradient of A": (mine_a.grad, a.grad),
        "gradient of B": (mine_b.grad, b.grad),
    }
    found = {
        "held": ranks.held(mine_a, mine_b, mine_c),
        "whole": ranks.held(a, b, c),
        "place": [i, j],
    }
    return found | {
        "differences": {name: difference(part, block(x)) for name, (part, x) in pairs.items()}
    }


def read(cfg):
    """The first layers of the model, fp32, with gradients, and real text for it: -> model, ids (B, L + 1)."""
    tokenizer, model = (
        pretrained.smollm2() if cfg.model == "smollm2" else pretrained.language_model(cfg.model)
    )
    check(model.config)
    depth = len(model.model.layers)
    run.check(
        0 <= cfg.layers <= depth,
        f"--layers must be at most {depth}, those of the model, or 0 for all",
    )
    del model.model.layers[cfg.layers or depth :]
    text = "\n\n".join(page for _, page in data.docs()[: cfg.batch])
    ids = torch.tensor(tokenizer(text)["input_ids"])[: cfg.batch * (cfg.length + 1)]
    run.check(len(ids) == cfg.batch * (cfg.length + 1), "there is not so much text: lower --length")
    model = model.to(ranks.device(), torch.float64 if cfg.double else torch.float32)
    return model.requires_grad_(), ids.view(cfg.batch, -1).to(ranks.device())


def plain(states, weight, labels):
    """The same loss as `cross_entropy`, with all words in one place."""
    return F.cross_entropy((states @ weight.T).flatten(0, 1), labels.flatten())


def step(model, ids, loss):
    """Forward and backward -> {"loss", "states" (B, L, D), "input gradient" (B, L, D), "gradients" of the weights}."""
    x = model.get_input_embeddings()(ids[:, :-1])
    x.retain_grad()
    states = model.model(inputs_embeds=x, use_cache=False).last_hidden_state
    value = loss(states, model.lm_head.weight, ids[:, 1:])
    value.backward()
    gradients = {k: p.grad for k, p in model.named_parameters()}
    return {
        "loss": value.detach(),
        "states": states.detach(),
        "input gradient": x.grad,
        "gradients": gradients,
    }


def difference(ours, theirs):
    """The largest difference, as a share of the largest number; of dicts, the worst of their entries."""
    if isinstance(ours, dict):
        return max(difference(x, theirs[name]) for name, x in ours.items())
    theirs = theirs.to_local() if hasattr(theirs, "to_local") else theirs
    return float((ours - theirs).abs().max() / theirs.abs().max())


def worker(cfg):
    """What every rank does: a training step of the whole model, of torch's shards, of ours -> what was found."""
    from torch.distributed.tensor.debug import CommDebugMode

    model, ids = read(cfg)
    whole = step(model, ids, plain)
    whole["gradients"] = {name: local_shard(name, x) for name, x in whole["gradients"].items()}
    sizes = {name: p.nbytes for name, p in model.named_parameters()}
    matrices = {
        k: list(p.shape) for k, p in model.model.layers[0].named_parameters() if p.dim() == 2
    }
    model.zero_grad()
    calls = []
    for once in (False, True):
        theirs = None  # of the first time: let go before the second
        twin = through_torch(copy.deepcopy(model), once)
        # Of hooks that it would like to set
        with warnings.catch_warnings(action="ignore"), CommDebugMode() as counted:
            theirs = step(twin, ids, plain)
        calls.append(counted.get_total_counts() / len(twin.model.layers))
        del twin
    with ranks.Traffic() as traffic:
        ours = step(apply_tensor_parallel(model), ids, cross_entropy)
    layers = ours | {
        "gradients": {name: x for name, x in ours["gradients"].items() if ".layers." in name}
    }
    return {
        "loss": ours["loss"].item(), "layers": len(model.model.layers), "message": ours["states"].nbytes,
        "width": model.config.hidden_size,
        "differences": [{k: difference(a[k], b[k]) for k in a} for a, b in ((ours, whole), (layers, theirs))],
        "whole": sum(sizes.values()), "norms": sum(size for name, size in sizes.items() if "norm" in name),
        "held": ranks.states(model)["weights"], "sent": traffic.sent["all_reduce"], "calls": [traffic.calls, *calls],
        "matrices": matrices, "pieces": {k: list(p.shape) for k, p in model.model.layers[0].named_parameters()},
    }  # fmt: skip


def picture(path, found):
    """Who holds what of a layer: its matrices as in the paper, inputs down, outputs across, a colour for each rank."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 5.2), layout="constrained")
    say = lambda x, y, what: axis.text(x, y, what, ha="center", va="center", fontsize=9)  # noqa: E731
    shapes = lambda one, of: [n / one["width"] for n in one[of][key]]  # noqa: E731
    for block, names, top in (
        ("self_attn", ["q", "k", "v", "o"], 0),
        ("mlp", ["gate", "up", "down"], 1.8),
    ):
        x = 0.0  # in widths of the model
        for name in names:
            key = f"{block}.{name}_proj.weight"
            if name == names[-1]:
                say(x + 0.2, top + 0.5, "each rank\nby itself")
                x += 0.75
            axis.text(x, top - 0.08, f"$W_{{{name}}}$", fontsize=10)
            across, down = x, top
            for rank, one in enumerate(found):
                out, size = shapes(one, "pieces")
                box = plt.Rectangle(
                    (across, down), out, size, facecolor=f"C{rank}", alpha=0.7, edgecolor="white"
                )
                axis.add_patch(box)
                say(across + out / 2, down + size / 2, rank)
                across, down = (
                    (across + out, down)
                    if SHARD_DIM[f"{name}_proj"] == COLUMNS
                    else (across, down + size)
                )
            x += shapes(found[0], "matrices")[0] + 0.4
        say(-0.55, top + 0.5, "$\\bf{f}$\nbackward:\nall-reduce")
        say(x + 0.05, top + 0.5, "$\\bf{g}$\nforward:\nall-reduce")
    axis.set(
        xlim=(-1, x + 0.5), ylim=(top + shapes(found[0], "matrices")[1] + 0.1, -0.3), aspect="equal"
    )
    axis.text(
        0,
        1.35,
        "attention above, MLP below; a number is the rank that holds the shard",
        fontsize=10,
    )
    axis.axis("off")
    figures.close(figure, path)


def main(cfg: Config) -> dict:
    """One step in three ways, compared; writes the picture of who holds what."""
    run.check(min(cfg.batch, cfg.length) > 0, "--batch and --length must be at least 1")
    found = ranks.launch(worker, cfg, cfg.ranks)
    if found is None:
        return {}
    one, n = found[0], len(found)
    held = (one["whole"] - one["norms"]) / n + one["norms"]
    three = 3 * one["message"] / one["width"]  # numbers a token, of the loss
    sent = 2 * (n - 1) / n * ((4 * one["layers"] + 2) * one["message"] + three)
    worst = [
        {what: max(x["differences"][i][what] for x in found) for what in one["differences"][i]}
        for i in (0, 1)
    ]
    mib = lambda **sizes: {name: size / 2**20 for name, size in sizes.items()}  # noqa: E731
    metrics = {"loss": one["loss"], "layers": one["layers"], "ranks": n}
    metrics |= {"ours and the whole": worst[0], "ours and torch": worst[1]}
    metrics["weights, MiB"] = mib(whole=one["whole"], rank=one["held"], formula=held)
    metrics["sent by a rank, MiB"] = mib(
        measured=one["sent"], formula=sent, layer=8 * (n - 1) / n * one["message"]
    )
    metrics["errors of the formulas"] = {
        "weights": one["held"] / held - 1,
        "sent": one["sent"] / sent - 1,
    }
    ours, naive, once = one["calls"]
    ours = (ours - WORDS) / one["layers"]
    metrics["all-reduces a layer"] = {
        "ours": ours,
        "torch": once,
        "torch, each matrix its own": naive,
    }
    folder = run.output(cfg.out, cfg)
    picture(folder / "slices.png", found)
    return run.report(
        folder, metrics, then=f"open {folder}/slices.png; then python training/pipeline.py"
    )


if __name__ == "__main__":
    run.cli(main, Config)
