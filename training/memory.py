"""Memory of a training step: by formula, by DeepSpeed's estimator, by tracing on fake tensors.

formulas.py has the formulas. memory_trace.py runs the real step, of the real model, on fake tensors
and writes down everything that it allocates and releases, in order; the highest moment is the
answer. memory_fit.py asks the other way round: what is the largest that fits?

ZeRO: Rajbhandari et al. 2019, arXiv:1910.02054. Checkpointing: Chen et al. 2016, arXiv:1604.06174.
What is not seen: what a kernel allocates inside itself, the CUDA context (some 0.5 GB), and the
gaps of CUDA's allocator.

    python training/memory.py --model llama2-7b --method full --zero 3 --world-size 8 --batch 4 --seq-len 512
    python training/memory.py --model llama2-7b --method lora --precision bf16 --batch 4 --checkpointing
    python training/memory.py --model llama2-7b --method qlora --precision bf16 --fit batch --budget 24
    python training/memory.py --model smollm2-135m --batch 4 --seq-len 128 --precision fp32 --measure
"""

import json
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from training import formulas, memory_fit, memory_plot
from training.config_checks import KNOWN, check_vision
from training.memory_model import build
from training.memory_trace import exact, measured
from training.presets import configuration, image_tokens, sizes
from utils import run


@dataclass(frozen=True)
class Config:
    """Predict the memory of one training step on one device. Presets: see presets.py."""

    # a preset (see below), a config.json, a folder that has one, or a hub id
    model: str = "llama2-7b"
    # all weights; low-rank adapters; the same beside 4-bit weights
    method: Literal["full", "lora", "qlora"] = "full"
    zero: Literal[0, 1, 2, 3] = 0  # stage of ZeRO
    world_size: int = 1  # devices
    batch: int = 1  # texts per device and step
    seq_len: int = 512  # tokens of a text
    # see training/memory.md
    precision: Literal["bf16-mixed", "bf16", "fp32", "autocast"] = "bf16-mixed"
    optimizer: Literal["adamw", "sgd"] = "adamw"  # what moves the weights; sgd keeps nothing
    # keep the inputs of layers only and compute them again in the backward pass
    checkpointing: bool = False
    offload: Literal["none", "optimizer", "parameters"] = "none"  # what waits in the host's memory
    attention: Literal["sdpa", "eager"] = "sdpa"  # fused, or with all attention weights written out
    fit: Literal["", "batch", "seq-len", "model"] = ""  # what is the largest that fits in --budget?
    budget: float = 24.0  # GB (1e9 bytes) of a device
    measure: bool = False  # also make the step on this machine, with numbers, and print the error
    plot: bool = False  # also draw all stages of ZeRO and the cost of length; a minute or two
    json: bool = False  # print one object with bytes, and nothing else
    out: str = "outputs/memory"  # where the numbers and the figure go


def textbook(cfg, found):
    """The same by formula -> {"weights", ..., "activations", "peak"} in bytes on one device.

    found: what `exact` has counted, of which only "parameters" and "trained" are used.
    """
    V, d, L, f, heads, kv_heads = sizes(configuration(cfg.model))
    n = cfg.world_size
    trained = found["trained"]
    e = 4 if cfg.precision in ("fp32", "autocast") else 2
    # Weights, of the model and of adapters.
    weights = e * found["parameters"]
    if cfg.method != "full":
        weights += e * trained
    if cfg.method == "qlora":
        # Half a byte, and 4 bytes for 64 weights, for all matrices of the layers
        matrices = formulas.parameters(0, d, L, f, heads, kv_heads) - (2 * L + 1) * d
        weights += matrices * (0.5 + 4 / 64 - e)
    # A gradient for each trained weight, in its type.
    gradients = e * trained
    # Optimizer states: mean and variance, and the fp32 copy of a bf16 weight.
    moments = 4 if cfg.precision == "bf16" else 8
    if cfg.optimizer == "sgd":
        moments = 0
    master = 4 if cfg.precision == "bf16-mixed" else 0
    optimizer = (moments + master) * trained
    # ZeRO: what a stage shards is divided by the devices.
    if cfg.zero >= 1:
        optimizer /= n
    if cfg.zero >= 2:
        gradients /= n
    if cfg.zero == 3:
        weights /= n
    # Offloading: what the host keeps.
    if cfg.offload != "none":
        optimizer = 0
        if cfg.zero >= 2:
            gradients = 0
    if cfg.offload == "parameters":
        weights = 0
    # Activations, with checkpointing those of one layer at a time.
    shape = (V, d, L, f, heads, kv_heads)
    products = 2 if cfg.precision == "autocast" else e
    texts = dict(B=cfg.batch, S=cfg.seq_len, e=products, attention=cfg.attention)
    kept = formulas.activations(*shape, **texts, checkpointing=cfg.checkpointing)
    activations = sum(kept.values())
    if cfg.checkpointing:
        activations += formulas.one_layer(*shape, **texts)
    return {
        "weights": int(weights),
        "gradients": int(gradients),
        "optimizer": int(optimizer),
        "activations": int(activations),
        "peak": int(weights + gradients + optimizer + activations),
    }


