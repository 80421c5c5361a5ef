"""Latent autoencoder (KL-VAE): 64 x 64 pixels to 16 x 16 latents. Rombach et al. 2022, arXiv:2112.10752.

Most bits of an image are texture that nobody asked for. An encoder throws them away once, a decoder paints them back,
and the diffusion model of `stable_diffuser.py` works on what is left: here 12 288 numbers become 1024. Sections are the
paper's.

Shapes: B images, C = 3 colours, H x W pixels, D latent channels, h x w latents with h = H / 4.
Modules carry the names of diffusers' AutoencoderKL, so weights move both ways by load_state_dict.
Differences from the paper: features of EfficientNet-lite0, not of VGG, in the perceptual loss; an eighth of the
channels and half of the blocks.

    python models/autoencoder.py
    python models/autoencoder.py --pretrained           # only the pictures and the numbers
    python models/autoencoder.py --adversarial 0.5 --steps 20000 --batch 64     # with the discriminator, for a GPU
"""

import copy
import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from models import ddpm
from models.batches import batches
from models.unet import AttentionBlock, Stage
from models.vae import kl_divergence, reparameterize
from utils import checkpoint, data, figures, pretrained, run

WEIGHTS = Path(__file__).parent / "weights" / "autoencoder.safetensors"


@dataclass(frozen=True)
class Config:
    """Train the autoencoder on emoji and show what it keeps of pictures it never saw."""

    steps: int = 500  # training steps
    batch: int = 16  # images per step
    lr: float = 2e-3  # peak learning rate: 100 steps of warm-up, then a cosine to zero
    # widths, one per resolution; each after the first halves it
    channels: tuple[int, ...] = (16, 48, 96)
    latent: int = 4  # D, channels of the latent
    perceptual: float = 0.1  # weight of the distance in the features of a classifier
    kl: float = 1e-6  # weight of the KL divergence: only a rein on the latents' size
    adversarial: float = 0.0  # weight of the discriminator; 0 leaves it out
    pretrained: bool = False  # start from the shipped weights and skip the training
    resume: bool = False  # go on from the last checkpoint in --out, bit for bit
    save_every: int = 500  # steps between checkpoints
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/autoencoder"  # where the results go


