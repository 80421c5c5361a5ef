"""Models to weigh: by name, by config.json or by hub id; whole, with LoRA, or with LoRA beside 4-bit weights.

Only sizes and types matter here: no weights are read. LoRA and NF4 are explained in the chapter on adapting.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from utils import run

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
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")  # what LoRA corrects, as in the chapter on adapting
RANK = 8  # of the corrections


class LoRALinear(nn.Module):
    """W x + B A x, as the chapter on adapting explains it; here it is only weighed."""

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
        return F.linear(x, torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, 64, "nf4", shape, x.dtype))

    @staticmethod
    def backward(ctx, grad):  # ty: ignore
        packed, absmax = ctx.saved_tensors
        return grad @ torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, 64, "nf4", ctx.shape, ctx.dtype), *[
            None
        ] * 3


class Linear4bit(nn.Module):
    """A linear layer in NF4: half a byte a weight, and four bytes for each block of 64."""

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_buffer("packed", torch.zeros(-(-base.weight.numel() // 2), 1, dtype=torch.uint8))
        self.register_buffer("absmax", torch.ones(-(-base.weight.numel() // 64)))
        self.bias = base.bias

    def forward(self, x):
        y = NF4.apply(x, self.packed, self.absmax, (self.out_features, self.in_features))
        return y if self.bias is None else y + self.bias


def configuration(name):
    """The transformers configuration behind a name. Raises UserError."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        if name in PRESETS:
            kind, values = PRESETS[name]
            return AutoConfig.for_model(kind, **values)
        if name.endswith(".json"):
            values = json.loads(Path(name).read_text())
            run.check(
                isinstance(values, dict) and values.get("model_type") in CONFIG_MAPPING, f"{name}: no known model_type"
            )
            return AutoConfig.for_model(values.pop("model_type"), **values)
        return AutoConfig.from_pretrained(name, local_files_only=Path(name).is_dir())
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        known = ", ".join(PRESETS)
        raise run.UserError(f"--model {name}: {str(error).splitlines()[0]}; presets: {known}") from None


def build(cfg, config):
    """The model as it is trained: type of its numbers, adapters, checkpointing."""
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # transformers' own function; under this name no mask is made, which for texts of one length says nothing anyway,
    # and to find that out it would have to look at numbers
    AttentionInterface.register("fused", sdpa_attention_forward)
    config._attn_implementation = "fused" if cfg.attention == "sdpa" else "eager"
    make: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
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
    language = model.model.language_model if hasattr(model.config, "vision_config") else model.model  # not the eye
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
        ids[:, 1 : 1 + (vision.image_size // vision.patch_size) ** 2] = config.image_token_index
        batch["pixel_values"] = torch.zeros(cfg.batch, 3, vision.image_size, vision.image_size, dtype=torch.float32)
    return batch
