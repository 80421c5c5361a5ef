"""Denoising Diffusion Probabilistic Models: digits grow out of noise. Ho, Jain & Abbeel 2020, arXiv:2006.11239.

Add a little Gaussian noise a thousand times and nothing of an image is left. Train a network to see which noise was
added; then walk the thousand steps back, from pure noise to an image that nobody drew. Equation numbers are the
paper's.

Shapes: B images, C channels, H x W pixels, T steps of noise. t is an integer tensor (B,) whose 0 is the paper's t = 1.
Differences from the paper: the network may predict eps, x0 or v (Salimans & Ho 2022, arXiv:2202.00512), by default v
under the cosine schedule (Nichol & Dhariwal 2021, arXiv:2102.09672); the paper's eps and linear schedule are flags.

    python models/ddpm.py                                      # train, sample, measure: 5.0 min on two CPU cores
    python models/ddpm.py --pretrained                         # sample from the shipped weights
    python models/ddpm.py --predict eps --schedule linear      # as in the paper
    python models/ddpm.py --channels 128 256 --batch 256 --steps 40000      # larger, for a GPU
"""

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from models import quality
from models.unet import UNet
from models.vae import learning_rate
from utils import checkpoint, data, figures, run

WEIGHTS = Path(__file__).parent / "weights" / "ddpm.safetensors"
Predict = Literal["eps", "x0", "v"]


@dataclass(frozen=True)
class Config:
    """Train a diffusion model on MNIST, sample from it and measure the samples."""

    steps: int = 1100  # training steps
    batch: int = 64  # images per step
    lr: float = 2e-3  # peak learning rate: 100 steps of warm-up, then a cosine to zero
    schedule: Literal["linear", "cosine"] = "cosine"  # how the noise grows
    predict: Predict = "v"  # what the network says: the noise, the image, or v between the two
    channels: tuple[int, ...] = (32, 64)  # widths of the U-Net, one per resolution
    layers: int = 2  # residual blocks per resolution
    ema: float = 0.995  # EMA decay: samples come from an exponential moving average of the weights
    samples: int = 64  # digits to sample and measure
    pretrained: bool = False  # start from the shipped weights and skip the training
    resume: bool = False  # go on from the last checkpoint in --out, bit for bit
    save_every: int = 500  # steps between checkpoints
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/ddpm"  # where the results go


class Schedule:
    """The noise of each step: beta, alpha = 1 - beta and alpha_bar = prod(alpha), each (T,); index 0 is t = 1. Sec. 2.

    signal = sqrt(alpha_bar) and noise = sqrt(1 - alpha_bar) are kept in double precision: in single, 1 - 0.9999 leaves
    three digits. Raises UserError for another kind.
    """

    def __init__(self, steps=1000, beta_start=1e-4, beta_end=0.02, kind="linear"):
        run.check(kind in ("linear", "cosine"), f"there is no schedule '{kind}'; there are linear and cosine")
        self.steps = steps
        if kind == "linear":  # Sec. 4
            beta = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        else:  # Nichol & Dhariwal 2021, Eq. 17
            f = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        alpha_bar = (1 - beta).cumprod(0)
        self.beta, self.alpha, self.alpha_bar = beta.float(), (1 - beta).float(), alpha_bar.float()
        self.signal, self.noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def to(self, device):
        for name, table in vars(self).items():
            if isinstance(table, torch.Tensor):
                setattr(self, name, (table.float() if torch.device(device).type == "mps" else table).to(device))
        return self


def at(table, t):
    """table[t] for a batch: (T,), (B,) -> (B, 1, 1, 1) in single precision, to be multiplied with images."""
    return table[t][:, None, None, None].float()


def add_noise(schedule, x0, t, eps):
    """t steps of noise at once: (B, C, H, W), (B,), (B, C, H, W) -> xt."""
    return at(schedule.signal, t) * x0 + at(schedule.noise, t) * eps  # Eq. 4


def predict_x0(schedule, xt, t, eps):
    """The clean image, if eps was the noise in xt."""
    return (xt - at(schedule.noise, t) * eps) / at(schedule.signal, t)  # Eq. 15


