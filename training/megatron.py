"""The layers of Megatron-LM: every rank has a shard of every matrix. Shoeybi et al. 2019,
arXiv:1909.08053.

Shard the first matrix of a pair by columns (column-parallel) and the second by rows (row-parallel),
and each rank computes its part from one end to the other alone; the partial sums are then added up.
Two operators say where ranks talk: f copies to the model-parallel region (backward: all-reduce), g
reduces from it (forward: all-reduce). Sections and equations are the paper's; tensor_parallel.py
trains with these layers and measures them.

Shapes: B texts, L tokens, D width, H heads of d numbers each, M width of the MLP, V words of the
vocabulary, N ranks. Differences from the paper: Llama instead of GPT-2, so the MLP is a SwiGLU of
three matrices, there are no biases, and several heads of queries share one of keys and values: what
is sharded are groups of heads.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from utils import run


def all_reduce(x):
    """The sum of x over all ranks, on all ranks."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


class CopyToModelParallel(torch.autograd.Function):
    """f of Fig. 3. Forward: nothing, for all have x. Backward: all-reduce of the gradients."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad)


class ReduceFromModelParallel(torch.autograd.Function):
    """g of Fig. 3. Forward: all-reduce of the partial sums. Backward: nothing, all have it."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


f = CopyToModelParallel.apply
g = ReduceFromModelParallel.apply

# The paper's A, in Y = X A, is (in, out); torch keeps its transpose (out, in): columns of A are
# along dimension 0.
COLUMNS = 0
ROWS = 1
SHARD_DIM = dict.fromkeys(["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], COLUMNS)
SHARD_DIM |= dict.fromkeys(["embed_tokens", "lm_head"], COLUMNS)  # vocabulary-parallel
SHARD_DIM |= dict.fromkeys(["o_proj", "down_proj"], ROWS)
# All-reduces that are no layer's: after the embedding, before the head (backward), three in the loss.
VOCABULARY_ALL_REDUCES = 5


def local_shard(name, x):
    """This rank's shard of a weight or gradient by its name; of norms all.

    name: e.g. "model.layers.0.mlp.up_proj.weight".
    """
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
    """H / N of the heads, with the keys and values that they read: (B, L, D) -> (B, L, D).

    Sec. 3, Fig. 3b.
    """

    def __init__(self, dense):
        super().__init__()
        self.size = dense.head_dim
        # Column-parallel: H / N heads of queries, and their keys and values.
        self.q_proj = shard_linear(dense, "q_proj")
        self.k_proj = shard_linear(dense, "k_proj")
        self.v_proj = shard_linear(dense, "v_proj")
        # Row-parallel: what these heads add to the output.
        self.o_proj = shard_linear(dense, "o_proj")

    def split_heads(self, x):
        return rearrange(x, "b l (h d) -> b h l d", d=self.size)

    def forward(self, hidden_states, position_embeddings, **_):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        x = f(hidden_states)
        # Queries (B, H/N, L, d) of this rank's heads, with positions; keys and values of theirs.
        q = self.split_heads(self.q_proj(x))
        k = self.split_heads(self.k_proj(x))
        v = self.split_heads(self.v_proj(x))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        # Attention of each head, without any other rank: (B, H/N, L, d).
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return g(self.o_proj(rearrange(y, "b h l d -> b l (h d)"))), None


def local_ids(ids, size):
    """Token ids -> ids within this rank's `size` words, and the mask of foreign ones (0 there)."""
    local = ids - dist.get_rank() * size
    foreign = (local < 0) | (local >= size)
    return local.masked_fill(foreign, 0), foreign


class Embedding(nn.Module):
    """Vocabulary-parallel embedding, V / N words: ids (B, L) -> (B, L, D). Sec. 3.

    Exactly one rank has something to add for each id.
    """

    def __init__(self, dense):
        super().__init__()
        self.weight = nn.Parameter(local_shard("embed_tokens.weight", dense.weight.detach()))

    def forward(self, ids):
        local, foreign = local_ids(ids, len(self.weight))
        return g(F.embedding(local, self.weight).masked_fill(foreign[..., None], 0))


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
    local, foreign = local_ids(labels, len(weight))
    right = g(logits.gather(-1, local[..., None])[..., 0].masked_fill(foreign, 0))  # (B, L)
    # The log of the sum of exp over the whole vocabulary.
    exp_sum = g((logits - highest[..., None]).exp().sum(-1))  # (B, L)
    return (exp_sum.log() + highest - right).mean()


def check(config):
    """Raises UserError unless a Llama of this configuration can be sharded over the ranks."""
    # The layers above are a Llama's, without biases.
    kind = config.model_type
    run.check(kind == "llama", f"--model is a {kind}; only a Llama can be sharded here")
    run.check(
        not config.attention_bias and not config.mlp_bias,
        "--model has biases; only a Llama without can be sharded here",
    )
    # Whatever is sharded must fall into equal shards.
    n = dist.get_world_size()
    sizes = {
        "query heads": config.num_attention_heads,
        "heads of keys and values": config.num_key_value_heads,
        "hidden units": config.intermediate_size,
        "words": config.vocab_size,
    }
    for what, size in sizes.items():
        run.check(
            size % n == 0,
            f"{size} {what} cannot be dealt to {n} ranks; take --ranks that divide {size}",
        )


def apply_tensor_parallel(model):
    """Replace the matrices of a Llama by this rank's shards, in place -> the model.

    Names of weights stay.
    """
    check(model.config)
    # Attention and MLP of each layer.
    for layer in model.model.layers:
        layer.self_attn = Attention(layer.self_attn)
        layer.mlp = MLP(layer.mlp)
    # Embedding and head, sharded over the vocabulary; they may be one weight.
    model.lm_head = shard_linear(model, "lm_head")
    model.model.embed_tokens = Embedding(model.model.embed_tokens)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model
