"""Consistency distillation: a student of a diffusion model that draws in one step. Song et al. 2023, arXiv:2303.01469.

All points of one path of the ODE end in the same image. A consistency function says which, from any of them, in one
call. It is learned from neighbours: the teacher walks one DDIM step, from xt to xs, and the student's answer at xt must
become that of its own average (EMA) at xs. At the clean image the answer is known; from there the truth passes upwards,
level by level. More calls give better digits: add noise to the answer, less than before, and ask again.

Shapes: B images, C channels, H x W pixels; t, s < t are integer tensors (B,), -1 the clean image. Equation numbers are
the paper's; (I) is Song & Dhariwal 2023, arXiv:2310.14189, whose loss needs no second network (LPIPS).
Differences from the paper: network and schedule of `ddpm.py`; DDIM steps (Euler) in place of Heun's; one EMA for both,
the target of the training and the samples.

    python models/distill.py --pretrained      # teacher: the shipped weights of models/ddpm.py; 4 CPU minutes
    python models/distill.py                   # those that models/ddpm.py left; trains them if there are none
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch

from models import ddim, ddpm, quality
from models.batches import batches
from models.ddim import alpha_bar_roots, last
from utils import checkpoint, data, figures, run


@dataclass(frozen=True)
class Config:
    """Distil a diffusion model into a student that draws digits in one step, and measure its digits."""

    steps: int = 700  # training steps
    batch: int = 64  # images per step
    lr: float = 5e-4  # peak learning rate: 20 steps of warm-up, then a line to zero
    levels: int = 16  # noise levels, between which the teacher walks in single DDIM steps
    ema: float = 0.95  # EMA decay of the target network, which is also what is kept
    sampling_steps: tuple[int, ...] = (1, 2, 4, 8)  # numbers of steps to compare
    samples: int = 512  # digits to sample and measure at each number of steps
    weights: str = "outputs/ddpm/model.safetensors"  # the teacher: what models/ddpm.py wrote
    pretrained: bool = False  # the teacher has the shipped weights instead
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/distill"  # where the results go


def consistency(model, schedule, xt, t, predict="eps"):
    """The image in which the path through xt ends: (B, C, H, W), (B,) -> (B, C, H, W). f of Sec. 3, Eq. 5.

    At the clean image sigma is 0 and alpha 1: the answer is xt itself, the boundary condition.
    """
    step = t.clamp(min=0)
    output = model(xt, step).float()
    eps = ddpm.to_eps(schedule, xt, step, output, predict)
    alpha, sigma = alpha_bar_roots(schedule, t)
    return ((xt - sigma * eps) / alpha).float()


@torch.no_grad()
def teacher_step(teacher, schedule, xt, t, s, predict="eps"):
    """One DDIM step of the teacher from xt at t to s < t: (B, C, H, W), (B,), (B,) -> (B, C, H, W). Eq. 6."""
    output = teacher(xt, t).float()
    eps = ddpm.to_eps(schedule, xt, t, output, predict)
    return ddim.step(schedule, xt, t, s, eps).float()


def pseudo_huber(a, b):
    """Mean over images of sqrt(|a - b|^2 + c^2) - c: near zero a square, else a distance. (I) Sec. 3.3."""
    c = 0.00054 * math.sqrt(a[0].numel())
    squares = (a - b).square().flatten(1).sum(1)
    return ((squares + c * c).sqrt() - c).mean()


def loss(student, target, schedule, xt, t, xs, s, predict="eps"):
    """Consistency distillation loss: the student at xt, the target network one teacher's step on, at xs. Eq. 7."""
    with torch.no_grad():
        goal = consistency(target, schedule, xs, s, predict)
    return pseudo_huber(consistency(student, schedule, xt, t, predict), goal)


def learning_rate(cfg, step):
    """Twenty steps of warm-up, then a line to zero."""
    return cfg.lr * min(1, (step + 1) / 20) * (1 - step / cfg.steps)


