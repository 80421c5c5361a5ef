"""GPU benchmark of the book: training steps, memory of models of 7 billion weights, the inference engine: `make gpu`.

Weights are random, of the right shape: speed and memory need no others, so nothing is fetched. The U-Net
and the DiT of `models/`, LoRA and QLoRA steps of Llama-2-7B whose memory `training/memory.py` predicted, the
engine of `deploy/` and its Triton kernels. Time is that of the clock, after the device has finished; memory is
`torch.cuda.max_memory_allocated`. Made to take at most eight minutes on one GPU of 40 GB or more.

    python vlm/gpu_bench.py --write                  # a GPU; --write puts the table into docs/BENCHMARKS.md
    python vlm/gpu_bench.py --only unet engine
    python vlm/gpu_bench.py --tiny --device cpu      # the same code in small, to see that it runs
"""

import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from deploy import triton_offline
from deploy.engine import Engine
from models import ddpm, digit_unet, dit
from training import memory, memory_trace, presets
from utils import run
from utils.run import check

BENCHMARKS = Path(__file__).parents[1] / "docs" / "BENCHMARKS.md"
# The table stands between these two lines
MARKS = ("<!-- gpu -->", "<!-- /gpu -->")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Config:
    """Measure the rows of docs/BENCHMARKS.md that need a GPU."""

    only: tuple[str, ...] = ()  # unet, dit, memory, engine, kernels; none: all of them
    rounds: int = 3  # the fastest one counts
    steps: int = 20  # of a round
    compile: bool = True  # networks through torch.compile, too
    tiny: bool = False  # the smallest shapes: a check of the code, not a measurement
    write: bool = False  # the table into docs/BENCHMARKS.md
    seed: int = 0
    device: str = "cuda"
    out: str = "outputs/gpu_bench"


def synchronise(on):
    """Wait until the device has done what it was told to."""
    if on.type == "cuda":
        torch.cuda.synchronize(on)


def seconds_each(action, cfg, on):
    """Seconds of one call, after three to warm up: the fastest round of cfg.steps calls."""
    for _ in range(3):
        action()
    rounds = []
    for _ in range(cfg.rounds):
        synchronise(on)
        start = time.perf_counter()
        for _ in range(cfg.steps):
            action()
        synchronise(on)
        rounds.append((time.perf_counter() - start) / cfg.steps)
    return min(rounds)


def peak(on):
    """Highest memory of tensors since the last reset, in GB (1e9 bytes) -> {"peak GB"}; {} on a CPU."""
    if on.type != "cuda":
        return {}
    return {"peak GB": torch.cuda.max_memory_allocated(on) / 1e9}


