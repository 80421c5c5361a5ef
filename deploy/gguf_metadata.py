"""Metadata of a GGUF file: sizes of a Llama, and a byte-level BPE tokenizer, under the keys of llama.cpp.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A wrong number here is no error but another
model: the base of the rotary angles, for instance, or the epsilon of RMSNorm.
"""

import json
from typing import Any

from utils.run import check


def check_config(config):
    """Raises UserError for a model that is no plain Llama."""
    is_llama = config.model_type == "llama"
    check(is_llama, f"a model of type {config.model_type}: this writes Llamas")
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    check(kind == "default", f"rotary angles of type {kind}: only plain ones are written")
    bias = config.attention_bias or config.mlp_bias
    check(not bias, "biases in linear layers: a plain Llama has none")


def add_config(writer, config, name, kind):
    """Sizes of the model; kind: f16, q8_0 or q4_1, the type of most tensors."""
    import gguf

    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    # sizes of layers and heads
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    # rotary angles, RMSNorm
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_tokenizer(writer, tokenizer, size, pre):
    """Tokens, their types, merges and special ids of a byte-level BPE. size: rows of the embeddings; those that
    are no token are called so. pre: how text is cut before BPE, by its name in llama.cpp.

    Raises UserError for another kind of tokenizer.
    """
    from gguf import TokenType

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    check(backend is not None, "this tokenizer has no tokenizer.json")
    bpe = json.loads(backend.to_str())["model"]
    # a space is written as this letter in the bytes of GPT-2
    is_bytes = bpe.get("type") == "BPE" and "\u0120" in "".join(bpe["vocab"])
    check(is_bytes, "this writes byte-level BPE tokenizers, such as that of SmolLM2")
    # a token for each row of the embeddings, and what kind it is
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    check(max(by_id) < size, f"{max(by_id) + 1} tokens, but {size} embeddings")
    added = tokenizer.added_tokens_decoder
    tokens = []
    types = []
    for number in range(size):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        kind = TokenType.NORMAL if number in by_id else TokenType.UNUSED
        # control tokens are never made of what a user writes
        if number in added:
            kind = TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED
        types.append(kind)
    # byte-level BPE is called so after the first that had it
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # pairs, as "a b"
    writer.add_token_merges([x if isinstance(x, str) else " ".join(x) for x in bpe["merges"]])
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    # ids of tokens that begin, end and pad
    special = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: tokenizer.eos_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
    }
    for add, number in special.items():
        if number is not None:
            add(number)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