def train(student, target, teacher, optimizer, schedule, images, cfg, predict="eps"):
    """Algorithm 2; yields the loss of each step. target: the EMA of the student, without gradients."""
    device = schedule.beta.device
    # the noise levels, from noise to the clean image, -1
    grid = torch.tensor([*ddim.timesteps(schedule, cfg.levels).tolist(), -1], device=device)
    for i, x0 in zip(range(cfg.steps), batches(images, cfg.batch, cfg.seed)):
        optimizer.param_groups[0]["lr"] = learning_rate(cfg, i)
        # a digit, noised to one of the levels
        x0 = x0.to(device)
        level = torch.randint(cfg.levels, (len(x0),), device=device)
        t = grid[level]
        s = grid[level + 1]
        xt = ddpm.add_noise(schedule, x0, t, torch.randn_like(x0))
        with run.autocast(device):
            # the same path one level on, as the teacher sees it
            xs = teacher_step(teacher, schedule, xt, t, s, predict)
            value = loss(student, target, schedule, xt, t, xs, s, predict)
        # backward pass, long gradients clipped
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        # EMA of the student, which is the target of the next step
        ddpm.update_ema(target, student, min(cfg.ema, (1 + i) / (10 + i)))
        yield value.item()


@torch.no_grad()
def sample(model, schedule, xt, n, predict="eps", clip=True):
    """Multistep consistency sampling from noise xt (B, C, H, W): yields xt, then each image. Algorithm 1."""
    x0 = None
    yield xt
    for now in ddim.timesteps(schedule, n).tolist():
        t = torch.full((len(xt),), now, device=xt.device)
        # noise again, less of it than before: to the next of n levels
        if x0 is not None:
            xt = ddpm.add_noise(schedule, x0, t, torch.randn_like(xt))
        # the end of the path, in one call
        x0 = consistency(model, schedule, xt, t, predict)
        if clip:
            x0 = x0.clamp(-1, 1)
        yield x0


def check_config(cfg):
    """Raises UserError for flags with which nothing can be trained or sampled."""
    run.check(min(cfg.steps, cfg.batch) > 0, "--steps and --batch must be at least 1")
    run.check(2 <= cfg.levels <= 1000, "--levels must be 2 to 1000")
    paces = 0 < cfg.lr < math.inf and 0 <= cfg.ema < 1
    run.check(paces, "--lr must be above 0 and finite, --ema in [0, 1)")
    run.check(cfg.samples >= 10, "--samples must be at least 10, as many as the figure shows")
    counts = cfg.sampling_steps and 0 < min(cfg.sampling_steps) <= max(cfg.sampling_steps) <= 1000
    run.check(counts, "--sampling-steps must be one or more numbers from 1 to 1000")


def main(cfg: Config) -> dict:
    """Distil, then sample teacher and student from the same noises; writes scores, digits, the student's weights."""
    check_config(cfg)
    folder = run.output(cfg.out, cfg)
    device = run.device(cfg.device)
    # the teacher, frozen; its shipped or written weights are an EMA
    path = ddim.find_weights(cfg)
    teacher, schedule, predict = ddpm.load(path, device)
    meta = checkpoint.read(path)[1]
    run.seed(cfg.seed)
    clock = run.Clock()
    metrics: dict[str, Any] = {}

    # the student begins where the teacher is; so does its EMA
    student = copy.deepcopy(teacher).requires_grad_(True).train()
    target = copy.deepcopy(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), cfg.lr, weight_decay=0.0)
    images, _ = data.mnist("train")
    steps = train(student, target, teacher, optimizer, schedule, images, cfg, predict)
    losses = list(run.progress(steps, cfg.steps))
    metrics["final_loss"] = sum(losses[-100:]) / len(losses[-100:])
    metrics["train_seconds"] = clock()
    checkpoint.write(folder / "model.safetensors", target.state_dict(), meta)

    # the same noises: teacher by DDIM, student
    noise = torch.randn(cfg.samples, 1, 28, 28).to(device)
    scores = quality.scorer(device)
    rows = {}
    for n in cfg.sampling_steps:
        chains = {
            "teacher": ddim.sample(teacher, schedule, noise, n, predict),
            "student": sample(target, schedule, noise, n, predict),
        }
        for name, chain in chains.items():
            with run.autocast(device):
                x = last(run.bar(chain, n + 1, name=f"{name}, {n} steps")).cpu()
            metrics[f"{name}, {n} steps"] = scores(x)
            rows[f"{name}, {n}"] = x[:10]

    # draw
    figures.rows(folder / "steps.png", rows)
    figures.curves(
        folder / "loss.png", {"loss": losses}, "step", "pseudo-Huber distance", smooth=50
    )
    return run.report(folder, metrics, then="python models/few_steps.py --pretrained")


if __name__ == "__main__":
    run.cli(main, Config)
