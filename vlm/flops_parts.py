"""FLOPs of the matrix products of vision encoder, connector and language model, by formula from their configurations.

A product of (n,k) with (k,m) makes 2 n k m FLOPs. Its backward pass has two more of that size: one for the gradient of
its input, one for that of its weight (Kaplan et al. 2020, arXiv:2001.08361, Sec. 2.1). vlm/flops.py puts them together.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.run import UserError, check
from vlm import anyres
from vlm.flags import RESAMPLERS

# for types only: it imports transformers, and --help shall be quick
if TYPE_CHECKING:
    from vlm.config import VLMConfig

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of LoRA


@dataclass(frozen=True)
class Products:
    """FLOPs of the matrix products of a part, forward: with weights, and of activations with each other.

    first: those of `weights` whose input is that of the part: if nothing before it learns, its gradient is not made.
    """

    weights: int
    attention: int = 0
    first: int = 0

    @property
    def forward(self) -> int:
        return self.weights + self.attention

    def backward(self, trained: bool, before: bool) -> int:
        """trained: the weights of this part get gradients; before: something before it does, too."""
        if not trained and not before:
            return 0
        # Gradients of weights if they learn, of inputs if something before needs them
        of_weights = self.weights if trained else 0
        of_inputs = self.weights if before else self.weights - self.first
        # both factors of an attention product are activations
        return of_weights + of_inputs + 2 * self.attention

    def __add__(self, other: "Products") -> "Products":
        first = self.first + other.first
        return Products(self.weights + other.weights, self.attention + other.attention, first)

    def __mul__(self, times: int) -> "Products":
        return Products(self.weights * times, self.attention * times, self.first * times)


def product(n: int, k: int, m: int) -> int:
    """FLOPs of (n,k) @ (k,m)."""
    return 2 * n * k * m


# Vision encoder


def patches(vision: Any) -> tuple[int, int]:
    """-> (patches of a picture, tokens that the encoder works on). Raises UserError for what is no CLIP or SigLIP."""
    known = ("clip_vision_model", "siglip_vision_model")
    kind = getattr(vision, "model_type", "EfficientNet")
    check(kind in known, f"there is no formula for {kind}: CLIP and SigLIP have one")
    count = (vision.image_size // vision.patch_size) ** 2
    # CLIP has a class token before its patches
    return count, count + (kind == known[0])


def vit_layer(vision: Any, tokens: int) -> Products:
    """Four projections and two matrices of the MLP; scores and weighted values."""
    # Queries, keys, values, output; up and down of the MLP; then Q K^T and its product with V
    d = vision.hidden_size
    weights = 4 * product(tokens, d, d) + 2 * product(tokens, d, vision.intermediate_size)
    return Products(weights, 2 * product(tokens, d, tokens))


def vision_encoder(vision: Any, layer: int) -> tuple[Products, int]:
    """Of one picture -> (all that is read, FLOPs of what is computed and not read).

    layer: of the hidden states, as in VisionTower; -2 leaves out the last of the layers, computed all the same.
    """
    count, tokens = patches(vision)
    d = vision.hidden_size
    # The patches: a convolution with a stride of its width is one product; pixels need no gradient
    embedding = product(count, 3 * vision.patch_size**2, d)
    # Hidden state 0 is the embedding: of `total` layers there are `total` + 1 states
    total = vision.num_hidden_layers
    read = layer if layer >= 0 else total + 1 + layer
    one = vit_layer(vision, tokens)
    # Computed all the same, and read by nobody
    unused = (total - read) * one.forward
    if vision.model_type == "siglip_vision_model" and getattr(vision, "vision_use_head", True):
        unused += pooling_head(vision, tokens)
    return Products(embedding, 0, embedding) + one * read, unused


def pooling_head(vision: Any, tokens: int) -> int:
    """SigLIP's: one learned query over all tokens, then an MLP; a vision-language model does not read it."""
    d = vision.hidden_size
    attention = 2 * product(1, d, d) + 2 * product(tokens, d, d) + 2 * product(1, d, tokens)
    return attention + 2 * product(1, d, vision.intermediate_size)


# Connector


def perceiver(options: dict, tokens: int, dim_in: int, width: int) -> Products:
    """Perceiver resampler of vlm/connector.py with SwiGLU, mlp_ratio 2; latents (M,E) over tokens (N,E)."""
    # Sizes of the resampler
    M = options["latents"]
    inside = options["hidden_size"] or width
    keys = tokens + M if options["concat_latents_kv"] else tokens
    inner = options["heads"] * options["head_dim"]
    kv = options["kv_heads"] * options["head_dim"]
    # Queries and output of latents, keys and values of all, gate, up and down
    weights = 2 * product(M, inside, inner) + 2 * product(keys, inside, kv)
    weights += 3 * product(M, inside, 2 * inside)
    layer = Products(weights, 2 * product(M, inner, keys))
    # Into its width and out of it, where they differ
    entry = product(tokens, dim_in, inside) if dim_in != inside else 0
    leave = product(M, inside, width) if inside != width else 0
    return Products(entry, 0, entry) + layer * options["depth"] + Products(leave)


