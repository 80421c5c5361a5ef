"""Auto-Encoding Variational Bayes, the VAE: a map whose every point is a digit. Kingma & Welling 2013, arXiv:1312.6114.

An encoder turns an image into a small cloud of codes, a decoder turns a code into an image. Two terms pull at them, in
nats: the image must come back (reconstruction), and the cloud must stay close to a standard normal (KL divergence), so
that codes drawn from the normal are images too. The script also trains what fails. Without the KL term the codes stray
to where the normal never goes, and samples show few kinds of digits. Without the noise codes are points packed close:
samples may look as good, but the least blur of a code ruins its image, and the bound breaks. Equation numbers are the
paper's.

Shapes: B images, D latent dimensions; images are (B, 1, 28, 28) in [-1, 1].
The likelihood is Bernoulli (App. C.1): a pixel is a coin, its grey the chance of white. The cross-entropy with a grey
target is the mean over all tosses, so the bound is one for MNIST binarised at random. Pictures show chances, no tosses.
Differences from the paper: convolutions, not one hidden layer; Adam, not Adagrad; one z an image is the paper's L = 1.

    python models/vae.py                              # four models, pictures, numbers: @TIME@ on two CPU cores
    python models/vae.py --latents 2 --no-ablations   # the map alone: @SHORT@
    python models/vae.py --pretrained                 # everything but the training, from the shipped weights
    python models/vae.py --latents 2 64 --channels 64 128 --hidden 512 --batch 512 --steps 20000   # larger, for a GPU
"""

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from models import quality
from utils import checkpoint, data, figures, run

WEIGHTS = Path(__file__).parent / "weights" / "vae.safetensors"


@dataclass(frozen=True)
class Config:
    """Train variational autoencoders on MNIST, whole and with parts left out; draw their latent spaces, measure all."""

    latents: tuple[int, ...] = (
        2,
        16,
    )  # a model for each number of dimensions: 2 can be drawn as a map, 16 makes better digits
    ablations: bool = True  # train the first one without the noise and without the KL term, too
    steps: int = 1000  # training steps of each model
    batch: int = 128  # images per step
    lr: float = 3e-3  # peak learning rate: 100 steps of warm-up, then a cosine to zero
    channels: tuple[int, int] = (16, 32)  # widths at 14 x 14 and at 7 x 7 pixels
    hidden: int = 256  # width of the linear layer between convolutions and latents
    samples: int = 2000  # digits to sample from the prior and measure, for each model
    pretrained: bool = False  # start from the shipped weights and skip the training
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
    run.check(x.min() >= -1 and x.max() <= 1, "images must be in [-1, 1]; data.to_float makes them so")
    return F.binary_cross_entropy_with_logits(logits, (x + 1) / 2, reduction="none").flatten(1).sum(dim=1)  # Eq. 11


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
        run.check(x.shape[1:] == (1, 28, 28), f"this network reads (B, 1, 28, 28) images, not {tuple(x.shape)}")
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
        chosen |= {"no noise": Variant(cfg.latents[0], noise=False), "no KL": Variant(cfg.latents[0], beta=0.0)}
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
    if cfg.resume and (
        state.exists() or not any(folder.glob("state_*"))
    ):  # those after the interrupted one were never begun
        curves = checkpoint.load_state(state, **parts)["curves"]
    save = lambda: checkpoint.save_state(state, **parts, curves=curves)  # noqa: E731
    for _ in run.progress(
        train(model, optimizer, images, cfg, curves, variant), cfg.steps, len(curves["kl"]), cfg.save_every, save
    ):
        pass
    save()
    return model.eval().requires_grad_(False), curves


def load(path, device="cpu"):
    """Weights written by this script -> {name: model}, ready to sample."""
    tensors, meta = checkpoint.read(path)
    models = {}
    for name, latent in meta["latent"].items():
        models[name] = VAE(latent, meta["channels"], meta["hidden"]).to(device).eval().requires_grad_(False)
        models[name].load_state_dict(
            {k.removeprefix(f"{name}/"): v.float() for k, v in tensors.items() if k.startswith(f"{name}/")}
        )
    return models


@torch.no_grad()
def measure(model, images):
    """Images (N, 1, 28, 28) in [-1, 1] -> the bound on their log-likelihood, in nats per image; codes (N, D)."""
    where, parts = next(model.parameters()).device, []
    for x in images.split(500):
        parts.append(torch.tensor([*loss(model, x.to(where))]) * len(x) / len(images))
    value, error, kl = torch.stack(parts).sum(0).tolist()
    codes = torch.cat([model.encode(x.to(where))[0] for x in images.split(500)])
    return {"elbo": -value, "reconstruction": error, "kl": kl}, codes


@torch.no_grad()
def sample(model, n):
    """n images from the prior, (n, 1, 28, 28) in [-1, 1]: draw z ~ N(0, 1), decode."""
    return picture(model.decode(torch.randn(n, model.latent, device=next(model.parameters()).device))).cpu()


@torch.no_grad()
def latent_grid(model, n=20):
    """n x n images (n^2, 1, 28, 28) of a 2-d latent space, in steps of equal probability (inverse CDF). Fig. 4."""
    steps = torch.special.ndtri((torch.arange(n) + 0.5) / n)
    z = torch.cartesian_prod(steps.flip(0), steps).flip(1)  # z_1 to the right, z_2 upwards, as in the scatter plots
    return picture(model.decode(z.to(next(model.parameters()).device))).cpu()


