"""Prefix tuning: learned keys and values in front of every layer. Li & Liang 2021,
arXiv:2101.00190.

A soft prompt speaks to the first layer only. But what later layers see of earlier words are their
keys and values. So learn these: P keys and values for every layer, put into the cache as if P words
had been read before the text. Learned directly they are unstable, so the paper lets a small network
write all of them from P vectors, and throws it away after training. They begin as those of a real
text: random ones cost a hundred steps before they stop disturbing.

Shapes: P prefix positions, N layers, H heads of keys and values with d numbers each; B, L, V as in
sentiment.py.
Differences from the paper: Llama instead of GPT-2; keys carry no position (they are learned after
the rotation).

    python finetune/llama2_prefix.py
    python finetune/llama2_prefix.py --start ""           # from random numbers
    python finetune/llama2_prefix.py --backend peft       # always from random numbers
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import nn

from finetune import llama2_full, llama2_prompt, sentiment, task_setup
from utils import run


@dataclass(frozen=True)
class Config(task_setup.Training):
    """Learn keys and values before a frozen language model, and score it."""

    lr: float = 3e-4  # peak learning rate
    tokens: int = 20  # P, prefix positions
    hidden: int = 256  # width of the network that writes them
    # it begins as what is kept of this text; "", and always with peft: random
    start: str = llama2_prompt.START
    backend: Literal["ours", "peft"] = "ours"  # who adds the prefix
    out: str = "outputs/llama2_prefix"  # where the results go


def sizes(model):
    """-> layers N, key-value heads H, numbers a head d. Raises UserError if layers keep else."""
    from transformers import DynamicCache

    c = model.config
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    # models before Llama 2 have as many heads of keys and values as of queries
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    # a prefix needs layers that keep plain keys and values, no sliding window or state
    kept = {type(layer).__name__ for layer in DynamicCache(config=c).layers} - {"DynamicLayer"}
    kinds = ", ".join(kept)
    run.check(
        not kept,
        f"models of the kind {c.model_type} keep {kinds} in some layers: no place for a prefix",
    )
    return c.num_hidden_layers, heads, head


class PrefixEncoder(nn.Module):
    """P free vectors and the MLP that makes keys and values of them: () -> (P, N 2 H d). Sec. 4.3;
    named as in PEFT.

    start: keys and values of a real text (P, N 2 H d), to which the network adds, at first nothing.
    Sec. 7.4.
    """

    def __init__(self, tokens, layers, heads, size, hidden, start=None):
        super().__init__()
        width = heads * size
        self.register_buffer("start", start, persistent=False)
        self.embedding = nn.Embedding(tokens, width)
        self.transform = nn.Sequential(
            nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, layers * 2 * width)
        )
        # a start is not to be disturbed: the last layer adds zero
        if start is not None:
            nn.init.zeros_(self.transform[2].weight)
            nn.init.zeros_(self.transform[2].bias)

    def forward(self):
        numbers = self.transform(self.embedding.weight)
        return numbers if self.start is None else self.start + numbers


def remember(prefix, layers, heads, batch, dtype):
    """Numbers (P, N 2 H d) -> a KV cache of P words that were read, the same for the batch."""
    from transformers import DynamicCache

    # a key and a value of shape (1, H, P, d) for each layer
    pairs = rearrange(prefix.to(dtype), "p (n two h d) -> n two 1 h p d", n=layers, two=2, h=heads)
    cache = DynamicCache()
    for i, (key, value) in enumerate(pairs):
        cache.update(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), i)
    return cache


def beginning(bench, cfg):
    """Keys and values of the text that a prefix begins as (P, N 2 H d); None if it is empty."""
    if not cfg.start:
        return None
    words = llama2_prompt.first_words(bench.tokenizer, cfg.start, cfg.tokens, 0)
    return read(bench.model, words)


@torch.no_grad()
def read(model, ids):
    """Keys and values of words: ids (P,) -> (P, N 2 H d). As a prefix it does what the words do."""
    cache = model(input_ids=ids[None].to(model.device), use_cache=True).cache
    pairs = [torch.cat([layer.keys, layer.values]) for layer in cache.layers]
    pairs = torch.stack(pairs)  # (N, 2, H, P, d)
    return rearrange(pairs, "n two h p d -> p (n two h d)").float()


def network(model, prefix):
    """The model after prefix() (P, N 2 H d), as a network of this chapter."""
    layers, heads, _ = sizes(model)

    def forward(ids, mask, last=0):
        # keys and values of the prefix, as if P words had been read
        numbers = prefix()
        sentiment.check_positions(model, len(numbers) + ids.shape[1])
        cache = remember(numbers, layers, heads, len(ids), model.dtype)
        # attention sees them, and the positions of the text begin after them
        seen = torch.cat([mask.new_ones(len(ids), len(numbers)), mask], dim=1)
        position = (seen.long().cumsum(-1) - 1).clamp(min=0)[:, len(numbers) :]
        return model(
            input_ids=ids,
            attention_mask=seen.long(),
            position_ids=position,
            cache=cache,
            logits_to_keep=sentiment.last_positions(ids, last),
        ).logits

    return forward


def through_peft(model, cfg, projection=True) -> Any:
    """The same prefix by the PEFT library -> its model."""
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=cfg.tokens,
        prefix_projection=projection,
        encoder_hidden_size=getattr(cfg, "hidden", None),
    )
    return get_peft_model(model, config)


def main(cfg: Config) -> dict:
    """Train the encoder, score; write the keys and values that it ends with in PEFT's layout."""
    run.check(min(cfg.tokens, cfg.hidden) > 0, "--tokens and --hidden must be at least 1")
    bench = task_setup.start(cfg, sizes, before=cfg.tokens)
    # by PEFT, or by the class above
    if cfg.backend == "peft":
        model = through_peft(bench.model, cfg)
        metrics = llama2_full.by_peft(cfg, bench, model, llama2_prompt.peft_network(model))
    else:
        layers, heads, size = sizes(bench.model)
        prefix = PrefixEncoder(cfg.tokens, layers, heads, size, cfg.hidden, beginning(bench, cfg))
        # what PEFT's file says besides
        extra = {"encoder_hidden_size": cfg.hidden, "prefix_projection": True}
        extra |= {"token_dim": heads * size, "num_attention_heads": heads}
        forward = network(bench.model, prefix)
        metrics = llama2_prompt.experiment(cfg, bench, prefix, forward, "PREFIX_TUNING", **extra)
    return run.report(bench.folder, metrics, then="python finetune/llama2_ptune_v2.py")


if __name__ == "__main__":
    run.cli(main, Config)
