"""Diffusion transformer (DiT): a transformer with adaLN-Zero in the place of the U-Net, conditioned on the class.

Peebles & Xie 2022, arXiv:2212.09748. Cut the noisy image into patches, read them as a sentence, and let the time step
and the class steer every block through its normalisation (adaLN-Zero). Training starts from blocks that do nothing.
Sampling asks twice, with the class and without, and goes further in the direction in which the class points:
classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598). Section and figure numbers are Peebles & Xie's.

The network is in `dit_network.py`.

Shapes: B images, C channels, H x W pixels, K classes.
y (B,) are classes 0..K-1, and K stands for "no class". t is an integer tensor (B,) whose 0 is the paper's t = 1.
Differences from the paper: pixels instead of an autoencoder's latents (`stable_diffuser.py` has those); v under the
cosine schedule as in `ddpm.py`, and no learned variance; 50 DDIM steps instead of 250 DDPM steps; the learning rate
rises and falls.

    python models/dit.py                                  # train, sample, measure: 4.4 min on two CPU cores
    python models/dit.py --pretrained                     # sample from the shipped weights
    python models/dit.py --pretrained --guidance-scale 0 1 8    # 0 ignores the class, 1 is plain, above 1 exaggerates
    python models/dit.py --data FOLDER                    # pictures of your own, without classes
    python models/dit.py --size S --patch 2 --batch 256 --lr 1e-4 --ema 0.9999 --steps 100000   # DiT-S/2, for a GPU
"""

import copy
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro

from models import ddim, ddpm, own_images, quality
from models.batches import shuffled
from models.dit_network import DiT
from models.guidance_study import accuracy, draw
from models.training_state import TrainingState
from utils import checkpoint, data, figures, run

