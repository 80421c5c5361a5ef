"""Flow matching (rectified flow): straight lines from noise to image, and a network that predicts the velocity.

Lipman et al. 2022, arXiv:2210.02747 (L); Liu, Gong & Liu 2022, arXiv:2209.03003 (R). Walk from a noise to an image in a
straight line, and ask the network at some point of it for the velocity. Its answer is the mean over all lines through
that point. To sample, start from noise and follow the answers: an ordinary differential equation (ODE), for which a few
large steps are enough. There is no noise schedule. (E) is Esser et al. 2024, arXiv:2403.03206, Stable Diffusion 3.

Shapes: B images, C channels, H x W pixels. t in [0, 1] is a float tensor (B,): as in both papers 0 is the noise x0 and
1 the image x1, so the velocity points from noise to image. Elsewhere in this chapter x0 is the image, and Stable
Diffusion 3 and diffusers count the other way round: their sigma is 1 - t, their velocity minus ours. The network is
asked at 1000 t, the range of ddpm's time steps.
Differences from the papers: the U-Net, optimizer and EMA of `ddpm.py`; the network reads the class, and sampling is
guided (see `dit.py`); logit-normal times (E); Euler and Heun instead of an adaptive solver.

    python models/flow.py                                    # train, sample in 1 to 50 steps, measure: 4.1 CPU minutes
    python models/flow.py --pretrained                       # sample from the shipped weights
    python models/flow.py --times uniform --dropout 1 --guidance-scale 0    # the papers' times, and no classes
"""

import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro

from models import digit_unet, guidance_study, own_images
from models.batches import shuffled
from models.ddim import last
from models.ddpm import update_ema
from models.dit import classifier_free_guidance, drop_labels
from models.flow_flags import check_flow
from models.training_state import TrainingState
from models.vae import learning_rate
from utils import checkpoint, data, figures, run

WEIGHTS = Path(__file__).parent / "weights" / "flow.safetensors"
NO_CLASS = 10  # stands for none of the digits 0..9
Times = Literal["uniform", "logit-normal"]
Solver = Literal["euler", "heun"]


@dataclass(frozen=True)
class Config:
    """Train a flow on MNIST, sample from it in few steps and in many, measure the samples."""

    steps: int = 1100  # training steps
    batch: int = 64  # images per step
    lr: float = 2e-3  # peak learning rate: 100 steps of warm-up, then a cosine to zero
    times: Times = "logit-normal"  # distribution of the training times
    dropout: float = 0.1  # share of labels replaced by "no class", which guidance needs
    channels: tuple[int, ...] = (32, 64)  # widths of the U-Net, one per resolution
    layers: int = 2  # residual blocks per resolution
    ema: float = 0.995  # EMA decay: samples come from an exponential moving average of the weights
    sampling_steps: tuple[int, ...] = (1, 2, 4, 10, 50)  # numbers of solver steps to compare
    solver: Solver = "euler"  # of the ODE; heun calls the network twice a step
    # classifier-free guidance; 1 is no guidance, 0 ignores the class
    guidance_scale: Annotated[float, tyro.conf.arg(aliases=["--guidance"])] = 1.5
    samples: int = 512  # digits to sample and measure at each number of steps
    data: str = ""  # train on the pictures in this folder, 32 x 32 in colour, instead of digits
    pretrained: bool = False  # start from the shipped weights and skip the training
    resume: bool = False  # go on from the last checkpoint in --out, bit for bit
    save_every: int = 500  # steps between checkpoints
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/flow"  # where the results go


def interpolate(x0, x1, t):
    """The point at time t of the straight line from noise to image: (B, C, H, W) twice, (B,) -> xt (B, C, H, W)."""
    t = t[:, None, None, None]
    return (1 - t) * x0 + t * x1  # (L) Eq. 22, sigma_min = 0


def velocity(x0, x1):
    """dx/dt along that line, the same at all times: (B, C, H, W) twice -> (B, C, H, W). What the network learns."""
    return x1 - x0


def draw_times(n, times="uniform", device="cpu"):
    """Training times in (0, 1): (n,). Logit-normal: the sigmoid of a standard normal, (E) Sec. 3.1.

    Simple answers are best at both ends, the mean image minus the noise and the image; logit-normal times train the
    middle more often. Raises UserError for another distribution.
    """
    run.check(times in ("uniform", "logit-normal"), f"there is no distribution '{times}' of times")
    if times == "uniform":
        return torch.rand(n, device=device)
    return torch.randn(n, device=device).sigmoid()


def predict(model, xt, t):
    """The network's velocity at times t in [0, 1], (B,) or one for all: (B, C, H, W) -> (B, C, H, W)."""
    t = torch.as_tensor(t, device=xt.device).expand(len(xt))
    return model(xt, 1000 * t).float()


def loss(model, x0, x1, t):
    """Conditional flow matching: mean squared error of the velocity, (B, C, H, W) twice, (B,) -> ()."""
    xt = interpolate(x0, x1, t)
    return F.mse_loss(predict(model, xt, t), velocity(x0, x1))  # (L) Eq. 23, (R) Eq. 1


def euler_step(model, xt, t, t_next):
    """One step of the ODE along the velocity at its beginning: (B, C, H, W), two floats -> (B, C, H, W)."""
    return xt + (t_next - t) * predict(model, xt, t)


