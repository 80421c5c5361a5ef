"""Benchmark of the U-Net against other libraries: ratios in one process, interleaved, CPU time, one thread.

A training step (forward, backward, AdamW) of unet.UNet against diffusers.UNet2DModel, which has the same parameters
and does the same work (the counter misses 3 % of its, in a fused attention), and against denoising-diffusion-pytorch's
Unet at the nearest size. That package pulls in torchvision, which does not load beside the CPU build of torch, so it is
measured only where someone ran `pip install --no-deps denoising-diffusion-pytorch`; the helpers that it imports and a
bare Unet does not use are stubbed. Then the profile of our step: which operators take the time, and what it would be
with fused AdamW, fused attention or channels last.

    python models/bench.py    # about 2 CPU minutes, with both libraries
"""

import importlib
import statistics
import sys
import time
from dataclasses import dataclass
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from models import ddim, ddpm
from models.step_profile import by_kind, flop_shares, time_shares, variants
from models.unet import UNet
from utils import run

# The pair of settings of the two U-Nets with the nearest cost: 0.7 % more FLOPs and 6 % more parameters in ours.
LUCID = dict(channels=(40, 72), layers=2, attention=(False, True)), dict(dim=40, mults=(1, 2))


@dataclass(frozen=True)
class Config:
    """Compare training steps and the sampler's overhead."""

    rounds: int = 12  # interleaved repetitions; the median of the ratios is reported
    batch: int = 32  # images per step
    seed: int = 0  # same seed, same weights
    out: str = "outputs/bench"  # where the results go


def ours(channels, layers, attention, size, colours=4, head_dim=32):
    """Our U-Net, and the shape of an image for it."""
    model = UNet(colours, channels, layers, attention, head_dim=head_dim)
    return model, (colours, size, size)


def diffusers_unet(channels, layers, attention, colours=4):
    from diffusers import UNet2DModel

    down = ["AttnDownBlock2D" if a else "DownBlock2D" for a in attention]
    up = ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)]
    return UNet2DModel(
        in_channels=colours, out_channels=colours, layers_per_block=layers, block_out_channels=channels,
        down_block_types=down, up_block_types=up, attention_head_dim=32, norm_num_groups=8,
    )  # fmt: skip


def lucidrains_unet(dim, mults, colours=4):
    """denoising-diffusion-pytorch's Unet, or None where it is not installed."""
    names = ["torchvision", "torchvision.transforms", "torchvision.utils", "torchvision.models"]
    names += ["ema_pytorch", "pytorch_fid", "pytorch_fid.fid_score", "pytorch_fid.inception"]
    package = "denoising_diffusion_pytorch"
    # with stubs of what a bare Unet does not use
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in names}):
        try:
            module = importlib.import_module(f"{package}.{package}")
        except ImportError:
            return None
    return module.Unet(dim, dim_mults=mults, channels=colours, flash_attn=False)


def cost(model, x, t):
    """(parameters, FLOPs of a forward and a backward pass)."""
    with FlopCounterMode(display=False) as counter:
        output(model, x, t).float().mean().backward()
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, counter.get_total_flops()


def output(model, x, t):
    y = model(x, t)
    return y if isinstance(y, torch.Tensor) else y.sample


def seconds(action):
    start = time.process_time()
    action()
    return time.process_time() - start


def training_step(model, x, t, bf16, **flags):
    """A function that makes one step; flags: of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, **flags)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = (output(model, x, t).float() - x).square().mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def interleaved(actions, rounds, name="bench"):
    """Run the actions in turn, after one unmeasured turn -> [seconds of each]."""
    for action in actions:
        action()
    # every round measures each of them once
    times = []
    for _ in run.bar(range(rounds), rounds, name=name):
        times.append([seconds(action) for action in actions])
    return list(zip(*times))


def matrix_product(bf16, n=1024):
    """A function that multiplies two n x n matrices, and its FLOPs."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    a = torch.randn(n, n, dtype=dtype)
    b = torch.randn(n, n, dtype=dtype)
    return lambda: a @ b, 2 * n**3


