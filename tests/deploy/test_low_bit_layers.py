"""deploy/low_bit_layers.py, low_bit_fused.py: products of 4-bit codes, whole models of them, layers fused."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from deploy.caches import StaticCache
from deploy.engine import Engine
from deploy.int8_linear import Int8Linear, int8_layers
from deploy.llama import Llama
from deploy.low_bit_fused import FusedLayer, bytes_held, fused, stacked
from deploy.low_bit_gguf import dequantise_q4_1, dequantise_q8_0, q4_1, q8_0
from deploy.low_bit_layers import (
    FEW,
    Int4Int8Linear,
    Int4Linear,
    NibbleLinear,
    Q8Embedding,
    from_q4_1,
    int4_layers,
    int8_of,
    quantised,
)
from tests import llamas
from utils.run import UserError


def tiny(tied=True, bias=False, vocabulary=120) -> Any:
    """Sizes that 32 and 64 divide, and weights that are not all alike."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=128,
        tie_word_embeddings=tied, pad_token_id=None, bos_token_id=None, eos_token_id=1,
        attention_bias=bias,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
        elif "layers" in name and p.dim() == 2:
            p *= 5
        elif p.dim() == 1:
            nn.init.uniform_(p, 0.5, 1.5)
    return model


def of_rounded_factors(x, codes, scale, zero, bias):
    """Activations, scales and zero points rounded to bf16, the product in float64, rounded to bf16."""
    blocks = codes.unflatten(1, (-1, 32)).double() - 8
    weight = blocks * scale.bfloat16().double()[:, :, None] + zero.bfloat16().double()[:, :, None]
    y = (x.bfloat16().double() @ weight.flatten(1).T).bfloat16().float()
    return y if bias is None else y + bias


@pytest.mark.parametrize("outputs", [64, 120])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_int4_product_is_that_of_the_rounded_factors(rows, outputs, parity):
    codes, scale, minimum = q4_1(torch.randn(outputs, 96))
    x = torch.randn(2, rows, 96)
    for bias in (None, torch.randn(outputs)):
        ours = from_q4_1(codes, scale, minimum, bias)(x)
        assert ours.dtype == torch.float32
        theirs = of_rounded_factors(x, codes, scale, minimum + 8 * scale, bias)
        name = "float64 product of bf16 factors, in bf16"
        # sums in another order: a last bit of bf16 now and then
        assert (ours != theirs).float().mean() < 0.01
        parity("Low-bit", "low_bit_layers.Int4Linear", name, ours, theirs, 0.2)
        wanted = F.linear(x, dequantise_q4_1(codes, scale, minimum), bias)
        assert (ours - wanted).abs().mean() < 0.005 * wanted.abs().mean()


def test_eight_bits_are_two_nibbles(parity):
    """All 256 codes, each with weight 1 alone, come out as they are; and a whole product."""
    codes = torch.zeros(256, 32, dtype=torch.int8)
    codes[:, 0] = torch.arange(-128, 128)
    row = F.one_hot(torch.tensor([0]), 32).float()
    exact = NibbleLinear(codes, torch.ones(256, 1))(row)
    assert exact[0].tolist() == list(range(-128, 128))
    codes, scale = q8_0(torch.randn(120, 96))
    x = torch.randn(5, 96).bfloat16().float()
    bias = torch.randn(120)
    ours = NibbleLinear(codes, scale, bias)(x)
    theirs = x @ dequantise_q8_0(codes, scale.bfloat16().float()).T
    name = "float32 product of bf16 factors, in bf16"
    parity("Low-bit", "low_bit_layers.NibbleLinear", name, ours - bias, theirs.bfloat16(), 0.1)
    assert (ours - bias - theirs).abs().mean() < 0.005 * theirs.abs().mean()


def test_rows_of_the_embedding_are_those_of_the_table(parity):
    codes, scale = q8_0(torch.randn(50, 64))
    ids = torch.tensor([[3, 49, 0], [7, 7, 1]])
    ours = Q8Embedding(codes, scale)(ids)
    theirs = F.embedding(ids, dequantise_q8_0(codes, scale))
    assert ours.dtype == torch.float32
    parity("Low-bit", "low_bit_layers.Q8Embedding", "F.embedding", ours, theirs, 0)


