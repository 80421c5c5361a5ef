"""The vision-language model of one training step, as it is trained: types, what is frozen, adapters, checkpointing.

Only shapes and types matter here: made on fake tensors it costs no memory, and counts that of a 7B model in seconds.
What is frozen is in bf16, what learns in fp32, and products are in bf16 by autocast, as in vlm/train.py; under ZeRO
all is in bf16, with fp32 copies, as in DeepSpeed.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from training.memory_model import Linear4bit, LoRALinear
from utils.run import check
from vlm import anyres, llava_parts
from vlm.config import VLMConfig
from vlm.connector import joins_tiles
from vlm.flops import TRAIN_TYPES
from vlm.flops_parts import TARGETS
from vlm.modeling import VLM


@dataclass(frozen=True)
class Step:
    """One training step on one device, of `world_size` that share the model states by ZeRO."""

    train_type: str = (
        "projector"  # projector, use_lora, freeze_vision or none, as in vlm/train_config.py
    )
    quantize: bool = False  # the frozen language model in 4 bits: QLoRA
    batch: int = 1  # conversations
    images: int = 1  # pictures of a conversation
    text_tokens: int = 128  # of a conversation, beside its image tokens
    checkpointing: bool = False  # of the layers of what has a backward pass
    cached: bool = False  # features come from a file: no encoder
    lora_rank: int = 8
    picture: tuple[int, int] = (672, 672)  # height and width, if the configuration has tiles
    zero: int = 0  # stage of ZeRO; 3 is what FSDP does, too
    world_size: int = 1
    # what the trace of training/memory_trace.py asks for, too
    offload: str = "none"
    optimizer: str = "adamw"

    @property
    def precision(self) -> str:
        """autocast: what learns is in fp32; under ZeRO it is in bf16, with an fp32 copy in the optimizer."""
        return "bf16-mixed" if self.zero else "autocast"


def check_step(step: Step) -> None:
    """Raises UserError for a step that makes no sense."""
    check(step.train_type in TRAIN_TYPES, f"--train_type is one of {', '.join(TRAIN_TYPES)}")
    positive = min(step.batch, step.text_tokens, step.lora_rank, step.world_size) > 0
    check(positive, "--batch, --text_tokens, --lora_rank, --world_size: above 0")
    check(step.images >= 0, "--images must be 0 or more")
    check(step.zero in (0, 1, 2, 3), "--zero is a stage of ZeRO: 0, 1, 2 or 3")
    check(
        not step.quantize or step.train_type == "use_lora", "4 bits are for --train_type use_lora"
    )
    everything = step.train_type == "none"
    check(not step.cached or not everything, "an encoder that is trained has no cached features")


class StepVLM(VLM):
    """The same model; its texts are known to fit, so that no number needs to be looked at."""

    sizes: tuple = ()  # with tiles, of all pictures

    def get_image_features(self, pixel_values, image_sizes=None):
        """Tiles of all pictures one after the other, whose sizes are known -> one sequence (1,N,E)."""
        if not self.grids:
            return self.project(pixel_values)
        features = self.vision(pixel_values) if pixel_values.dim() == 4 else pixel_values
        return llava_parts.tile_tokens(self, features, self.sizes, self.grids)

    def embed(self, input_ids, image_features=None, prompt_of=None):
        # Scattered without counting: a fake tensor has no numbers to look at
        places = input_ids == self.config.image_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(places, 0))
        if image_features is None:
            return embeds
        return embeds.masked_scatter(places[..., None], image_features.to(embeds.dtype))

    def project(self, pixel_values):
        """Pictures (P,3,S,S), or cached features of the encoder (P,N,D), through the connector."""
        # Four axes are pixels, three are features that were cached
        if pixel_values.dim() == 4:
            return super().project(pixel_values)
        weight = next(self.connector.parameters(), pixel_values)
        return self.connector(pixel_values.to(weight.dtype))


def build(config: VLMConfig, step: Step, attention: str = "fused") -> Any:
    """The model without weights worth having, in training mode.

    config: with vision_config and text_config filled in, as by vlm.build.configurations; attention: "fused" for the
    trace, which is sdpa without a mask; "eager" to count FLOPs, because PyTorch counts none of a fused one on a CPU.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # 1. A kernel that is given no mask, so that the trace sees the fused attention
    check_step(step)
    AttentionInterface.register("fused", sdpa_attention_forward)
    model: Any = StepVLM(config)
    model.language.config._attn_implementation = attention
    if config.vision_config is not None:
        model.vision.network.config._attn_implementation = attention
    # 2. Cached features: no encoder on the device
    if step.cached:
        model.vision.network = nn.Identity()  # weighs nothing, and is not called
    model.sizes = (step.picture,) * (step.batch * step.images)
    # ZeRO's units are the first list of layers that it meets: let it be that of the language model
    model._modules["vision"] = model._modules.pop("vision")
    # 3. What is frozen, what learns, in which type
    set_types(model, step)
    # 4. Layers that keep their inputs only
    if step.checkpointing:
        # Of the whole model at once it would make a frozen encoder take part in the backward pass
        kind = {"use_reentrant": False, "preserve_rng_state": False}
        model.language.gradient_checkpointing_enable(kind)
        if step.train_type == "none":
            network: Any = model.vision.network
            network.gradient_checkpointing_enable(kind)
    return model.train()


