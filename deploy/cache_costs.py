"""Costs of decoding, predicted: FLOPs of a pass, bytes of the KV cache, bytes that a token reads.

Prefill multiplies each weight with all tokens of the prompt, so arithmetic limits it; a new token
multiplies it once, so what limits it is how quickly weights and cache come out of memory (roofline:
Williams et al. 2009, doi:10.1145/1498765.1498785). Pope et al. 2022, arXiv:2211.05102, Sec. 2.
"""

import time

import torch
import torch.nn.functional as F


def head_dim(config):
    """D, numbers of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_bytes_per_token(config, bytes_per_number=2.0):
    """Bytes that a KV cache needs for a token: 2 (keys, values) x layers x K x D x bytes of a number.

    Any configuration of transformers. int8 with a float32 scale for each head: 1 + 4 / D a number.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim(config) * bytes_per_number


def forward_flops(config, new, held=0, logits=1):
    """FLOPs of matrix products for `new` tokens after `held` others, and the logits of some of them.

    A product of (n,k) and (k,m) has 2 n k m. Scores that the causal mask hides count, too.
    """
    width = config.hidden_size
    queries = config.num_attention_heads * head_dim(config)
    keys = config.num_key_value_heads * head_dim(config)
    # projections of queries and output, of keys and values; three of SwiGLU
    numbers = 2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size
    projections = 2 * new * numbers
    # scores, and the weighted sum of the values
    attention = 2 * (2 * new * (held + new) * queries)
    head = 2 * logits * width * config.vocab_size
    return config.num_hidden_layers * (projections + attention) + head


def weight_bytes(llama):
    """Bytes of the weights that each token reads: all but the table of embeddings, of which it reads a row;
    as output layer (tied weights) the table is read.
    """
    once = {id(p): p for p in llama.parameters()}
    if llama.head.weight is not llama.embed.weight:
        del once[id(llama.embed.weight)]
    return sum(p.numel() * p.element_size() for p in once.values())


def fastest(action, seconds=0.5):
    """CPU seconds of a call, the least of all calls within so many seconds."""
    best = float("inf")
    action()
    until = time.process_time() + seconds
    while time.process_time() < until:
        began = time.process_time()
        action()
        best = min(best, time.process_time() - began)
    return best


def bandwidth(dtype=torch.float32, width=1024, rows=65536):
    """Bytes a second that a matrix-vector product (GEMV) reads: F.linear of one row.

    The matrix, 256 MiB in float32, does not fit into the processor's caches.
    """
    # ones: zeros that nobody wrote are one page of memory, over and over
    weight = torch.ones(rows, width, dtype=dtype)
    row = torch.ones(1, width, dtype=dtype)
    seconds = fastest(lambda: F.linear(row, weight))
    return weight.numel() * weight.element_size() / seconds


def gemm_rate(dtype=torch.float32, width=1024, rows=256):
    """FLOPs a second of a matrix product (GEMM) of many rows."""
    weight = torch.ones(width, width, dtype=dtype)
    x = torch.ones(rows, width, dtype=dtype)
    seconds = fastest(lambda: F.linear(x, weight))
    return 2 * rows * width * width / seconds


def products_seconds(llama):
    """CPU seconds of the linear layers for one token, each called with one row and nothing between."""
    wide = torch.ones(1, llama.config.hidden_size, dtype=llama.embed.weight.dtype)

    def products():
        for layer in llama.layers:
            layer.q(wide)
            layer.k(wide)
            heads = layer.v(wide)
            layer.o(heads.new_ones(1, layer.o.in_features))
            layer.gate(wide)
            layer.down(layer.up(wide))
        llama.head(wide)

    return fastest(products)
