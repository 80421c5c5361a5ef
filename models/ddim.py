"""DDIM sampler, denoising diffusion implicit models: fifty steps, not 1000. Song, Meng & Ermon 2020, arXiv:2010.02502.

DDPM's training never asks that the chain be Markov, so the same network may walk any other chain with the same noise
levels: one that skips most steps, and one that adds no noise at all. Without noise, image and starting noise determine
each other: images can be turned back into noise, and points between two noises are images between two images. Equation
numbers are the paper's, its alpha is our alpha_bar.

Shapes: B images, C channels, H x W pixels, T training steps.
t is an integer tensor (B,) whose 0 is the paper's t = 1; -1 is the clean image.
Difference from the paper: time steps are spaced evenly, leading as in the authors' code, or trailing (Lin et al. 2024,
arXiv:2305.08891).

    python models/ddim.py                 # uses the weights of models/ddpm.py; trains them if there are none
    python models/ddim.py --pretrained    # uses the shipped weights
    python models/ddim.py --pretrained --counts 5 10 25 --eta 1
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from models import ddpm, quality
from utils import data, figures, run


@dataclass(frozen=True)
class Config:
    """Sample a trained DDPM in few steps, measure quality against seconds, invert and interpolate."""

    counts: tuple[int, ...] = (10, 20, 50, 100, 1000)  # numbers of steps to compare
    eta: float = 0.0  # 0: no noise (DDIM), 1: as much as DDPM
    spacing: Literal["leading", "trailing"] = "trailing"  # which steps are kept
    samples: int = 128  # digits to sample and measure at each number of steps
    weights: str = "outputs/ddpm/model.safetensors"  # what models/ddpm.py wrote
    pretrained: bool = False  # use the shipped weights instead
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/ddim"  # where the results go


def timesteps(schedule, n, spacing="trailing"):
    """n of the T steps, evenly spaced, from noisy to clean: (n,). Lin et al. 2024, Table 2.

    Leading keeps 0 and misses the last step, T - 1, which is pure noise; trailing keeps T - 1. Sampling starts from
    pure noise, so use trailing.
    """
    run.check(1 <= n <= schedule.steps, f"cannot take {n} of {schedule.steps} steps")
    known = spacing in ("leading", "trailing")
    run.check(known, f"there is no spacing '{spacing}'; there are leading and trailing")
    if spacing == "leading":
        return torch.arange(n).flip(0) * (schedule.steps // n)
    return (schedule.steps - torch.arange(n) * schedule.steps / n).round().long() - 1


def alpha_bar_roots(schedule, t):
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t): (B,) -> two (B, 1, 1, 1); t = -1 is the clean image: 1 and 0."""
    is_clean = t < 0
    index = t.clamp(min=0)
    sqrt_alpha_bar = torch.where(is_clean, 1.0, schedule.sqrt_alpha_bar[index])
    sqrt_one_minus_alpha_bar = torch.where(is_clean, 0.0, schedule.sqrt_one_minus_alpha_bar[index])
    return sqrt_alpha_bar[:, None, None, None], sqrt_one_minus_alpha_bar[:, None, None, None]


def ddim_sigma(schedule, t, t_prev, eta):
    """Standard deviation of the noise of a step: (B,), (B,) -> (B, 1, 1, 1). eta = 0: DDIM, none; eta = 1: DDPM's."""
    sqrt_alpha_bar, sqrt_one_minus_alpha_bar = alpha_bar_roots(schedule, t)
    if eta == 0:  # no division: on the way up from the clean image sqrt(1 - alpha_bar) is 0
        return torch.zeros_like(sqrt_alpha_bar)
    sqrt_alpha_bar_prev, sqrt_one_minus_alpha_bar_prev = alpha_bar_roots(schedule, t_prev)
    ratio = sqrt_one_minus_alpha_bar_prev / sqrt_one_minus_alpha_bar
    return eta * ratio * (1 - sqrt_alpha_bar**2 / sqrt_alpha_bar_prev**2).sqrt()  # Eq. 16


