"""Models to weigh: by name, by config.json or by hub id; whole, with LoRA, or with LoRA beside 4-bit weights.

Only sizes and types matter here: no weights are read. LoRA and NF4 are explained in finetune/llama2_lora.py and
llama2_qlora.py.
"""

import difflib
import json
import logging
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from utils import run
from utils.text import printable, read_text

PRESETS = {  # model type, and what its configuration says
    "smollm2-135m": ("llama", dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                   num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)),
    "llama2-7b": ("llama", dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                                num_attention_heads=32, num_key_value_heads=32)),
    "llama2-13b": ("llama", dict(vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                                 num_attention_heads=40, num_key_value_heads=40)),
    "llama2-70b": ("llama", dict(vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                                 num_attention_heads=64, num_key_value_heads=8)),
    "llama3-8b": ("llama", dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                num_attention_heads=32, num_key_value_heads=8)),
    "qwen2.5-7b": ("qwen2", dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                                 num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False)),
    "llava-1.5-7b": ("llava", dict(
        image_token_index=32000, tie_word_embeddings=False,
        vision_config=dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, image_size=336,
                           patch_size=14, num_hidden_layers=24, num_attention_heads=16, projection_dim=768),
        text_config=dict(model_type="llama", vocab_size=32064, hidden_size=4096, intermediate_size=11008,
                         num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32))),
}  # fmt: skip
# What LoRA corrects, as in finetune/llama2_lora.py
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK = 8  # of the corrections


class LoRALinear(nn.Module):
    """W x + B A x, as finetune/llama2_lora.py explains it; here it is only weighed."""

    def __init__(self, base, rank):
        super().__init__()
        like = base.weight if hasattr(base, "weight") else base.absmax
        dtype = like.dtype if hasattr(base, "weight") else torch.bfloat16
        self.base = base
        self.lora_A = nn.Parameter(torch.ones(rank, base.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)


class NF4(torch.autograd.Function):
    """x W^T for a W in 4 bits, which is made anew in bf16 in the forward and in the backward pass, and never kept."""

    @staticmethod
    def forward(ctx, x, packed, absmax, shape):
        ctx.save_for_backward(packed, absmax)
        ctx.shape, ctx.dtype = shape, x.dtype
        return F.linear(
            x, torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, 64, "nf4", shape, x.dtype)
        )

    @staticmethod
    def backward(ctx, grad):  # ty: ignore
        packed, absmax = ctx.saved_tensors
        return grad @ torch.ops.bitsandbytes.dequantize_4bit(
            packed, absmax, 64, "nf4", ctx.shape, ctx.dtype
        ), *[None] * 3


