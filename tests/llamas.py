"""A Llama of a few thousand random weights, for the tests of fine-tuning."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny(layers=2, vocabulary=120, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=None,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def batch(vocabulary=120):
    """ids, mask: three sentences of lengths 9, 6 and 4, filled up on the right."""
    ids = torch.randint(2, vocabulary, (3, 9))
    mask = torch.arange(9) < torch.tensor([9, 6, 4])[:, None]
    return torch.where(mask, ids, 1), mask


def folder(path):
    """Write a tiny Llama with the real tokenizer, as an ordinary model folder -> its name."""
    from utils import pretrained

    tokenizer, _ = pretrained.smollm2()
    tiny(vocabulary=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
