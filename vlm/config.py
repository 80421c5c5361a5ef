"""Configuration of a vision-language model of transformers: what modeling.py builds and a saved folder says.

The sections of flags.py can be had from here, too; alone they need no transformers.
"""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from tyro.conf import arg

from vlm.flags import (
    DataConfig,
    DeepSpeedConfig,
    FSDPConfig,
    LoraConfig,
    ModelFlags,
    PerceiverConfig,
    QuantConfig,
    TrainConfig,
    WandbConfig,
)

__all__ = [
    "DataConfig",
    "DeepSpeedConfig",
    "FSDPConfig",
    "LoraConfig",
    "ModelFlags",
    "PerceiverConfig",
    "QuantConfig",
    "TrainConfig",
    "VLMConfig",
    "WandbConfig",
    "model_flags",
]


@strict
class VLMConfig(PreTrainedConfig):
    """Vision encoder, connector, language model: what a vision-language model is put together from.

    Where the names lead to is read once, by `vlm.build.build`; then `vision_config` and `text_config` say what the
    parts are, and a folder that was saved needs no other. Raises an error of transformers for a value of a wrong type.
    """

    model_type = "vlm_action"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(AutoConfig, "clip_vision_model", optional=True),
        "text_config": SubConfigSpec(AutoConfig, "llama", optional=True),
    }

    vision_name_or_path: str = "efficientnet"
    text_name_or_path: str = "smollm2"
    connector: str = "pool3"
    perceiver: dict | None = None  # fields of PerceiverConfig
    sparsity_plugins: list | None = None  # see vlm/token_sparsity.py
    vision_layer: int = -2
    select: Literal["patch", "all"] = "patch"
    img_size: int = 0
    attn_implementation: str | None = None
    image_token_id: int = -1  # of <image>, once the vocabulary has it
    vision_config: dict | PreTrainedConfig | None = None  # none: EfficientNet-lite0
    text_config: dict | PreTrainedConfig | None = None

    def connector_options(self) -> dict[str, Any]:
        """What `vlm.connector.build` is given besides names and widths."""
        options = PerceiverConfig(**self.perceiver).options() if self.perceiver else {}
        if self.sparsity_plugins:
            options["sparsity_plugins"] = tuple(self.sparsity_plugins)
        return options


def model_flags(
    vision_name_or_path: Annotated[str, arg(aliases=["--vision"])] = "efficientnet",
    text_name_or_path: Annotated[str, arg(aliases=["--language", "--text"])] = "smollm2",
    connector: str = "pool3",
    perceiver: PerceiverConfig = PerceiverConfig(),  # noqa: B008  (frozen)
    sparsity_plugins: tuple[str, ...] = (),
    vision_layer: Annotated[int, arg(aliases=["--layer"])] = -2,
    select: Literal["patch", "all"] = "patch",
    img_size: int = 0,
    attn_implementation: str | None = None,
) -> VLMConfig:
    """The flags of a model -> its configuration.

    Args:
        vision_name_or_path: vision encoder: efficientnet, or a folder or hub id
        text_name_or_path: language model: smollm2, or a folder or hub id
        connector: see vlm/connector.py
        perceiver: if the connector is "perceiver"
        sparsity_plugins: fewer tokens before the connector: topk_norm16, random16, pool4, bilinear4
        vision_layer: of the encoder's hidden states
        select: patches only, or the class token and others, too
        img_size: side of the pictures; 0: that of the encoder
        attn_implementation: eager, sdpa, flash_attention_2; None: eager on a CPU, else what transformers chooses
    """
    given = dict(locals())
    given["perceiver"] = asdict(perceiver) if connector == "perceiver" else None
    given["sparsity_plugins"] = list(sparsity_plugins) or None
    return VLMConfig(**given)
