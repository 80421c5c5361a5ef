"""Memory of a training step, predicted three ways: by formula, by DeepSpeed's estimator, by tracing on fake tensors.

The third way runs the real step, of the real model, on fake tensors: they have shapes and types but no numbers, so a 7B
model takes seconds and no memory. Everything that the step allocates and releases is written down in order; the highest
moment is the answer. FakeTensorMode is PyTorch's; ZeRO is that of zero.py, on ranks that are fake as well.

ZeRO: Rajbhandari et al. 2019, arXiv:1910.02054. Checkpointing: Chen et al. 2016, arXiv:1604.06174. What is not seen:
what a kernel allocates inside itself, the CUDA context (some 0.5 GB), and the gaps of CUDA's allocator.

    python training/memory.py --model llama2-7b --method full --zero 3 --world-size 8 --batch 4 --seq-len 512
    python training/memory.py --model llama2-7b --method lora --precision bf16 --batch 4 --checkpointing
    python training/memory.py --model llama2-7b --method qlora --precision bf16 --fit batch --budget 24
    python training/memory.py --model smollm2-135m --batch 4 --seq-len 128 --precision fp32 --measure
"""

import json
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from training import formulas, ranks, zero
from training.presets import (
    KNOWN,
    PRESETS,
    Linear4bit,
    LoRALinear,
    build,
    check_picture,
    configuration,
    inputs,
    places,
)
from training.tracker import Tracker
from utils import figures, run


@dataclass(frozen=True)
class Config:
    """Predict the memory of one training step on one device. Presets: see presets.py."""

    # a preset (see below), a config.json, a folder that has one, or a hub id
    model: str = "llama2-7b"
    method: Literal["full", "lora", "qlora"] = (
        "full"  # all weights; low-rank corrections; the same beside 4-bit weights
    )
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


class Plain:
    """One device and a plain optimizer, with the interface of the engines in zero.py."""

    def __init__(self, model, optimizer):
        self.optimizer = optimizer([p for p in model.parameters() if p.requires_grad])

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def engine(cfg, model):
    """What keeps the optimizer's numbers: plain AdamW, or a stage of ZeRO with an fp32 copy of bf16 weights."""
    if cfg.zero == 0 and cfg.precision != "bf16-mixed":
        return Plain(model, torch.optim.AdamW if cfg.optimizer == "adamw" else torch.optim.SGD)
    made = zero.STAGES[cfg.zero](model, 1e-3)
    if cfg.optimizer == "sgd":
        made.adams = [torch.optim.SGD([flat.master]) for flat in made.trained]
    return made


@contextmanager
def fake_ranks(n):
    """As if there were n ranks and this were the first: collectives have shapes and do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
    try:
        yield
    finally:
        dist.destroy_process_group()


def moments(moving):
    """The optimizer's numbers that this rank holds."""
    adams = [moving.optimizer] if isinstance(moving, Plain) else moving.adams
    masters = (
        []
        if isinstance(moving, Plain)
        else [f.master for f in moving.trained if f.master.dtype != f.full.dtype]
    )
    return masters + [
        x for adam in adams for s in adam.state.values() for x in s.values() if x.dim()
    ]


def shards(moving):
    """The weights that this rank owns under ZeRO-3; the gathered ones are only borrowed."""
    return [flat.shard for flat in moving.flat_params] if isinstance(moving, zero.ZeRO3) else []


def gradients(moving, model):
    kept = [p.grad for p in model.parameters() if p.grad is not None]
    return kept + [f.grad_shard for f in getattr(moving, "trained", ()) if f.grad_shard is not None]


