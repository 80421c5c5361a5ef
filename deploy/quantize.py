"""Post-training weight quantisation of a language model: RTN, SmoothQuant, AWQ, GPTQ, HQQ compared.

The linear layers of the decoder are stored in 8, 4 or 3 bits a weight, after training and without
a gradient; embeddings and the last layer stay as they are. Five methods choose the codes: RTN, HQQ
(Badri & Shaji 2023), SmoothQuant (arXiv:2211.10438) and AWQ (arXiv:2306.00978) in quantizers.py,
GPTQ (arXiv:2210.17323) in gptq.py. Each is judged by the perplexity of held-out pages of manuals,
by the bytes that it stores and the seconds that it takes.

Shapes: weight (out, in), calibration inputs (n, in); a group of S inputs of a row has one scale.

    python deploy/quantize.py                                              # all methods in 8, 4 and 3 bits
    python deploy/quantize.py --method gptq --bits 4 --group 64 --save outputs/smollm2_4bit
    python deploy/quantize.py --load outputs/smollm2_4bit                  # reads and measures it
    python deploy/quantize.py --model outputs/llama2_lora/merged           # any local folder or hub id
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from deploy import quantized_model
from deploy.calibration import decoder_layers, first_inputs, layer_inputs, linear_layers, run_layer
from deploy.gptq import gptq
from deploy.perplexity import perplexity, texts_of
from deploy.quantized_model import QuantizedLinear, bits_per_weight, stored_bytes
from deploy.quantizers import (
    BITS,
    absmax,
    awq_scales,
    check_grid,
    dequantize,  # noqa: F401  (callers look for it beside quantize)
    expand,
    hqq,
    rtn,
    smoothing_scales,
)
from utils import figures, pretrained, run
from utils.run import check

METHODS = ("rtn", "hqq", "awq", "gptq", "smoothquant")
CALIBRATED = ("awq", "gptq", "smoothquant")  # these look at activations


@dataclass(frozen=True)
class Config:
    """Quantise a language model after training; perplexity, bytes and seconds by method and bits."""

    model: str = "smollm2"  # or a local folder, or a hub id
    method: str = "all"  # or rtn, hqq, awq, gptq, smoothquant
    bits: int = 0  # 8, 4 or 3 bits a weight; 0: all of them
    group: int = 64  # inputs of a row that share a scale; 0: a whole row
    activations: int = 16  # 8: activations in integers, too, one scale a token; wants --group 0
    calibration: int = 16  # pieces of text that awq, gptq and smoothquant look at
    held_out: int = 8  # held-out pieces of text for the perplexity
    length: int = 128  # tokens of a piece
    save: str = ""  # folder for the quantised model; wants one method and one number of bits
    load: str = ""  # folder that --save wrote: measured, and nothing is quantised
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/quantize"


def choose_codes(weight, bits, group, method="rtn", inputs=None):
    """-> codes, scales, zeros, and channel scales (in,) that activations are divided by, or None.

    Raises UserError for a grid or method that there is not, or if a method misses its inputs.
    """
    check_grid(weight, bits, group)
    check(method in METHODS, f"--method {method}: known are {', '.join(METHODS)}, and all")
    needs = f"{method} needs calibration inputs of the layer, (n, {weight.shape[1]})"
    check(method not in CALIBRATED or (inputs is not None and len(inputs)), needs)
    if method == "awq":
        channels = awq_scales(weight, bits, group, inputs)
        return *rtn(weight * channels, bits, group), channels
    if method == "smoothquant":
        channels = smoothing_scales(inputs, weight)
        return *absmax(weight * channels, bits, group), channels
    if method == "gptq":
        return *gptq(weight, bits, group, inputs), None
    if method == "hqq":
        return *hqq(weight, bits, group), None
    return *rtn(weight, bits, group), None


def quantize(weight, bits, group, method="rtn", inputs=None):
    """Quantise a weight (out, in), with calibration activations `inputs` (n, in) for some methods.

    -> codes (out, in), scales, zeros (out, groups), which `dequantize` takes. Channel scales of AWQ
    and SmoothQuant are folded into `scales`, which has one number for each weight then.
    """
    codes, scales, zeros, channels = choose_codes(weight, bits, group, method, inputs)
    if channels is not None:
        scales = expand(scales, weight.shape[1]) / channels
    return codes, scales, zeros


@torch.no_grad()
def quantize_model(model, batches, bits, group, method="rtn", activations=16):
    """Quantise all linear layers of the decoder in place, layer after layer -> the model.

    model: any module with a stack of decoder layers; batches: keyword arguments of its forward
    pass, such as {"input_ids": (B, T)} or {"inputs_embeds": (B, T, D)}. Each layer sees what the
    quantised layers before it put out (GPTQ, Sec. 4).
    """
    layers = decoder_layers(model)
    calls = first_inputs(model, layers, batches) if method in CALIBRATED else []
    for layer in layers:
        inputs = layer_inputs(layer, calls) if calls else {}
        for name, linear in linear_layers(layer).items():
            weight = linear.weight.detach().float()
            codes, scales, zeros, channels = choose_codes(
                weight, bits, group, method, inputs.get(name)
            )
            made = QuantizedLinear(codes, scales, zeros, bits, channels, linear.bias, activations)
            layer.set_submodule(name, made)
        # What the next layer sees has the errors of this one in it
        calls = run_layer(layer, calls)
    return model


def settings(cfg):
    """[(method, bits, group, bits of activations)] of the table."""
    if cfg.method == "all":
        every = [("rtn", 8, cfg.group, 16), ("rtn", 8, 0, 8), ("smoothquant", 8, 0, 8)]
        for bits in (4, 3):
            every += [(method, bits, cfg.group, 16) for method in METHODS[:4]]
        return [row for row in every if cfg.bits in (0, row[1])]
    widths = [cfg.bits] if cfg.bits else BITS
    if cfg.method == "smoothquant":
        return [("smoothquant", 8, 0, 8)]
    return [(cfg.method, bits, cfg.group, cfg.activations) for bits in widths]


def check_flags(cfg):
    """Raises UserError for flags of which one makes no sense."""
    known = (*METHODS, "all")
    check(cfg.method in known, f"--method {cfg.method}: known are {', '.join(known)}")
    check(cfg.bits in (0, *BITS), f"--bits {cfg.bits}: known are 8, 4 and 3, and 0 for all")
    check(cfg.group >= 0, "--group must be 0, a whole row, or more")
    check(cfg.activations in (16, 8), "--activations must be 16 or 8")
    integers = cfg.activations == 16 or cfg.group == 0
    check(integers, "--activations 8 multiplies integers row by row: add --group 0")
    eight = cfg.method != "smoothquant" or (cfg.bits in (0, 8) and cfg.group == 0)
    check(eight, "smoothquant is for products in 8 bits, row by row: --bits 8 --group 0")
    check(min(cfg.calibration, cfg.held_out) > 0, "--calibration and --held-out start at 1")
    check(cfg.length > 1, "--length must be at least 2")
    one = cfg.method == "smoothquant" or (cfg.method != "all" and cfg.bits)
    check(not cfg.save or one, "--save wants one --method and one number of --bits")
    check(not (cfg.save and cfg.load), "--load measures, --save quantises: leave out one")
    if cfg.save:
        quantized_model.check_target(cfg.save)


def measure(model, held_out, seconds):
    """A row of the table: perplexity, bits a weight, MiB of the whole model, CPU seconds."""
    return {
        "perplexity": perplexity(model, held_out),
        "bits a weight": bits_per_weight(model) or 16.0,
        "MiB": stored_bytes(model) / 2**20,
        "CPU s": seconds,
    }


def quantize_and_measure(model, cfg, calibration, held_out, tokenizer):
    """All settings on copies of one model -> {name: row of the table}; saves the one to be saved."""
    rows = {"full": measure(model, held_out, 0.0)}
    batches = [{"input_ids": part.to(model.device)} for part in calibration.split(8)]
    for method, bits, group, activations in settings(cfg):
        name = f"{method} {bits}, {f'groups of {group}' if group else 'rows'}"
        if activations == 8:
            name += ", activations 8"
        # A copy of its own for each
        quantized = copy.deepcopy(model)
        began = time.process_time()
        quantize_model(quantized, batches, bits, group, method, activations)
        seconds = time.process_time() - began
        rows[name] = measure(quantized, held_out, seconds)
        print(f"{name:>32}  perplexity {rows[name]['perplexity']:8.2f}", flush=True)
        if cfg.save:
            quantized_model.save(quantized, tokenizer, cfg.save)
    return rows


def draw(path, rows):
    """Perplexity against bits a weight, scales included; a curve for each method."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4))
    curves = {}
    for name, row in rows.items():
        method = name.split()[0]
        if "activations" in name:
            method += ", activations 8"
        curves.setdefault(method, []).append((row["bits a weight"], row["perplexity"]))
    # what quantisation takes the distance from
    ((_, full),) = curves.pop("full")
    axis.axhline(full, color="black", linewidth=1, label="bfloat16")
    for method, points in curves.items():
        bits, perplexities = zip(*sorted(points))
        axis.plot(bits, perplexities, marker="o", label=method)
    axis.set(xlabel="bits a weight, scales included", ylabel="perplexity of held-out text")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False)
    figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Quantise by every method that was asked for, measure each; writes a table and a figure."""
    # flags, model and texts; what is wrong with them ends the run before anything is written
    check_flags(cfg)
    run.seed(cfg.seed)
    device = run.device(cfg.device)
    if cfg.load:
        tokenizer, model = quantized_model.load(cfg.load, device)
    elif cfg.model == "smollm2":
        tokenizer, model = pretrained.smollm2(device)
    else:
        tokenizer, model = pretrained.language_model(cfg.model, device)
    calibration, held_out = texts_of(tokenizer, cfg.calibration, cfg.held_out, cfg.length)
    most = pretrained.positions(model)
    check(cfg.length <= most, f"--length {cfg.length}, but the model has {most} positions")
    if cfg.load:
        folder = run.output(cfg.out, cfg)
        rows = {Path(cfg.load).name: measure(model, held_out, 0.0)}
        return run.report(folder, rows)
    for linear in linear_layers(decoder_layers(model)).values():
        check_grid(linear.weight, cfg.bits or 8, cfg.group)
    folder = run.output(cfg.out, cfg)
    rows = quantize_and_measure(model, cfg, calibration, held_out, tokenizer)
    draw(folder / "quantize.png", rows)
    return run.report(folder, rows, then=f"open {folder}/quantize.png")


if __name__ == "__main__":
    run.cli(main, Config)
