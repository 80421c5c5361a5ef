"""FLOPs of a training step of a vision-language model by formula: vision encoder, connector, language model.

A backward pass has twice the products of the forward pass: gradients of inputs, and of weights (Kaplan et al. 2020,
arXiv:2001.08361, Sec. 2.1). Freezing decides which of the two are made:

- a frozen vision encoder below a trained connector has no backward pass at all;
- a frozen language model above a trained connector needs the gradients of all inputs, so that the connector gets its
  own, and none of weights: 2 instead of 3 forward passes, not 1;
- LoRA is that, and three times the few FLOPs of the adapters; gradient checkpointing adds a forward pass of the layers
  that have a backward pass; cached features leave out the encoder.

Norms, softmax, GELU and sums are not counted, neither here nor by PyTorch's `FlopCounterMode`, which gives the same
numbers (tests/vlm/test_flops.py). Of causal attention all scores are counted, the hidden ones, too. The formulas of the
parts: vlm/flops_parts.py.

    python vlm/step_cost.py    # a table of them, with the memory
"""

from dataclasses import dataclass
from typing import Any

from utils.run import check
from vlm import flops_parts
from vlm.config import VLMConfig
from vlm.flops_parts import TARGETS, Products, product

TRAIN_TYPES = (
    "projector",
    "use_lora",
    "freeze_vision",
    "none",
)  # as in vlm/train_config.py; none: nothing is frozen


@dataclass(frozen=True)
class Part:
    """FLOPs of one part in a step. recomputed: the second forward pass of gradient checkpointing."""

    forward: int
    backward: int = 0
    recomputed: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recomputed


def again(layer: Products, last: int, checkpointing: bool) -> int:
    """FLOPs that checkpointing computes again in a layer: all but its last product, whose output nothing needs."""
    return layer.forward - last if checkpointing else 0


def step(
    config: VLMConfig,
    train_type: str,
    batch: int = 1,
    text_tokens: int = 128,
    images: int = 1,
    checkpointing: bool = False,
    cached: bool = False,
    lora_rank: int = 8,
    lora_targets: tuple = TARGETS,
    picture: tuple[int, int] = (672, 672),
) -> dict[str, Part]:
    """FLOPs of forward and backward pass -> {"vision", "connector", "language"}.

    config: with vision_config and text_config filled in, as by vlm.build.configurations; images: pictures of a
    conversation, whose tokens stand beside `text_tokens` others; cached: features come from a file; picture: (height,
    width), if the configuration has tiles: then every picture is seen whole and in those.
    """
    check(train_type in TRAIN_TYPES, f"there is no --train_type {train_type}")
    check(min(batch, text_tokens) > 0 <= images, "batch, text tokens: above 0; images: 0 or more")
    learns = config.connector != "identity" or train_type in ("freeze_vision", "none")
    check(learns, "the connector `identity` has no weights: train the language model whole")
    vision: Any = config.vision_config
    text: Any = config.text_config
    # Tokens of a picture: patches, or with the class token
    count, tokens = flops_parts.patches(vision)
    seen = count if config.select == "patch" else tokens
    # With tiles a picture is several for the encoder and the connector
    tiles, picture_tokens = flops_parts.tiles_and_tokens(config, seen, picture)
    pictures = batch * images * tiles
    everything = train_type == "none"
    # 1. The encoder: forward all of it, backward what is read, if it learns
    encoder, unused = flops_parts.vision_encoder(vision, config.vision_layer)
    one = flops_parts.vit_layer(vision, tokens)
    # Layers that are read, for what checkpointing computes again
    layers = (encoder.forward - encoder.first) // one.forward
    last = product(tokens, vision.hidden_size, vision.intermediate_size)
    vision_part = Part(
        pictures * (encoder.forward + unused),
        pictures * encoder.backward(everything, False),
        pictures * layers * again(one, last, checkpointing and everything),
    )
    if cached:
        check(not everything, "an encoder that is trained has no cached features")
        vision_part = Part(0)
    # 2. The connector always learns
    read, times = flops_parts.connector_calls(config, seen, tiles)
    calls = batch * images * times
    joined = flops_parts.connector(config, read, vision.hidden_size, text.hidden_size)
    forward = calls * joined.forward
    connector_part = Part(forward, calls * joined.backward(True, everything))
    # 3. The language model: what comes in has a gradient, that of the connector
    length = images * picture_tokens + text_tokens
    language_part = language(
        text, train_type, batch, length, checkpointing, lora_rank, lora_targets
    )
    return {"vision": vision_part, "connector": connector_part, "language": language_part}


def language(text, train_type, batch, length, checkpointing, lora_rank, lora_targets) -> Part:
    """Of the language model: layers, adapters if there are any, logits."""
    # Layers and head; its input always has a gradient, for the connector
    trained = train_type in ("freeze_vision", "none")
    layer, logits = flops_parts.decoder_layer(text, length), flops_parts.head(text, length)
    L = text.num_hidden_layers
    forward = L * layer.forward + logits.forward
    backward = L * layer.backward(trained, True) + logits.backward(trained, True)
    # The last product of a layer: down, or what its adapter makes of it
    k, m = flops_parts.linears(text)["down_proj"]
    last = product(length, k, m)
    # Adapters: A x and B A x beside each matrix, both trained
    if train_type == "use_lora":
        extra = flops_parts.adapters(text, length, lora_rank, lora_targets)
        forward += L * extra.forward
        backward += L * extra.backward(True, True)
        layer += extra
        if "down_proj" in lora_targets:
            last = product(length, lora_rank, m)
    # With checkpointing each layer runs forward once more
    recomputed = L * again(layer, last, checkpointing)
    return Part(batch * forward, batch * backward, batch * recomputed)


def total(parts: dict[str, Part]) -> int:
    """FLOPs of the whole step, recomputed ones included: for MFU take `forward` and `backward` only."""
    return sum(part.total for part in parts.values())
