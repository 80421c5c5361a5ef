"""Memory of a training step by formula: weights, gradients, optimizer states, activations.

Bytes. Symbols: V words of the vocabulary, d width, f width of the MLP, L layers, H heads, K heads
of keys and values; B texts of S tokens; N parameters; e bytes of a number in matrix products (2 in
bf16, 4 in fp32). Each function is compared with the thing itself, in
tests/training/test_memory.py: with `sum(p.numel())`, with what autograd saves, with DeepSpeed.
ACCOUNTS and the plain forms are there to be read, and used by the notebook.
"""

MOMENTS = {"mean": 4, "variance": 4}  # of Adam, in fp32
MIXED = {"bf16 weight": 2, "bf16 gradient": 2, "fp32 weight": 4}
ACCOUNTS = {  # bytes per trained weight, as they are found in print: {account: {part: bytes}}
    "fp32": {"weight": 4, "gradient": 4} | MOMENTS,
    "mixed, ZeRO": MIXED | MOMENTS,
    "mixed, fp32 gradients": {"bf16 weight": 2, "fp32 weight": 4, "fp32 gradient": 4} | MOMENTS,
    "mixed, two gradients": MIXED | {"fp32 gradient": 4} | MOMENTS,
    "bf16, fp32 moments": {"weight": 2, "gradient": 2} | MOMENTS,
    "mixed, 8-bit moments": MIXED | {"mean": 1, "variance": 1},
    "bf16": {"weight": 2, "gradient": 2, "mean": 2, "variance": 2},
    "moments alone": MOMENTS,
}


def parameters(V, d, L, f, heads=1, kv_heads=1, tied=False, bias=False):
    """N of a Llama: embedding and head, attention, a SwiGLU of three matrices, norms.

    With K = H, no tied head and no bias: N = 2 V d + L (4 d^2 + 3 d f + 2 d) + d.
    """
    # Queries and outputs d x d, keys and values d x d K/H
    kv = d * kv_heads // heads
    attention = 2 * d * d + 2 * d * kv
    if bias:
        attention += d + 2 * kv
    # Gate, up and down
    mlp = 3 * d * f
    norms = 2 * d
    embeddings = V * d if tied else 2 * V * d
    return embeddings + L * (attention + mlp + norms) + d


def two_matrices(V, d, L, f):
    """The form that is often printed, with an MLP of two matrices: too small by L d f."""
    return parameters(V, d, L, f) - L * d * f


def plain_activations(V, d, L, f, heads, B, S, e=2):
    """Activations of a plain transformer: 8 d + 2 f + H S numbers a token and layer, and logits.

    d: two inputs of norms, what goes into queries, keys and values, these three, the attention's
    result, the MLP's input; f: the MLP's inside before and after its nonlinearity; H S: the
    attention weights; the logits in fp32.
    """
    layer = 8 * d + 2 * f + heads * S
    logits = 4 * B * S * V
    return L * B * S * e * layer + logits


def activations(V, d, L, f, heads, kv_heads, B, S, e=2, attention="sdpa", checkpointing=False):
    """What autograd keeps of transformers' Llama until the backward pass: {term: bytes}.

    A norm works in fp32: it keeps its input (4 d), a number per token (4), its output before and
    after its weight. The fused attention keeps a number per head and token (4 H) instead of the
    weights (4 H S, and a copy if e = 2); eager attention copies keys and values for every head.
    SwiGLU keeps gate, up, silu(gate) and their product. Checkpointing keeps the input of each
    layer, and one layer at a time as above.
    """
    tokens = B * S
    kv = d * kv_heads // heads
    norm = 4 * d + 4 + 2 * e * d
    # Bytes a token and layer
    if attention == "sdpa":
        mixing = e * (2 * d + 2 * kv) + 4 * heads
    else:
        weight = 6 if e == 2 else 4
        mixing = e * 4 * d + heads * S * weight
    layer = {"norms": 2 * norm, "attention": mixing, "mlp": 4 * e * f}
    if checkpointing:
        layer = {"inputs of layers": e * d}
    kept = {name: L * tokens * size for name, size in layer.items()}
    # What is there once: after the last layer, and for all of them
    ends = {
        "last norm": tokens * norm,
        "logits": 4 * tokens * V,
        "ids": 8 * tokens,
        "rotary": 2 * S * (d // heads) * e,
    }
    return kept | ends


def one_layer(V, d, L, f, heads, kv_heads, **texts):
    """Activations that checkpointing computes again at one time: those of one layer of L."""
    terms = activations(V, d, 1, f, heads, kv_heads, **texts)
    return terms["norms"] + terms["attention"] + terms["mlp"]


def deepspeed_estimate(total, largest, stage, n, offload="none"):
    """Bytes of model states per GPU by DeepSpeed's estimators, of stages 2 and 3; else None.

    total: parameters; largest: those of the largest single module; n: GPUs. They count gradients
    twice, in bf16 and in fp32, which makes 18 N / n where the paper has 16, and for stage 3 a
    buffer of the largest module.
    """
    if stage < 2:
        return None
    sharded = int(18 * total / n)
    # Stage 2: all GPUs hold the bf16 weights
    if stage == 2:
        return 2 * total + (sharded if offload == "none" else 0)
    # Stage 3: what the host keeps is all but the weights, or all
    if offload == "optimizer":
        sharded = int(2 * total / n)
    elif offload == "parameters":
        sharded = 0
    return 4 * largest + sharded
