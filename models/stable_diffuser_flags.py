"""Flags of stable_diffuser.py: what makes no sense is refused before anything is trained."""

import math

import torch

from models.guidance_study import check_guidance_scale
from utils import run


def check_flags(cfg, world):
    """Raises UserError for flags that make no sense, alone or together, on `world` processes."""
    sizes = (cfg.steps, cfg.batch, cfg.sampling_steps)
    run.check(min(sizes) > 0, "--steps, --batch and --sampling-steps must be at least 1")
    most = "--sampling-steps: the schedule has 1000 steps and no more"
    run.check(cfg.sampling_steps <= 1000, most)
    run.check(0 < cfg.lr < math.inf, "--lr must be above 0 and finite")
    run.check(
        not (cfg.pretrained and cfg.autoencoder),
        "the shipped weights belong to the shipped --autoencoder",
    )
    run.check(cfg.batch % world == 0, f"--batch {cfg.batch} cannot be shared by {world} processes")
    run.check(0 <= cfg.drop_text <= 1, "--drop-text is a share: it must be in [0, 1]")
    run.check(0 <= cfg.word_dropout <= 1, "--word-dropout is a share: it must be in [0, 1]")
    strong = 0 <= cfg.text_noise < math.inf
    run.check(strong, "--text-noise must be finite and not negative")
    run.check(0 <= cfg.ema < 1, "--ema must be in [0, 1)")
    check_guidance_scale(cfg.guidance_scale, cfg.negative)
    run.check(cfg.prompt or not cfg.negative, "--negative needs a --prompt")
    for flag, words in (("--prompt", cfg.prompt), ("--negative", cfg.negative)):
        blank = words and not words.strip()
        run.check(not blank, f"{flag} is blank: name what to draw, or leave it out")
    multiples = all(c > 0 and c % 32 == 0 for c in cfg.channels)
    run.check(cfg.channels and multiples, "--channels must be multiples of 32")


def latent_shape(coder, channels, device):
    """(D, h, w) of the latents of a picture. Raises UserError if the U-Net cannot halve them so often."""
    mean, _ = coder.encode(torch.zeros(1, 3, 64, 64, device=device))
    shape = tuple(mean.shape[1:])
    halvings = len(channels) - 1
    halved = f"--channels: latents of {shape[1]} x {shape[2]}, folded 2 x 2, cannot be halved {halvings} times"
    run.check(shape[1] % 2 ** len(channels) == 0, halved)
    return shape