def two_steps(model, batch, moving, cfg, tracker=None, steps=2):
    """Two training steps: the first makes the optimizer's numbers, the second is like all that follow.

    With a tracker, what was allocated gets its tag, and the moments between the phases are written down.
    """
    tell = tracker or Tracker()
    tell.mark(moments(moving), "optimizer")
    tell.mark(shards(moving), "offloaded" if cfg.offload == "parameters" else "weights")
    for _ in range(steps):
        tell.at["start"], tell.tag = len(tell.events) - 1, "activations"
        with (
            run.autocast(batch["input_ids"].device)
            if cfg.precision == "autocast"
            else nullcontext()
        ):
            loss = model(**batch, use_cache=False).loss
        tell.at["forward"], tell.tag = len(tell.events) - 1, "temporary"
        moving.backward(loss)
        del loss
        away = cfg.offload != "none" and cfg.zero >= 2
        tell.mark(gradients(moving, model), "offloaded" if away else "gradients")
        tell.at["backward"] = len(tell.events) - 1
        if cfg.offload == "none":  # else the host does it
            moving.step()
            tell.mark(moments(moving), "optimizer")
        else:
            drop(moving, model)
        tell.at["step"] = len(tell.events) - 1


def drop(moving, model):
    """The gradients have gone to the host."""
    model.zero_grad()
    for unit in getattr(moving, "trained", ()):
        unit.gradient = None


def things(model, batch, moving):
    """All tensors that are there before the first step."""
    return [
        *model.parameters(),
        *model.buffers(),
        *moments(moving),
        *shards(moving),
        *batch.values(),
    ]


def set_up(cfg):
    """-> model, batch, engine. Within FakeTensorMode they are fake, and so is everything that they make."""
    run.seed(0)
    # It would count the places of a picture: look at numbers
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"
    config = configuration(cfg.model)
    model, batch = build(cfg, config), inputs(cfg, config)
    return model, batch, engine(cfg, model)


@lru_cache(maxsize=256)
def exact(cfg):
    """The step on fake tensors -> {"parameters", "trained", "weights", "gradients", "optimizer", "activations", ...}.

    Bytes on one device, each at its largest; "at_peak" has what was there at the highest moment, of which "temporary"
    is what an operator, the backward pass or the optimizer holds for a while. Raises UserError for an unknown model.
    """
    with fake_ranks(cfg.world_size), FakeTensorMode():
        model, batch, moving = set_up(cfg)
        adapters = [
            p for m in model.modules() if isinstance(m, LoRALinear) for p in (m.lora_A, m.lora_B)
        ]
        count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in adapters)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if cfg.method == "qlora":
            count += sum(
                m.in_features * m.out_features for m in model.modules() if isinstance(m, Linear4bit)
            )
        tracker = Tracker(*things(model, batch, moving))
        with tracker:
            two_steps(model, batch, moving, cfg, tracker)
    gone = ("offloaded", "optimizer") if cfg.offload != "none" else ()
    entries = [0 if tracker.entries[entry] in gone else size for entry, size in tracker.events]
    curve = np.cumsum(entries)
    moment = int(curve.argmax())
    at = {name: tracker.alive(i) for name, i in tracker.at.items()}
    return {
        "parameters": count, "trained": trained,
        "weights": at["start"]["weights"], "gradients": at["backward"].get("gradients", 0),
        "optimizer": 0 if gone else at["step"].get("optimizer", 0), "activations": at["forward"]["activations"],
        "peak": int(curve[moment]),
        "at_peak": {tag: size for tag, size in tracker.alive(moment).items() if tag not in gone},
    }  # fmt: skip


def measured(cfg):
    """The same step with numbers on this machine -> the highest sum of tensors, in bytes. GPU: what CUDA allocated."""
    with fake_ranks(cfg.world_size), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model, batch, moving = set_up(cfg)
        before = Tracker(*things(model, batch, moving)).peak()
        return before + ranks.allocated(lambda: two_steps(model, batch, moving, cfg))


def sizes(config):
    """V, d, L, f, H, K of the language model behind a configuration."""
    text = getattr(config, "text_config", config)
    kv = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
    )
    return *(getattr(text, name) for name in names), kv


