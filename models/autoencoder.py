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
from torch import nn

from models import ddpm
from models.adversarial_loss import Discriminator, adaptive_weight, discriminator_loss
from models.batches import batches
from models.encoder_decoder import Decoder, Encoder
from models.perceptual_loss import perceptual_distance
from models.training_state import TrainingState
from models.vae import kl_divergence, reparameterize
from utils import checkpoint, data, figures, pretrained, run

WEIGHTS = Path(__file__).parent / "weights" / "autoencoder.safetensors"


@dataclass(frozen=True)
class Config:
    """Train the autoencoder on emoji and show what it keeps of held-out ones."""

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


class Autoencoder(nn.Module):
    """encode: (B, 3, H, W) in [-1, 1] -> mu, logvar, each (B, D, h, w); decode: (B, D, h, w) -> (B, 3, H, W)."""

    def __init__(self, channels=(16, 48, 96), latent=4):
        super().__init__()
        self.encoder = Encoder(channels, latent)
        self.decoder = Decoder(channels, latent)
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


def loss(model, x, classifier, cfg, discriminator=None):
    """L1 + perceptual + KL (+ adversarial): (B, 3, H, W) -> (), reconstruction. Sec. 3.1 and App. G."""
    # reconstruction: L1, and the distance in the features of a classifier
    y, mu, logvar = model(x)
    value = (x - y).abs().mean() + cfg.perceptual * perceptual_distance(classifier, x, y)
    # KL divergence, per number of the image
    value = value + cfg.kl * kl_divergence(mu.flatten(1), logvar.flatten(1)).mean() / x[0].numel()
    # adversarial loss: the decoder paints what the discriminator takes for real
    if discriminator is not None:
        generator = -discriminator(y).mean()
        weight = adaptive_weight(value, generator, model.decoder.conv_out.weight)
        value = value + cfg.adversarial * weight * generator
    return value, y


def split(captions, share=0.1):
    """True for the captions held out of all training: a tenth of them, chosen by a hash, the same on every machine."""
    held_out = []
    for caption in captions:
        digest = hashlib.sha256(caption.encode()).hexdigest()
        held_out.append(int(digest[:8], 16) / 2**32 < share)
    return held_out


def train(model, ema, optimizer, images, cfg, start=0, discriminator=None, optimizer_d=None):
    """Steps `start` to cfg.steps; yields the loss of each. Images are mirrored at random."""
    device = next(model.parameters()).device
    classifier = pretrained.efficientnet(device)
    for i, x in zip(range(start, cfg.steps), batches(images, cfg.batch, cfg.seed, start)):
        # learning rate of this step: warm-up, then a cosine
        optimizer.param_groups[0]["lr"] = ddpm.learning_rate(cfg, i)
        # half of the images mirrored
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.flip(3)).to(device)
        # forward pass and loss, matrix products in bf16
        with run.autocast(device):
            value, y = loss(model, x, classifier, cfg, discriminator)
        # backward pass, long gradients clipped
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # a step of the discriminator, on the same images and what was painted of them
        if discriminator and optimizer_d:
            with run.autocast(device):
                value_d = discriminator_loss(discriminator(x), discriminator(y.detach()))
            optimizer_d.zero_grad()
            value_d.backward()
            optimizer_d.step()
        # EMA of the weights; a small decay in the first steps lets it forget its random start
        decay = min(0.995, (1 + i) / (10 + i))
        ddpm.update_ema(ema, model, decay)
        yield value.item()


def shown(parts, name):
    """Batches under a progress bar, if there are more than a few."""
    return run.bar(parts, len(parts), name=name) if len(parts) > 4 else parts


@torch.no_grad()
def encode_all(model, images, batch=64):
    """uint8 (N, 3, H, W) -> mean latents (N, D, h, w), not yet scaled."""
    device = next(model.parameters()).device
    latents = []
    with run.autocast(device):
        for x in shown(images.split(batch), "encode"):
            mu, _ = model.encode(data.to_float(x).to(device))
            latents.append(mu.float().cpu())
    return torch.cat(latents)


@torch.no_grad()
def decode_all(model, latents, batch=64):
    """Latents (N, D, h, w), not scaled -> images (N, 3, H, W) in [-1, 1]."""
    device = next(model.parameters()).device
    images = []
    with run.autocast(device):
        for z in shown(latents.split(batch), "decode"):
            images.append(model.decode(z.to(device)).float().cpu().clamp(-1, 1))
    return torch.cat(images)