class Linear4bit(nn.Module):
    """A linear layer in NF4: half a byte a weight, and four bytes for each block of 64."""

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_buffer(
            "packed", torch.zeros(-(-base.weight.numel() // 2), 1, dtype=torch.uint8)
        )
        self.register_buffer("absmax", torch.ones(-(-base.weight.numel() // 64)))
        self.bias = base.bias

    def forward(self, x):
        y = NF4.apply(x, self.packed, self.absmax, (self.out_features, self.in_features))
        return y if self.bias is None else y + self.bias


def configuration(name):
    """The transformers configuration behind a name: of a preset, a config.json, a folder or a hub id. Raises UserError.

    What decides the memory must be in the file: a default of transformers would be weighed without a word.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if name in PRESETS:
        kind, values = PRESETS[name]
        return AutoConfig.for_model(kind, **values)
    if name.endswith(".json"):
        return from_file(Path(name))
    if Path(name).is_dir():
        return from_file(Path(name) / "config.json")
    # a hub id has an owner: without one nobody need be asked
    near = difflib.get_close_matches(name, PRESETS, 1)
    hint = f"do you mean {near[0]}?" if near else f"presets are {', '.join(PRESETS)}"
    run.check(
        "/" in name,
        f"--model {printable(name)} is no preset, no folder and no hub id OWNER/NAME; {hint}",
    )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(name)
    except (*ERRORS, StrictDataclassError) as error:
        raise run.UserError(f"--model {printable(name)}: {printable(error)}") from None
    check_sizes(config, name)
    return config


# what transformers raises over a configuration that makes no sense
ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    ZeroDivisionError,
    RecursionError,
)
# Language models whose sizes and projections have these names
KNOWN = ("llama", "qwen2", "mistral")
NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
LARGEST = {"vocab_size": 10**7, "hidden_size": 10**6, "intermediate_size": 10**7, "num_hidden_layers": 500,
           "num_attention_heads": 10**4, "num_key_value_heads": 10**4}  # fmt: skip


@contextmanager
def quiet():
    """The hub's client says each of its retries, transformers what it mends; an answer in one line says enough."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def from_file(path):
    """config.json -> the configuration. Raises UserError: no JSON, unknown model_type, a wrong or missing value."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name, text = printable(path), read_text(path)
    try:
        values = json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise run.UserError(f"{name} is no readable JSON file: {printable(error)}") from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    run.check(isinstance(kind, str) and kind in CONFIG_MAPPING, f"{name}: no known model_type")
    language = values.get("text_config", values)
    run.check(
        isinstance(language, dict), f"{name}: text_config is {{...}}, not {printable(language)}"
    )
    for part, made_by in ((values, kind), (language, language.get("model_type", kind))):
        known_keys(name, part, made_by)
    for key in NEEDED if kind in KNOWN else ():
        run.check(key in values, f"{name}: {key} is missing")
    try:
        with quiet():
            config = AutoConfig.for_model(**values)
    except (*ERRORS, StrictDataclassError) as error:
        raise run.UserError(f"{name}: {printable(error)}") from None
    check_sizes(config, name)
    return config


def unique(pairs):
    """A JSON object as a dict. Raises ValueError for a key that is there twice: which one counts?"""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is there twice")
    return values


def refuse_constant(word):
    raise ValueError(f"{word} is no JSON number")


def known_keys(name, values, kind):
    """Raises UserError for a key that is nearly one of this kind of configuration: its default would count instead."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return
    known = {key for key in dir(CONFIG_MAPPING[kind]()) if not key.startswith("__")} | OTHER_KEYS
    for key in values.keys() - known:
        near = difflib.get_close_matches(key, known, 1, 0.75)
        run.check(
            not near,
            f"{name}: a {kind} knows no '{printable(key)}', perhaps you mean '{near and near[0]}'",
        )


# of config.json files, but no attributes of a configuration in transformers 5
OTHER_KEYS = {
    "_name_or_path",
    "auto_map",
    "rope_theta",
    "rope_scaling",
    "torch_dtype",
    "quantization_config",
}
OTHER_KEYS |= {
    "transformers_version",
    "tie_word_embeddings",
    "architectures",
    "partial_rotary_factor",
}


def check_sizes(config, name):
    """Raises UserError unless the sizes of the language model are numbers that fit each other."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = getattr(config, "text_config", config)
    for key, most in LARGEST.items():
        size = getattr(text, key, None)
        if size is None:  # of another kind of model, or as many as heads of queries
            continue
        whole = isinstance(size, int) and not isinstance(size, bool)
        run.check(
            whole and 0 < size <= most,
            f"--model {name}: {key} is {printable(size)}; 1 to {most:,} make sense",
        )
    heads, kv = getattr(text, "num_attention_heads", 1), getattr(text, "num_key_value_heads", None)
    run.check(
        heads % (kv or heads) == 0,
        f"--model {name}: {heads} heads cannot share {kv} of keys and values",
    )
    act = getattr(text, "hidden_act", "silu")
    run.check(
        isinstance(act, str) and act in ACT2FN,
        f"--model {name}: no known hidden_act: {printable(act)}",
    )
    rope = getattr(text, "rope_parameters", None)
    rope = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
    known = {"default", *ROPE_INIT_FUNCTIONS}
    run.check(
        isinstance(rope, str) and rope in known,
        f"--model {name}: no known rope_type: {printable(rope)}",
    )


def check_picture(config, name):
    """Raises UserError unless `inputs` can make a picture for this model: a LLaVA that sees by CLIP, or no pictures."""
    if not hasattr(config, "vision_config"):
        return
    kind, vision = config.model_type, config.vision_config
    run.check(
        kind == "llava", f"--model {name} is a {kind}: of models that see only a llava is weighed"
    )
    run.check(
        vision.model_type == "clip_vision_model",
        f"--model {name} sees by a {vision.model_type}, not by CLIP",
    )
    layer = config.vision_feature_layer
    run.check(
        isinstance(layer, int),
        f"--model {name}: vision_feature_layer {printable(layer)}: one layer is weighed",
    )
    sizes = (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers)
    whole = all(isinstance(size, int) and 0 < size <= 10**5 for size in sizes)
    run.check(
        whole and sizes[0] % sizes[1] == 0,
        f"--model {name}: the sizes {sizes} of its tower make no sense",
    )


def places(config):
    """Tokens that a picture takes among the words."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    # "default" leaves out CLIP's class token
    return patches + (config.vision_feature_select_strategy != "default")


def build(cfg, config):
    """The model as it is trained: type of its numbers, adapters, checkpointing."""
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # transformers' own function; under this name no mask is made, which for texts of one length says nothing anyway,
    # and to find that out it would have to look at numbers
    AttentionInterface.register("fused", sdpa_attention_forward)
    config._attn_implementation = "fused" if cfg.attention == "sdpa" else "eager"
    make: Any = (
        AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    )
    model = make.from_config(config)
    dtype = torch.float32 if cfg.precision in ("fp32", "autocast") else torch.bfloat16
    for p in model.parameters():
        p.data = p.data.to(dtype)
    if cfg.method != "full":
        model.requires_grad_(False)
        adapt(model, cfg.method == "qlora")
    if cfg.checkpointing:
        # there is no dropout, so the random state (5 kB a layer) need not be kept
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return model.train()


def adapt(model, quantize):
    """Adapters around the projections of attention; with `quantize`, all matrices of the layers go to 4 bits."""
    if quantize:
        import bitsandbytes  # noqa: F401  (its operators)
    # Not the eye
    language = model.model.language_model if hasattr(model.config, "vision_config") else model.model
    for name, base in [(n, m) for n, m in language.named_modules() if isinstance(m, nn.Linear)]:
        parent, _, child = name.rpartition(".")
        layer = Linear4bit(base) if quantize else base
        layer = LoRALinear(layer, RANK) if child in TARGETS else layer
        setattr(language.get_submodule(parent), child, layer)


def inputs(cfg, config):
    """One batch. A picture, for a model that sees, takes its place among the tokens."""
    ids = torch.ones(cfg.batch, cfg.seq_len, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    if hasattr(config, "vision_config"):
        vision = config.vision_config
        ids[:, 1 : 1 + places(config)] = config.image_token_index
        batch["pixel_values"] = torch.zeros(
            cfg.batch, 3, vision.image_size, vision.image_size, dtype=torch.float32
        )
    return batch
