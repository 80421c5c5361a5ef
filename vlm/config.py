"""Configuration of a vision-language model of transformers: what modeling.py builds and a saved folder says.

The sections of flags.py can be had from here, too; alone they need no transformers.
"""

from dataclasses import asdict, fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from vlm import anyres
from vlm.flags import (
    RESAMPLERS,
    DataConfig,
    DeepSpeedConfig,
    FSDPConfig,
    LoraConfig,
    ModelFlags,
    PerceiverConfig,
    QuantConfig,
    TrainConfig,
    WandbConfig,
    connector_options,
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
    "configuration",
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
    tiles: int = 0  # any-resolution tiles: at most so many of a picture
    image_grid_pinpoints: list | None = None  # instead: sizes to choose from, [height, width]
    attn_implementation: str | None = None
    image_token_id: int = -1  # of <image>, once the vocabulary has it
    vision_config: dict | PreTrainedConfig | None = None  # none: EfficientNet-lite0
    text_config: dict | PreTrainedConfig | None = None

    def connector_options(self) -> dict[str, Any]:
        """What `vlm.connector.build` is given besides names and widths."""
        perceiver = PerceiverConfig(**self.perceiver) if self.perceiver else None
        return connector_options(perceiver, self.sparsity_plugins or ())

    def grids(self, side: int) -> list:
        """Sizes that pictures are tiled to, for an encoder of pictures of side x side; none: []."""
        return anyres.grids(side, self.tiles, self.image_grid_pinpoints)


def model_flags(*names: Any, **more: Any) -> VLMConfig:
    """Flags of a model, fields of ModelFlags -> its configuration."""
    return configuration(ModelFlags(*names, **more))


def configuration(flags: ModelFlags) -> VLMConfig:
    """Flags of a model -> its configuration."""
    given = {field.name: getattr(flags, field.name) for field in fields(flags)}
    given["perceiver"] = asdict(flags.perceiver) if flags.connector in RESAMPLERS else None
    given["sparsity_plugins"] = list(flags.sparsity_plugins) or None
    given["image_grid_pinpoints"] = [list(size) for size in flags.image_grid_pinpoints] or None
    return VLMConfig(**given)
