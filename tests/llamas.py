"""A Llama of a few thousand random weights, for the tests of fine-tuning."""

from functools import cache
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from utils import assets, pretrained


def tiny(layers=2, vocabulary=120, seed=0, bias=False) -> Any:
    """bias: biases in attention, as Qwen2 has them, and not zero."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=None,
        bos_token_id=None, eos_token_id=1, attention_bias=bias,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    return model


def learned_positions(kind) -> Any:
    """A tiny model with a table of 64 positions: gpt2, opt, or opt-350m, whose words are half as wide as its layers."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=120,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            eos_token_id=1,
            bos_token_id=1,
        )
        model = GPT2LMHeadModel(config)
    else:
        config = OPTConfig(
            vocab_size=120, hidden_size=32, word_embed_proj_dim=16 if kind == "opt-350m" else 32, ffn_dim=48,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, pad_token_id=1, eos_token_id=1,
        )  # fmt: skip
        model = OPTForCausalLM(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@cache
def tokenizer() -> Any:
    """SmolLM2's, without its weights."""
    place = assets.fetch("smollm2") / "bf16"
    return AutoTokenizer.from_pretrained(place) if place.exists() else pretrained.smollm2()[0]


def batch(vocabulary=120):
    """ids, mask: three sentences of lengths 9, 6 and 4, filled up on the right."""
    ids = torch.randint(2, vocabulary, (3, 9))
    mask = torch.arange(9) < torch.tensor([9, 6, 4])[:, None]
    return torch.where(mask, ids, 1), mask


def folder(path):
    """Write a tiny Llama with the real tokenizer, as an ordinary model folder -> its name."""
    tiny(vocabulary=len(tokenizer())).to(torch.bfloat16).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)