WEIGHTS = Path(__file__).parent / "weights" / "dit.safetensors"
SIZES = {  # blocks, width D, heads: Table 1, and one small enough for a laptop
    "tiny": (6, 128, 4),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
SCALES = (1, 1.5, 2, 3, 4, 6)  # of guidance, compared by default


@dataclass(frozen=True)
class Config:
    """Train a class-conditional diffusion transformer on MNIST, sample every digit and measure what guidance does."""

    steps: int = 1000  # training steps
    batch: int = 64  # images per step
    lr: float = 3e-3  # peak learning rate: 100 steps of warm-up, then a cosine to zero
    size: str = "tiny"  # tiny, or the paper's S, B, L, XL
    patch: int = 4  # side of a patch in pixels; half of it is four times the tokens
    # conditioning dropout: share of labels replaced by "no class", which guidance needs
    dropout: float = 0.1
    ema: float = 0.995  # EMA decay: samples come from an exponential moving average of the weights
    # classifier-free guidance scales to compare; 1 is no guidance
    guidance_scale: Annotated[tuple[float, ...], tyro.conf.arg(aliases=["--guidance"])] = SCALES
    samples: int = 100  # digits to sample and measure at each guidance scale
    data: str = ""  # train on the pictures in this folder, 32 x 32 in colour, instead of digits
    pretrained: bool = False  # start from the shipped weights and skip the training
    resume: bool = False  # go on from the last checkpoint in --out, bit for bit
    save_every: int = 500  # steps between checkpoints
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/dit"  # where the results go


def drop_labels(y, share, null):
    """Conditioning dropout: this share of the labels becomes the null class, (B,) -> (B,). Ho & Salimans, Alg. 1."""
    return torch.where(torch.rand(y.shape, device=y.device) < share, null, y)


def classifier_free_guidance(model, y, guidance_scale):
    """A network of (xt, t), as every sampler takes it: null + guidance_scale (class - null). Sec. 3.1.

    The paper guides eps. But eps is a number times v plus a number times xt, and the weights 1 - guidance_scale and
    guidance_scale add up to one: guiding v, as here, is guiding eps.
    """
    null = torch.full_like(y, model.classes)

    def guided(xt, t):
        if guidance_scale == 1:
            return model(xt, t, y=y)
        # both halves in one batch, (2 B, C, H, W): the conditional one and the unconditional one
        output = model(torch.cat([xt, xt]), torch.cat([t, t]), y=torch.cat([y, null]))
        conditional, unconditional = output.float().chunk(2)
        # from the unconditional answer towards the conditional one, and beyond it
        return unconditional + guidance_scale * (conditional - unconditional)

    return guided


def train(model, ema, optimizer, schedule, images, labels, cfg, start=0):
    """Steps `start` to cfg.steps of ddpm's Algorithm 1, with labels; yields the loss of each."""
    device = schedule.beta.device
    null = model.classes
    picks = shuffled(torch.arange(len(images)), cfg.batch, cfg.seed, start)
    for i, pick in zip(range(start, cfg.steps), picks):
        # learning rate of this step: warm-up, then a cosine
        optimizer.param_groups[0]["lr"] = ddpm.learning_rate(cfg, i)
        # a batch of images; some of their labels become "no class", for guidance
        x0 = data.to_float(images[pick]).to(device)
        y = drop_labels(labels[pick].to(device), cfg.dropout, null)
        # forward pass and loss, matrix products in bf16
        with run.autocast(device):
            value = ddpm.loss(partial(model, y=y), schedule, x0, "v")
        # backward pass, long gradients clipped
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # EMA of the weights; a small decay in the first steps lets it forget its random start
        decay = min(cfg.ema, (1 + i) / (10 + i))
        ddpm.update_ema(ema, model, decay)
        yield value.item()


def check_network(size, patch, side=28):
    """Raises UserError if there is no such network for images of side x side pixels."""
    run.check(size in SIZES, f"there is no --size {size}; there are: {', '.join(SIZES)}")
    *fitting, last = [str(p) for p in range(2, side) if side % p == 0]
    wanted = f"use {', '.join(fitting)} or {last}"
    divides = patch > 0 and side % patch == 0
    run.check(divides, f"--patch {patch} does not divide {side} pixels; {wanted}")


def build(size, patch, in_channels=1, side=28, **_):
    """The network of this chapter, for digits, or for pictures of other channels and another side."""
    check_network(size, patch, side)
    return DiT(*SIZES[size], patch, side, in_channels)


def load(path, device="cpu"):
    """Weights written by this script -> (model, schedule, config as a dict), ready to sample."""
    model, meta = checkpoint.load_model(path, build, device)
    return model, ddpm.Schedule(kind="cosine").to(device), meta


def draw_samples(network, schedule, noise, about):
    """Samples (B, C, H, W), on the CPU, from the noise in 50 steps of DDIM; about: words for the progress bar."""
    with run.autocast(noise.device):
        chain = ddim.sample(network, schedule, noise, 50, "v")
        return ddim.last(run.bar(chain, 51, name=f"sample{about}")).cpu()


def compare_guidance(model, schedule, noise, scales, folder):
    """Every digit in turn, at each guidance scale from the same noise; draws all, returns the scores as metrics."""
    device = noise.device
    classifier = quality.load(device)
    judge = quality.scorer(device)
    y = torch.arange(len(noise)) % 10
    digits = {}
    scores = {}
    for scale in scales:
        network = classifier_free_guidance(model, y.to(device), scale)
        digits[scale] = draw_samples(network, schedule, noise, f", guidance {scale:g}")
        right = accuracy(classifier, digits[scale], y)
        error = quality.standard_error(right, len(noise))
        scores[scale] = {"accuracy": right, "accuracy_error": error} | judge(digits[scale])

    # the best scale has the smallest Frechet distance
    best = min(scores, key=lambda scale: scores[scale]["frechet"])
    draw(folder, digits, y, scores, best)
    metrics = {f"guidance {s:g}: {k}": v for s, row in scores.items() for k, v in row.items()}
    return metrics | {"best_guidance": best}


def draw_without_class(model, schedule, noise, images, folder):
    """Samples of a network that knows no classes; draws them, returns how near they are to the training pictures."""
    no_class = torch.full((len(noise),), model.classes, device=noise.device)
    samples = draw_samples(partial(model, y=no_class), schedule, noise, "")
    figures.grid(folder / "samples.png", samples[:64])
    return own_images.score(folder, images, samples)


def main(cfg: Config) -> dict:
    """Train (or load), sample at every guidance scale, measure; writes the digits, what guidance does, the weights."""
    sizes = (cfg.steps, cfg.batch, cfg.save_every)
    run.check(min(sizes) > 0, "--steps, --batch and --save-every must be at least 1")
    run.check(cfg.samples >= 10, "--samples must be at least 10, one of each digit")
    paces = 0 < cfg.lr < math.inf and 0 <= cfg.ema < 1
    run.check(paces, "--lr must be above 0 and finite, --ema in [0, 1)")
    run.check(0 <= cfg.dropout < 1, "--dropout must be at least 0 and less than 1")
    finite = all(0 <= scale < math.inf for scale in cfg.guidance_scale)
    needed = "--guidance-scale takes one or more scales, finite and not negative"
    run.check(cfg.guidance_scale and finite, needed)
    check_network(cfg.size, cfg.patch, own_images.SIDE if cfg.data else 28)
    images, labels = own_images.training_set(cfg)
    shape = tuple(images.shape[1:])
    run.seed(cfg.seed)
    folder = run.output(cfg.out, cfg)
    device = run.device(cfg.device)
    clock = run.Clock()
    metrics = {}

    if cfg.pretrained:
        model, schedule, _ = load(WEIGHTS, device)
    else:
        # model, its EMA, optimizer without weight decay: Sec. 4
        schedule = ddpm.Schedule(kind="cosine").to(device)
        meta = asdict(cfg) | {"in_channels": shape[0], "side": shape[-1]}
        model = build(**meta).to(device)
        ema = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0)
        # all that a resumed run needs to go on bit for bit
        state = TrainingState(folder, cfg, clock, model=model, ema=ema, optimizer=optimizer)
        start = len(state.losses)

        # train
        steps = train(model, ema, optimizer, schedule, images, labels, cfg, start)
        for value in run.progress(steps, cfg.steps, start, cfg.save_every, state.save):
            state.losses.append(value)
        state.save()
        metrics["final_loss"] = state.final_loss()
        metrics["train_seconds"] = state.clock()
        state.draw_losses("squared error of v")

        # the EMA is what is kept and sampled from
        checkpoint.write(folder / "model.safetensors", ema.state_dict(), meta)
        model = ema.eval()

    # sample and measure: every digit at each guidance scale, or pictures without a class
    clock = run.Clock()
    metrics["parameters"] = sum(p.numel() for p in model.parameters())
    noise = torch.randn(cfg.samples, *shape).to(device)
    if cfg.data:
        metrics |= draw_without_class(model, schedule, noise, images, folder)
        show = folder / "nearest.png"
    else:
        metrics |= compare_guidance(model, schedule, noise, cfg.guidance_scale, folder)
        show = folder / "guidance.png"
    metrics["sample_seconds"] = clock()
    return run.report(folder, metrics, then=f"open {show}")


if __name__ == "__main__":
    run.cli(main, Config)
