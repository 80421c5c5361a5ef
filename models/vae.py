"""Variational autoencoder (VAE): evidence lower bound, reparameterisation. Kingma & Welling 2013, arXiv:1312.6114.

An encoder turns an image into a small cloud of codes, a decoder turns a code into an image. Two terms pull at them, in
nats: the image must come back (reconstruction), and the cloud must stay close to a standard normal (KL divergence), so
that codes drawn from the normal are images too. The script also trains what fails. Without the KL term the codes stray
to where the normal never goes, and samples show few kinds of digits. Without the noise the codes crowd together:
samples look as good, but put the noise back and no image returns, so the bound is lost. Equation numbers are the
paper's.

Shapes: B images, D latent dimensions; images are (B, C, H, W) in [-1, 1], digits (B, 1, 28, 28).
The likelihood is Bernoulli (App. C.1): a pixel is a coin, its grey the chance of white. The cross-entropy with a grey
target is the mean over all tosses, so the bound is one for MNIST binarised at random. Pictures show chances, no tosses.
Differences from the paper: convolutions, not one hidden layer; Adam, not Adagrad; one z an image is the paper's L = 1.

    python models/vae.py                              # four models, pictures, numbers: 2.0 min on two CPU cores
    python models/vae.py --latents 2 --no-ablations   # the map alone
    python models/vae.py --data FOLDER                # pictures of your own, in colour
    python models/vae.py --latents 2 64 --channels 64 128 --hidden 512 --batch 512 --steps 20000   # larger, for a GPU
"""

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models import own_images, quality
from models.latent_figures import draw
from models.vae_network import VAE, paint
from utils import checkpoint, data, run


@dataclass(frozen=True)
class Config:
    """Train variational autoencoders on MNIST, whole and with parts left out; draw their latent spaces, measure all."""

    # a model for each: 2 dimensions can be drawn as a map, 16 make better digits
    latents: tuple[int, ...] = (2, 16)
    ablations: bool = True  # train the first one without the noise and without the KL term, too
    steps: int = 1000  # training steps of each model
    batch: int = 128  # images per step
    lr: float = 3e-3  # peak learning rate: 100 steps of warm-up, then a cosine to zero
    channels: tuple[int, int] = (16, 32)  # widths at 14 x 14 and at 7 x 7 pixels
    hidden: int = 256  # width of the linear layer between convolutions and latents
    samples: int = 2000  # digits to sample from the prior and measure, for each model
    data: str = ""  # train on the pictures in this folder, 32 x 32 in colour, instead of digits
    resume: bool = False  # go on from the last checkpoints in --out, bit for bit
    save_every: int = 500  # steps between checkpoints
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/vae"  # where the results go


def reparameterize(mu, logvar):
    """z ~ N(mu, sigma^2) as a function of mu and sigma, which the gradient can pass: (B, D), (B, D) -> (B, D)."""
    return mu + (logvar / 2).exp() * torch.randn_like(mu)  # Sec. 2.4; Eq. 4


def kl_divergence(mu, logvar):
    """Nats from N(mu, sigma^2) to N(0, 1): (B, D), (B, D) -> (B,)."""
    return -(1 + logvar - mu.square() - logvar.exp()).sum(dim=1) / 2  # App. B


def reconstruction(logits, x):
    """-log p(x | z) in nats: (B, C, H, W) log odds of white, images (B, C, H, W) in [-1, 1] -> (B,)."""
    run.check(
        x.min() >= -1 and x.max() <= 1, "images must be in [-1, 1]; data.to_float makes them so"
    )
    white = (x + 1) / 2
    nats = F.binary_cross_entropy_with_logits(logits, white, reduction="none")  # Eq. 11
    return nats.flatten(1).sum(dim=1)


def loss(model, x, beta=1.0, noise=True):
    """The negative bound in nats per image, and its parts: (B, C, H, W) -> (loss, reconstruction, kl), each ().

    `beta` other than 1 gives no bound (0: no KL term); without `noise` the code is a point, mu.
    """
    # encoder: a Gaussian of codes; a draw from it
    mu, logvar = model.encode(x)
    z = reparameterize(mu, logvar) if noise else mu
    # decoder: how likely the image is under that code
    error = reconstruction(model.decode(z), x).mean()
    kl = kl_divergence(mu, logvar).mean()
    return error + beta * kl, error, kl  # Eq. 10


class Variant(NamedTuple):
    latent: int
    beta: float = 1.0
    noise: bool = True


def variants(cfg):
    """{name: what is trained}."""
    chosen = {f"{n}-d": Variant(n) for n in cfg.latents}
    if cfg.ablations:
        chosen["no noise"] = Variant(cfg.latents[0], noise=False)
        chosen["no KL"] = Variant(cfg.latents[0], beta=0.0)
    return chosen


def learning_rate(cfg, step):
    """Learning rate of a step: a hundred steps of warm-up, then a cosine down to zero."""
    warm_up = min(1, (step + 1) / 100)
    cosine = (1 + math.cos(math.pi * step / cfg.steps)) / 2
    return cfg.lr * warm_up * cosine