def step(schedule, xt, t, t_prev, eps, eta=0.0, noise=None, clip=True):
    """From step t to t_prev < t: (B, C, H, W), (B,), (B,), (B, C, H, W) -> (B, C, H, W). Eq. 12, term by term."""
    # the coefficients, in double precision, then in that of the images
    sqrt_alpha_bar, sqrt_one_minus_alpha_bar = alpha_bar_roots(schedule, t)
    sqrt_alpha_bar_prev, sqrt_one_minus_alpha_bar_prev = alpha_bar_roots(schedule, t_prev)
    sigma = ddim_sigma(schedule, t, t_prev, eta)
    direction_coef = (sqrt_one_minus_alpha_bar_prev**2 - sigma**2).clamp(min=0).sqrt()
    sqrt_alpha_bar = sqrt_alpha_bar.to(xt.dtype)
    sqrt_one_minus_alpha_bar = sqrt_one_minus_alpha_bar.to(xt.dtype)
    sqrt_alpha_bar_prev = sqrt_alpha_bar_prev.to(xt.dtype)
    direction_coef = direction_coef.to(xt.dtype)
    sigma = sigma.to(xt.dtype)

    # "predicted x0"; a clipped one goes with another eps, so that the two still make up xt
    x0 = (xt - sqrt_one_minus_alpha_bar * eps) / sqrt_alpha_bar  # Eq. 9
    if clip:
        x0 = x0.clamp(-1, 1)
        eps = (xt - sqrt_alpha_bar * x0) / sqrt_one_minus_alpha_bar
    # "direction pointing to xt"
    direction = direction_coef * eps
    x_prev = sqrt_alpha_bar_prev * x0 + direction
    if eta == 0:
        return x_prev
    # "random noise"
    if noise is None:
        noise = torch.randn_like(xt)
    return x_prev + sigma * noise


@torch.no_grad()
def sample(model, schedule, xt, n, predict="eps", spacing="trailing", eta=0.0, clip=True):
    """From noise xt (B, C, H, W) to images in n steps; yields every x. clip: keep x0 in [-1, 1]; not for latents."""
    # the steps that are kept, from noisy to clean; -1 is the clean image
    steps = [*timesteps(schedule, n, spacing).tolist(), -1]
    yield xt
    for now, before in zip(steps[:-1], steps[1:], strict=True):
        t = torch.full((len(xt),), now, device=xt.device)
        t_prev = torch.full((len(xt),), before, device=xt.device)
        # which noise does the network see in xt?
        output = model(xt, t).float()
        eps = ddpm.to_eps(schedule, xt, t, output, predict)
        # the same image with less of it
        xt = step(schedule, xt, t, t_prev, eps, eta, clip=clip)
        yield xt


@torch.no_grad()
def invert(model, schedule, x0, n, predict="eps", rounds=8):
    """DDIM inversion: from images to the noise that `sample` turns into them; yields every x. Sec. 4.3.

    The same steps, walked upwards. The way down asks the network at the upper end of each step, which the way up does
    not know yet: guess it from the lower end, and use the answer as a better guess, a few rounds (one round is the
    nearest to the paper's). This is a fixed-point iteration.
    """
    # the steps of `sample`, from clean to noisy
    steps = [-1, *timesteps(schedule, n).flip(0).tolist()]
    x = x0
    yield x
    for now, above in zip(steps[:-1], steps[1:], strict=True):
        t = torch.full((len(x),), now, device=x.device)
        t_above = torch.full((len(x),), above, device=x.device)
        # first guess of the upper end: the lower end
        x_above = x
        for _ in range(rounds):
            # the noise that the way down would see there, and where the step upwards with it ends
            output = model(x_above, t_above).float()
            eps = ddpm.to_eps(schedule, x_above, t_above, output, predict)
            x_above = step(schedule, x, t, t_above, eps, clip=False)
        x = x_above
        yield x


def last(chain):
    """The last of what a generator yields."""
    for x in chain:  # noqa: B007
        pass
    return x


def slerp(a, b, weight):
    """From noise a to noise b on the sphere, where Gaussian noise lives; a straight line leaves it. Eq. 67.

    Raises UserError for a noise of zeros and for opposite noises: no way between them is the shortest.
    """
    # the angle between the two
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = cosine.clamp(-1, 1).acos()
    if angle < 1e-3:  # where the formula is 0 / 0, arc and line are one
        return a + weight * (b - a)
    run.check(
        angle.sin() > 1e-3,
        "no arc between these two noises: one is zero, or they are opposite; draw another",
    )
    # shares that keep the point on the sphere
    share_a = ((1 - weight) * angle).sin()
    share_b = (weight * angle).sin()
    return (share_a * a + share_b * b) / angle.sin()