def test_few_rows_take_int4_and_many_take_int8():
    parts = q4_1(torch.randn(64, 96))
    bias = nn.Parameter(torch.randn(64), requires_grad=False)
    int4, int8 = from_q4_1(*parts, bias), int8_of(*parts, bias)
    both = Int4Int8Linear(int4, int8)
    few = torch.randn(2, FEW // 2, 96)
    many = torch.randn(1, FEW + 1, 96)
    assert torch.equal(both(few), int4(few)) and not torch.equal(both(few), int8(few))
    assert torch.equal(both(many), int8(many)) and not torch.equal(both(many), int4(many))
    # rows of the whole batch count
    batch = torch.randn(2, FEW // 2 + 1, 96)
    assert torch.equal(both(batch), int8(batch))
    linear = nn.Linear(96, 64)
    linear.weight.data = dequantise_q4_1(*parts)
    linear.bias = bias
    assert torch.equal(int8(many), Int8Linear(linear)(many))


@pytest.mark.parametrize("bias", [False, True])
def test_a_model_of_int4_layers_is_that_of_its_dequantised_weights(bias):
    """All weights of the counterpart are those of the codes, so what differs is rounding to bf16."""
    model = tiny(bias=bias)
    wanted = copy.deepcopy(model)
    for name, parts in quantised(model).items():
        kept = dequantise_q4_1(*parts) if len(parts) == 3 else dequantise_q8_0(*parts)
        wanted.get_submodule(name).weight.copy_(kept)
    made = int4_layers(model)
    assert not [m for m in made.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    ids = torch.randint(3, 120, (2, 20))
    ours, theirs = made(ids).logits, wanted(ids).logits
    assert ours.dtype == torch.float32
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_a_head_of_its_own_leaves_the_embedding_alone():
    model = tiny(tied=False)
    table = model.model.embed_tokens.weight.clone()
    int4_layers(model.bfloat16(), prefill_int8=True)
    assert isinstance(model.lm_head, NibbleLinear)
    assert torch.equal(model.model.embed_tokens.weight, table.bfloat16().float())
    layer = model.model.layers[1].mlp.down_proj
    assert isinstance(layer, Int4Int8Linear) and isinstance(layer.int4, Int4Linear)


def test_widths_that_blocks_do_not_divide_are_refused():
    model = llamas.tiny()
    with pytest.raises(UserError, match="48 inputs: blocks of 32"):
        int4_layers(model)
    assert isinstance(model.lm_head, nn.Linear)


WAYS = {
    "fp32": lambda model: model,
    "int8": int8_layers,
    "int4": int4_layers,
    "int4 + int8": lambda model: int4_layers(model, prefill_int8=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_stacked_layers_give_the_same_outputs_side_by_side(way):
    layer = WAYS[way](tiny(bias=True)).model.layers[0].self_attn
    layers = [layer.q_proj, layer.k_proj, layer.v_proj]
    before = [module.out_features for module in layers]
    one = stacked(layers)
    for rows in (1, 2 * FEW):
        x = torch.randn(2, rows, 128)
        together = torch.cat([module(x) for module in layers], dim=-1)
        torch.testing.assert_close(one(x), together, atol=1e-5, rtol=1e-5)
    assert [module.out_features for module in layers] == before and one.out_features == sum(before)


def test_what_cannot_be_stacked_is_refused():
    with pytest.raises(UserError, match="different types"):
        stacked([nn.Linear(32, 64), from_q4_1(*q4_1(torch.randn(64, 32)))])
    with pytest.raises(UserError, match="blocks of 64"):
        stacked([from_q4_1(*q4_1(torch.randn(48, 32))) for _ in range(2)])


@pytest.mark.parametrize("way", WAYS)
def test_fused_layers_compute_the_same(way, parity):
    """A prompt and then a token at a time."""
    model = WAYS[way](tiny(bias=True))
    ids = torch.randint(3, 120, (2, 30))
    logits = {}
    for llama in (Llama(model), fused(model)):
        cache = StaticCache(llama, 32, batch=2)
        parts = [llama(x, cache.positions(x.shape[1]), cache) for x in ids.split([27, 1, 2], 1)]
        logits[type(llama.layers[0])] = torch.cat(parts, dim=1)
    plain, quick = logits.values()
    assert FusedLayer in logits
    # rounding to 8 bits in between makes more of another order of the sums
    atol = {"fp32": 1e-4}.get(way, 0.02 * float(plain.abs().max()))
    assert (plain - quick).norm() < (1e-5 if way == "fp32" else 0.01) * plain.norm()
    parity("Low-bit", f"low_bit_fused.fused, {way}", "llama.Llama", quick, plain, atol)


@pytest.mark.parametrize("way", WAYS)
def test_fused_layers_share_the_weights_of_the_model(way):
    """All but scales and zero points of int4, of which q, k, v, gate and up have 4 bytes for 32 weights."""
    model = WAYS[way](tiny())
    before = bytes_held(model, Llama(model))
    if way == "fp32":
        assert (
            before
            == sum(p.nbytes for p in model.parameters())
            + model.model.rotary_emb.inv_freq.nbytes * 2
        )
    more = bytes_held(model, fused(model)) - before
    stacked_rows = 2 * (128 + 64 + 64 + 192 + 192)
    scales = {"fp32": 0, "int8": 4}.get(way, 4 * 128 // 32) * stacked_rows
    if way == "int4 + int8":
        scales += 4 * stacked_rows
    assert more == scales


def test_an_engine_runs_on_fused_int4_layers():
    model = int4_layers(tiny())
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    together = Engine(fused(model), 40, 4).generate(prompts, 5)
    assert together == Engine(Llama(model), 40, 4).generate(prompts, 5)
