"""Models for the memory trace, whole, with LoRA or with LoRA beside NF4 weights; their batch.

Only sizes and types matter here: no weights are read. LoRA and NF4 are explained in
finetune/llama2_lora.py and llama2_qlora.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from training.presets import image_tokens

# Projections that LoRA adapts, as in finetune/llama2_lora.py
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK = 8  # r of the adapters
BLOCK = 64  # weights of NF4 that share a scale


class LoRALinear(nn.Module):
    """W x + B A x, as finetune/llama2_lora.py explains it; here only its memory counts."""

    def __init__(self, base, rank):
        super().__init__()
        dtype = base.weight.dtype if hasattr(base, "weight") else torch.bfloat16
        self.base = base
        self.lora_A = nn.Parameter(torch.ones(rank, base.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype))

    def forward(self, x):
        output = self.base(x)
        low_rank = F.linear(x, self.lora_A)
        return output + F.linear(low_rank, self.lora_B)


class NF4(torch.autograd.Function):
    """x W^T for a W in 4 bits, made anew in bf16 forward and backward, and never kept."""

    @staticmethod
    def forward(ctx, x, packed, absmax, shape):
        ctx.save_for_backward(packed, absmax)
        ctx.shape = shape
        ctx.dtype = x.dtype
        dequantize = torch.ops.bitsandbytes.dequantize_4bit
        return F.linear(x, dequantize(packed, absmax, BLOCK, "nf4", shape, x.dtype))

    @staticmethod
    def backward(ctx, grad):  # ty: ignore
        packed, absmax = ctx.saved_tensors
        dequantize = torch.ops.bitsandbytes.dequantize_4bit
        grad_x = grad @ dequantize(packed, absmax, BLOCK, "nf4", ctx.shape, ctx.dtype)
        return grad_x, None, None, None


class Linear4bit(nn.Module):
    """A linear layer in NF4: half a byte a weight, and four bytes for each block of 64."""

    def __init__(self, base):
        super().__init__()
        self.in_features = base.in_features
        self.out_features = base.out_features
        weights = base.weight.numel()
        # Two weights a byte, a scale a block, both rounded up.
        self.register_buffer("packed", torch.zeros(-(-weights // 2), 1, dtype=torch.uint8))
        self.register_buffer("absmax", torch.ones(-(-weights // BLOCK)))
        self.bias = base.bias

    def forward(self, x):
        y = NF4.apply(x, self.packed, self.absmax, (self.out_features, self.in_features))
        return y if self.bias is None else y + self.bias


def build(cfg, config):
    """The model as it is trained: type of its numbers, adapters, checkpointing."""
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # transformers' own function; under this name no mask is made, which for texts of one length
    # says nothing anyway, and to find that out it would have to look at numbers
    AttentionInterface.register("fused", sdpa_attention_forward)
    config._attn_implementation = "fused" if cfg.attention == "sdpa" else "eager"
    library: Any = AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        library = AutoModelForImageTextToText
    model = library.from_config(config)
    # The type of weights, before adapters take it over
    dtype = torch.float32 if cfg.precision in ("fp32", "autocast") else torch.bfloat16
    for p in model.parameters():
        p.data = p.data.to(dtype)
    if cfg.method != "full":
        model.requires_grad_(False)
        add_adapters(model, cfg.method == "qlora")
    if cfg.checkpointing:
        # there is no dropout, so the random state (5 kB a layer) need not be kept
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return model.train()


def add_adapters(model, quantize):
    """LoRA at the projections of attention; `quantize`: all matrices of the layers to 4 bits."""
    if quantize:
        import bitsandbytes  # noqa: F401  (its operators)
    # The language model only, not the vision tower
    language = model.model
    if hasattr(model.config, "vision_config"):
        language = model.model.language_model
    linears = [(name, m) for name, m in language.named_modules() if isinstance(m, nn.Linear)]
    for name, base in linears:
        parent, _, child = name.rpartition(".")
        layer = Linear4bit(base) if quantize else base
        if child in TARGETS:
            layer = LoRALinear(layer, RANK)
        setattr(language.get_submodule(parent), child, layer)


def inputs(cfg, config):
    """One batch. A picture, for a model that sees, takes its place among the tokens."""
    ids = torch.ones(cfg.batch, cfg.seq_len, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    if hasattr(config, "vision_config"):
        ids[:, 1 : 1 + image_tokens(config)] = config.image_token_index
        size = config.vision_config.image_size
        batch["pixel_values"] = torch.zeros(cfg.batch, 3, size, size, dtype=torch.float32)
    return batch