@torch.no_grad()
def interpolate(model, a, b, n=10):
    """n images on the straight line between the codes of a and b, (1, 28, 28) each -> (n, 1, 28, 28)."""
    weight = torch.linspace(0, 1, n)[:, None]
    mu, _ = model.encode(torch.stack([a, b]).to(next(model.parameters()).device))
    return picture(model.decode(mu[:1].lerp(mu[1:], weight.to(mu.device)))).cpu()


def panels(path, rows, size=3.0):
    """Panels, row by row: {"title": images (N, C, H, W), or (codes (N, D), labels (N,)) for a scatter plot}."""
    columns = max(len(row) for row in rows)
    figure, axes = plt.subplots(len(rows), columns, figsize=(size * columns, (size + 0.25) * len(rows)), squeeze=False)
    for i, row in enumerate(rows):
        for axis, (title, content) in zip(axes[i], row.items()):
            axis.set_title(title, fontsize=9)
            if isinstance(content, tuple):
                scatter(axis, *content)
            else:
                axis.imshow(figures.tile(content, math.isqrt(len(content)), pad=0), interpolation="lanczos")
                axis.axis("off")
    figure.tight_layout()
    return figures.close(figure, path)


def scatter(axis, codes, labels):
    """The first two dimensions of codes (N, D), coloured by label; the circle holds 95 % of a 2-d standard normal."""
    codes = codes[:, :2].cpu()
    axis.scatter(*codes.T, c=labels, cmap="tab10", s=1, alpha=0.4, linewidths=0)
    for k in labels.unique():
        middle = codes[labels == k].median(0).values
        axis.text(*middle, str(int(k)), ha="center", va="center", weight="bold", fontsize=9)
    axis.add_patch(plt.Circle((0, 0), math.sqrt(-2 * math.log(0.05)), fill=False, color="black", linewidth=1))
    reach = max(3.0, 1.1 * float(codes.abs().quantile(0.998)))
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")


def main(cfg: Config) -> dict:
    """Train (or load) every variant, measure on the test digits, and draw."""
    sizes = (cfg.steps, cfg.batch, cfg.hidden, *cfg.channels)
    run.check(min(sizes) > 0, "--steps, --batch, --hidden and --channels must be at least 1")
    run.check(cfg.samples >= 64, "--samples must be at least 64, as many as the figures show")
    run.check(
        cfg.latents and min(cfg.latents) > 1, "--latents must be one or more numbers from 2 on: a map has two axes"
    )
    folder, device, clock = run.output(cfg.out, cfg), run.device(cfg.device), run.Clock()
    test, labels = data.mnist("test")
    test = data.to_float(test)
    metrics, curves = {}, {}
    if cfg.pretrained:
        models = load(WEIGHTS, device)
    else:
        images, models = data.mnist("train")[0], {}
        for name, variant in variants(cfg).items():
            models[name], curves[name] = fit(name, variant, images, cfg, folder, device)
        metrics["train_seconds"] = clock()
        tensors = {f"{name}/{k}": v for name, model in models.items() for k, v in model.state_dict().items()}
        meta = asdict(cfg) | {"latent": {name: model.latent for name, model in models.items()}}
        checkpoint.write(folder / "model.safetensors", tensors, meta)
    run.seed(cfg.seed)
    judge, codes, samples = quality.judge(device), {}, {}
    for name, model in models.items():
        result, codes[name] = measure(model, test)
        samples[name] = sample(model, cfg.samples)
        metrics |= {f"{name}: {k}": v for k, v in (result | judge(samples[name])).items()}
    draw(folder, curves, models, codes, samples, test, labels)
    return run.report(folder, metrics, then=f"open {folder}/; then python models/ddpm.py")


def draw(folder, curves, models, codes, samples, test, labels):
    """Every figure of the run."""
    first, best = list(models)[0], [name for name in models if name.endswith("-d")][-1]
    figures.grid(folder / "samples.png", samples[best][:64])
    with torch.no_grad():
        back = {name: picture(model.decode(codes[name][:10])).cpu() for name, model in models.items()}
    figures.rows(folder / "reconstructions.png", {"original": test[:10]} | back)
    if models[first].latent == 2:
        untrained = copy.deepcopy(models[first])
        untrained.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
        maps = {"before training": latent_grid(untrained), "after": latent_grid(models[first])}
        panels(folder / "map.png", [maps], size=5)
    pairs = [(test[labels == a][1], test[labels == b][1], f"{a} to {b}") for a, b in ((3, 8), (4, 9), (0, 6), (1, 7))]
    weight = torch.linspace(0, 1, 10)[:, None, None, None]
    strips = {}
    for a, b, name in pairs:
        strips |= {f"{name}, pixels": a[None].lerp(b[None], weight), f"{name}, {best}": interpolate(models[best], a, b)}
    figures.rows(folder / "interpolation.png", strips)
    names = [name for name in models if name == first or not name.endswith("-d")]
    panels(folder / "latents.png", [
        {f"{name}: codes of test digits": (codes[name], labels) for name in names},
        {f"{name}: samples from the prior": samples[name][:64] for name in names},
    ])  # fmt: skip
    for part in ("reconstruction", "kl") if curves else ():
        log = {name: curve[part] for name, curve in curves.items()}
        figures.curves(folder / f"{part}.png", log, "step", f"{part}, nats per image", smooth=20, log="y")
    if curves:
        bound = {name: [a + b for a, b in zip(*curves[name].values())] for name in curves if name.endswith("-d")}
        figures.curves(folder / "loss.png", bound, "step", "negative bound, nats per image", smooth=20)


if __name__ == "__main__":
    run.cli(main, Config)
