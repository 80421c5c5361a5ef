"""finetune/llama2_qlora.py: codes equal bitsandbytes', bits are counted, gradients pass, integers multiply."""

from statistics import NormalDist

import pytest
import torch
from torch import nn

from finetune import (
    llama2_full,
    llama2_qlora,
    lora_inject,
    lora_layers,
    quantization,
    sentiment,
    task_setup,
)
from tests.llamas import batch, learned_positions, tiny
from utils import run


def weight(out=48, size=128):
    return torch.randn(out, size) * 0.02


def test_codebook_and_codes_are_those_of_bitsandbytes(parity):
    from bitsandbytes import functional as bnb

    w, values = weight(), quantization.nf4()
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False)
    codes, top = quantization.quantize(w, values)
    mine = quantization.pack(codes)
    parity(
        "Quantisation",
        "quantization.nf4 (Eq. 4)",
        "bitsandbytes quantize_4bit",
        values,
        state.code,
        atol=1e-6,
    )
    parity(
        "Quantisation",
        "quantization.quantize, nf4",
        "bitsandbytes quantize_4bit",
        mine,
        packed.flatten(),
    )
    back, theirs = (
        quantization.dequantize(mine, top, values, w.shape),
        bnb.dequantize_4bit(packed, state),
    )
    parity(
        "Quantisation", "quantization.dequantize, nf4", "bitsandbytes dequantize_4bit", back, theirs
    )


def test_fp4_differs_from_bitsandbytes_in_its_smallest_value():
    """The standard's smallest number is 0.5 of 6; theirs is a sixteenth of that, and nearly wasted."""
    from bitsandbytes import functional as bnb

    _, state = bnb.quantize_4bit(
        weight(), blocksize=64, quant_type="fp4", compress_statistics=False
    )
    theirs, ours = state.code.unique(), quantization.fp4().unique()
    assert len(theirs) == len(ours) == 15
    differ = ~torch.isclose(theirs, ours, atol=1e-4)
    assert ours[differ].abs().tolist() == pytest.approx([0.5 / 6] * 2)
    assert theirs[differ].abs().tolist() == pytest.approx([0.5 / 6 / 16] * 2, rel=1e-2)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_by_bitsandbytes_gives_the_same(bits, parity):
    """Four bits: the same codes, so the same numbers. Eight: theirs rounds the input, too."""
    base, x = (
        nn.Linear(64, 48, bias=False).to(torch.bfloat16),
        torch.randn(40, 64).to(torch.bfloat16).requires_grad_(),
    )
    out = []
    for make in (quantization.QuantLinear, llama2_qlora.by_bitsandbytes):
        layer, x.grad = make(base, bits, "nf4", 64, False), None
        # bitsandbytes' fast path on CPUs, taken here, would spoil the gradients that follow
        layer.eval()(x.detach())
        y = layer.train()(x)
        y.float().square().sum().backward()
        out.append((y.float().detach(), x.grad.float()))
    if bits == 4:
        name = "quantization.QuantLinear, bf16, output and gradient"
        a, b = ([v / v.abs().max() for v in o] for o in out)  # of 1: bf16 has three digits
        parity("Quantisation", name, "bitsandbytes.nn.Linear4bit", a, b, atol=2e-2)
    else:
        for a, b in zip(*out):
            assert (a - b).norm() / a.norm() < 0.02


def test_bits_are_counted():
    base = nn.Linear(256, 512, bias=False)
    each = {
        double: quantization.QuantLinear(base, 4, double=double).bits_each()
        for double in (False, True)
    }
    n = 256 * 512
    assert each[False] == 4 + 32 / 64
    assert each[True] == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + 32 / n)
    assert quantization.QuantLinear(base, 8).bits_each() == 8 + 32 / 256


def test_zero_stays_zero_and_every_value_comes_back():
    for name, make in quantization.CODEBOOKS.items():
        values = make()
        assert (
            len(values) == 16
            and (values.diff() >= 0).all()
            and values.min() == -1
            and values.max() == 1
        ), name
        assert (values == 0).any(), name
        codes, top = quantization.quantize(values[None] * 3, values, 16)
        back = quantization.dequantize(quantization.pack(codes), top, values, (1, 16))
        assert torch.equal(back, values[None] * 3)


