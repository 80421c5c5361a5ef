"""Flags of flow.py and reflow.py: what makes no sense is refused before anything is trained."""

import math

from models.digit_unet import check_channels
from models.guidance_study import check_guidance_scale
from utils import run


def check_sampling(cfg):
    """Raises UserError for flags of either script with which nothing can be trained or sampled."""
    paces = 0 < cfg.lr < math.inf and 0 <= cfg.ema < 1
    run.check(paces, "--lr must be above 0 and finite, --ema in [0, 1)")
    run.check(0 <= cfg.dropout <= 1, "--dropout is a share: it must be in [0, 1]")
    check_guidance_scale(cfg.guidance_scale)
    run.check(cfg.samples >= 10, "--samples must be at least 10, as many as the figure shows")
    counts = cfg.sampling_steps and min(cfg.sampling_steps) > 0
    run.check(counts, "--sampling-steps must be one or more numbers from 1 on")


def check_flow(cfg):
    """Raises UserError for flags of flow.py that make no sense."""
    sizes = (cfg.steps, cfg.batch, cfg.layers, cfg.save_every)
    run.check(min(sizes) > 0, "--steps, --batch, --layers and --save-every must be at least 1")
    check_sampling(cfg)
    check_channels(cfg.channels)


def check_reflow(cfg):
    """Raises UserError for flags of reflow.py that make no sense."""
    sizes = (cfg.pair_steps, cfg.steps, cfg.batch)
    run.check(min(sizes) > 0, "--pair-steps, --steps and --batch must be at least 1")
    run.check(cfg.pairs >= cfg.batch, "--pairs must be at least --batch, one batch of them")
    check_sampling(cfg)
