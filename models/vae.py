"""Variational autoencoder (VAE): evidence lower bound, reparameterisation. Kingma & Welling 2013, arXiv:1312.6114.

An encoder turns an image into a small cloud of codes, a decoder turns a code into an image. Two terms pull at them, in
nats: the image must come back (reconstruction), and the cloud must stay close to a standard normal (KL divergence), so
that codes drawn from the normal are images too. The script also trains what fails. Without the KL term the codes stray
to where the normal never goes, and samples show few kinds of digits. Without the noise the codes crowd together:
samples look as good, but put the noise back and no image returns, so the bound is lost. Equation numbers are the
paper's.

Shapes: B images, D latent dimensions; images are (B, 1, 28, 28) in [-1, 1].
The likelihood is Bernoulli (App. C.1): a pixel is a coin, its grey the chance of white. The cross-entropy with a grey
target is the mean over all tosses, so the bound is one for MNIST binarised at random. Pictures show chances, no tosses.
Differences from the paper: convolutions, not one hidden layer; Adam, not Adagrad; one z an image is the paper's L = 1.

    python models/vae.py                              # four models, pictures, numbers: 2.0 min on two CPU cores
    python models/vae.py --latents 2 --no-ablations   # the map alone
    python models/vae.py --latents 2 64 --channels 64 128 --hidden 512 --batch 512 --steps 20000   # larger, for a GPU
"""

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models import quality
from utils import checkpoint, data, figures, run


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
    """-log p(x | z) in nats: (B, 1, H, W) log odds of white, images (B, 1, H, W) in [-1, 1] -> (B,)."""
    run.check(
        x.min() >= -1 and x.max() <= 1, "images must be in [-1, 1]; data.to_float makes them so"
    )
    # Eq. 11
    return (
        F.binary_cross_entropy_with_logits(logits, (x + 1) / 2, reduction="none")
        .flatten(1)
        .sum(dim=1)
    )


def picture(logits):
    """Log odds of white -> the expected image, in [-1, 1]: 2 sigmoid(logits) - 1."""
    return (logits / 2).tanh()


def loss(model, x, beta=1.0, noise=True):
    """The negative bound in nats per image, and its parts: (B, 1, 28, 28) -> (loss, reconstruction, kl), each ().

    `beta` other than 1 gives no bound (0: no KL term); without `noise` the code is a point, mu.
    """
    mu, logvar = model.encode(x)
    z = reparameterize(mu, logvar) if noise else mu
    error, kl = reconstruction(model.decode(z), x).mean(), kl_divergence(mu, logvar).mean()
    return error + beta * kl, error, kl  # Eq. 10


class VAE(nn.Module):
    """q(z | x), two numbers for every latent dimension, and p(x | z), one for every pixel."""

    def __init__(self, latent=2, channels=(16, 32), hidden=256):
        super().__init__()
        a, b = channels
        self.latent = latent
        self.encoder = nn.Sequential(
            nn.Conv2d(1, a, 4, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(a, b, 4, stride=2, padding=1), nn.SiLU(),
            nn.Flatten(), nn.Linear(b * 7 * 7, hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2 * latent),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, b * 7 * 7), nn.SiLU(), nn.Unflatten(1, (b, 7, 7)),
            nn.ConvTranspose2d(b, a, 4, stride=2, padding=1), nn.SiLU(),
            nn.ConvTranspose2d(a, 1, 4, stride=2, padding=1),
        )  # fmt: skip

    def encode(self, x):
        """(B, 1, 28, 28) in [-1, 1] -> mu (B, D), logvar (B, D). Eq. 9."""
        run.check(
            x.shape[1:] == (1, 28, 28),
            f"this network reads (B, 1, 28, 28) images, not {tuple(x.shape)}",
        )
        return self.encoder(x).chunk(2, dim=1)

    def decode(self, z):
        """(B, D) -> log odds of white (B, 1, 28, 28); `picture` makes an image of them."""
        return self.decoder(z)