def find_weights(cfg):
    """The network to sample: shipped, or trained before, or trained now."""
    if cfg.pretrained:
        return ddpm.WEIGHTS
    if not Path(cfg.weights).is_file() and cfg.weights == Config.weights:
        train = "training them first with models/ddpm.py; --pretrained takes shipped ones"
        print(f"no weights at {cfg.weights}: {train}")
        out = str(Path(cfg.weights).parent)
        ddpm.main(replace(ddpm.Config(), seed=cfg.seed, device=cfg.device, out=out))
    return cfg.weights


def main(cfg: Config) -> dict:
    """Compare numbers of steps, turn test digits into noise and back, and walk from digit to digit."""
    run.check(cfg.counts and min(cfg.counts) > 0, "--counts must be one or more numbers from 1 on")
    run.check(cfg.samples >= 10, "--samples must be at least 10, as many as the figures show")
    run.check(max(cfg.counts) <= 1000, "--counts: the schedule has 1000 steps and no more")
    run.check(0 <= cfg.eta <= 1, "--eta must be in [0, 1]: 0 is DDIM, 1 is DDPM")
    folder = run.output(cfg.out, cfg)
    device = run.device(cfg.device)
    model, schedule, predict = ddpm.load(find_weights(cfg), device)
    run.check(model.in_channels == 1, "--weights draws pictures in colour; digits are measured")
    run.seed(cfg.seed)
    judge = quality.scorer(device)
    metrics = {}
    shown = {}
    noise = torch.randn(cfg.samples, 1, 28, 28).to(device)
    with run.autocast(device):
        # the same noises in few steps and in many: quality and seconds
        for n in cfg.counts:
            clock = run.Clock()
            chain = sample(model, schedule, noise, n, predict, cfg.spacing, cfg.eta)
            images = last(run.bar(chain, n + 1, name=f"{n} steps")).cpu()
            seconds = clock() * 64 / cfg.samples
            metrics[f"{n} steps"] = judge(images) | {"seconds_per_64": seconds}
            shown[f"{n} steps"] = images[:10]

        # inversion: test digits become noise, and digits again
        digits = data.to_float(data.mnist("test")[0][:10]).to(device)
        back = {}
        for n in (20, 100):
            chain = invert(model, schedule, digits, n, predict)
            found = last(run.bar(chain, n + 1, name=f"invert, {n} steps"))
            back[n] = last(sample(model, schedule, found, n, predict)).cpu()

        # interpolation: four walks of ten steps, each between two noises
        a = noise[:4].repeat_interleave(10, 0)
        b = noise[4:8].repeat_interleave(10, 0)
        weights = torch.linspace(0, 1, 10).repeat(4)
        path = torch.cat([slerp(x[None], y[None], w) for x, y, w in zip(a, b, weights)])
        chain = sample(model, schedule, path, 50, predict)
        between = last(run.bar(chain, 51, name="interpolate")).cpu()

    # how far is an inverted digit from the one that it was?
    digits = digits.cpu()
    for n, x in back.items():
        metrics[f"inversion_error_{n}_steps"] = float((x - digits).abs().mean())

    # draw: quality over the number of steps, inversion, interpolation
    figures.rows(folder / "steps.png", shown)
    for name, score, label in (
        ("quality", "recognised", f"share recognised, of {cfg.samples}"),
        ("frechet", "frechet", "Frechet distance to test digits"),
    ):
        values = [metrics[f"{n} steps"][score] for n in cfg.counts]
        curve = {label: (cfg.counts, values)}
        figures.curves(folder / f"{name}.png", curve, "DDIM steps a digit", label, log="x")
    rows = {"test digits": digits} | {f"{n} steps": x for n, x in back.items()}
    figures.rows(folder / "inversion.png", rows)
    rows = {f"pair {i + 1}": between[10 * i : 10 * i + 10] for i in range(4)}
    figures.rows(folder / "interpolation.png", rows)
    return run.report(folder, metrics, then="python models/autoencoder.py")


if __name__ == "__main__":
    run.cli(main, Config)