def main(cfg: Config) -> dict:
    """Measure a training step of the U-Nets in fp32 and bf16, and the overhead of the sampler."""
    run.check(cfg.rounds > 0 and cfg.batch > 0, "--rounds and --batch must be at least 1")
    torch.set_num_threads(1)
    run.seed(cfg.seed)
    folder = run.output(cfg.out, cfg)
    metrics = {}

    # pairs of U-Nets of the same cost
    shape = dict(channels=(32, 64), layers=2, attention=(False, True))
    pairs = {
        "diffusers": (ours(**shape, size=14), diffusers_unet(**shape)),
        "denoising-diffusion-pytorch": (ours(**LUCID[0], size=16), lucidrains_unet(**LUCID[1])),
    }
    for name, ((model, image), other) in pairs.items():
        x = torch.randn(cfg.batch, *image)
        t = torch.randint(1000, (cfg.batch,))
        if other is None:
            metrics[name] = "not measured: pip install --no-deps denoising-diffusion-pytorch"
            continue
        # parameters and FLOPs of both
        parameters, flops = cost(model, x, t)
        their_parameters, their_flops = cost(other, x, t)
        metrics[f"{name}: size"] = {
            "parameters": parameters,
            "their_parameters": their_parameters,
            "GFLOP": flops / 1e9,
            "their_GFLOP": their_flops / 1e9,
        }
        # time of a training step
        for kind, bf16 in (("fp32", False), ("bf16", True)):
            steps = [training_step(m, x, t, bf16) for m in (model, other)]
            product, product_flops = matrix_product(bf16)
            actions = [*steps, product]
            mine, theirs, products = interleaved(actions, cfg.rounds, f"{name}, {kind}")
            rates = [(flops / a) / (product_flops / p) for a, p in zip(mine, products)]
            metrics[f"{name}: {kind} step"] = {
                "times_faster": statistics.median(b / a for a, b in zip(mine, theirs)),
                "ms": 1e3 * statistics.median(mine),
                "their_ms": 1e3 * statistics.median(theirs),
                "share_of_matmul_rate": statistics.median(rates),
            }
            if name == "diffusers":
                share = metrics[f"{name}: {kind} step"]["share_of_matmul_rate"]
                metrics |= profile_of_step(cfg, model, x, t, kind, share)
    metrics["sampler overhead"] = sampler_overhead(cfg)
    return run.report(folder, metrics)


def profile_of_step(cfg, model, x, t, kind, share_of_rate):
    """Rows of our step, fp32 or bf16: what each kind of operator takes, and how much faster each variant is."""
    bf16 = kind == "bf16"
    times = time_shares(training_step(model, x, t, bf16), cfg.rounds)
    flops = flop_shares(lambda: output(model, x, t).mean())
    rows = by_kind(times, flops, share_of_rate)
    metrics = {f"{kind}, {name}": row for name, row in rows.items()}
    # variants of the step, interleaved
    steps = {
        name: training_step(other, images, t, bf16, **flags)
        for name, (other, images, flags) in variants(model, x).items()
    }
    taken = interleaved(list(steps.values()), cfg.rounds, f"variants, {kind}")
    first, *others = taken
    metrics[f"{kind}, times faster"] = {
        name: statistics.median(a / b for a, b in zip(first, of_other))
        for name, of_other in zip(list(steps)[1:], others)
    }
    return metrics


def sampler_overhead(cfg, n=20):
    """Time of ddim.sample over that of the bare network calls in it, minus 1."""
    model = ddpm.build((32, 64), 2).eval()
    schedule = ddpm.Schedule(kind="cosine")
    noise = torch.randn(cfg.batch, 1, 28, 28)
    t = torch.zeros(cfg.batch, dtype=torch.long)

    def whole():
        ddim.last(ddim.sample(model, schedule, noise, n, "v"))

    @torch.no_grad()
    def bare():
        for _ in range(n):
            model(noise, t)

    of_whole, of_calls = interleaved([whole, bare], cfg.rounds)
    return statistics.median(a / b for a, b in zip(of_whole, of_calls)) - 1


if __name__ == "__main__":
    run.cli(main, Config)