def connector_calls(config: "VLMConfig", tokens: int, tiles: int) -> tuple[int, int]:
    """-> (features that the connector reads at once, how often) of a picture of so many tiles of N features each."""
    return (tokens * tiles, 1) if config.connector == "tile_perceiver" else (tokens, tiles)


def connector(config: "VLMConfig", tokens: int, dim_in: int, width: int) -> Products:
    """Of one picture with `tokens` tokens (N,dim_in) -> (M,width). Raises UserError for an unknown name."""
    from vlm.prompt_sparsity import split
    from vlm.token_sparsity import TokenSparsity

    name = config.connector
    tokens = TokenSparsity(split(config.sparsity_plugins or ())[0]).count(tokens)
    if name == "identity":
        return Products(0)
    if name in RESAMPLERS:
        return perceiver(config.connector_options(), tokens, dim_in, width)
    if name == "linear":
        entry = product(tokens, dim_in, width)
        return Products(entry, 0, entry)
    # An MLP, on all tokens, on joined ones, or on a grid of means
    depth = 2
    if name.startswith("mlp"):
        depth = int(name.removeprefix("mlp").removesuffix("x_gelu"))
    out = connector_tokens(config, tokens)
    # Joined neighbours: fewer tokens, as many times wider
    if name.startswith("concat"):
        dim_in *= int(name.removeprefix("concat"))
    entry = product(out, dim_in, width)
    return Products(entry + (depth - 1) * product(out, width, width), 0, entry)


def image_tokens(config: "VLMConfig", tokens: int) -> int:
    """What a picture of N vision features becomes: image tokens that the language model reads."""
    from vlm.prompt_sparsity import split

    coarse, keep = split(config.sparsity_plugins or ())[1]
    return coarse**2 + keep if keep else connector_tokens(config, tokens)


def connector_tokens(config: "VLMConfig", tokens: int) -> int:
    """M, tokens that come out of the connector for N vision features."""
    from vlm.prompt_sparsity import split
    from vlm.token_sparsity import TokenSparsity

    name = config.connector
    tokens = TokenSparsity(split(config.sparsity_plugins or ())[0]).count(tokens)
    if name in RESAMPLERS:
        return config.connector_options()["latents"]
    if name.startswith(("pool", "bilinear")):
        return int(name.removeprefix("pool").removeprefix("bilinear")) ** 2
    if name.startswith("concat"):
        side = round(int(name.removeprefix("concat")) ** 0.5)
        return (-(-round(tokens**0.5) // side)) ** 2
    if name in ("linear", "identity") or (name.startswith("mlp") and name.endswith("x_gelu")):
        return tokens
    raise UserError(f"there is no formula for the connector '{name}'")


def tiles_and_tokens(config: "VLMConfig", tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """-> (pictures that the encoder sees of one of `size` (H,W), 1 + T with tiles, and its image tokens).

    tokens: N, of the encoder. What puts tiles together has no products.
    """
    count = image_tokens(config, tokens)
    vision: Any = config.vision_config
    grids = config.grids(vision.image_size)
    if not grids:
        return 1, count
    g = round(count**0.5)
    tiles = anyres.count_tiles(size, vision.image_size, grids)
    if config.connector == "tile_perceiver":
        return tiles, count
    return tiles, anyres.count_tokens(size, vision.image_size, g, grids)


# Language model


def linears(text: Any) -> dict[str, tuple[int, int]]:
    """{projection of a layer: (inputs, outputs)} of Llama and its like. Raises UserError for another model."""
    from training.config_checks import KNOWN

    known = [kind for kind in KNOWN if kind != "llava"]
    kind = text.model_type
    check(kind in known, f"there is no formula for {kind}; there is one for {', '.join(known)}")
    d, f = text.hidden_size, text.intermediate_size
    # Grouped-query attention: fewer heads of keys and values than of queries
    head_dim = getattr(text, "head_dim", None) or d // text.num_attention_heads
    q = text.num_attention_heads * head_dim
    kv = text.num_key_value_heads * head_dim
    attention = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)}
    return attention | {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}


def decoder_layer(text: Any, length: int) -> Products:
    """Seven matrices; scores and weighted values of all queries with all keys."""
    shapes = linears(text)
    weights = sum(product(length, k, m) for k, m in shapes.values())
    # All pairs are counted, those that the causal mask hides, too
    inner = shapes["q_proj"][1]
    return Products(weights, 2 * product(length, inner, length))


def head(text: Any, length: int) -> Products:
    """Logits of every place."""
    return Products(product(length, text.hidden_size, text.vocab_size))


def adapters(text: Any, length: int, rank: int, targets: tuple = TARGETS) -> Products:
    """LoRA of one layer: x A^T and its product with B^T, beside each target. Hu et al. 2021, Eq. 3."""
    shapes = [linears(text)[name] for name in targets]
    return Products(sum(product(length, k, rank) + product(length, rank, m) for k, m in shapes))