def test_nf4_is_best_on_normal_weights():
    layers = [nn.Linear(256, 256, bias=False) for _ in range(2)]
    for layer in layers:
        nn.init.normal_(layer.weight)
    found = {k: e for k, (_, e) in llama2_qlora.errors(layers).items()}
    assert found["int8, a row"] < found["nf4"] < min(found["fp4"], found["int4"])


def test_packing_and_double_quantisation():
    codes = torch.randint(16, (64,), dtype=torch.uint8)
    numbers = torch.arange(16.0)  # a codebook that shows the codes
    back = quantization.dequantize(quantization.pack(codes), torch.ones(1), numbers, (8, 8))
    assert torch.equal(back.flatten(), codes.float())
    top = torch.rand(700) + 1
    back = quantization.double_dequantize(*quantization.double_quantize(top))
    assert (back - top).abs().max() < 0.5 / 127 * 1.01  # half a step of the largest deviation


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_pass_the_coarse_weight_and_are_those_of_it(bits):
    base = nn.Linear(64, 32)
    layer = quantization.QuantLinear(base, bits)
    plain = nn.Linear(64, 32)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(base.bias)
    x = torch.randn(5, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    plain(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_outliers_are_taken_out():
    w, x = weight(16, 64), torch.randn(8, 64)
    x[:, 3] = 60.0
    codes, scale = quantization.absmax(w, 1)
    exact = x @ (codes * scale).T  # what is left is the error of the activations
    error = {
        t: (quantization.int8_matmul(x, codes, scale, t) - exact).norm() / exact.norm()
        for t in (6.0, 1e9)
    }
    assert error[6.0] < 0.01 and error[1e9] > 5 * error[6.0]


def test_a_model_in_four_bits_trains():
    model = llama2_qlora.store(tiny(), 4)
    assert sum(isinstance(m, quantization.QuantLinear) for m in model.modules()) == 14
    lora_inject.inject(model, ("q_proj",), 2, 4.0)
    ids, mask = batch()
    sentiment.network(model)(ids, mask).square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 4 and all(g is not None for g in grads.values())


def test_fp16_loses_small_gradients_and_scaling_brings_them_back():
    # a zero is no loss; the smallest number of fp16 is 6e-8
    small = torch.tensor([1e-9, 1e-8, 1e-6, 1e-3, 0.0])
    assert llama2_qlora.underflow([small], 1) == (0.5, 0.0)
    assert llama2_qlora.underflow([small], 2**10) == (0.0, 0.0)
    assert llama2_qlora.underflow([small], 2**30) == (0.0, 0.25)
    assert (small.bfloat16() != 0).sum() == 4  # bf16 needs no scale


def test_types_change_and_rotations_do_not():
    model = tiny()
    angles = model.model.rotary_emb.inv_freq.clone()
    llama2_qlora.store(model, 16)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, angles)


def test_nf4_is_the_asymmetric_construction_and_not_eq_4_alone():
    """2^(k-1) + 1 quantiles from zero up, 2^(k-1) from zero down, one of the two zeros left out; Sec. 3."""
    quantile, offset = NormalDist().inv_cdf, (1 - 1 / 30 + 1 - 1 / 32) / 2
    up = [quantile(0.5 + (offset - 0.5) * i / 8) for i in range(9)]
    down = [-quantile(0.5 + (offset - 0.5) * i / 7) for i in range(8)]
    table = sorted({round(x / up[-1], 12) + 0.0 for x in up + down})
    assert len(table) == 16
    torch.testing.assert_close(quantization.nf4(), torch.tensor(table), atol=1e-6, rtol=0)
    assert table[8] == pytest.approx(0.0796, abs=1e-4) and table[6] == pytest.approx(
        -0.0911, abs=1e-4
    )
    eq_4 = [(quantile(i / 17) + quantile((i + 1) / 17)) / 2 for i in range(1, 16)]
    assert len(eq_4) == 15 and 0.1 < min(abs(x / max(eq_4)) for x in eq_4 if abs(x) > 1e-9) < 0.12


def test_int8_takes_out_exactly_the_columns_beyond_the_threshold(monkeypatch):
    """Those are exact, the others are integers: both halves against the formula by hand."""
    w, x = weight(16, 64), torch.randn(8, 64)
    x[2, 3], x[5, 40], x[1, 7] = 60.0, -8.0, 6.0  # 6 is not beyond 6
    codes, scale = quantization.absmax(w, 1)
    real, widths = torch._int_mm, []
    monkeypatch.setattr(
        torch, "_int_mm", lambda a, b: widths.append((a.shape, b.shape)) or real(a, b)
    )
    got = quantization.int8_matmul(x, codes, scale)
    assert widths == [((8, 62), (62, 16))]
    large = torch.zeros(64, dtype=torch.bool)
    large[[3, 40]] = True
    rest = x[:, ~large]
    step = rest.abs().amax(1, keepdim=True) / 127
    rounded = torch.zeros_like(x)
    rounded[:, large], rounded[:, ~large] = x[:, large], (rest / step).round() * step
    torch.testing.assert_close(got, rounded @ (codes * scale).T, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, x @ (codes * scale).T, atol=1e-4, rtol=1e-4)


def test_double_quantisation_is_of_the_scales_of_this_layer():
    base = nn.Linear(64, 48)
    with torch.no_grad():
        # Rows of very different size
        base.weight.mul_(torch.logspace(-1, 1, 48)[torch.randperm(48), None])
    once, twice = (quantization.QuantLinear(base, 4, double=double) for double in (False, True))
    assert torch.equal(once.codes, twice.codes)
    back = quantization.double_dequantize(twice.top_codes, twice.top_scale, twice.top_mean)
    assert (
        back - once.top
    ).abs().max() <= 0.51 * twice.top_scale.max() and twice.top_mean == once.top.mean()
    torch.testing.assert_close(once.top, base.weight.abs().amax(1))  # blocks of 64 are rows here


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_every_flag_reaches_the_layers(bits, monkeypatch, tmp_path):
    class Recorded(Exception):
        pass

    def experiment(cfg, bench, network, model, groups=None):
        found["model"] = model
        raise Recorded

    found, bench = {}, task_setup.Bench(tmp_path, torch.device("cpu"), None, tiny(), {})
    monkeypatch.setattr(task_setup, "start", lambda cfg, *allow, **kw: bench)
    monkeypatch.setattr(llama2_full, "experiment", experiment)
    monkeypatch.setattr(llama2_qlora, "gradients", lambda bench, cfg, layers: [torch.ones(1)])
    monkeypatch.setattr(llama2_qlora, "draw", lambda *args: None)
    flags = {"bits": bits, "codebook": "fp4", "block": 16, "double": False, "rank": 2, "alpha": 6.0}
    with pytest.raises(Recorded):
        llama2_qlora.main(llama2_qlora.Config(targets=("q_proj", "down_proj"), **flags))
    adapters = [m for m in found["model"].modules() if isinstance(m, lora_layers.LoRALinear)]
    assert len(adapters) == 4 and {(m.scale, len(m.lora_A)) for m in adapters} == {(3.0, 2)}
    bases = {type(m.base) for m in adapters}
    assert all(("lora_" in n) == p.requires_grad for n, p in found["model"].named_parameters())
    if bits >= 16:
        dtype = torch.float32 if bits == 32 else torch.bfloat16
        assert bases == {nn.Linear} and {m.base.weight.dtype for m in adapters} == {dtype}
        return
    layer = adapters[0].base
    assert bases == {quantization.QuantLinear} and layer.bits == bits
    if bits == 4:
        assert len(layer.top) == 32 * 32 / 16 and torch.equal(layer.values, quantization.fp4())


def test_the_body_is_all_but_the_head_whatever_its_name():
    model = tiny()
    model.gate, model.lm_head = nn.Linear(4, 4), model.lm_head
    assert len(llama2_qlora.body(model)) == 15 and "lm_head" not in llama2_qlora.body(model)
    with pytest.raises(run.UserError, match="nothing to quantise"):
        llama2_qlora.store(learned_positions("gpt2"), 4)