def train(model, optimizer, images, cfg, curves, variant):
    """Algorithm 1, from step len(curves["kl"]) to cfg.steps; yields each loss and puts its parts into `curves`."""
    for step in range(len(curves["kl"]), cfg.steps):
        # learning rate of this step: warm-up, then a cosine
        optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)
        # a batch of images, a code drawn for each, the bound
        pick = torch.randint(len(images), (cfg.batch,))
        x = data.to_float(images[pick]).to(next(model.parameters()).device)
        value, error, kl = loss(model, x, variant.beta, variant.noise)
        # backward pass, long gradients clipped
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
        # both parts of the loss
        curves["reconstruction"].append(error.item())
        curves["kl"].append(kl.item())
        yield value.item()


def fit(name, variant, images, cfg, folder, device):
    """Train one variant from the seed, or go on from its checkpoint -> model, curves."""
    run.seed(cfg.seed)
    model = VAE(variant.latent, cfg.channels, cfg.hidden, images.shape[1:]).to(device)
    optimizer = torch.optim.Adam(model.parameters(), cfg.lr)
    curves = {"reconstruction": [], "kl": []}
    # all that a resumed run needs to go on bit for bit
    parts = {"model": model, "optimizer": optimizer}
    state = folder / f"state_{name.replace(' ', '_')}.safetensors"
    if cfg.resume and state.exists():  # those after the interrupted one were never begun
        curves = checkpoint.load_state(state, cfg, **parts)["curves"]

    def save():
        checkpoint.save_state(state, **parts, curves=curves, config=asdict(cfg))

    # train; the curves grow on the way
    steps = train(model, optimizer, images, cfg, curves, variant)
    for _ in run.progress(steps, cfg.steps, len(curves["kl"]), cfg.save_every, save):
        pass
    save()
    return model.eval().requires_grad_(False), curves


def load(path, device="cpu"):
    """Weights written by this script -> {name: model}, ready to sample. Raises UserError for another network's."""
    tensors, meta = checkpoint.read(path)
    try:
        models = {
            name: VAE(latent, meta["channels"], meta["hidden"], meta.get("image", (1, 28, 28)))
            for name, latent in meta["latent"].items()
        }
        together = nn.ModuleDict(models).to(device).eval().requires_grad_(False)
        together.load_state_dict(tensors)
    except (TypeError, KeyError, AttributeError, ValueError, RuntimeError):
        raise run.UserError(
            f"{path} holds no weights of models/vae.py; name a file that this script wrote"
        ) from None
    return models


@torch.no_grad()
def measure(model, images):
    """Images (N, C, H, W) in [-1, 1] -> the bound on their log-likelihood, in nats per image; codes (N, D)."""
    device = next(model.parameters()).device
    parts = [x.to(device) for x in images.split(500)]
    # the bound and its parts, with noise; the last batch may be a smaller one
    sums = [torch.stack(loss(model, x)) * len(x) for x in parts]
    value, error, kl = (torch.stack(sums).sum(0) / len(images)).tolist()
    # codes: the means of the encoder
    codes = torch.cat([model.encode(x)[0] for x in parts])
    return {"elbo": -value, "reconstruction": error, "kl": kl}, codes


def sample(model, n):
    """n images from the prior, (n, C, H, W) in [-1, 1]: draw z ~ N(0, 1), decode."""
    return paint(model, torch.randn(n, model.latent))


def main(cfg: Config) -> dict:
    """Train every variant, measure on the test digits, or on those of --data that it was trained on, and draw."""
    sizes = (cfg.steps, cfg.batch, cfg.hidden, *cfg.channels)
    run.check(min(sizes) > 0, "--steps, --batch, --hidden and --channels must be at least 1")
    run.check(cfg.save_every >= 0, "--save-every must not be negative; 0 saves at the end only")
    run.check(0 < cfg.lr < math.inf, "--lr must be above 0 and finite")
    run.check(cfg.samples >= 64, "--samples must be at least 64, as many as the figures show")
    two = cfg.latents and min(cfg.latents) > 1
    run.check(two, "--latents must be numbers from 2 on: a map has two axes")
    images, _ = own_images.training_set(cfg)
    folder = run.output(cfg.out, cfg)
    device = run.device(cfg.device)
    clock = run.Clock()

    # train every variant
    models = {}
    curves = {}
    for name, variant in variants(cfg).items():
        models[name], curves[name] = fit(name, variant, images, cfg, folder, device)
    metrics = {"train_seconds": clock()}
    meta = asdict(cfg) | {"latent": {name: model.latent for name, model in models.items()}}
    meta["image"] = tuple(images.shape[1:])
    checkpoint.write(folder / "model.safetensors", nn.ModuleDict(models).state_dict(), meta)

    # measure: the bound, the score of samples from the prior
    run.seed(cfg.seed)
    test, labels = (images, None) if cfg.data else data.mnist("test")
    test = data.to_float(test)
    judge = None if cfg.data else quality.scorer(device)
    codes = {}
    samples = {}
    for name, model in run.bar(models.items(), len(models), name="measure"):
        result, codes[name] = measure(model, test)
        samples[name] = sample(model, cfg.samples)
        if judge:
            result |= judge(samples[name])
        metrics |= {f"{name}: {k}": v for k, v in result.items()}

    # no classifier knows pictures of one's own; are the samples copies of them?
    if cfg.data:
        metrics |= own_images.score(folder, images, samples[f"{cfg.latents[-1]}-d"])

    # draw
    draw(folder, cfg, curves, models, codes, samples, test, labels)
    return run.report(folder, metrics, then=f"open {folder}/; then python models/ddpm.py")


if __name__ == "__main__":
    run.cli(main, Config)