def textbook(cfg, found):
    """The same by formula -> {"weights", "gradients", "optimizer", "activations", "peak"} in bytes on one device."""
    V, d, L, f, heads, kv = sizes(configuration(cfg.model))
    e, n, trained = (
        4 if cfg.precision in ("fp32", "autocast") else 2,
        cfg.world_size,
        found["trained"],
    )
    adapters = found["trained"] if cfg.method != "full" else 0
    weights = e * (found["parameters"] + adapters)
    # Half a byte, and 4 bytes for 64 weights, for all matrices of the layers
    if cfg.method == "qlora":
        matrices = formulas.parameters(0, d, L, f, heads, kv) - (2 * L + 1) * d
        weights += matrices * (0.5 + 4 / 64 - e)
    moments = 0 if cfg.optimizer == "sgd" else 2 * (2 if cfg.precision == "bf16" else 4)
    copy = 4 if cfg.precision == "bf16-mixed" else 0
    shape = dict(
        B=cfg.batch,
        S=cfg.seq_len,
        e=2 if cfg.precision == "autocast" else e,
        attention=cfg.attention,
    )
    kept = sum(
        formulas.activations(
            V, d, L, f, heads, kv, **shape, checkpointing=cfg.checkpointing
        ).values()
    )
    kept += formulas.one_layer(V, d, L, f, heads, kv, **shape) if cfg.checkpointing else 0
    states = {
        "weights": weights / (n if cfg.zero == 3 else 1) * (cfg.offload != "parameters"),
        "gradients": e
        * trained
        / (n if cfg.zero >= 2 else 1)
        * (cfg.offload == "none" or cfg.zero < 2),
        "optimizer": (moments + copy) * trained / (n if cfg.zero else 1) * (cfg.offload == "none"),
        "activations": kept,
    }
    return {name: int(size) for name, size in (states | {"peak": sum(states.values())}).items()}


