"""deploy/llama.py: logits and keys of the models of transformers; families that have other equations are refused."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from deploy.llama import Llama, attention, rms_norm, rotary_angles, rotate
from utils.run import UserError

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128}
STRETCHED = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CONFIGS = {
    "Llama": LlamaConfig(**SIZES, **HEADS),
    "Llama, one head of keys": LlamaConfig(**SIZES, **HEADS | {"num_key_value_heads": 1}),
    "Llama, as many heads of keys": LlamaConfig(**SIZES, **HEADS | {"num_key_value_heads": 6}),
    "Llama, tied, wide heads": LlamaConfig(**SIZES, **HEADS, head_dim=12, tie_word_embeddings=True),
    "Llama, biases": LlamaConfig(**SIZES, **HEADS, attention_bias=True, mlp_bias=True),
    "Llama 3": LlamaConfig(**SIZES, **HEADS, rope_parameters=STRETCHED),
    "Llama, YaRN": LlamaConfig(**SIZES, **HEADS, rope_parameters=YARN),
    "Mistral": MistralConfig(**SIZES, **HEADS, sliding_window=None),
    "Qwen2": Qwen2Config(**SIZES, **HEADS),
}


class NoCache:
    """Causal attention among the tokens of one pass."""

    def attend(self, layer, q, k, v):
        return attention(q, k, v, is_causal=True)


def made(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    # norms and biases that are not their starting values
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name, parity):
    model = made(CONFIGS[name])
    ids = torch.randint(0, 97, (2, 21))
    positions = torch.arange(21).expand(2, -1)
    mine = Llama(model)(ids, positions, NoCache())
    with torch.no_grad():
        theirs = model(ids).logits
    parity(
        "Llama", f"llama.Llama, {name}", f"transformers.{type(model).__name__}", mine, theirs, 1e-5
    )


def test_embeddings_instead_of_ids_and_logits_of_some_tokens():
    model = made(CONFIGS["Llama"])
    llama = Llama(model)
    ids = torch.randint(0, 97, (1, 9))
    positions = torch.arange(9)[None]
    whole = llama(ids, positions, NoCache())
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(llama(embeds, positions, NoCache()), whole)
    some = llama(ids, positions, NoCache(), keep=torch.tensor([2, 8]))
    torch.testing.assert_close(some, whole[:, [2, 8]])


def test_positions_are_those_that_are_given(parity):
    """Tokens with gaps between them, as transformers sees them."""
    model = made(CONFIGS["Llama 3"])
    ids = torch.randint(0, 97, (1, 9))
    positions = torch.arange(9)[None] ** 2
    mine = Llama(model)(ids, positions, NoCache())
    with torch.no_grad():
        theirs = model(ids, position_ids=positions).logits
    parity(
        "Llama",
        "llama.Llama, positions with gaps",
        "transformers.LlamaForCausalLM",
        mine,
        theirs,
        1e-5,
    )


def test_rotation_depends_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8)
    inv_freq = 10000.0 ** -(torch.arange(4) / 4)

    def product(i, j):
        at = [rotary_angles(torch.tensor([[n]]), inv_freq) for n in (i, j)]
        return float((rotate(q, *at[0]) * rotate(k, *at[1])).sum())

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-3)
    # a rotation keeps lengths
    turned = rotate(q, *rotary_angles(torch.tensor([[9]]), inv_freq))
    torch.testing.assert_close(turned.norm(), q.norm())


def test_the_norm_is_computed_in_float32(parity):
    x = 100 * torch.randn(3, 64)
    weight = torch.randn(64)
    theirs = torch.nn.functional.rms_norm(x, (64,), weight, 1e-5)
    parity(
        "Llama",
        "llama.rms_norm",
        "torch.nn.functional.rms_norm",
        rms_norm(x, weight, 1e-5),
        theirs,
        1e-5,
    )
    # squares of 300 do not fit into float16
    half = rms_norm((3 * x).half(), weight.half(), 1e-5)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), rms_norm(3 * x, weight, 1e-5), rtol=0.01, atol=0.01)


def test_other_equations_are_refused():
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    with pytest.raises(UserError, match="type gpt2: this forward pass is that of llama, mistral"):
        Llama(gpt2)
    gelu = made(LlamaConfig(**SIZES, **HEADS, hidden_act="gelu"))
    with pytest.raises(UserError, match="activation gelu"):
        Llama(gelu)
    window = made(MistralConfig(**SIZES, **HEADS, sliding_window=16))
    with pytest.raises(UserError, match="attention to the last 16 tokens alone"):
        Llama(window)
