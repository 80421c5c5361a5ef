"""deploy/quantize.py and its modules: every method against its definition or another library, and what is stored."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from deploy import calibration, perplexity, quantize, quantized_model, quantizers
from deploy import gptq as gptq_module
from finetune import lora_inject
from tests import fuzz, llamas
from utils.run import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden/hqq.json").read_text("utf-8"))


@pytest.fixture
def weight():
    return torch.randn(24, 64)


@pytest.fixture
def inputs():
    """Activations of which some channels are large, and all are correlated."""
    channels = torch.linspace(-2, 2, 64).exp()[torch.randperm(64)]
    common = torch.randn(200, 16) @ torch.randn(16, 64) / 4
    return (common + 0.3 * torch.randn(200, 64)) * channels


def batches(count=2):
    torch.manual_seed(3)
    return [{"input_ids": torch.randint(2, 120, (3, 12))} for _ in range(count)]


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


# ---- grids and round-to-nearest


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_rtn_is_torch_fake_quantize(weight, parity, bits):
    codes, scales, zeros = quantize.quantize(weight, bits, 0)
    mine = quantize.dequantize(codes, scales, zeros)
    grid = (scales[:, 0], zeros[:, 0].float(), 0, 0, 2**bits - 1)
    theirs = torch.fake_quantize_per_channel_affine(weight, *grid)
    topic = "Quantisation after training"
    parity(topic, "quantizers.rtn", "torch.fake_quantize_per_channel_affine", mine, theirs, 1e-6)


def test_the_grid_is_that_of_torchs_observer(weight, parity):
    from torch.ao.quantization.observer import PerChannelMinMaxObserver

    weight[3] = weight[3].abs() + 1  # zero is on the grid all the same
    observer = PerChannelMinMaxObserver(ch_axis=0, dtype=torch.quint8)
    observer(weight)
    scales, zeros = observer.calculate_qparams()
    mine = quantizers.asymmetric_grid(weight, 8, 0)
    # our scales are rounded to float16
    pairs = [(mine[0].flatten(), scales.half().float()), (mine[1].flatten(), zeros.float())]
    names = ("quantizers.asymmetric_grid", "torch.ao PerChannelMinMaxObserver")
    parity("Quantisation after training", *names, *zip(*pairs), atol=0)


def test_dequantisation_is_that_of_gguf_q8_0_and_q4_1(weight, parity):
    rows = weight.numpy()
    # Q8_0: a block of 32 is a float16 scale and 32 signed codes
    raw = quants.quantize(rows, GGMLQuantizationType.Q8_0)
    blocks = raw.reshape(24, 2, 34)
    scales = torch.from_numpy(blocks[..., :2].copy().view(np.float16)[..., 0]).float()
    codes = torch.from_numpy(blocks[..., 2:].copy().view(np.int8)).flatten(1).int() + 128
    mine = quantize.dequantize(codes, scales, torch.full_like(scales, 128))
    theirs = torch.from_numpy(quants.dequantize(raw, GGMLQuantizationType.Q8_0))
    topic = "Quantisation after training"
    parity(topic, "quantizers.dequantize", "gguf dequantize, Q8_0", mine, theirs, atol=1e-6)
    # The same grid comes out of absmax
    codes_of_ours, scales_of_ours, _ = quantizers.absmax(weight, 8, 32)
    assert torch.equal(scales_of_ours, scales)
    assert (codes_of_ours.int() - codes).abs().max() <= 1  # scales were rounded first
    # Q4_1: scale, minimum, 16 bytes; low halves first
    raw = quants.quantize(rows, GGMLQuantizationType.Q4_1)
    blocks = raw.reshape(24, 2, 20)
    scale, least = torch.from_numpy(blocks[..., :4].copy().view(np.float16)).float().unbind(-1)
    pairs = torch.from_numpy(blocks[..., 4:].copy())
    codes = torch.cat([pairs & 15, pairs >> 4], -1).flatten(1)
    mine = quantize.dequantize(codes, scale, -least / scale)
    theirs = torch.from_numpy(quants.dequantize(raw, GGMLQuantizationType.Q4_1))
    parity(topic, "quantizers.dequantize", "gguf dequantize, Q4_1", mine, theirs, atol=1e-5)


def test_rows_in_8_bits_are_those_of_bitsandbytes(weight, parity):
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    codes, largest, _ = int8_vectorwise_quant(weight.half())
    mine, scales, zeros = quantizers.absmax(weight.half().float(), 8, 0)
    names = ("quantizers.symmetric_grid", "bitsandbytes int8_vectorwise_quant")
    theirs = (largest / 127).half().float()
    parity("Quantisation after training", *names, scales.flatten(), theirs, atol=0)
    assert (zeros == 128).all()
    # ours are codes for scales in float16: of one in a hundred the neighbour
    apart = (mine.int() - 128 - codes.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 0.02
    restored = quantize.dequantize(codes.int() + 128, largest[:, None] / 127, zeros)
    names = ("quantizers.dequantize", "bitsandbytes int8_vectorwise_dequant")
    theirs = int8_vectorwise_dequant(codes, largest)
    parity("Quantisation after training", *names, restored, theirs, atol=1e-6)


@pytest.mark.parametrize("group", [0, 16, 64])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_an_error_of_rtn_is_half_a_step_at_most(weight, bits, group):
    codes, scales, zeros = quantize.quantize(weight, bits, group)
    assert scales.shape == zeros.shape == (24, 64 // (group or 64))
    assert codes.dtype == torch.uint8 and codes.max() == 2**bits - 1
    steps = (quantize.dequantize(codes, scales, zeros) - weight) / quantizers.expand(scales, 64)
    # half a step; at the ends of the range the zero point and the scale were rounded, too
    assert steps.abs().max() <= 1.2 and steps.abs().mean() < 0.27
    inner = (codes > 0) & (codes < 2**bits - 1)
    assert steps[inner].abs().max() <= 0.501


def test_finer_grids_have_smaller_errors(weight):
    def error(bits, group):
        return float((quantize.dequantize(*quantize.quantize(weight, bits, group)) - weight).norm())

    assert error(8, 64) < error(4, 64) / 10 < error(3, 64) / 10
    assert error(4, 8) < error(4, 16) < error(4, 64)


def test_constant_and_zero_rows_come_back():
    weight = torch.tensor([[0.0] * 8, [0.5] * 8, [-0.25] * 8])
    for method in ("rtn",):
        restored = quantize.dequantize(*quantize.quantize(weight, 4, 8, method))
        torch.testing.assert_close(restored, weight, atol=1e-3, rtol=1e-3)


# ---- HQQ


@pytest.mark.parametrize("bits", ["4", "3"])
def test_hqq_is_that_of_torchao(parity, bits):
    """Numbers of torchao, which is not installed here: golden/hqq.json says how they were made."""
    golden = {k: torch.tensor(v, dtype=torch.float32) for k, v in GOLDEN[bits].items()}
    weight = golden["weight"] / 2**10
    codes, scales, zeros = quantize.quantize(weight, int(bits), 16, "hqq")
    theirs = [golden["codes"], golden["scales"], golden["zeros"].half().float()]
    names = ("quantizers.hqq", "torchao HQQ")
    parity("Quantisation after training", *names, [codes.float(), scales, zeros], theirs, 1e-6)


def test_shrink_is_half_a_step_towards_the_minimum_of_lp(parity):
    """(sp1) for p = 1 is soft-thresholding, whose minimum is known; for p < 1 large errors stay."""
    from scipy.optimize import minimize_scalar

    x = torch.tensor([-2.0, -0.4, 0.05, 0.3, 1.5])
    found = [
        minimize_scalar(
            lambda e, v=v: abs(e) + 5 * (e - v) ** 2, bounds=(-3, 3), method="bounded"
        ).x
        for v in x.tolist()
    ]
    names = ("quantizers.shrink, p = 1", "scipy minimize_scalar")
    mine = quantizers.shrink(x, 10.0, 1.0)
    parity("Quantisation after training", *names, mine, torch.tensor(found), atol=1e-4)
    sparse = quantizers.shrink(x, 10.0, 0.7)
    assert sparse[2] == 0 and (sparse[[0, 4]] - x[[0, 4]]).abs().max() < 0.1


@pytest.mark.parametrize("bits", [4, 3])
def test_hqq_lowers_the_error_of_the_weights_and_its_mean(weight, bits):
    """Zero points are means of what is left: errors of a group sum to nearly zero."""
    found = {}
    for method in ("rtn", "hqq"):
        error = quantize.dequantize(*quantize.quantize(weight, bits, 32, method)) - weight
        means = quantizers.grouped(error, 32).mean(-1).square().mean().sqrt()
        found[method] = float(error.abs().mean()), float(means)
    assert found["hqq"][0] < found["rtn"][0] and found["hqq"][1] < 0.5 * found["rtn"][1]


# ---- SmoothQuant


def test_smoothing_scales_balance_activations_and_weights(weight, inputs):
    """Eq. 4 with alpha = 1/2: both have the same largest value in every channel afterwards."""
    scales = quantizers.smoothing_scales(inputs, weight)
    x, w = (inputs / scales).abs().amax(0), (weight * scales).abs().amax(0)
    torch.testing.assert_close(x, w, rtol=2e-3, atol=0)
    # alpha = 1: all of the difficulty goes to the weights
    alone = quantizers.smoothing_scales(inputs, weight, alpha=1.0)
    torch.testing.assert_close((inputs / alone).abs().amax(0), torch.ones(64), rtol=2e-3, atol=0)


def test_folded_smoothing_leaves_the_function_as_it_is(parity):
    """After a norm with a weight, and between two linear layers, one with a bias. Eq. 3."""
    model = llamas.tiny()
    layer = model.model.layers[0]
    readers = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    before = logits(model, batches()[0])
    old = readers[0].weight.clone()
    scales = torch.rand(32) * 4 + 0.2
    quantizers.fold(layer.input_layernorm, readers, scales)
    quantizers.fold(layer.mlp.up_proj, [layer.mlp.down_proj], torch.rand(48) * 4 + 0.2)
    assert not torch.equal(readers[0].weight, old)
    after = logits(model, batches()[0])
    names = ("quantizers.fold", "transformers Llama, not smoothed")
    parity("Quantisation after training", *names, after, before, atol=1e-5)
    first, second = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)
    x = torch.randn(5, 4)
    y = second(first(x))
    quantizers.fold(first, [second], torch.rand(6) + 0.5)
    torch.testing.assert_close(second(first(x)), y)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("grid", ["rtn", "absmax"])
def test_products_of_integers_are_those_of_their_dequantised_values(weight, parity, grid, bits):
    x = torch.randn(20, 64)
    codes, scales, zeros = getattr(quantizers, grid)(weight, bits, 0)
    mine = quantizers.int8_matmul(x, codes, scales, zeros)
    # In float64: activations rounded token by token, times the dequantised weight
    step = x.abs().amax(1, keepdim=True) / 127
    rounded = (x / step).round().clamp(-127, 127).double() * step
    theirs = rounded @ quantize.dequantize(codes, scales.double(), zeros.double()).T
    names = ("quantizers.int8_matmul", "torch, float64")
    parity("Quantisation after training", *names, mine.double(), theirs, atol=1e-4)


def test_smoothquant_saves_activations_with_outliers(weight, inputs):
    """Integer activations with one scale a token: a large channel costs the others their digits."""
    inputs[:, 5] *= 60
    exact = inputs @ weight.T

    def error(method):
        codes, scales, zeros, channels = quantize.choose_codes(weight, 8, 0, method, inputs)
        layer = quantized_model.QuantizedLinear(codes, scales, zeros, 8, channels, None, 8)
        return float((layer(inputs) - exact).norm() / exact.norm())

    assert error("smoothquant") < 0.5 * error("rtn")


# ---- AWQ


@pytest.mark.parametrize("bits", [4, 3])
def test_awq_is_never_worse_than_rtn_on_its_inputs(weight, inputs, bits):
    better = 0
    for seed in range(4):
        torch.manual_seed(seed)
        x = inputs[torch.randperm(200)[:100]] * torch.rand(64)
        errors = {}
        for method in ("rtn", "awq"):
            restored = quantize.dequantize(*quantize.quantize(weight, bits, 16, method, x))
            errors[method] = quantizers.output_error(weight, restored, x)
        assert errors["awq"] <= errors["rtn"] * 1.0001
        better += errors["awq"] < 0.9 * errors["rtn"]
    assert better >= 3


def test_awq_finds_the_best_of_its_scales(weight, inputs):
    """By hand: all exponents, the error of each."""
    mean = inputs.abs().mean(0)
    errors = []
    for point in range(10):
        s = mean ** (point / 10)
        s = (s / (s.max() * s.min()).sqrt()).half().float()
        restored = quantize.dequantize(*quantize.quantize(weight * s, 3, 16)) / s
        errors.append(float(((inputs @ (weight - restored).T) ** 2).mean()))
    found = quantizers.awq_scales(weight, 3, 16, inputs, rows=1000)
    restored = quantize.dequantize(*quantize.quantize(weight * found, 3, 16)) / found
    assert quantizers.output_error(weight, restored, inputs) == pytest.approx(min(errors), rel=1e-4)
    assert int(np.argmin(errors)) > 0


def test_equal_channels_need_no_scales():
    inputs = torch.ones(10, 16) * torch.randn(10, 1).sign()
    scales = quantizers.awq_scales(torch.randn(4, 16), 4, 0, inputs)
    assert torch.equal(scales, torch.ones(16))


# ---- GPTQ


def brain_surgeon(weight, h, scales, zeros, bits, columns):
    """Optimal brain surgeon, one column at a time, with the exact inverse of what is left of H."""
    left = weight.clone()
    codes = torch.zeros_like(weight)
    todo = list(columns)
    while todo:
        q = todo[0]
        inverse = torch.linalg.inv(h[todo][:, todo])
        codes[:, q] = (left[:, q] / scales[:, q] + zeros[:, q]).round().clamp(0, 2**bits - 1)
        error = left[:, q] - (codes[:, q] - zeros[:, q]) * scales[:, q]
        left[:, todo] -= error[:, None] / inverse[0, 0] * inverse[0]
        todo = todo[1:]
    return codes


@pytest.mark.parametrize("order", [False, True])
def test_gptq_is_the_optimal_brain_surgeon(weight, inputs, parity, order):
    weight, inputs = weight.double(), inputs.double()
    h = 2 * inputs.T @ inputs / len(inputs)
    h += 0.01 * h.diagonal().mean() * torch.eye(64)
    columns = h.diagonal().argsort(descending=True).tolist() if order else range(64)
    mine, scales, zeros = gptq_module.gptq(weight, 3, 16, inputs, order, block=16)
    each = quantizers.expand(scales, 64), quantizers.expand(zeros, 64)
    theirs = brain_surgeon(weight, h, *each, 3, columns)
    names = ("gptq.gptq", "brute-force OBS, float64")
    parity("Quantisation after training", *names, mine.double(), theirs, atol=0)
    assert (mine != quantize.quantize(weight, 3, 16)[0]).float().mean() > 0.2


@pytest.mark.parametrize("block", [1, 7, 32, 64, 128])
def test_lazy_blocks_change_nothing(weight, inputs, block):
    whole = gptq_module.gptq(weight.double(), 4, 16, inputs.double(), block=64)
    lazy = gptq_module.gptq(weight.double(), 4, 16, inputs.double(), block=block)
    for one, other in zip(whole, lazy, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bits", [4, 3])
def test_gptq_and_its_order_lower_the_error_of_the_output(weight, inputs, bits):
    def error(grid):
        return quantizers.output_error(weight, quantize.dequantize(*grid), inputs)

    plain = error(quantize.quantize(weight, bits, 16))
    in_order = error(gptq_module.gptq(weight, bits, 16, inputs, order=False))
    ordered = error(quantize.quantize(weight, bits, 16, "gptq", inputs))
    assert in_order < 0.8 * plain and ordered < 0.65 * plain and ordered < in_order


def test_gptq_without_correlation_is_rtn(weight):
    """A diagonal Hessian: no column can make up for another."""
    codes, _, _ = gptq_module.gptq(weight, 4, 16, torch.eye(64) * 3)
    assert torch.equal(codes, quantize.quantize(weight, 4, 16)[0])


def test_inputs_that_are_always_zero_do_no_harm(weight, inputs):
    inputs[:, 3] = 0
    restored = quantize.dequantize(*quantize.quantize(weight, 4, 16, "gptq", inputs))
    assert restored.isfinite().all()
    h = gptq_module.hessian(inputs)
    assert h[3, 3] == pytest.approx(1 + 0.01 * float(h.diagonal().mean()), rel=0.05)


# ---- what is stored


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_codes_are_packed_without_loss_and_without_waste(bits):
    codes = torch.randint(0, 2**bits, (8 * 37,), dtype=torch.uint8)
    codes[:8] = 2**bits - 1
    packed = quantized_model.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.nbytes * 8 == len(codes) * bits
    assert torch.equal(quantized_model.unpack(packed, bits), codes)


def test_four_bits_are_two_codes_a_byte_and_three_run_across_bytes():
    assert quantized_model.pack(torch.arange(8), 4).tolist() == [0x10, 0x32, 0x54, 0x76]
    stream = sum(code << 3 * i for i, code in enumerate([7, 0, 1, 2, 3, 4, 5, 6]))
    packed = quantized_model.pack(torch.tensor([7, 0, 1, 2, 3, 4, 5, 6]), 3)
    assert packed.tolist() == list(stream.to_bytes(3, "little"))


def test_a_weight_that_cannot_be_packed_is_refused():
    with pytest.raises(UserError, match="a weight of 3 x 5 cannot be packed"):
        quantized_model.QuantizedLinear(*quantize.quantize(torch.randn(3, 5), 4, 0), 4)


@pytest.mark.parametrize("method", quantize.METHODS)
def test_a_stored_layer_computes_what_quantize_says(weight, inputs, method):
    bits, group = (8, 0) if method == "smoothquant" else (4, 16)
    bias = torch.randn(24)
    restored = quantize.dequantize(*quantize.quantize(weight, bits, group, method, inputs))
    *grid, channels = quantize.choose_codes(weight, bits, group, method, inputs)
    layer = quantized_model.QuantizedLinear(*grid, bits, channels, bias)
    x = inputs[:6].view(2, 3, 64)
    torch.testing.assert_close(layer(x), x @ restored.T + bias, atol=2e-3, rtol=1e-3)
    exact = x @ weight.T + bias
    assert (layer(x) - exact).norm() < 0.2 * exact.norm()
    assert (channels is not None) == (method in ("awq", "smoothquant"))


def test_bits_per_weight_count_scales_and_zero_points():
    model = quantize.quantize_model(llamas.tiny(), [], 3, 16)
    assert quantized_model.bits_per_weight(model) == 3 + (16 + 8) / 16
    model = quantize.quantize_model(llamas.tiny(), [], 4, 16, "hqq")
    assert quantized_model.bits_per_weight(model) == 4 + (16 + 16) / 16
    assert quantized_model.bits_per_weight(llamas.tiny()) == 0
    plain = llamas.tiny()
    assert quantized_model.stored_bytes(plain) == 4 * sum(p.numel() for p in plain.parameters())


# ---- a model


def test_all_linear_layers_of_the_decoder_and_nothing_else():
    model = llamas.tiny(bias=True)
    before = copy.deepcopy(model)
    quantize.quantize_model(model, [], 8, 16)
    layers = quantized_model.quantized_layers(model)
    assert len(layers) == 14 and not calibration.linear_layers(model.model)
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)
    for name, layer in layers.items():
        linear = before.get_submodule(name)
        torch.testing.assert_close(layer.dequantize(), linear.weight, atol=2e-3, rtol=0)
        assert layer.bias is linear.bias or torch.equal(layer.bias, linear.bias)
    near = logits(model, batches()[0]) - logits(before, batches()[0])
    assert near.abs().max() < 0.05


def test_calibration_inputs_are_those_of_the_whole_model():
    """Layer after layer is the same as hooks on the whole model, as long as nothing is quantised."""
    model = llamas.tiny()
    seen = {}
    linear = model.model.layers[1].mlp.down_proj
    hook = linear.register_forward_pre_hook(
        lambda m, args: seen.setdefault("x", []).append(args[0])
    )
    for batch in batches():
        logits(model, batch)
    hook.remove()
    with torch.no_grad():
        layers = calibration.decoder_layers(model)
        calls = calibration.first_inputs(model, layers, batches())
        calls = calibration.run_layer(layers[0], calls)
        found = calibration.layer_inputs(layers[1], calls)
    assert found.keys() == calibration.linear_layers(layers[1]).keys() and len(calls) == 2
    expected = torch.cat(seen["x"]).flatten(0, 1)
    torch.testing.assert_close(found["mlp.down_proj"], expected, atol=1e-6, rtol=1e-5)
    assert not layers[0]._forward_pre_hooks and not layers[1].mlp.down_proj._forward_pre_hooks


def test_a_layer_is_calibrated_on_what_quantised_layers_put_out(monkeypatch):
    seen = []
    whole = quantize.choose_codes

    def spy(weight, bits, group, method, inputs):
        seen.append(inputs)
        return whole(weight, bits, group, method, inputs)

    monkeypatch.setattr(quantize, "choose_codes", spy)
    model = quantize.quantize_model(llamas.tiny(), batches(), 3, 16, "gptq")
    caught = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
        lambda m, args: caught.append(args[0].flatten(0, 1))
    )
    for batch in batches():
        logits(model, batch)
    hook.remove()
    # seven linear layers before it
    torch.testing.assert_close(seen[7], torch.cat(caught), atol=1e-5, rtol=1e-4)


def test_the_language_model_of_a_vlm_is_calibrated_on_embeddings():
    """Any module with decoder layers, such as the language model of LLaVA, and any batches."""
    language = llamas.tiny().model
    vectors = [{"inputs_embeds": torch.randn(2, 9, 32)}]
    exact = language(**vectors[0]).last_hidden_state
    made = quantize.quantize_model(copy.deepcopy(language), vectors, 4, 16, "gptq")
    plain = quantize.quantize_model(copy.deepcopy(language), [], 4, 16)
    error = (made(**vectors[0]).last_hidden_state - exact).norm()
    assert error < (plain(**vectors[0]).last_hidden_state - exact).norm()
    assert len(quantized_model.quantized_layers(made)) == 14


def test_a_merged_adapter_is_quantised_with_the_model():
    model = llamas.tiny()
    lora_inject.inject(model, ("q_proj",), rank=2, alpha=4.0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    adapted = logits(model, batches()[0])
    merged = lora_inject.merge(model)
    quantize.quantize_model(merged, [], 8, 16)
    after = logits(merged, batches()[0])
    base = logits(llamas.tiny(), batches()[0])
    assert (after - adapted).norm() < 0.2 * (base - adapted).norm()


def test_a_module_without_layers_is_refused():
    with pytest.raises(UserError, match="no stack of layers"):
        quantize.quantize_model(torch.nn.Linear(8, 8), [], 4, 8)


# ---- text and perplexity


def test_perplexity_is_that_of_the_loss_of_transformers(parity):
    model = llamas.tiny()
    ids = torch.randint(2, 120, (5, 11))
    with torch.no_grad():
        theirs = model(input_ids=ids, labels=ids).loss.exp()
    mine = torch.tensor(perplexity.perplexity(model, ids, batch=2))
    names = ("perplexity.perplexity", "transformers, exp of the loss")
    parity("Quantisation after training", *names, mine, theirs, atol=1e-3)


def test_calibration_text_is_not_held_out_text():
    from training import pretrain_text

    pages = [(f"manual/{i}.txt", f"page {i}") for i in range(300)]
    to_calibrate, to_judge = perplexity.split(pages)
    assert not set(to_calibrate) & set(to_judge) and len(to_judge) > 3
    assert len(to_calibrate) + len(to_judge) == 300
    # what pretraining holds out is held out here: a model of that script is judged fairly
    assert (to_calibrate, to_judge) == pretrain_text.split(pages)


def test_pieces_come_from_the_right_pages(monkeypatch):
    pages = [(f"manual/{i}.txt", f"{i} " * 60) for i in range(100, 400)]
    monkeypatch.setattr(perplexity.data, "docs", lambda: pages)
    tokenizer = llamas.tokenizer()
    to_calibrate, to_judge = perplexity.split(pages)
    first, second = perplexity.texts_of(tokenizer, 9, 4, 16)
    assert first.shape == (9, 16) and second.shape == (4, 16)

    def numbers(ids):
        return {tokenizer.decode(row).split()[1] for row in ids}

    assert numbers(first) <= {text.split()[0] for text in to_calibrate}
    assert numbers(second) <= {text.split()[0] for text in to_judge}
    assert len(numbers(first)) == 3  # four of a page at most
    with pytest.raises(UserError, match="pieces of 16 tokens, not"):
        perplexity.texts_of(tokenizer, 9, 10**6, 16)


# ---- folders and the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A quantised model and its folder: AWQ, so that there are channel scales, and biases."""
    torch.manual_seed(0)
    made = llamas.tiny(vocabulary=len(llamas.tokenizer()), bias=True)
    model = quantize.quantize_model(made, batches(), 3, 16, "awq")
    folder = tmp_path_factory.mktemp("quantised") / "model"
    quantized_model.save(model, llamas.tokenizer(), folder)
    return model, folder


