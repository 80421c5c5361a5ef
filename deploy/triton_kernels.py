"""Fused GPU kernels in Triton: softmax, RMSNorm, AdamW, matmul, int4 matmul; bytes, registers, differences, times.

Triton (Tillet et al. 2019, MAPL, "an intermediate language and compiler for tiled neural network computations")
is Python for one block of a GPU: a program works on a tile, masks keep it inside the tensor. An operation
of torch reads its operands from memory and writes its result there; a fused kernel keeps what lies between in
registers. Everything but the times is found without a GPU: kernels run in Triton's interpreter, and are compiled
for GPUs that are not here (triton_offline.py).

    pip install 'triton>=3.6'                                 # Linux; not among the requirements
    python deploy/triton_kernels.py                           # half a CPU minute; with a GPU it measures times, too
    python deploy/triton_kernels.py --arch 80 --tokens 16     # for an A100 only; 16 tokens with int4 weights
"""

from dataclasses import dataclass

import torch

from deploy import triton_offline
from utils import figures, run
from utils.run import check

# Shapes of the interpreter, ragged on purpose: no tile or block is full everywhere
SMALL = {"rows": 150, "columns": 50, "parameters": 1500, "inputs": 64, "outputs": 140, "tokens": 3}
SMALL |= {"group": 32}
BANDS = (1, 2, 4, 8, 16)  # rows of tiles of a band, for the table of the L2 cache


@dataclass(frozen=True)
class Config:
    """What fused kernels save: bytes by formula, registers as compiled, times where there is a GPU."""

    rows: int = 4096  # of softmax, RMSNorm and matmul
    columns: int = 4096  # of softmax and RMSNorm, at most 65536
    parameters: int = 2**24  # that AdamW changes
    size: int = 4096  # inputs and outputs of matmul and of int4 matmul
    tokens: int = 1  # rows of int4 matmul
    group: int = 64  # inputs that share a scale: a multiple of 16; 0: a whole row
    arch: tuple[int, ...] = (
        triton_offline.ARCHITECTURES
    )  # compile for 80, A100; 90, H100; 86 and 89
    wave: int = 32  # programs of matmul side by side, for the order of tiles
    bandwidth: float = 2.0  # TB/s of memory, for the roofline: an A100
    peak: float = 312.0  # Tflop/s of its tensor cores in float16
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/triton_kernels"


def check_flags(cfg):
    """Raises UserError for sizes that no kernel takes."""
    sizes = (cfg.rows, cfg.columns, cfg.parameters, cfg.size, cfg.tokens, cfg.wave)
    check(min(sizes) > 0, "sizes and --wave must be at least 1")
    check(cfg.columns <= 65536, "--columns must be at most 65536: a block holds a row")
    check(cfg.size % 16 == 0, "--size must be a multiple of 16")
    fits = cfg.group == 0 or (cfg.group > 0 and cfg.group % 16 == 0 and cfg.size % cfg.group == 0)
    check(fits, f"--group {cfg.group}: a multiple of 16 that divides --size {cfg.size}, or 0")
    unknown = set(cfg.arch) - {80, 86, 89, 90}
    check(not unknown, f"--arch {' '.join(map(str, sorted(unknown)))}: there are 80, 86, 89, 90")
    check(min(cfg.bandwidth, cfg.peak) > 0, "--bandwidth and --peak must be more than 0")


def bytes_row(case, sizes, small, on, cfg):
    """What one case moves and how far it is from torch -> a row of the table."""
    from deploy import triton_cases, triton_traffic

    eager = triton_traffic.eager_bytes(case, sizes)
    least = triton_traffic.least_bytes(case, sizes)
    bandwidth, peak = 1e12 * cfg.bandwidth, 1e12 * cfg.peak
    seconds = triton_traffic.roofline_seconds(least, case.flops(sizes), bandwidth, peak)
    row = {
        "eager MB": eager / 1e6,
        "least MB": least / 1e6,
        "eager / least": eager / least,
        "roofline us": 1e6 * seconds,
        "difference": triton_cases.difference(case, small, device=on),
    }
    # only the interpreter can count what programs load
    if on.type == "cpu":
        counted = triton_traffic.kernel_bytes(case, small)
        row["counted / least, small"] = counted / triton_traffic.least_bytes(case, small)
    return row