def scale_factor(latents):
    """1 / standard deviation: scaled latents have variance 1, as the noise schedule expects of x0. App. G."""
    return float(1 / latents.std())


def build(channels, latent, **_):
    """The autoencoder of these widths."""
    return Autoencoder(channels, latent)


def load(path, device="cpu"):
    """Weights written by this script -> (autoencoder, scale factor)."""
    model, meta = checkpoint.load_model(path, build, device)
    return model, meta["scale"]


def main(cfg: Config) -> dict:
    """Train (or load), reconstruct emoji that were held out, measure; writes weights and pictures."""
    sizes = (cfg.steps, cfg.batch, cfg.latent)
    run.check(min(sizes) > 0, "--steps, --batch and --latent must be at least 1")
    multiples = all(c > 0 and c % 8 == 0 for c in cfg.channels)
    run.check(cfg.channels and multiples, "--channels must be multiples of 8")
    run.check(
        len(cfg.channels) <= 6,
        "--channels: 64 pixels can be halved five times, so there are at most six",
    )
    run.check(cfg.save_every >= 0, "--save-every must not be negative; 0 saves at the end only")
    run.check(0 < cfg.lr < math.inf, "--lr must be above 0 and finite")
    finite = all(0 <= w < math.inf for w in (cfg.perceptual, cfg.kl, cfg.adversarial))
    run.check(finite, "--perceptual, --kl, --adversarial: finite, not below 0")
    run.seed(cfg.seed)
    folder = run.output(cfg.out, cfg)
    device = run.device(cfg.device)
    clock = run.Clock()

    # data: emoji, a tenth of them held out
    images, captions, _ = data.emoji(64)
    held_out = torch.tensor(split(captions))
    metrics = {}

    if cfg.pretrained:
        model, scale = load(WEIGHTS, device)
    else:
        # model, its EMA, optimizer; a discriminator with its own, if there is an adversarial loss
        model = build(cfg.channels, cfg.latent).to(device)
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(
            model.parameters(), cfg.lr, betas=(0.9, 0.99), weight_decay=0.01
        )
        critic = {}
        if cfg.adversarial:
            discriminator = Discriminator().to(device)
            optimizer_d = torch.optim.AdamW(discriminator.parameters(), 2e-4, betas=(0.5, 0.9))
            critic = {"discriminator": discriminator, "optimizer_d": optimizer_d}
        # all that a resumed run needs to go on bit for bit
        parts = {"model": model, "ema": ema, "optimizer": optimizer} | critic
        state = TrainingState(folder, cfg, clock, **parts)
        start = len(state.losses)

        # train
        steps = train(model, ema, optimizer, images[~held_out], cfg, start, **critic)
        for value in run.progress(steps, cfg.steps, start, cfg.save_every, state.save):
            state.losses.append(value)
        state.save()

        # the EMA is what is kept, with the scale of its latents
        model = ema
        scale = scale_factor(encode_all(ema, images[~held_out]))
        metrics["train_seconds"] = state.clock()
        state.draw_losses("L1 + perceptual")
        meta = asdict(cfg) | {"scale": scale}
        checkpoint.write(folder / "model.safetensors", model.state_dict(), meta)

    # reconstruct the held-out emoji and measure
    unseen = data.to_float(images[held_out])
    latents = encode_all(model, images[held_out])
    again = decode_all(model, latents)
    metrics["parameters"] = sum(p.numel() for p in model.parameters())
    metrics["held_out_l1"] = float((again - unseen).abs().mean())
    metrics["scale"] = scale
    squared = (((again - unseen) / 2) ** 2).mean((1, 2, 3))
    metrics["held_out_psnr"] = float(-10 * squared.log10().mean())

    # draw 24 of them, and the latents of twelve, channel by channel
    first, second = torch.linspace(0, len(unseen) - 1, 24).long().split(12)
    pairs = {
        "held out": unseen[first],
        "again": again[first],
        "held out ": unseen[second],
        "again ": again[second],
    }
    figures.rows(folder / "reconstructions.png", pairs)
    rows = {"held out": unseen[second]}
    for i in range(min(4, latents.shape[1])):
        rows[f"channel {i}"] = latents[second, i : i + 1] * scale / 3
    figures.rows(folder / "latents.png", rows)
    return run.report(folder, metrics, then="python models/stable_diffuser.py")


if __name__ == "__main__":
    run.cli(main, Config)