def test_a_folder_gives_back_the_model_bit_for_bit(saved):
    model, folder = saved
    tokenizer, loaded = quantized_model.load(folder)
    assert torch.equal(logits(loaded, batches()[0]), logits(model, batches()[0]))
    assert tokenizer("Why?")["input_ids"] == llamas.tokenizer()("Why?")["input_ids"]
    assert quantized_model.stored_bytes(loaded) == quantized_model.stored_bytes(model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not [p for p in loaded.parameters() if p.requires_grad]
    size = (folder / "model.safetensors").stat().st_size
    assert size == pytest.approx(quantized_model.stored_bytes(model), rel=0.02)


@pytest.mark.parametrize("activations", [8])
def test_integer_activations_are_loaded_as_such(tmp_path, activations):
    made = llamas.tiny(vocabulary=len(llamas.tokenizer()))
    model = quantize.quantize_model(made, batches(), 8, 0, "smoothquant", activations)
    quantized_model.save(model, llamas.tokenizer(), tmp_path / "x")
    _, loaded = quantized_model.load(tmp_path / "x")
    assert torch.equal(logits(loaded, batches()[0]), logits(model, batches()[0]))
    layers = quantized_model.quantized_layers(loaded).values()
    assert {layer.activation_bits for layer in layers} == {8}


def test_a_folder_that_does_not_fit_is_refused_in_one_line(saved, tmp_path):
    _, folder = saved
    with pytest.raises(UserError, match="holds no quantised model"):
        quantized_model.load(tmp_path)
    with pytest.raises(UserError, match="holds no quantised model"):
        quantized_model.load(llamas.folder(tmp_path / "plain"))
    # the config of another model
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text("utf-8"))
    config["num_hidden_layers"] = 3
    (other / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(UserError, match="do not belong together"):
        quantized_model.load(other)


def test_damaged_configs_are_refused(saved, tmp_path):
    _, folder = saved
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (folder / "config.json").read_bytes()
    for bad in fuzz.damaged(whole, 500):
        (tmp_path / "config.json").write_bytes(bad)

        def read():
            # what does not refuse the config must find it equal, so the weights need not be built
            ours = quantized_model.is_ours(tmp_path)
            return quantized_model.load(tmp_path) if ours else None

        fuzz.reads_or_refuses(read)


def test_another_folder_is_not_replaced(saved, tmp_path):
    model, _ = saved
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(UserError, match="name a new folder"):
        quantized_model.save(model, llamas.tokenizer(), tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").is_file()
    for _ in range(2):  # the second time it replaces the first
        quantized_model.save(model, llamas.tokenizer(), tmp_path / "new")
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "new"}


SMALL = {"calibration": 2, "held_out": 2, "length": 16, "group": 16}


def test_main_measures_every_method(tmp_path):
    name = llamas.folder(tmp_path / "model")
    found = quantize.main(quantize.Config(model=name, out=str(tmp_path / "out"), **SMALL))
    assert list(found) == [
        "full",
        "rtn 8, groups of 16",
        "rtn 8, rows, activations 8",
        "smoothquant 8, rows, activations 8",
        *[f"{m} {b}, groups of 16" for b in (4, 3) for m in ("rtn", "hqq", "awq", "gptq")],
    ]
    assert found["full"]["bits a weight"] == 16
    assert found["rtn 4, groups of 16"]["bits a weight"] == 5.5
    # each method begins with the full model, not with what the last one left
    alone = quantize.Config(model=name, method="gptq", bits=3, out=str(tmp_path / "one"), **SMALL)
    one = quantize.main(alone)
    for key in ("perplexity", "MiB", "bits a weight"):
        assert one["gptq 3, groups of 16"][key] == found["gptq 3, groups of 16"][key]
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "metrics.json", "quantize.png"}