def posterior(schedule, x0, xt, t):
    """Mean (B, C, H, W) and variance (B, 1, 1, 1) of x_{t-1}, if both ends are known."""
    signal, noise = schedule.signal, schedule.noise  # sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)
    signal_prev, noise_prev = (torch.cat([x.new_tensor([end]), x[:-1]]) for x, end in ((signal, 1.0), (noise, 0.0)))
    sqrt_alpha = signal / signal_prev
    beta = 1 - sqrt_alpha**2
    mean = at(signal_prev * beta / noise**2, t) * x0 + at(sqrt_alpha * noise_prev**2 / noise**2, t) * xt  # Eq. 7
    return mean, at(noise_prev**2 / noise**2 * beta, t)  # Eq. 7


def known(predict):
    """Raises UserError unless a network can be asked for that."""
    run.check(predict in ("eps", "x0", "v"), f"a network cannot predict '{predict}'; it may be eps, x0 or v")


def target(schedule, x0, t, eps, predict="eps"):
    """What the network should say: the noise, the image, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0."""
    known(predict)
    if predict == "v":
        return at(schedule.signal, t) * eps - at(schedule.noise, t) * x0  # Salimans & Ho 2022, App. D
    return eps if predict == "eps" else x0


def to_eps(schedule, xt, t, output, predict="eps"):
    """The noise that the network's output stands for; exact for all three kinds."""
    known(predict)
    signal, noise = at(schedule.signal, t), at(schedule.noise, t)
    if predict == "v":
        return signal * output + noise * xt
    return output if predict == "eps" else (xt - signal * output) / noise


def loss(model, schedule, x0, predict="eps", t=None, eps=None):
    """Mean squared error, each image at a random t: (B, C, H, W) -> (). Algorithm 1; t, eps: drawn if not given."""
    t = torch.randint(schedule.steps, (len(x0),), device=x0.device) if t is None else t
    eps = torch.randn_like(x0) if eps is None else eps
    output = model(add_noise(schedule, x0, t, eps), t)
    return F.mse_loss(output.float(), target(schedule, x0, t, eps, predict))  # Eq. 14


def step(schedule, xt, t, eps, noise=None, clip=True):
    """x_{t-1} from x_t and the predicted noise. Algorithm 2; noise: (B, C, H, W), ignored at the last step, t = 0.

    clip: keep x0 in [-1, 1], as the authors' code does; not for latents.
    """
    x0 = predict_x0(schedule, xt, t, eps)
    if clip:
        x0 = x0.clamp(-1, 1)
    mean, variance = posterior(schedule, x0, xt, t)
    noise = torch.randn_like(xt) if noise is None else noise
    return mean + (t > 0)[:, None, None, None] * variance.sqrt() * noise


@torch.no_grad()
def sample(model, schedule, shape, predict="eps", clip=True):
    """From noise to images: yields x_T, then x_{t-1} of every step; the last are the samples. Algorithm 2."""
    device = schedule.beta.device
    xt = torch.randn(shape, device=device)
    yield xt
    for i in reversed(range(schedule.steps)):
        t = torch.full((shape[0],), i, device=device)
        eps = to_eps(schedule, xt, t, model(xt, t).float(), predict)
        xt = step(schedule, xt, t, eps, clip=clip)
        yield xt


def shuffled(items, batch, seed=0, start=0):
    """Batches in a new order every epoch, for ever. The seed alone sets it: `start` goes on where it broke off."""
    per_epoch = len(items) // batch
    run.check(per_epoch > 0, f"--batch {batch} is more than the {len(items)} images there are")
    while True:
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed + start // per_epoch))
        yield items[order[start % per_epoch * batch :][:batch]]
        start += 1


def batches(images, batch, seed=0, start=0):
    """Shuffled batches of uint8 images as floats in [-1, 1]."""
    return map(data.to_float, shuffled(images, batch, seed, start))