def resource_rows(table):
    """{kernel, architecture: what a thread and a block need} of kernels that were compiled."""
    return {
        f"{name}, sm_{arch}": {key: x for key, x in found.items() if key != "ptx"}
        for name, by_arch in table.items()
        for arch, found in by_arch.items()
    }


def draw(path, rows, tiles, wave):
    """Bytes of each kernel, eager and fused; and which tiles of C are computed side by side, in two orders.

    rows: {kernel: row of the table}; tiles: {title: [(row, column)]} of square numbers of tiles.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 1 + len(tiles), figsize=(12, 3.6), width_ratios=[1.7, 1, 1])
    # bytes
    bars = axes[0]
    for place, row in enumerate(rows.values()):
        bars.barh(place - 0.2, row["eager MB"], 0.38, color="lightsteelblue")
        bars.barh(place + 0.2, row["least MB"], 0.38, color="tab:orange")
        label = f" {row['eager / least']:.1f} x"
        bars.text(max(row["eager MB"], row["least MB"]), place, label, va="center", fontsize=8)
    bars.set_yticks(range(len(rows)), list(rows), fontsize=9)
    bars.invert_yaxis()
    bars.set_xscale("log")
    bars.margins(x=0.15)
    bars.set(xlabel="MB between memory and processor")
    bars.set_title("an operation at a time (blue), each byte once (orange)", fontsize=9)
    # order of tiles, and the waves of programs
    for axis, (title, order) in zip(axes[1:], tiles.items()):
        side = 1 + max(row for row, _ in order)
        numbers = torch.zeros(side, side)
        for program, place in enumerate(order):
            numbers[place] = program // wave
        axis.imshow(numbers.numpy(), cmap="viridis")
        first = order[:wave]
        axis.plot([column for _, column in first], [row for row, _ in first], "w.-", lw=1, ms=3)
        axis.set_title(title, fontsize=9)
        axis.set(xticks=[], yticks=[], xlabel="columns of tiles of C")
    figure.tight_layout()
    figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Count, compile, compare, and time where there is a GPU."""
    check_flags(cfg)
    on = run.device(cfg.device)
    triton_offline.prepare(on)
    # kernels are imported now: before `prepare` Triton might be missing
    from deploy import triton_builds, triton_cases, triton_speed, triton_traffic

    folder = run.output(cfg.out, cfg)
    run.seed(cfg.seed)
    shape = {"rows": cfg.rows, "columns": cfg.columns, "parameters": cfg.parameters}
    product = {"inputs": cfg.size, "outputs": cfg.size, "tokens": cfg.tokens, "group": cfg.group}
    sizes = triton_cases.Sizes(**shape, **product)
    small = triton_cases.Sizes(**SMALL)
    # bytes, and the difference to torch
    cases = triton_cases.CASES
    rows = {name: bytes_row(case, sizes, small, on, cfg) for name, case in cases.items()}
    # what the kernels need on GPUs that need not be here
    table = triton_builds.compiled(
        triton_builds.builds(cfg.columns, cfg.tokens, cfg.group), cfg.arch
    )
    # which tiles a wave of programs needs
    side = 16
    orders = {group: triton_traffic.order(side, side, group) for group in BANDS}
    bands = {
        f"group {group}": triton_traffic.bands_of_a_wave(order, cfg.wave)
        for group, order in orders.items()
    }
    metrics = {**rows, **resource_rows(table), f"bands of A and B, {cfg.wave} programs": bands}
    # times
    for name, times in triton_speed.rows(sizes, on).items():
        metrics[f"{name}, on a GPU"] = times
    titles = {
        f"row by row: {bands['group 1']:.0f} bands a wave": orders[1],
        f"groups of 8: {bands['group 8']:.0f} bands a wave": orders[8],
    }
    draw(folder / "triton_kernels.png", rows, titles, cfg.wave)
    return run.report(folder, metrics, then=f"open {folder}/triton_kernels.png")


if __name__ == "__main__":
    run.cli(main, Config)