def set_types(model: Any, step: Step) -> None:
    """What is frozen to bf16, what learns to fp32; LoRA and 4 bits in the layers of the language model."""
    # 1. All of it frozen, in bf16
    learned = torch.float32 if step.precision == "autocast" else torch.bfloat16
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16)
        p.requires_grad_(False)
    # 2. The connector always learns; the others as --train_type says
    learning = [model.connector]
    if step.train_type in ("freeze_vision", "none"):
        learning.append(model.language)
    if step.train_type == "none":
        learning.append(model.vision)
    if step.train_type == "use_lora":
        add_adapters(model.language, step, learned)
    # 3. What learns in its own type, with gradients
    for part in learning:
        for p in part.parameters():
            p.data = p.data.to(learned)
            p.requires_grad_(True)
    if model.newline is not None:
        model.newline.data = model.newline.data.to(learned)
        model.newline.requires_grad_(True)


def add_adapters(language: Any, step: Step, learned: torch.dtype) -> None:
    """LoRA beside all matrices of the layers; `quantize`: the matrices themselves in 4 bits (NF4)."""
    if step.quantize:
        import bitsandbytes  # noqa: F401  (its operators)
    # Listed before any is replaced: the layers change while we go through them
    linears = [(name, m) for name, m in language.named_modules() if isinstance(m, nn.Linear)]
    for name, base in linears:
        parent, _, child = name.rpartition(".")
        if child not in TARGETS:
            continue
        # W x + s B A x, where W may be in 4 bits
        layer = LoRALinear(Linear4bit(base) if step.quantize else base, step.lora_rank)
        for p in (layer.lora_A, layer.lora_B):
            p.data = p.data.to(learned)
        setattr(language.get_submodule(parent), child, layer)


def inputs(model: Any, step: Step) -> dict[str, torch.Tensor]:
    """One batch: pictures, or features of them, and texts with places for their tokens; learned are all of them."""
    # With tiles a picture has as many tokens as its size says
    tiles = 1
    picture_tokens = model.image_tokens
    if model.grids:
        side = model.vision.size
        g = round(picture_tokens**0.5)
        tiles = anyres.count_tiles(step.picture, side, model.grids)
        if not joins_tiles(model.connector):
            picture_tokens = anyres.count_tokens(step.picture, side, g, model.grids)
    # Text behind the places of all pictures of a conversation
    seen = step.images * picture_tokens
    ids = torch.ones(step.batch, seen + step.text_tokens, dtype=torch.long)
    ids[:, 1 : 1 + seen] = model.config.image_token_id
    batch = {"input_ids": ids, "labels": torch.ones_like(ids)}
    # Pixels of every picture, or cached features in their stead
    pictures = step.batch * step.images * tiles
    if not pictures:
        return batch
    size = model.vision.size
    batch["pixel_values"] = torch.zeros(pictures, 3, size, size)
    if step.cached:
        shape = (pictures, model.vision.count, model.vision.width)
        batch["pixel_values"] = torch.zeros(shape, dtype=torch.bfloat16)
    return batch