def heun_step(model, xt, t, t_next):
    """One step along the mean of the velocities at both ends: two calls, and an error of second order."""
    v = predict(model, xt, t)
    # where Euler would end, and the velocity there; at t = 1 a network knows nothing of the noise, so Euler ends it
    guess = xt + (t_next - t) * v
    if t_next == 1:
        return guess
    v_next = predict(model, guess, t_next)
    return xt + (t_next - t) * (v + v_next) / 2


@torch.no_grad()
def sample(model, x0, n, solver="euler"):
    """From noise x0 (B, C, H, W) to images in n equal steps of the ODE, t = 0 to 1; yields every x, the noise first."""
    step = {"euler": euler_step, "heun": heun_step}[solver]
    times = torch.linspace(0, 1, n + 1).tolist()
    xt = x0
    yield xt
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        xt = step(model, xt, t, t_next)
        yield xt


def independent_pairs(images, labels, cfg, start, device):
    """Noises, images in [-1, 1] that know nothing of them, (B, 1, 28, 28) each, and their classes (B,); for ever."""
    for pick in shuffled(torch.arange(len(images)), cfg.batch, cfg.seed, start):
        x1 = data.to_float(images[pick]).to(device)
        yield torch.randn_like(x1), x1, labels[pick].to(device)


def train(model, ema, optimizer, pairs, cfg, start=0):
    """Steps `start` to cfg.steps on (noise, image, class); yields the loss of each. (R) Algorithm 1."""
    for i, (x0, x1, y) in zip(range(start, cfg.steps), pairs):
        # learning rate of this step: warm-up, then a cosine
        optimizer.param_groups[0]["lr"] = learning_rate(cfg, i)
        # a time for each line; some of the labels become "no class", for guidance
        t = draw_times(len(x0), cfg.times, x0.device)
        y = drop_labels(y, cfg.dropout, NO_CLASS)
        # forward pass and loss, matrix products in bf16
        with run.autocast(x0.device):
            value = loss(partial(model, y=y), x0, x1, t)
        # backward pass, long gradients clipped
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # EMA of the weights; a small decay in the first steps lets it forget its random start
        decay = min(cfg.ema, (1 + i) / (10 + i))
        update_ema(ema, model, decay)
        yield value.item()


def build(channels, layers, in_channels=1, **_):
    """The U-Net of ddpm.py, which reads a class too."""
    return digit_unet.build(channels, layers, NO_CLASS, in_channels)


def load(path, device="cpu"):
    """Weights written by this script or by `reflow.py` -> (model, config as a dict), ready to sample."""
    return checkpoint.load_model(path, build, device)


def compare_steps(network, x0, counts, solver, scores):
    """Samples from the same noise x0 (B, C, H, W) in each number of steps -> ({n: images}, {n: {score: value}})."""
    images = {}
    table = {}
    for n in counts:
        with run.autocast(x0.device):
            chain = run.bar(sample(network, x0, n, solver), n + 1, name=f"{n} steps")
            images[n] = last(chain).cpu()
        table[n] = scores(images[n])
    return images, table


def main(cfg: Config) -> dict:
    """Train (or load), sample in each number of steps, measure; writes the digits, the scores, the weights."""
    check_flow(cfg)
    images, labels = own_images.training_set(cfg, NO_CLASS)
    shape = tuple(images.shape[1:])
    run.seed(cfg.seed)
    folder = run.output(cfg.out, cfg)
    device = run.device(cfg.device)
    clock = run.Clock()
    metrics = {}

    if cfg.pretrained:
        model, _ = load(WEIGHTS, device)
    else:
        # model, its EMA, optimizer
        meta = asdict(cfg) | {"in_channels": shape[0]}
        model = build(**meta).to(device)
        ema = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0.01)
        # all that a resumed run needs to go on bit for bit
        state = TrainingState(folder, cfg, clock, model=model, ema=ema, optimizer=optimizer)
        start = len(state.losses)

        # train
        pairs = independent_pairs(images, labels, cfg, start, device)
        steps = train(model, ema, optimizer, pairs, cfg, start)
        for value in run.progress(steps, cfg.steps, start, cfg.save_every, state.save):
            state.losses.append(value)
        state.save()
        metrics["final_loss"] = state.final_loss()
        metrics["train_seconds"] = state.clock()
        state.draw_losses("squared error of the velocity")

        # the EMA is what is kept and sampled from
        checkpoint.write(folder / "model.safetensors", ema.state_dict(), meta)
        model = ema.eval()

    # the ten digits in turn, from the same noises in each number of steps
    metrics["parameters"] = sum(p.numel() for p in model.parameters())
    x0 = torch.randn(cfg.samples, *shape).to(device)
    y = (torch.arange(cfg.samples) % 10).to(device)
    if cfg.data:
        # no classes: nothing to guide towards, and no classifier
        network = partial(model, y=torch.full_like(y, NO_CLASS))
        scores = partial(own_images.score, folder, images)
    else:
        network = classifier_free_guidance(model, y, cfg.guidance_scale)
        scores = guidance_study.scorer(y, device)
    drawn, table = compare_steps(network, x0, cfg.sampling_steps, cfg.solver, scores)
    metrics |= {f"{n} steps": row for n, row in table.items()}

    # draw
    figures.grid(folder / "samples.png", drawn[max(drawn)][:64])
    figures.rows(folder / "steps.png", {f"{n} steps": x[:10] for n, x in drawn.items()})
    return run.report(folder, metrics, then="python models/reflow.py")


if __name__ == "__main__":
    run.cli(main, Config)
