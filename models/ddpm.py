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
    python models/ddpm.py --data FOLDER                        # pictures of your own
    python models/ddpm.py --channels 128 256 --batch 256 --steps 40000      # larger, for a GPU
"""

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from models import own_images, quality
from models.batches import batches
from models.digit_unet import build, check_channels
from models.prediction_type import Predict, at, target, to_eps
from models.training_state import TrainingState
from models.vae import learning_rate
from utils import checkpoint, figures, run

WEIGHTS = Path(__file__).parent / "weights" / "ddpm.safetensors"


@dataclass(frozen=True)
class Config:
    """Train a diffusion model on MNIST, sample from it and measure the samples."""

    steps: int = 1100  # training steps
    batch: int = 64  # images per step
    lr: float = 2e-3  # peak learning rate: 100 steps of warm-up, then a cosine to zero
    schedule: Literal["linear", "cosine"] = "cosine"  # how the noise grows
    predict: Predict = "v"  # what the network predicts: the noise, the image, or v (v-prediction)
    channels: tuple[int, ...] = (32, 64)  # widths of the U-Net, one per resolution
    layers: int = 2  # residual blocks per resolution
    ema: float = 0.995  # EMA decay: samples come from an exponential moving average of the weights
    samples: int = 64  # digits to sample and measure
    data: str = ""  # train on the pictures in this folder, 32 x 32 in colour, instead of digits
    pretrained: bool = False  # start from the shipped weights and skip the training
    resume: bool = False  # go on from the last checkpoint in --out, bit for bit
    save_every: int = 500  # steps between checkpoints
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/ddpm"  # where the results go


def linear_beta(steps, beta_start=1e-4, beta_end=0.02):
    """The noise of each step grows in a line: (T,). Sec. 4."""
    return torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)


def cosine_beta(steps, offset=0.008):
    """The noise of each step under which alpha_bar falls like cos^2: (T,). Nichol & Dhariwal 2021, Eq. 17."""
    t = torch.arange(steps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((t / steps + offset) / (1 + offset) * math.pi / 2) ** 2
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    return beta.clamp(max=0.999)  # else alpha_bar ends at 0, and Eq. 15 divides by it


class Schedule:
    """The noise schedule: every coefficient of the forward process and of its posterior, each a table (T,). Sec. 2.

    Index 0 is t = 1. All are computed in double precision, and what is divided or rooted later stays in it: in single,
    1 - 0.9999 leaves three digits. beta: these (T,) instead of a kind. Raises UserError for another kind.
    """

    def __init__(self, steps=1000, beta_start=1e-4, beta_end=0.02, kind="linear", beta=None):
        run.check(
            kind in ("linear", "cosine"),
            f"there is no schedule '{kind}'; there are linear and cosine",
        )
        if beta is None:
            linear = kind == "linear"
            beta = linear_beta(steps, beta_start, beta_end) if linear else cosine_beta(steps)
        self.steps = len(beta)
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)
        # Of t - 1; before the first step it is 1
        alpha_bar_prev = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])

        self.beta = beta.float()
        self.alpha = alpha.float()
        self.alpha_bar = alpha_bar.float()

        # forward process q(x_t | x_0): Eq. 4
        self.sqrt_alpha_bar = alpha_bar.sqrt()
        self.sqrt_one_minus_alpha_bar = (1 - alpha_bar).sqrt()

        # posterior q(x_{t-1} | x_t, x_0): Eq. 7
        self.posterior_mean_coef_x0 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
        self.posterior_mean_coef_xt = alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
        self.posterior_variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta

    def to(self, device):
        """Move every table to the device, in place."""
        for name, table in vars(self).items():
            if isinstance(table, torch.Tensor):
                if torch.device(device).type == "mps":  # which has no double precision
                    table = table.float()
                setattr(self, name, table.to(device))
        return self


def add_noise(schedule, x0, t, eps):
    """Forward process q(x_t | x_0), t steps of noise at once: (B, C, H, W), (B,), (B, C, H, W) -> xt (B, C, H, W)."""
    sqrt_alpha_bar = at(schedule.sqrt_alpha_bar, t)
    sqrt_one_minus_alpha_bar = at(schedule.sqrt_one_minus_alpha_bar, t)
    return sqrt_alpha_bar * x0 + sqrt_one_minus_alpha_bar * eps  # Eq. 4


def predict_x0(schedule, xt, t, eps):
    """The clean image, if eps was the noise in xt: Eq. 4 solved for x0."""
    sqrt_alpha_bar = at(schedule.sqrt_alpha_bar, t)
    sqrt_one_minus_alpha_bar = at(schedule.sqrt_one_minus_alpha_bar, t)
    return (xt - sqrt_one_minus_alpha_bar * eps) / sqrt_alpha_bar  # Eq. 15


def posterior(schedule, x0, xt, t):
    """Posterior q(x_{t-1} | x_t, x_0), a Gaussian: its mean (B, C, H, W) and variance (B, 1, 1, 1)."""
    # Eq. 7
    coef_x0 = at(schedule.posterior_mean_coef_x0, t)
    coef_xt = at(schedule.posterior_mean_coef_xt, t)
    mean = coef_x0 * x0 + coef_xt * xt
    variance = at(schedule.posterior_variance, t)
    return mean, variance


def loss(model, schedule, x0, predict="eps", t=None, eps=None):
    """Mean squared error, each image at a random t: (B, C, H, W) -> (). Algorithm 1; t, eps: drawn if not given."""
    # Algorithm 1, line 3: t ~ Uniform(1 .. T), another one for each image
    if t is None:
        t = torch.randint(schedule.steps, (len(x0),), device=x0.device)
    # line 4: eps ~ N(0, I)
    if eps is None:
        eps = torch.randn_like(x0)
    # line 5: the squared error, whose gradient the training loop takes
    xt = add_noise(schedule, x0, t, eps)
    output = model(xt, t)
    return F.mse_loss(output.float(), target(schedule, x0, t, eps, predict))  # Eq. 14


def step(schedule, xt, t, eps, noise=None, clip=True):
    """x_{t-1} from x_t and the predicted noise. Algorithm 2; noise: (B, C, H, W), ignored at the last step, t = 0.

    clip: keep x0 in [-1, 1], as the authors' code does; not for latents.
    """
    # the image that the predicted noise implies: Eq. 15
    x0 = predict_x0(schedule, xt, t, eps)
    if clip:
        x0 = x0.clamp(-1, 1)
    # the Gaussian of x_{t-1}, given x_t and that image: Eq. 7
    mean, variance = posterior(schedule, x0, xt, t)
    # Algorithm 2, line 3: z ~ N(0, I), but z = 0 at the last step
    if noise is None:
        noise = torch.randn_like(xt)
    is_last = (t == 0)[:, None, None, None]
    z = torch.where(is_last, 0.0, noise)
    # line 4: a draw from that Gaussian
    return mean + variance.sqrt() * z


@torch.no_grad()
def sample(model, schedule, shape, predict="eps", clip=True):
    """From noise to images: yields x_T, then x_{t-1} of every step; the last are the samples. Algorithm 2."""
    device = schedule.beta.device
    # Algorithm 2, line 1: x_T ~ N(0, I)
    xt = torch.randn(shape, device=device)
    yield xt
    # line 2: for t = T, ..., 1
    for i in reversed(range(schedule.steps)):
        t = torch.full((shape[0],), i, device=device)
        # which noise does the network see in x_t?
        output = model(xt, t).float()
        eps = to_eps(schedule, xt, t, output, predict)
        # lines 3 and 4
        xt = step(schedule, xt, t, eps, clip=clip)
        yield xt


@torch.no_grad()
def update_ema(ema, model, decay):
    """Exponential moving average (EMA) of the weights: ema <- decay * ema + (1 - decay) * model."""
    for ema_weight, weight in zip(ema.parameters(), model.parameters(), strict=True):
        ema_weight.lerp_(weight, 1 - decay)


def train(model, ema, optimizer, schedule, images, cfg, start=0):
    """Steps `start` to cfg.steps of Algorithm 1; yields the loss of each."""
    device = schedule.beta.device
    for i, x0 in zip(range(start, cfg.steps), batches(images, cfg.batch, cfg.seed, start)):
        # learning rate of this step: warm-up, then a cosine
        optimizer.param_groups[0]["lr"] = learning_rate(cfg, i)
        # forward pass and loss, matrix products in bf16
        with run.autocast(device):
            value = loss(model, schedule, x0.to(device), cfg.predict)
        # backward pass; one bad batch must not throw the weights away, so long gradients are clipped
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # EMA of the weights; a small decay in the first steps lets it forget its random start
        decay = min(cfg.ema, (1 + i) / (10 + i))
        update_ema(ema, model, decay)
        yield value.item()


def load(path, device="cpu"):
    """Weights written by this script -> (model, schedule, predict), ready to sample."""
    model, meta = checkpoint.load_model(path, build, device)
    schedule = Schedule(kind=meta["schedule"]).to(device)
    return model, schedule, meta["predict"]


def main(cfg: Config) -> dict:
    """Train (or load), sample, measure; writes the digits, the film strip, the loss curve and the weights."""
    sizes = (cfg.steps, cfg.batch, cfg.layers)
    run.check(min(sizes) > 0, "--steps, --batch and --layers must be at least 1")
    run.check(cfg.save_every >= 0, "--save-every must not be negative; 0 saves at the end only")
    run.check(
        0 < cfg.lr < math.inf and 0 <= cfg.ema < 1,
        "--lr must be above 0 and finite, --ema in [0, 1)",
    )
    run.check(cfg.samples >= 6, "--samples must be at least 6, as many as the film shows")
    check_channels(cfg.channels)
    images, _ = own_images.training_set(cfg)
    shape = tuple(images.shape[1:])
    run.seed(cfg.seed)
    folder = run.output(cfg.out, cfg)
    device = run.device(cfg.device)
    clock = run.Clock()
    metrics = {}

    if cfg.pretrained:
        model, schedule, predict = load(WEIGHTS, device)
    else:
        # model, its EMA, optimizer
        schedule = Schedule(kind=cfg.schedule).to(device)
        predict = cfg.predict
        meta = asdict(cfg) | {"in_channels": shape[0]}
        model = build(**meta).to(device)
        ema = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0.01)
        # all that a resumed run needs to go on bit for bit
        state = TrainingState(folder, cfg, clock, model=model, ema=ema, optimizer=optimizer)
        start = len(state.losses)

        # train
        steps = train(model, ema, optimizer, schedule, images, cfg, start)
        for value in run.progress(steps, cfg.steps, start, cfg.save_every, state.save):
            state.losses.append(value)
        state.save()
        metrics["final_loss"] = state.final_loss()
        metrics["train_seconds"] = state.clock()
        state.draw_losses(f"squared error of {predict}")

        # the EMA is what is kept and sampled from
        checkpoint.write(folder / "model.safetensors", ema.state_dict(), meta)
        model = ema.eval()

    # sample; of the steps on the way ten images are enough
    clock = run.Clock()
    with run.autocast(device):
        chain = sample(model, schedule, (cfg.samples, *shape), predict)
        chain = run.bar(chain, schedule.steps + 1, name="sample")
        film = [xt[:10].cpu() if i < schedule.steps else xt.cpu() for i, xt in enumerate(chain)]
    digits = film[-1]

    # measure
    metrics["sample_seconds"] = clock()
    metrics["parameters"] = sum(p.numel() for p in model.parameters())
    if cfg.data:
        metrics |= own_images.score(folder, images, digits)
    else:
        metrics |= quality.scorer(device)(digits)

    # draw
    figures.grid(folder / "samples.png", digits[:64])
    # The paper's t: x_1000 is noise, x_0 the digit
    shown = [1000, 800, 600, 500, 400, 300, 200, 100, 50, 0]
    strips = {f"digit {j + 1}": torch.stack([film[1000 - t][j] for t in shown]) for j in range(6)}
    figures.rows(folder / "film.png", strips, [f"t={t}" for t in shown])
    return run.report(folder, metrics, then=f"open {folder}/film.png; then python models/ddim.py")


if __name__ == "__main__":
    run.cli(main, Config)