class Encoder(nn.Module):
    """Down the ladder: (B, 3, H, W) -> (B, 2 D, h, w), mean and log-variance before the last 1x1 convolution."""

    def __init__(self, channels, latent, layers=1, groups=8):
        super().__init__()
        kw, c = dict(groups=groups, eps=1e-6), channels[0]
        self.conv_in = nn.Conv2d(3, c, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(channels):
            widths = [(c if j == 0 else width, width) for j in range(layers)]
            self.down_blocks.append(Stage(widths, down=i < len(channels) - 1, down_padding=0, **kw))
            c = width
        self.mid_block = Stage([(c, c), (c, c)], **kw)
        self.mid_block.attentions = nn.ModuleList([AttentionBlock(c, c, **kw)])
        self.conv_norm_out = nn.GroupNorm(groups, c, 1e-6)
        self.conv_out = nn.Conv2d(c, 2 * latent, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in (*self.down_blocks, self.mid_block):
            x, _ = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Up the ladder: (B, D, h, w) -> (B, 3, H, W)."""

    def __init__(self, channels, latent, layers=1, groups=8):
        super().__init__()
        kw, c = dict(groups=groups, eps=1e-6), channels[-1]
        self.conv_in = nn.Conv2d(latent, c, 3, padding=1)
        self.mid_block = Stage([(c, c), (c, c)], **kw)
        self.mid_block.attentions = nn.ModuleList([AttentionBlock(c, c, **kw)])
        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(channels))):
            widths = [(c if j == 0 else width, width) for j in range(layers + 1)]
            self.up_blocks.append(Stage(widths, up=i > 0, **kw))
            c = width
        self.conv_norm_out = nn.GroupNorm(groups, c, 1e-6)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z):
        x = self.conv_in(z)
        for stage in (self.mid_block, *self.up_blocks):
            x, _ = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """encode: (B, 3, H, W) in [-1, 1] -> mu, logvar, each (B, D, h, w); decode: (B, D, h, w) -> (B, 3, H, W)."""

    def __init__(self, channels=(16, 48, 96), latent=4):
        super().__init__()
        self.encoder, self.decoder = Encoder(channels, latent), Decoder(channels, latent)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def encode(self, x):
        mu, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mu, logvar.clamp(-30, 20)

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x):
        """One random pass, for training: -> reconstruction, mu, logvar."""
        mu, logvar = self.encode(x)
        return self.decode(reparameterize(mu, logvar)), mu, logvar


def features(classifier, x):
    """(B, 3, H, W) in [-1, 1] -> maps of the frozen EfficientNet: after its stem and its stages of stride 4, 8, 16."""
    x = F.relu6(classifier._bn0(classifier._conv_stem(x)))
    maps = [x]
    for i, block in enumerate(classifier._blocks[:11]):
        x = block(x)
        if i in (2, 4, 10):
            maps.append(x)
    return maps


def perceptual_distance(classifier, x, y):
    """Squared distance of unit feature vectors, averaged over positions, summed over maps.

    Zhang et al. 2018, arXiv:1801.03924, Eq. 1, without its learned weights.
    """
    pairs = zip(features(classifier, x), features(classifier, y), strict=True)
    return sum(
        (F.normalize(a, eps=1e-6) - F.normalize(b, eps=1e-6)).square().sum(1).mean()
        for a, b in pairs
    )


class Discriminator(nn.Module):
    """Says of each patch of 38 x 38 pixels whether it is real: (B, 3, H, W) -> (B, 1, H/8, W/8).

    Isola et al. 2017, arXiv:1611.07004.
    """

    def __init__(self, width=32):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        layers = [
            nn.Sequential(nn.Conv2d(i, o, 4, 2, 1), nn.GroupNorm(8, o), nn.LeakyReLU(0.2))
            for i, o in zip(widths, widths[1:])
        ]
        self.body = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, x):
        return self.body(x)


def discriminator_loss(real, fake):
    """Hinge: real patches above 1, painted ones below -1. Lim & Ye 2017, arXiv:1705.02894."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(reconstruction_loss, generator_loss, last_layer):
    """Make both losses pull equally hard at the decoder's last layer. Esser et al. 2021, arXiv:2012.09841, Eq. 7."""
    ours, theirs = (
        torch.autograd.grad(x, last_layer, retain_graph=True)[0].norm()
        for x in (reconstruction_loss, generator_loss)
    )
    return (ours / (theirs + 1e-4)).clamp(0, 1e4).detach()


def loss(model, x, classifier, cfg, discriminator=None):
    """L1 + perceptual + KL (+ adversarial): (B, 3, H, W) -> (), reconstruction. Sec. 3.1 and App. G."""
    y, mu, logvar = model(x)
    value = (x - y).abs().mean() + cfg.perceptual * perceptual_distance(classifier, x, y)
    value = value + cfg.kl * kl_divergence(mu.flatten(1), logvar.flatten(1)).mean() / x[0].numel()
    if discriminator is not None:
        generator = -discriminator(y).mean()
        weight = adaptive_weight(value, generator, model.decoder.conv_out.weight)
        value = value + cfg.adversarial * weight * generator
    return value, y


def split(captions, share=0.1):
    """True for the captions held out of all training: a tenth of them, chosen by a hash, the same on every machine."""
    return [int(hashlib.sha256(c.encode()).hexdigest()[:8], 16) / 2**32 < share for c in captions]


def train(model, ema, optimizer, images, cfg, start=0, discriminator=None, optimizer_d=None):
    """Steps `start` to cfg.steps; yields the loss of each. Images are mirrored at random."""
    device = next(model.parameters()).device
    classifier = pretrained.efficientnet(device)
    for i, x in zip(range(start, cfg.steps), batches(images, cfg.batch, cfg.seed, start)):
        optimizer.param_groups[0]["lr"] = ddpm.learning_rate(cfg, i)
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.flip(3)).to(device)
        with run.autocast(device):
            value, y = loss(model, x, classifier, cfg, discriminator)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if discriminator and optimizer_d:
            with run.autocast(device):
                value_d = discriminator_loss(discriminator(x), discriminator(y.detach()))
            optimizer_d.zero_grad()
            value_d.backward()
            optimizer_d.step()
        ddpm.update_ema(ema, model, min(0.995, (1 + i) / (10 + i)))
        yield value.item()


def shown(parts, name):
    """Batches under a progress bar, if there are more than a few."""
    return run.bar(parts, len(parts), name=name) if len(parts) > 4 else parts


@torch.no_grad()
def encode_all(model, images, batch=64):
    """uint8 (N, 3, H, W) -> mean latents (N, D, h, w), not yet scaled."""
    device = next(model.parameters()).device
    with run.autocast(device):
        parts = shown(images.split(batch), "encode")
        return torch.cat(
            [model.encode(data.to_float(x).to(device))[0].float().cpu() for x in parts]
        )


@torch.no_grad()
def decode_all(model, latents, batch=64):
    """Latents (N, D, h, w), not scaled -> images (N, 3, H, W) in [-1, 1]."""
    device = next(model.parameters()).device
    with run.autocast(device):
        parts = shown(latents.split(batch), "decode")
        return torch.cat([model.decode(z.to(device)).float().cpu().clamp(-1, 1) for z in parts])


def scale_factor(latents):
    """1 / standard deviation: scaled latents have variance 1, as the noise schedule expects of x0. App. G."""
    return float(1 / latents.std())


def load(path, device="cpu"):
    """Weights written by this script -> (autoencoder, scale factor)."""
    model, meta = checkpoint.load_model(
        path, lambda channels, latent, **_: Autoencoder(channels, latent), device
    )
    return model, meta["scale"]


def main(cfg: Config) -> dict:
    """Train (or load), reconstruct emoji that were held out, measure; writes weights and pictures."""
    run.check(
        min(cfg.steps, cfg.batch, cfg.latent) > 0,
        "--steps, --batch and --latent must be at least 1",
    )
    run.check(
        cfg.channels and all(c > 0 and c % 8 == 0 for c in cfg.channels),
        "--channels must be multiples of 8",
    )
    run.check(
        len(cfg.channels) <= 6,
        "--channels: 64 pixels can be halved five times, so there are at most six",
    )
    run.check(cfg.save_every >= 0, "--save-every must not be negative; 0 saves at the end only")
    run.check(0 < cfg.lr < math.inf, "--lr must be above 0 and finite")
    weights = (cfg.perceptual, cfg.kl, cfg.adversarial)
    run.check(
        all(0 <= w < math.inf for w in weights),
        "--perceptual, --kl, --adversarial: finite, not below 0",
    )
    run.seed(cfg.seed)
    folder, device, clock = run.output(cfg.out, cfg), run.device(cfg.device), run.Clock()
    images, captions, _ = data.emoji(64)
    held_out = torch.tensor(split(captions))
    metrics, state = {}, folder / "state.safetensors"
    if cfg.pretrained:
        model, scale = load(WEIGHTS, device)
    else:
        model = Autoencoder(cfg.channels, cfg.latent).to(device)
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(
            model.parameters(), cfg.lr, betas=(0.9, 0.99), weight_decay=0.01
        )
        parts, losses, critic = {"model": model, "ema": ema, "optimizer": optimizer}, [], {}
        if cfg.adversarial:
            discriminator = Discriminator().to(device)
            optimizer_d = torch.optim.AdamW(discriminator.parameters(), 2e-4, betas=(0.5, 0.9))
            critic = {"discriminator": discriminator, "optimizer_d": optimizer_d}
        if cfg.resume:
            before = checkpoint.load_state(state, cfg, **parts, **critic)
            losses, clock = before["losses"], run.Clock(before["seconds"])
        values = {"losses": losses, "config": asdict(cfg)}
        save = lambda: checkpoint.save_state(state, **parts, **critic, **values, seconds=clock())  # noqa: E731
        steps = train(model, ema, optimizer, images[~held_out], cfg, len(losses), **critic)
        for value in run.progress(steps, cfg.steps, len(losses), cfg.save_every, save):
            losses.append(value)
        save()
        model, scale = ema, scale_factor(encode_all(ema, images[~held_out]))
        metrics["train_seconds"] = clock()
        figures.curves(folder / "loss.png", {"loss": losses}, "step", "L1 + perceptual", smooth=50)
        checkpoint.write(
            folder / "model.safetensors", model.state_dict(), asdict(cfg) | {"scale": scale}
        )
    unseen = data.to_float(images[held_out])
    latents = encode_all(model, images[held_out])
    again = decode_all(model, latents)
    metrics["parameters"] = sum(p.numel() for p in model.parameters())
    metrics |= {"held_out_l1": float((again - unseen).abs().mean()), "scale": scale}
    metrics["held_out_psnr"] = float(
        -10 * (((again - unseen) / 2) ** 2).mean((1, 2, 3)).log10().mean()
    )
    first, second = torch.linspace(0, len(unseen) - 1, 24).long().split(12)
    pairs = {
        "held out": unseen[first],
        "again": again[first],
        "held out ": unseen[second],
        "again ": again[second],
    }
    figures.rows(folder / "reconstructions.png", pairs)
    channels = {
        f"channel {i}": latents[second, i : i + 1] * scale / 3
        for i in range(min(4, latents.shape[1]))
    }
    figures.rows(folder / "latents.png", {"held out": unseen[second]} | channels)
    return run.report(folder, metrics, then="python models/stable_diffuser.py")


if __name__ == "__main__":
    run.cli(main, Config)