class Variant(NamedTuple):
    latent: int
    beta: float = 1.0
    noise: bool = True


def variants(cfg):
    """{name: what is trained}."""
    chosen = {f"{n}-d": Variant(n) for n in cfg.latents}
    if cfg.ablations:
        chosen |= {
            "no noise": Variant(cfg.latents[0], noise=False),
            "no KL": Variant(cfg.latents[0], beta=0.0),
        }
    return chosen


def learning_rate(cfg, step):
    """A hundred steps up, then a cosine down to zero."""
    return cfg.lr * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / cfg.steps)) / 2


def train(model, optimizer, images, cfg, curves, variant):
    """Algorithm 1, from step len(curves["kl"]) to cfg.steps; yields each loss and puts its parts into `curves`."""
    for step in range(len(curves["kl"]), cfg.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)
        pick = torch.randint(len(images), (cfg.batch,))
        x = data.to_float(images[pick]).to(next(model.parameters()).device)
        value, error, kl = loss(model, x, variant.beta, variant.noise)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
        curves["reconstruction"].append(error.item())
        curves["kl"].append(kl.item())
        yield value.item()


def fit(name, variant, images, cfg, folder, device):
    """Train one variant from the seed, or go on from its checkpoint -> model, curves."""
    run.seed(cfg.seed)
    model = VAE(variant.latent, cfg.channels, cfg.hidden).to(device)
    optimizer = torch.optim.Adam(model.parameters(), cfg.lr)
    parts, curves = {"model": model, "optimizer": optimizer}, {"reconstruction": [], "kl": []}
    state = folder / f"state_{name.replace(' ', '_')}.safetensors"
    if cfg.resume and state.exists():  # those after the interrupted one were never begun
        curves = checkpoint.load_state(state, cfg, **parts)["curves"]
    save = lambda: checkpoint.save_state(state, **parts, curves=curves, config=asdict(cfg))  # noqa: E731
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
            name: VAE(latent, meta["channels"], meta["hidden"])
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
    """Images (N, 1, 28, 28) in [-1, 1] -> the bound on their log-likelihood, in nats per image; codes (N, D)."""
    parts = [x.to(next(model.parameters()).device) for x in images.split(500)]
    sums = torch.stack([torch.stack(loss(model, x)) * len(x) for x in parts]).sum(0)
    value, error, kl = (sums / len(images)).tolist()
    codes = torch.cat([model.encode(x)[0] for x in parts])
    return {"elbo": -value, "reconstruction": error, "kl": kl}, codes


@torch.no_grad()
def paint(model, z):
    """Codes (N, D) -> expected images (N, 1, 28, 28) in [-1, 1], on the CPU."""
    return picture(model.decode(z.to(next(model.parameters()).device))).cpu()


def sample(model, n):
    """n images from the prior, (n, 1, 28, 28) in [-1, 1]: draw z ~ N(0, 1), decode."""
    return paint(model, torch.randn(n, model.latent))


def latent_grid(model, n=20):
    """n x n images (n^2, 1, 28, 28) of a 2-d latent space, in steps of equal probability (inverse CDF). Fig. 4."""
    steps = torch.special.ndtri((torch.arange(n) + 0.5) / n)
    # z_1 to the right, z_2 upwards, as in the scatter plots
    z = torch.cartesian_prod(steps.flip(0), steps).flip(1)
    return paint(model, z)


def interpolate(model, a, b, n=10):
    """n images on the straight line between the codes of a and b, (1, 28, 28) each -> (n, 1, 28, 28)."""
    mu, _ = model.encode(torch.stack([a, b]).to(next(model.parameters()).device))
    weight = torch.linspace(0, 1, n, device=mu.device)[:, None]
    return paint(model, mu[:1].lerp(mu[1:], weight))