def average(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, for every weight."""
    for slow, fast in zip(ema.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast.detach(), 1 - decay)


def train(model, ema, optimizer, schedule, images, cfg, start=0):
    """Steps `start` to cfg.steps of Algorithm 1; yields the loss of each."""
    device = schedule.beta.device
    for i, x0 in zip(range(start, cfg.steps), batches(images, cfg.batch, cfg.seed, start)):
        optimizer.param_groups[0]["lr"] = learning_rate(cfg, i)
        with run.autocast(device):
            value = loss(model, schedule, x0.to(device), cfg.predict)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average(ema, model, min(cfg.ema, (1 + i) / (10 + i)))
        yield value.item()


def possible(channels):
    """Raises UserError if there is no such U-Net for digits."""
    run.check(1 <= len(channels) <= 2, "--channels takes one or two widths: 14 x 14 positions can be halved once")


def build(channels, layers, **_):
    """The U-Net of this chapter: pixels folded 2 x 2, attention at the coarsest resolution."""
    possible(channels)
    attention = [i == len(channels) - 1 for i in range(len(channels))]
    return UNet(1, channels, layers, attention, patch=2)


def load(path, device="cpu"):
    """Weights written by this script -> (model, schedule, predict), ready to sample."""
    model, meta = checkpoint.load_model(path, build, device)
    return model, Schedule(kind=meta["schedule"]).to(device), meta["predict"]


def main(cfg: Config) -> dict:
    """Train (or load), sample, measure; writes the digits, the film strip, the loss curve and the weights."""
    run.check(min(cfg.steps, cfg.batch, cfg.layers) > 0, "--steps, --batch and --layers must be at least 1")
    run.check(cfg.save_every >= 0, "--save-every must not be negative; 0 saves at the end only")
    run.check(0 < cfg.lr < math.inf and 0 <= cfg.ema < 1, "--lr must be above 0 and finite, --ema in [0, 1)")
    run.check(cfg.samples >= 6, "--samples must be at least 6, as many as the film shows")
    run.check(all(c > 0 and c % 8 == 0 for c in cfg.channels), "--channels must be multiples of 8, the norm groups")
    possible(cfg.channels)
    run.seed(cfg.seed)
    folder, device, clock = run.output(cfg.out, cfg), run.device(cfg.device), run.Clock()
    metrics, state = {}, folder / "state.safetensors"
    if cfg.pretrained:
        model, schedule, predict = load(WEIGHTS, device)
    else:
        schedule, predict = Schedule(kind=cfg.schedule).to(device), cfg.predict
        model = build(**asdict(cfg)).to(device)
        ema = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0.01)
        parts, losses = {"model": model, "ema": ema, "optimizer": optimizer}, []
        if cfg.resume:
            before = checkpoint.load_state(state, cfg, **parts)
            losses, clock = before["losses"], run.Clock(before["seconds"])
        save = lambda: checkpoint.save_state(state, **parts, losses=losses, seconds=clock(), config=asdict(cfg))  # noqa: E731
        images, _ = data.mnist("train")
        steps = train(model, ema, optimizer, schedule, images, cfg, len(losses))
        for value in run.progress(steps, cfg.steps, len(losses), cfg.save_every, save):
            losses.append(value)
        save()
        metrics |= {"final_loss": sum(losses[-100:]) / len(losses[-100:]), "train_seconds": clock()}
        figures.curves(folder / "loss.png", {"loss": losses}, "step", f"squared error of {predict}", smooth=50)
        checkpoint.write(folder / "model.safetensors", ema.state_dict(), asdict(cfg))
        model = ema.eval()
    clock = run.Clock()
    with run.autocast(device):
        chain = run.bar(sample(model, schedule, (cfg.samples, 1, 28, 28), predict), schedule.steps + 1, name="sample")
        film = [xt[:10].cpu() if i < schedule.steps else xt.cpu() for i, xt in enumerate(chain)]
    digits = film[-1]
    metrics |= {"sample_seconds": clock(), "parameters": sum(p.numel() for p in model.parameters())}
    metrics |= quality.judge(device)(digits)
    figures.grid(folder / "samples.png", digits[:64])
    shown = [1000, 800, 600, 500, 400, 300, 200, 100, 50, 0]  # the paper's t: x_1000 is noise, x_0 the digit
    strips = {f"digit {j + 1}": torch.stack([film[1000 - t][j] for t in shown]) for j in range(6)}
    figures.rows(folder / "film.png", strips, [f"t={t}" for t in shown])
    return run.report(folder, metrics, then=f"open {folder}/film.png; then python models/ddim.py")


if __name__ == "__main__":
    run.cli(main, Config)