def test_what_was_saved_is_loaded_and_measured(tmp_path):
    name, folder = llamas.folder(tmp_path / "model"), str(tmp_path / "saved")
    cfg = quantize.Config(
        model=name, method="gptq", bits=4, save=folder, out=str(tmp_path / "a"), **SMALL
    )
    made = quantize.main(cfg)["gptq 4, groups of 16"]
    cfg = quantize.Config(load=folder, out=str(tmp_path / "b"), **SMALL)
    read = quantize.main(cfg)["saved"]
    assert read["perplexity"] == pytest.approx(made["perplexity"], rel=1e-6)
    assert read["bits a weight"] == made["bits a weight"] == 5.5 and read["MiB"] == made["MiB"]


@pytest.mark.parametrize("flags, said", [
    ({"bits": 5}, "--bits 5: known are 8, 4 and 3"), ({"method": "zip"}, "--method zip: known are"),
    ({"group": 7}, "--group 7 does not divide"), ({"group": -1}, "--group must be"),
    ({"activations": 4}, "--activations"), ({"activations": 8}, "add --group 0"),
    ({"method": "smoothquant"}, "--bits 8 --group 0"), ({"length": 1}, "--length"),
    ({"method": "smoothquant", "bits": 4, "group": 0}, "--bits 8 --group 0"),
    ({"calibration": 0}, "start at 1"), ({"held_out": 10**6}, "pieces of"),
    ({"length": 300}, "128 positions"), ({"save": "x"}, "--save wants one"),
    ({"save": "x", "method": "rtn"}, "--save wants one"),
    ({"save": "x", "load": "y", "method": "rtn", "bits": 4}, "leave out one"),
    ({"load": "no/such/folder"}, "holds no quantised model"), ({"model": "no/such"}, "no language"),
    ({"save": ".", "method": "rtn", "bits": 4}, "name a new folder"),
])  # fmt: skip
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, flags, said):
    name = llamas.folder(tmp_path / "model")
    with pytest.raises(UserError, match=said):
        quantize.main(quantize.Config(**({"model": name} | SMALL | flags), out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("arguments, said", [
    ((5, 16, "rtn"), "--bits 5"), ((4, 5, "rtn"), "--group 5"), ((4, 16, "zip"), "--method zip"),
    ((4, 16, "gptq"), "gptq needs calibration inputs"), ((4, 16, "awq"), "awq needs calibration"),
])  # fmt: skip
def test_bad_arguments_are_refused_in_one_line(weight, arguments, said):
    with pytest.raises(UserError, match=said):
        quantize.quantize(weight, *arguments)
