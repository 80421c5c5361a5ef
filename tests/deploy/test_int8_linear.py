"""deploy/int8_linear.py: products of integers are exact, what is lost is lost in rounding; whole models."""

import copy

import pytest
import torch
from torch import nn

from deploy.absmax import quantise_int8
from deploy.engine import Engine
from deploy.int8_linear import Int8Linear, int8_layers
from tests.deploy.test_decode import talker


def test_codes_are_within_half_a_step(parity):
    x = torch.randn(5, 64) * torch.tensor([[1.0], [100.0], [1e-6], [3.0], [1.0]])
    codes, scale = quantise_int8(x)
    assert codes.dtype == torch.int8 and codes.abs().amax(1).tolist() == [127] * 5
    assert ((codes * scale - x).abs() <= scale / 2 * 1.001).all()
    about = (scale[:, 0], torch.zeros(5, dtype=torch.int32), 0, -127, 127)
    theirs = torch.fake_quantize_per_channel_affine(x, *about)
    name = "torch.fake_quantize_per_channel_affine"
    parity("int8", "absmax.quantise_int8", name, codes * scale, theirs, 1e-5)
    # a row of zeros is no division by zero
    codes, scale = quantise_int8(torch.zeros(1, 4))
    assert not codes.any() and torch.isfinite(scale).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_product_is_that_of_the_rounded_factors(rows, bias, parity):
    linear = nn.Linear(48, 20, bias=bias)
    x = torch.randn(2, rows, 48)
    ours = Int8Linear(linear)(x)
    # the same factors in float64
    codes, scale = quantise_int8(x.reshape(-1, 48))
    rounded = codes.double() * scale
    weight = quantise_int8(linear.weight.detach())
    theirs = rounded @ (weight[0].double() * weight[1]).T + (linear.bias if bias else 0)
    name = f"int8_linear.Int8Linear, {rows} rows, bias {bias}"
    parity(
        "int8",
        name,
        "float64 product of rounded factors",
        ours.double(),
        theirs.view(2, rows, 20),
        1e-5,
    )
    # and near to what was there
    wanted = linear(x)
    assert (ours - wanted).abs().mean() < 0.02 * wanted.abs().mean()
    assert Int8Linear(linear)(x.bfloat16()).dtype == torch.bfloat16


def test_all_linear_layers_of_a_model_are_replaced_and_a_tied_head_has_its_own_codes():
    model = talker()
    model.lm_head.weight = model.model.embed_tokens.weight
    before = copy.deepcopy(model)
    int8_layers(model)
    assert not [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert sum(isinstance(m, Int8Linear) for m in model.modules()) == 2 * 7 + 1
    assert torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)
    ids = torch.randint(3, 120, (1, 20))
    with torch.no_grad():
        ours, theirs = model(ids).logits, before(ids).logits
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.8


def test_an_engine_runs_on_int8_layers():
    """Alone and one token at a time it says what it says in a batch, but for rounding: here they agree."""
    model = int8_layers(talker())
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    together = Engine(model, 40, 4).generate(prompts, 5)
    assert [len(answer) for answer in together] == [5, 5]
    assert Engine(model, 40, 4, max_batch=1).generate(prompts, 5) == together
