"""LLaVA and LLaVA-NeXT of transformers: the same numbers as ours, taken apart and put together.

Models of other kinds, and settings that are not done here, are refused by name.
"""

from typing import Any

import torch
from torch import nn

from utils.run import UserError, check
from utils.text import printable
from vlm import connector, tower
from vlm.llava_parts import Parts, first_line
from vlm.prompts import IMAGE

# Model types of transformers that are read here; others only look alike
KINDS = ("llava", "llava_next")
# Keys of config.json beside those of transformers' own configuration, which change nothing here
HARMLESS = set(
    """architectures dtype torch_dtype transformers_version _name_or_path ignore_index image_token_index vocab_size
    pad_token_id bos_token_id eos_token_id hidden_size use_image_newline_parameter use_cache initializer_range
    text_config vision_config""".split()
)


def check_supported(config, name):
    """Raises UserError, naming the key, for what a configuration of transformers asks and this
    project does not do."""
    kind = getattr(config, "model_type", None)
    check(
        kind in KINDS,
        f"'{name}' is a {printable(kind)}: only {', '.join(KINDS)} and folders of --save are read",
    )
    from transformers import LlavaConfig, LlavaNextConfig

    # keys: those of transformers' own configuration, and some that do not matter here
    usual = set((LlavaConfig if kind == "llava" else LlavaNextConfig)().to_dict()) | HARMLESS
    unknown = sorted(set(config.to_dict()) - usual)
    check(
        not unknown,
        f"'{name}' has {printable(', '.join(unknown))} in its config.json, which is not known here",
    )
    # values
    layer = config.vision_feature_layer
    select = config.vision_feature_select_strategy
    wanted = {
        "projector_hidden_act": config.projector_hidden_act == "gelu",
        # a list would be several layers side by side
        "vision_feature_layer": isinstance(layer, int) and not isinstance(layer, bool),
        "vision_feature_select_strategy": select in ("default", "full"),
        "use_image_newline_parameter": getattr(config, "use_image_newline_parameter", True) is True,
    }
    for key, fine in wanted.items():
        check(fine, f"'{name}': {key} {printable(getattr(config, key, None))} is not supported")


def from_transformers(theirs, name="the model"):
    """transformers' LlavaForConditionalGeneration or LlavaNext... -> Parts, with the very same
    weights, not copied.

    Raises UserError for a model of another kind, or with a setting that is not done here.
    """
    check_supported(theirs.config, name)
    from transformers import AutoModelForCausalLM

    config = theirs.config
    inner = theirs.model
    # language model: an empty one, whose layers are theirs
    with torch.device("meta"):
        language: Any = AutoModelForCausalLM.from_config(config.text_config)
    language.model = inner.language_model
    language.lm_head = theirs.lm_head
    language.generation_config = theirs.generation_config
    # vision tower
    network = getattr(inner.vision_tower, "vision_model", inner.vision_tower)
    select = "patch" if config.vision_feature_select_strategy == "default" else "all"
    vision_tower = tower.VisionTower(network, config.vision_feature_layer, select)
    # connector
    join: Any = connector.build("mlp2x_gelu", vision_tower.width, config.text_config.hidden_size)
    join[0] = inner.multi_modal_projector.linear_1
    join[2] = inner.multi_modal_projector.linear_2
    # LLaVA-1.6: the vector that ends a row of tiles, and the sizes of grids
    newline = getattr(inner, "image_newline", None)
    grids = () if newline is None else tuple(tuple(size) for size in config.image_grid_pinpoints)
    return Parts(vision_tower, join, language, config.image_token_id, newline, grids)


def has_llava_parts(model):
    """Does transformers' LLaVA know these parts: a transformer as vision encoder, a connector mlp2x_gelu?"""
    vision_tower = model.vision
    patches = hasattr(getattr(vision_tower.network, "config", None), "patch_size")
    mlp = [type(m) for m in model.connector.children()] == [nn.Linear, nn.GELU, nn.Linear]
    return patches and mlp and vision_tower.lead < 2


