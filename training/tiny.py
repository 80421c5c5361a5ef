"""A small Llama that reads bytes, and real text for it: what the scripts on sharding train, in
seconds.

The text is that of three software manuals; a token is a byte, so nothing is hidden in a tokenizer.
The batch of step i is drawn by (seed, i) alone and then dealt out: any number of ranks sees the
same texts.
"""

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from training import ranks
from utils import data


def llama(width=256, layers=4, heads=4, tied=True, dtype=torch.float32, **more):
    """A Llama over bytes, its weights drawn anew: ids (B,T) -> logits (B,T,256).

    Its MLP is four times as wide.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=1024,
    )
    config = LlamaConfig(tie_word_embeddings=tied, **sizes | more)
    config._attn_implementation = "eager"  # on sequences as short as ours faster on a CPU
    model = LlamaForCausalLM(config).train()
    # The parameters only: rotary frequencies stay exact.
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def corpus():
    """All pages of the manuals, one after the other: bytes (n,), int64."""
    text = "\n\n".join(page for _, page in data.docs()).encode()
    return torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))


def batch(text, seed, step, rows, length):
    """The batch of a step: pieces of the text (rows, length), the same on every rank."""
    # By seed and step alone: a resumed run goes on with the same batches.
    starts = np.random.default_rng([seed, step]).integers(len(text) - length, size=rows)
    return torch.stack([text[s : s + length] for s in starts])


def share(x):
    """The rows of this rank, of as many equal shares as there are ranks."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def loss(model, ids):
    """Mean of -log p(byte | all before it): ids (B,T) -> ()."""
    # The logits of each byte are compared with the next one.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    # bf16 is too coarse for the sum over all bytes
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(wide), ids[:, 1:].flatten())


def mean(x):
    """The mean of a number over all ranks."""
    total = torch.tensor(float(x), dtype=torch.float64, device=ranks.device())
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()