def deepspeed(cfg):
    """What DeepSpeed's estimator says of weights, gradients and optimizer states together; None if nothing."""
    with FakeTensorMode():
        model = build(replace(cfg, method="full", checkpointing=False), configuration(cfg.model))
    own = [sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
    total = sum(p.numel() for p in model.parameters())
    return formulas.deepspeed_estimate(total, max(own), cfg.zero, cfg.world_size, cfg.offload)


def table(cfg, found):
    """Three ways to say it, in GB (1e9 bytes) on one device."""
    book, engine_says = textbook(cfg, found), deepspeed(cfg)
    cell = lambda size: f"{size / 1e9:12.3f}" if size is not None else " " * 11 + "-"  # noqa: E731
    lines = [
        f"{'GB on one device':<26}{'textbook':>12}{'DeepSpeed':>12}{'exact':>12}{'at the peak':>13}"
    ]
    for name in ("weights", "gradients", "optimizer", "activations"):
        here = found["at_peak"].get(name, 0)
        lines.append(f"{name:<26}{cell(book[name])}{cell(None)}{cell(found[name])} {cell(here)}")
    states = ("weights", "gradients", "optimizer")
    sums = [
        sum(x[name] for name in states)
        for x in (book, found, found["at_peak"] | {s: found["at_peak"].get(s, 0) for s in states})
    ]
    lines.insert(
        4,
        f"{'the three together':<26}{cell(sums[0])}{cell(engine_says)}{cell(sums[1])} {cell(sums[2])}",
    )
    lines.append(
        f"{'temporary':<26}{cell(None)}{cell(None)}{cell(None)} {cell(found['at_peak'].get('temporary', 0))}"
    )
    lines.append(
        f"{'total, the highest moment':<26}{cell(book['peak'])}{cell(None)}{cell(found['peak'])} {cell(found['peak'])}"
    )
    return "\n".join(lines)


def largest(peak, budget, start=1, step=1):
    """The largest multiple of `step` whose peak(x) is not above the budget, 0 if there is none -> (x, its peak).

    Doubles until it does not fit, then draws a line between the two ends: memory is nearly one.
    """
    low, high, x = (0, 0), None, start
    while high is None or high[0] - low[0] > step:
        size = peak(x)
        low, high = ((x, size), high) if size <= budget else (low, (x, size))
        if high is None:
            x *= 2
        else:
            share = (budget - low[1]) / (high[1] - low[1]) if low[0] else 0.5
            x = int(low[0] + share * (high[0] - low[0])) // step * step
            x = min(max(x, low[0] + step), high[0] - step)
    return low


def fit(cfg):
    """Answer --fit -> {"largest", "peak", "budget"}; for "model" also its name."""
    budget = cfg.budget * 1e9
    if cfg.fit == "model":
        best: dict[str, Any] = {"largest": 0, "name": "none of the presets", "peak": 0}
        for name in sorted(
            PRESETS, key=lambda name: formulas.parameters(*sizes(configuration(name))[:4])
        ):
            at_least = 577 if name.startswith("llava") else 1  # the places of a picture and a word
            found = exact(replace(cfg, model=name, seq_len=max(cfg.seq_len, at_least + 1)))
            if found["peak"] <= budget and found["parameters"] > best["largest"]:
                best = {"largest": found["parameters"], "name": name, "peak": found["peak"]}
        return best | {"budget": budget}
    field, step = ("batch", 1) if cfg.fit == "batch" else ("seq_len", 64)
    config, start = configuration(cfg.model), step
    if field == "seq_len" and hasattr(config, "vision_config"):  # a picture must find its place
        start = 64 * (places(config) // 64 + 1)
    least = exact(replace(cfg, **{field: start}))["peak"]
    run.check(
        least <= budget,
        f"not even --{cfg.fit} {start} fits: it takes {least / 1e9:.2f} GB of {cfg.budget:g}",
    )
    x, peak = largest(lambda x: exact(replace(cfg, **{field: x}))["peak"], budget, start, step)
    return {"largest": x, "peak": peak, "budget": budget}


COLOURS = zero.COLOURS | {"activations": "tab:purple", "temporary": "lightgray"}


def draw(path, cfg):
    """Left: the highest moment for every stage of ZeRO. Right: what the length of the texts costs."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    n = max(8, cfg.world_size)
    for stage in range(4):
        found, bottom = exact(replace(cfg, zero=stage, world_size=n, precision="bf16-mixed")), 0.0
        for name, colour in COLOURS.items():
            size = found["at_peak"].get(name, 0) / 1e9
            left.bar(stage, size, 0.7, bottom, color=colour, label=name if stage == 0 else None)
            bottom += size
        left.text(stage, bottom, f"{bottom:.0f}", ha="center", va="bottom", fontsize=9)
    left.axhline(cfg.budget, color="black", linestyle=":", linewidth=1)
    left.set(
        title=f"{cfg.model}, {cfg.method}, {n} devices",
        ylabel="GB on one device",
        xlabel="stage of ZeRO",
    )
    left.set_xticks(range(4))
    lengths = [256, 512, 1024, 2048, 4096]
    ways = {
        "all attention weights": dict(attention="eager"),
        "fused attention": {},
        "fused, checkpointed": dict(checkpointing=True),
    }
    plain = replace(
        cfg,
        method="lora",
        zero=0,
        world_size=1,
        precision="bf16",
        checkpointing=False,
        attention="sdpa",
    )
    for name, flags in ways.items():
        peaks = [exact(replace(plain, seq_len=length, **flags))["peak"] / 1e9 for length in lengths]
        right.plot(lengths, peaks, marker="o", markersize=3, label=name)
    right.axhline(cfg.budget, color="black", linestyle=":", linewidth=1)
    right.set_xscale("log", base=2)
    right.set_yscale("log", base=2)
    right.set_xticks(lengths, lengths)
    right.yaxis.set_major_formatter("{x:.0f}")
    right.set(
        title=f"{cfg.model}, LoRA, bf16, {cfg.batch} a batch",
        xlabel="tokens of a text",
        ylabel="GB",
    )
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figures.close(figure, path)


def allow(cfg):
    """Raises UserError for flags that cannot be meant."""
    run.check(
        min(cfg.world_size, cfg.batch) > 0 and cfg.seq_len > 1,
        "--world-size, --batch: 1 or more; --seq-len: 2 or more",
    )
    run.check(0 < cfg.budget < 1e6, "--budget must be above 0 and below a million GB")
    run.check(
        cfg.zero == 0 or cfg.precision in ("bf16-mixed", "fp32"),
        "ZeRO keeps an fp32 copy: --precision bf16-mixed",
    )
    run.check(
        cfg.offload == "none" or cfg.zero, "--offload is a part of ZeRO: choose --zero 1, 2 or 3"
    )
    run.check(cfg.offload != "parameters" or cfg.zero == 3, "--offload parameters needs --zero 3")
    config = configuration(cfg.model)
    check_picture(config, cfg.model)
    text = getattr(config, "text_config", config)
    run.check(
        text.model_type in KNOWN,
        f"--model {cfg.model} is a {text.model_type}; known are {', '.join(KNOWN)}",
    )
    usual = text.hidden_size // text.num_attention_heads
    run.check(
        getattr(text, "head_dim", usual) in (None, usual),
        f"--model {cfg.model}: heads of another size than d / H",
    )
    run.check(
        not cfg.plot or not (cfg.fit or cfg.json), "--plot goes with neither --fit nor --json"
    )
    if hasattr(config, "vision_config") and cfg.fit != "seq-len":
        picture = places(config)
        run.check(
            cfg.seq_len > picture, f"a picture takes {picture} tokens: --seq-len must be above that"
        )
    run.check(not (cfg.measure and cfg.fit), "--measure and --fit: one at a time")
    run.check(
        not cfg.measure or cfg.offload == "none",
        "--measure cannot tell host from device: leave out --offload",
    )


def main(cfg: Config) -> dict:
    """Predict, print, compare."""
    allow(cfg)
    folder = run.output(cfg.out, cfg)
    if cfg.fit:
        found = fit(cfg)
        name = found.get("name", f"{cfg.fit} {found['largest']}")
        line = f"largest that fits in {cfg.budget:g} GB: {name}, {found['peak'] / 1e9:.2f} GB at the highest moment"
        print(json.dumps(found) if cfg.json else line)
        run.write_json(folder / "metrics.json", found)
        return found
    found = dict(exact(cfg))
    if cfg.measure:
        import psutil

        room = (
            torch.cuda.mem_get_info()[0]
            if torch.cuda.is_available()
            else psutil.virtual_memory().available
        )
        run.check(
            found["peak"] < 0.9 * room,
            f"--measure needs {found['peak'] / 1e9:.0f} GB, here are {room / 1e9:.0f}",
        )
        found["measured"] = measured(cfg)
    if cfg.json:
        print(json.dumps(found))
        run.write_json(folder / "metrics.json", found)
        return found
    where = (
        f"ZeRO-{cfg.zero} on {cfg.world_size} devices"
        if cfg.world_size > 1 or cfg.zero
        else "one device"
    )
    print(
        f"{cfg.model}, {cfg.method}, {cfg.precision}, {where}, {cfg.batch} x {cfg.seq_len} tokens a device:"
    )
    print(
        f"{found['parameters']:,} parameters, {found['trained']:,} trained\n\n{table(cfg, found)}\n"
    )
    if cfg.measure:
        error = found["peak"] - found["measured"]
        print(f"measured on this machine: {found['measured']:,} bytes; the prediction is {error:+,} bytes away "
              f"({100 * error / found['measured']:+.4f} %)\n")  # fmt: skip
    if cfg.plot:
        draw(folder / "memory.png", cfg)
    return run.report(folder, found, then="python training/zero.py")


if __name__ == "__main__":
    run.cli(main, Config)
