"""Roofline of this machine: some operators, what each attains, and which limit it meets: compute, memory, overhead.

Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785, Fig. 1: at best min(peak, intensity x bandwidth) FLOPs
a second, intensity being FLOPs per byte that must be moved. Overhead is the third limit: He 2022, "Making Deep Learning
Go Brrrr From First Principles". Peak and bandwidth are measured, too: the fastest product and the fastest copy.
One thread and CPU time on a CPU, so that neighbours on the machine do not count.

    python training/roofline.py    # 10 seconds
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from training.flops import attainable
from utils import figures, run

OVERHEAD = 0.3  # share of the roofline below which a kernel is called overhead-bound


@dataclass(frozen=True)
class Config:
    """Measure operators, and draw them below the roofline of this machine."""

    repeats: int = 20  # of each operator; the fastest counts
    width: int = 1024  # of the largest matrices
    device: str = "auto"
    out: str = "outputs/roofline"


def fastest(action, on, repeats):
    """Seconds of the fastest call: CPU time on a CPU."""
    found = []
    for _ in range(repeats):
        if on.type == "cuda":
            torch.cuda.synchronize()
            then = time.perf_counter()
            action()
            torch.cuda.synchronize()
            found.append(time.perf_counter() - then)
        else:
            then = time.process_time_ns()
            action()
            found.append((time.process_time_ns() - then) / 1e9)
    return min(found)


def operators(n, on):
    """[(name, what to call, FLOPs, bytes that it must read and write at least)] in fp32."""
    a = torch.randn(n, n, device=on)
    vector = torch.randn(4 * n, 1, device=on)
    block = torch.randn(n // 16, n // 16, device=on)
    # so large that no cache holds them
    long = torch.randn(16 * n * n, device=on)
    result = torch.empty_like(long)
    short = torch.randn(64, device=on)
    large = long.view(4 * n, 4 * n)
    m = n // 16
    size = long.numel()
    return [
        (f"matrix product, {n}", lambda: a @ a, 2 * n**3, 3 * 4 * n**2),
        (f"matrix product, {m}", lambda: block @ block, 2 * m**3, 3 * 4 * m**2),
        (f"matrix x vector, {4 * n}", lambda: large @ vector, 2 * size, 4 * (size + 8 * n)),
        (f"add, {size} numbers", lambda: torch.add(long, 1, out=result), size, 8 * size),
        (f"relu, {size} numbers", lambda: F.relu(long), size, 8 * size),
        ("add, 64 numbers", lambda: short + 1, 64, 8 * 64),
    ]


def limits(on, n, repeats):
    """-> FLOPs a second of the fastest product, bytes a second of the fastest copy: a read and a write."""
    a = torch.randn(n, n, device=on)
    peak = 2 * n**3 / fastest(lambda: a @ a, on, repeats)
    long = torch.randn(16 * n * n, device=on)
    copy = torch.empty_like(long)
    bandwidth = 8 * long.numel() / fastest(lambda: copy.copy_(long), on, repeats)
    return peak, bandwidth


def row(flops, size, seconds, peak, bandwidth):
    """Of one operator: FLOPs per byte, attained FLOPs a second, its share of the roofline, and the limit."""
    intensity = flops / size
    roof = attainable(intensity, peak, bandwidth)
    rate = flops / seconds
    bound = "compute" if roof == peak else "memory"
    if rate < OVERHEAD * roof:
        bound = "overhead"
    return {"FLOPs/byte": intensity, "GFLOP/s": rate / 1e9, "share": rate / roof, "bound": bound}


def draw(path, rows, peak, bandwidth):
    """The roof, and each operator below it; both axes logarithmic."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.5, 3.8))
    ridge = peak / bandwidth
    x = [0.05, ridge, 1000]
    ax.loglog(x, [attainable(i, peak, bandwidth) / 1e9 for i in x], color="black", lw=1)
    ax.axvline(ridge, color="gray", lw=0.5, ls=":")
    for name, found in rows.items():
        ax.scatter(
            found["FLOPs/byte"], found["GFLOP/s"], label=f"{name}: {found['bound']}", zorder=3
        )
    ax.set(xlabel="FLOPs per byte", ylabel="GFLOP/s")
    ax.legend(fontsize=7)
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Measure, print, draw."""
    run.check(cfg.repeats > 0, "--repeats must be at least 1")
    run.check(cfg.width >= 16, "--width must be 16 or more")
    on = run.device(cfg.device)
    run.seed(0)
    folder = run.output(cfg.out, cfg)
    torch.set_num_threads(1)
    peak, bandwidth = limits(on, cfg.width, cfg.repeats)
    rows = {}
    for name, action, flops, size in operators(cfg.width, on):
        seconds = fastest(action, on, cfg.repeats)
        rows[name] = row(flops, size, seconds, peak, bandwidth)
    # Print
    print(f"peak {peak / 1e9:.0f} GFLOP/s, bandwidth {bandwidth / 1e9:.1f} GB/s; ", end="")
    print(f"the ridge is at {peak / bandwidth:.1f} FLOPs per byte\n")
    print(f"{'':>24} {'FLOPs/byte':>11} {'GFLOP/s':>9} {'share of the roof':>18}  bound by")
    for name, x in rows.items():
        cells = f"{x['FLOPs/byte']:11.2f} {x['GFLOP/s']:9.3f} {x['share']:18.2f}  {x['bound']}"
        print(f"{name:>24} {cells}")
    draw(folder / "roofline.png", rows, peak, bandwidth)
    found = {"GFLOP/s": peak / 1e9, "GB/s": bandwidth / 1e9}
    found |= {name: f"{x['GFLOP/s']:.3f} GFLOP/s, {x['bound']}" for name, x in rows.items()}
    print()
    return run.report(folder, found)


if __name__ == "__main__":
    run.cli(main, Config)