def training_step(model, schedule, images, labels=None):
    """A function that makes one step of diffusion training: v-prediction in bf16, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def network(xt, t):
        return model(xt, t) if labels is None else model(xt, t, labels)

    def step():
        with run.autocast(images.device):
            value = ddpm.loss(network, schedule, images, "v")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def network_rows(name, build, cfg, on, batch, with_labels):
    """Training steps on images like digits (B,1,28,28), as it is and compiled -> {row: numbers}."""
    schedule = ddpm.Schedule(kind="cosine").to(on)
    images = torch.randn(batch, 1, 28, 28, device=on)
    labels = torch.randint(10, (batch,), device=on) if with_labels else None
    rows = {}
    for way in ("eager", "torch.compile")[: 1 + cfg.compile]:
        run.seed(cfg.seed)
        model = build().to(on).train()
        if way != "eager":
            model = torch.compile(model)
        if on.type == "cuda":
            torch.cuda.reset_peak_memory_stats(on)
        seconds = seconds_each(training_step(model, schedule, images, labels), cfg, on)
        rows[f"{name}, {way}"] = {
            "ms a step": 1e3 * seconds,
            "images a second": batch / seconds,
        } | peak(on)
    return rows


def unet_rows(cfg, on):
    """The U-Net of ddpm.py with the channels that its page names for a GPU."""
    channels, batch = ((8, 16), 2) if cfg.tiny else ((128, 256), 256)
    return network_rows("U-Net", lambda: digit_unet.build(channels, 2), cfg, on, batch, False)


def dit_rows(cfg, on):
    """DiT-S/2 on digits."""
    size, batch = ("tiny", 2) if cfg.tiny else ("S", 256)
    return network_rows(f"DiT-{size}/2", lambda: dit.build(size, 2), cfg, on, batch, True)


def memory_rows(cfg, on):
    """Steps of LoRA and QLoRA: memory as predicted on fake tensors, as measured, and seconds -> {row: numbers}."""
    model = "smollm2-135m" if cfg.tiny else "llama2-7b"
    batch, length = (1, 16) if cfg.tiny else (4, 512)
    usual = memory.Config(model=model, precision="bf16", batch=batch, seq_len=length)
    rows = {}
    for method in ("lora", "qlora"):
        for checkpointing in (False, True):
            name = f"{model}, {method}{', checkpointing' if checkpointing else ''}"
            if method == "qlora" and find_spec("bitsandbytes") is None:
                rows[name] = f"{NOT_MEASURED}: pip install bitsandbytes"
                continue
            step = replace(usual, method=method, checkpointing=checkpointing)
            predicted = memory_trace.exact(step)["peak"]
            start = time.perf_counter()
            measured = memory_trace.measured(step)
            synchronise(on)
            rows[name] = {
                "predicted GB": predicted / 1e9,
                "measured GB": measured / 1e9,
                "seconds of set-up and two steps": time.perf_counter() - start,
            }
            if on.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def engine_rows(cfg, on):
    """New tokens a second of the engine, greedy, prompts of one length, so many requests at once -> {row: numbers}."""
    from transformers import AutoModelForCausalLM

    name = "smollm2-135m"
    prompt, new = (8, 4) if cfg.tiny else (128, 64)
    batches = (1, 2) if cfg.tiny else (1, 16, 64)
    run.seed(cfg.seed)
    language = AutoModelForCausalLM.from_config(presets.configuration(name)).eval()
    language = language.to(on, torch.float32 if on.type == "cpu" else torch.bfloat16)
    rows = {}
    for batch in batches:
        ids = torch.randint(1000, (batch, prompt)).tolist()
        blocks = batch * -(-(prompt + new) // 16)
        engine = Engine(language, blocks, 16, batch, batch * prompt, prefix_sharing=False)
        seconds = []
        for _ in range(1 + cfg.rounds):
            synchronise(on)
            start = time.perf_counter()
            engine.generate(ids, new)
            seconds.append(time.perf_counter() - start)
        # the first one warms up
        rate = batch * new / min(seconds[1:])
        rows[f"engine, {name}, {batch} at once"] = {"new tokens a second": rate}
    return rows


def kernel_rows(cfg, on):
    """Triton's kernels, torch's own operations and torch.compile, float16 -> {row: numbers}; only on a GPU."""
    name = "Triton kernels"
    if on.type != "cuda":
        return {name: f"{NOT_MEASURED}: no GPU"}
    if not triton_offline.available():
        return {name: f"{NOT_MEASURED}: pip install triton"}
    from deploy import triton_cases, triton_speed

    size, parameters = (64, 1024) if cfg.tiny else (4096, 2**26)
    product = {"inputs": size, "outputs": size, "tokens": 1, "group": 64}
    sizes = triton_cases.Sizes(rows=size, columns=size, parameters=parameters, **product)
    run.seed(cfg.seed)
    return {f"Triton, {name}": row for name, row in triton_speed.rows(sizes, on).items()}


ROWS = {"unet": unet_rows, "dit": dit_rows, "memory": memory_rows, "engine": engine_rows}
ROWS["kernels"] = kernel_rows


def cell(value):
    """A number of the table: three digits that count."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def table(rows, device, command):
    """Markdown lines: what was measured, and its numbers; above them the device and the command."""
    lines = [f"`{command}`, {device}:", "", "| what | numbers |", "|---|---|"]
    for name, numbers in rows.items():
        if not isinstance(numbers, str):
            numbers = ", ".join(f"{about} {cell(value)}" for about, value in numbers.items())
        lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines)


def write_table(text, path=BENCHMARKS):
    """Put the table between its marks. Raises UserError for a page without them."""
    page = path.read_text("utf-8")
    first, last = (page.find(mark) for mark in MARKS)
    check(0 <= first < last, f"{path.name} lacks the lines {' and '.join(MARKS)}")
    page = f"{page[:first]}{MARKS[0]}\n{text}\n{page[last:]}"
    path.write_text(page, "utf-8")


def main(cfg: Config) -> dict:
    """Measure what was asked for, one after the other."""
    unknown = set(cfg.only) - ROWS.keys()
    check(not unknown, f"--only {' '.join(sorted(unknown))}: there are {', '.join(ROWS)}")
    check(min(cfg.rounds, cfg.steps) > 0, "--rounds and --steps must be at least 1")
    check(not (cfg.write and cfg.tiny), "--tiny checks the code: its numbers are not for --write")
    on = run.device(cfg.device)
    check(cfg.tiny or on.type == "cuda", f"--device {cfg.device} is no GPU: --tiny runs anywhere")
    folder = run.output(cfg.out, cfg)
    rows = {}
    for name in cfg.only or ROWS:
        rows |= ROWS[name](cfg, on)
        run.write_json(folder / "rows.json", rows)
    # the table
    device = torch.cuda.get_device_name(on) if on.type == "cuda" else "CPU"
    flags = f" --only {' '.join(cfg.only)}" if cfg.only else ""
    flags += " --tiny" if cfg.tiny else ""
    text = table(rows, f"{device}, torch {torch.__version__}", f"python vlm/gpu_bench.py{flags}")
    (folder / "table.md").write_text(text + "\n", "utf-8")
    if cfg.write:
        write_table(text)
    return run.report(folder, rows)


if __name__ == "__main__":
    run.cli(main, Config)