def deepspeed_model_states(cfg):
    """DeepSpeed's estimate of weights, gradients and optimizer states together, or None."""
    with FakeTensorMode():
        model = build(replace(cfg, method="full", checkpointing=False), configuration(cfg.model))
    own = [sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
    total = sum(p.numel() for p in model.parameters())
    return formulas.deepspeed_estimate(total, max(own), cfg.zero, cfg.world_size, cfg.offload)


def gigabytes(size):
    """A cell of the table: bytes as GB (1e9 bytes), a dash for None."""
    return f"{'-':>12}" if size is None else f"{size / 1e9:12.3f}"


def table(cfg, found):
    """The three predictions, and what is there at the peak, in GB (1e9 bytes) on one device."""
    book = textbook(cfg, found)
    at_peak = found["at_peak"]
    states = ("weights", "gradients", "optimizer")
    # Name; textbook, DeepSpeed, exact, at the peak
    rows = [(name, book[name], None, found[name], at_peak.get(name, 0)) for name in states]
    rows.append(
        (
            "the three together",
            sum(book[name] for name in states),
            deepspeed_model_states(cfg),
            sum(found[name] for name in states),
            sum(at_peak.get(name, 0) for name in states),
        )
    )
    name = "activations"
    rows.append((name, book[name], None, found[name], at_peak.get(name, 0)))
    rows.append(("temporary", None, None, None, at_peak.get("temporary", 0)))
    rows.append(("total, the highest moment", book["peak"], None, found["peak"], found["peak"]))
    head = f"{'textbook':>12}{'DeepSpeed':>12}{'exact':>12}{'at the peak':>13}"
    lines = [f"{'GB on one device':<26}{head}"]
    for name, *predicted, peak in rows:
        cells = "".join(gigabytes(size) for size in predicted)
        lines.append(f"{name:<26}{cells} {gigabytes(peak)}")
    return "\n".join(lines)


def check_flags(cfg):
    """Raises UserError for flags that cannot be meant."""
    # Numbers
    positive = min(cfg.world_size, cfg.batch) > 0 and cfg.seq_len > 1
    run.check(positive, "--world-size, --batch: 1 or more; --seq-len: 2 or more")
    run.check(0 < cfg.budget < 1e6, "--budget must be above 0 and below a million GB")
    # ZeRO and offloading
    has_copy = cfg.precision in ("bf16-mixed", "fp32")
    run.check(cfg.zero == 0 or has_copy, "ZeRO keeps an fp32 copy: --precision bf16-mixed")
    offloads = cfg.offload != "none"
    run.check(not offloads or cfg.zero, "--offload is a part of ZeRO: choose --zero 1, 2 or 3")
    run.check(cfg.offload != "parameters" or cfg.zero == 3, "--offload parameters needs --zero 3")
    # The model
    config = configuration(cfg.model)
    check_vision(config, cfg.model)
    text = getattr(config, "text_config", config)
    kind = text.model_type
    known = ", ".join(KNOWN)
    run.check(kind in KNOWN, f"--model {cfg.model} is a {kind}; known are {known}")
    usual = text.hidden_size // text.num_attention_heads
    usual_heads = getattr(text, "head_dim", usual) in (None, usual)
    run.check(usual_heads, f"--model {cfg.model}: heads of another size than d / H")
    if hasattr(config, "vision_config") and cfg.fit != "seq-len":
        tokens = image_tokens(config)
        hint = "--seq-len must be above that"
        run.check(cfg.seq_len > tokens, f"a picture takes {tokens} tokens: {hint}")
    # Flags that exclude each other
    drawn_alone = not cfg.plot or not (cfg.fit or cfg.json)
    run.check(drawn_alone, "--plot goes with neither --fit nor --json")
    run.check(not (cfg.measure and cfg.fit), "--measure and --fit: one at a time")
    hint = "--measure cannot tell host from device: leave out --offload"
    run.check(not (cfg.measure and offloads), hint)


def measure(cfg, predicted):
    """Bytes of the step with numbers on this machine. Raises UserError if there is no room."""
    import psutil

    room = psutil.virtual_memory().available
    if torch.cuda.is_available():
        room = torch.cuda.mem_get_info()[0]
    need = f"--measure needs {predicted / 1e9:.0f} GB, here are {room / 1e9:.0f}"
    run.check(predicted < 0.9 * room, need)
    return measured(cfg)


def main(cfg: Config) -> dict:
    """Predict, print, compare."""
    check_flags(cfg)
    folder = run.output(cfg.out, cfg)
    # What is the largest that fits?
    if cfg.fit:
        found = memory_fit.fit(cfg)
        name = found.get("name", f"{cfg.fit} {found['largest']}")
        peak = f"{found['peak'] / 1e9:.2f} GB at the highest moment"
        line = f"largest that fits in {cfg.budget:g} GB: {name}, {peak}"
        print(json.dumps(found) if cfg.json else line)
        run.write_json(folder / "metrics.json", found)
        return found
    # Predict, and measure if that is asked for.
    found = dict(exact(cfg))
    if cfg.measure:
        found["measured"] = measure(cfg, found["peak"])
    if cfg.json:
        print(json.dumps(found))
        run.write_json(folder / "metrics.json", found)
        return found
    # Report.
    where = "one device"
    if cfg.world_size > 1 or cfg.zero:
        where = f"ZeRO-{cfg.zero} on {cfg.world_size} devices"
    texts = f"{cfg.batch} x {cfg.seq_len} tokens a device"
    print(f"{cfg.model}, {cfg.method}, {cfg.precision}, {where}, {texts}:")
    print(f"{found['parameters']:,} parameters, {found['trained']:,} trained\n")
    print(f"{table(cfg, found)}\n")
    if cfg.measure:
        error = found["peak"] - found["measured"]
        percent = 100 * error / found["measured"]
        print(f"measured on this machine: {found['measured']:,} bytes; ", end="")
        print(f"the prediction is {error:+,} bytes away ({percent:+.4f} %)\n")
    if cfg.plot:
        memory_plot.draw(folder / "memory.png", cfg)
    return run.report(folder, found, then="python training/zero.py")


if __name__ == "__main__":
    run.cli(main, Config)