def main(cfg: Config) -> dict:
    """Train every variant, measure on the test digits, and draw."""
    sizes = (cfg.steps, cfg.batch, cfg.hidden, *cfg.channels)
    run.check(min(sizes) > 0, "--steps, --batch, --hidden and --channels must be at least 1")
    run.check(cfg.save_every >= 0, "--save-every must not be negative; 0 saves at the end only")
    run.check(0 < cfg.lr < math.inf, "--lr must be above 0 and finite")
    run.check(cfg.samples >= 64, "--samples must be at least 64, as many as the figures show")
    run.check(
        cfg.latents and min(cfg.latents) > 1,
        "--latents must be numbers from 2 on: a map has two axes",
    )
    folder, device, clock = run.output(cfg.out, cfg), run.device(cfg.device), run.Clock()
    images, models, curves = data.mnist("train")[0], {}, {}
    for name, variant in variants(cfg).items():
        models[name], curves[name] = fit(name, variant, images, cfg, folder, device)
    metrics = {"train_seconds": clock()}
    meta = asdict(cfg) | {"latent": {name: model.latent for name, model in models.items()}}
    checkpoint.write(folder / "model.safetensors", nn.ModuleDict(models).state_dict(), meta)
    run.seed(cfg.seed)
    test, labels = data.mnist("test")
    test = data.to_float(test)
    judge, codes, samples = quality.judge(device), {}, {}
    for name, model in run.bar(models.items(), len(models), name="measure"):
        result, codes[name] = measure(model, test)
        samples[name] = sample(model, cfg.samples)
        metrics |= {f"{name}: {k}": v for k, v in (result | judge(samples[name])).items()}
    draw(folder, cfg, curves, models, codes, samples, test, labels)
    return run.report(folder, metrics, then=f"open {folder}/; then python models/ddpm.py")


def draw(folder, cfg, curves, models, codes, samples, test, labels):
    """Every figure of the run."""
    first, best = f"{cfg.latents[0]}-d", f"{cfg.latents[-1]}-d"
    figures.grid(folder / "samples.png", samples[best][:64])
    back = {name: paint(model, codes[name][:10]) for name, model in models.items()}
    figures.rows(folder / "reconstructions.png", {"original": test[:10]} | back)
    if cfg.latents[0] == 2:
        # a weave too faint to see, alike at every point
        grey = latent_grid(VAE(2, cfg.channels, cfg.hidden), n=8)
        low, high = grey.aminmax()
        before = f"before training, contrast x {2 / (high - low):.0f}"
        maps = {
            before: (grey - low) / (high - low) * 2 - 1,
            "after training": latent_grid(models[first]),
        }
        figures.panels(folder / "map.png", [maps], size=5)
    strips, weight = {}, torch.linspace(0, 1, 10)[:, None, None, None]
    for i, j in ((3, 8), (4, 9), (0, 6), (1, 7)):
        a, b = test[labels == i][1], test[labels == j][1]
        strips |= {
            f"{i} to {j}, pixels": a.lerp(b, weight),
            f"{i} to {j}, {best}": interpolate(models[best], a, b),
        }
    figures.rows(folder / "interpolation.png", strips)
    names = [name for name in models if name == first or not name.endswith("-d")]
    figures.panels(folder / "latents.png", [
        {f"{name}: codes of test digits": (codes[name], labels) for name in names},
        {f"{name}: samples from the prior": samples[name][:64] for name in names},
    ])  # fmt: skip
    for part in ("reconstruction", "kl"):
        log = {name: curve[part] for name, curve in curves.items()}
        figures.curves(
            folder / f"{part}.png", log, "step", f"{part}, nats per image", smooth=20, log="y"
        )
    bound = {
        name: [a + b for a, b in zip(*curves[name].values())]
        for name in curves
        if name.endswith("-d")
    }
    figures.curves(folder / "loss.png", bound, "step", "negative bound, nats per image", smooth=20)


if __name__ == "__main__":
    run.cli(main, Config)