def to_transformers(model):
    """Ours -> transformers' LlavaForConditionalGeneration or LlavaNext... Raises UserError if it
    has no such parts."""
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    vision_tower = model.vision
    join = model.connector
    check(
        has_llava_parts(model),
        "transformers' LLaVA has an encoder of its own kind and a connector mlp2x_gelu",
    )
    # configuration
    next_one = model.newline is not None
    kind = LlavaNextConfig if next_one else LlavaConfig
    config = kind(
        vision_config=vision_tower.network.config,
        text_config=model.language.config,
        image_token_index=model.image_id,
        vision_feature_layer=vision_tower.layer,
        vision_feature_select_strategy="default" if vision_tower.lead else "full",
        image_seq_length=vision_tower.count,
        tie_word_embeddings=model.language.config.tie_word_embeddings,
        multimodal_projector_bias=join[0].bias is not None,
    )
    if next_one and model.grids:
        config.image_grid_pinpoints = [list(size) for size in model.grids]
    # an empty model, in our precision before anything is copied: a configuration may ask for bf16
    network = LlavaNextForConditionalGeneration if next_one else LlavaForConditionalGeneration
    theirs: Any = network(config)
    theirs.to(model.language.dtype)
    # weights, part by part
    inner = theirs.model
    inner.vision_tower.load_state_dict(vision_tower.network.state_dict())
    inner.language_model.load_state_dict(model.language.model.state_dict())
    theirs.lm_head.load_state_dict(model.language.lm_head.state_dict())
    inner.multi_modal_projector.linear_1.load_state_dict(join[0].state_dict())
    inner.multi_modal_projector.linear_2.load_state_dict(join[2].state_dict())
    if next_one:
        inner.image_newline.data.copy_(model.newline)
    return theirs


def image_processor(vision_tower, grids=()):
    """transformers' image processor that prepares pictures as ours are: resize, crop, normalise; with
    grids the whole and its tiles."""
    from PIL.Image import Resampling
    from transformers import CLIPImageProcessorPil

    mean, std = vision_tower.mean, vision_tower.std
    if isinstance(vision_tower.network, tower.EfficientNetMaps):
        # (x - 127) / 128 of x from 0 to 255
        mean, std = [127 / 255] * 3, [128 / 255] * 3
    if grids:
        return tile_processor(vision_tower.size, grids, mean, std)
    return CLIPImageProcessorPil(
        size={"shortest_edge": vision_tower.size},
        crop_size={"height": vision_tower.size, "width": vision_tower.size},
        resample=Resampling.LANCZOS,
        image_mean=list(mean),
        image_std=list(std),
    )


def tile_processor(side, grids, mean, std):
    """transformers' image processor of LLaVA-1.6: the whole and the tiles, as anyres.py cuts them."""
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    return LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(mean),
        image_std=list(std),
        image_grid_pinpoints=[list(size) for size in grids],
    )


def processor(model, tokenizer):
    """transformers' LlavaProcessor, or LlavaNextProcessor, of this model: it puts N words <image>
    for one, and makes pixels."""
    from transformers import LlavaNextProcessor, LlavaProcessor

    vision_tower = model.vision
    kind: Any = LlavaProcessor if model.newline is None else LlavaNextProcessor
    return kind(
        image_processor(vision_tower, model.grids),
        tokenizer,
        patch_size=vision_tower.network.config.patch_size,
        num_additional_image_tokens=vision_tower.lead,
        vision_feature_select_strategy="default" if vision_tower.lead else "full",
        image_token=IMAGE,
    )


def from_pretrained(what, name, **more) -> Any:
    """Whatever goes wrong in a folder that somebody else wrote, it is one line."""
    try:
        return what.from_pretrained(name, **more)
    except Exception as error:
        raise UserError(f"no LLaVA at '{name}': {first_line(error)}") from error


def transformers_config(name):
    """The configuration of a folder or hub id of transformers' LLaVA. Raises UserError for any
    other."""
    from transformers import AutoConfig

    config = from_pretrained(AutoConfig, name)
    check_supported(config, name)
    return config
