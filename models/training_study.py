"""Training recipes compared: prediction type, min-SNR weights, logit-normal time steps, zero terminal SNR, and the EMA.

Each recipe changes one choice of `ddpm.py` and trains the same U-Net on the same digits for as many steps; each row is
the mean over seeds. The EMA is compared on runs of the first recipe: all averages see the same training, once with the
learning rate that falls to zero and once with a constant one. Formulas and papers: `training_choices.py`,
`post_hoc_ema.py`.

Shapes: B images, C channels, H x W pixels, T steps of noise.

    python models/training_study.py                                   # all recipes, three seeds each
    python models/training_study.py --only "eps" "eps, min-SNR"       # some of them
"""

import copy
import math
from dataclasses import dataclass

import torch

from models import ddim, ddpm, digit_unet, quality
from models.batches import batches
from models.post_hoc_ema import PowerEMA
from models.prediction_type import to_eps, to_x0
from models.training_choices import (
    draw_timesteps,
    min_snr_weight,
    rescale_zero_terminal_snr,
    scaled_linear_beta,
    weighted_loss,
)
from models.vae import learning_rate
from utils import data, figures, run

# name: (prediction, noise schedule, time steps, whether errors have min-SNR weights)
RECIPES = {
    "v": ("v", "cosine", "uniform", False),
    "v, min-SNR": ("v", "cosine", "uniform", True),
    "v, logit-normal": ("v", "cosine", "logit-normal", False),
    "eps": ("eps", "cosine", "uniform", False),
    "eps, min-SNR": ("eps", "cosine", "uniform", True),
    "v, scaled linear": ("v", "scaled-linear", "uniform", False),
    "v, scaled linear to zero SNR": ("v", "zero-snr", "uniform", False),
}
DECAYS = (0.0, 0.9, 0.97, 0.995)  # of ordinary EMAs; 0 is the weights themselves


@dataclass(frozen=True)
class Config:
    """Train the U-Net of ddpm.py by several recipes and several seeds, compare the samples and the EMAs."""

    only: tuple[str, ...] = ()  # names of recipes to train; all without it
    seeds: int = 3  # runs of each recipe; intervals are over them
    steps: int = 400  # training steps of a run
    batch: int = 64  # images per step
    lr: float = 2e-3  # peak learning rate: 100 steps of warm-up, then a cosine to zero
    ema: float = 0.995  # EMA decay of the recipes
    widths: tuple[float, ...] = (0.03, 0.07, 0.1, 0.15, 0.2)  # sigma_rel of post-hoc EMAs
    snapshots: int = 16  # of each of the two averages
    samples: int = 512  # digits of a run
    sampling_steps: int = 25  # DDIM steps
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/training_study"  # where the results go


def noise_schedule(kind):
    """The schedule of a recipe: "cosine", "scaled-linear", or "zero-snr", the latter stretched to pure noise."""
    if kind == "cosine":
        return ddpm.Schedule(kind=kind)
    beta = scaled_linear_beta(1000)
    return ddpm.Schedule(beta=rescale_zero_terminal_snr(beta) if kind == "zero-snr" else beta)


@torch.no_grad()
def sample(model, schedule, xt, n, predict):
    """DDIM in n steps from noise (B, C, H, W) to images, written with x0: alpha_bar of the first step may be 0."""
    steps = [*ddim.timesteps(schedule, n).tolist(), -1]
    for now, before in zip(steps[:-1], steps[1:], strict=True):
        t = torch.full((len(xt),), now, device=xt.device)
        output = model(xt, t).float()
        # the image and the noise that the network sees, the image kept in its range
        x0 = to_x0(schedule, xt, t, output, predict).clamp(-1, 1)
        if before < 0:
            xt = x0
        else:
            # the same image with less of that noise
            eps = to_eps(schedule, xt, t, output, predict)
            xt = ddpm.add_noise(schedule, x0, torch.full_like(t, before), eps)
    return xt


def train(model, averages, schedule, images, recipe, cfg, seed, constant=False):
    """cfg.steps steps by a recipe of RECIPES; `averages` are functions of (model, step) called after each."""
    predict, _, times, weighted = recipe
    device = schedule.beta.device
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0.01)
    for i, x0 in zip(range(cfg.steps), batches(images, cfg.batch, seed)):
        # learning rate of this step: warm-up, then a cosine, or constant
        rate = min(1, (i + 1) / 100) * cfg.lr if constant else learning_rate(cfg, i)
        optimizer.param_groups[0]["lr"] = rate
        # noise levels, noise, weights of the errors
        t = draw_timesteps(cfg.batch, schedule.steps, times, device)
        eps = torch.randn(x0.shape, device=device)
        weight = min_snr_weight(schedule, t, predict) if weighted else None
        # forward pass and loss, matrix products in bf16
        with run.autocast(device):
            value = weighted_loss(model, schedule, x0.to(device), predict, t, eps, weight)
        # backward pass, long gradients clipped
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for update in averages:
            update(model, i)
        yield value.item()


def ema_updater(ema, decay):
    """What updates an ordinary EMA after step i; a small decay in the first steps lets it forget its random start."""

    def update(model, i):
        ddpm.update_ema(ema, model, min(decay, (1 + i) / (10 + i)))

    return update


def measure(model, schedule, predict, noise, scorer, cfg):
    """Scores of the digits that grow from this noise, their brightness against that of real digits, the digits."""
    with run.autocast(noise.device):
        digits = sample(model.eval(), schedule, noise, cfg.sampling_steps, predict).cpu()
    scores = scorer(digits)
    kept = {name: scores[name] for name in ("frechet", "recognised")}
    return kept | {"brightness": float(digits.mean())}, digits


def new_model(seed, device):
    """The U-Net of ddpm.py with the weights of that seed; the random numbers of the training follow."""
    run.seed(seed)
    return digit_unet.build((32, 64), 2).to(device)


def one_recipe(name, seed, images, noise, scorer, cfg):
    """Train by one recipe with one seed -> scores of its EMA's samples, the samples."""
    recipe = RECIPES[name]
    schedule = noise_schedule(recipe[1]).to(noise.device)
    model = new_model(seed, noise.device)
    ema = copy.deepcopy(model)
    for _ in train(model, [ema_updater(ema, cfg.ema)], schedule, images, recipe, cfg, seed):
        pass
    return measure(ema, schedule, recipe[0], noise, scorer, cfg)


def all_averages(seed, images, noise, scorer, cfg, constant):
    """One run of the first recipe -> {average: scores}: EMAs of several decays, post-hoc ones of several widths."""
    recipe = RECIPES["v"]
    schedule = noise_schedule(recipe[1]).to(noise.device)
    model = new_model(seed, noise.device)
    emas = {decay: copy.deepcopy(model) for decay in DECAYS}
    power = PowerEMA([copy.deepcopy(model), copy.deepcopy(model)])
    every = max(1, cfg.steps // cfg.snapshots)

    def update_power(model, i):
        power.update(model)
        if (i + 1) % every == 0 or i == cfg.steps - 1:
            power.save()

    averages = [ema_updater(ema, decay) for decay, ema in emas.items()] + [update_power]
    for _ in train(model, averages, schedule, images, recipe, cfg, seed, constant):
        pass
    parts = (schedule, recipe[0], noise, scorer, cfg)
    found = {f"decay {decay:g}": measure(ema, *parts)[0] for decay, ema in emas.items()}
    for width in cfg.widths:
        found[f"sigma_rel {width:g}"] = measure(power.average(model, width), *parts)[0]
    return found


def summary(rows):
    """Scores of several seeds -> their means and standard errors."""
    found = {}
    for name in rows[0]:
        values = torch.tensor([row[name] for row in rows])
        found[name] = float(values.mean())
        found[f"{name}_error"] = float(values.std() / math.sqrt(len(rows)))
    return found


def check_config(cfg):
    """Raises UserError for flags with which nothing can be trained or compared."""
    names = ", ".join(f"'{name}'" for name in [*RECIPES, "EMA"])
    run.check(set(cfg.only) <= {*RECIPES, "EMA"}, f"--only takes names of recipes: {names}")
    sizes = (cfg.steps, cfg.batch, cfg.snapshots)
    run.check(min(sizes) > 0, "--steps, --batch and --snapshots must be at least 1")
    run.check(cfg.seeds >= 2, "--seeds must be at least 2: the intervals are over them")
    run.check(cfg.samples >= 10, "--samples must be at least 10, as many as the figure shows")
    run.check(1 <= cfg.sampling_steps <= 1000, "--sampling-steps must be from 1 to 1000")
    run.check(
        0 < cfg.lr < math.inf and 0 <= cfg.ema < 1,
        "--lr must be above 0 and finite, --ema in [0, 1)",
    )
    run.check(
        cfg.widths and all(0 < w <= 12**-0.5 for w in cfg.widths), "--widths must be in (0, 0.288]"
    )


def main(cfg: Config) -> dict:
    """Train, sample and measure every recipe and every average; writes the table, samples and curves."""
    check_config(cfg)
    folder = run.output(cfg.out, cfg)
    device = run.device(cfg.device)
    images, _ = data.mnist("train")
    scorer = quality.scorer(device)
    # the same noises for every run
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(cfg.samples, 1, 28, 28, generator=generator).to(device)
    parts = (images, noise, scorer, cfg)
    metrics = {"brightness_of_real": float(data.to_float(images).mean())}

    # recipes: every seed
    names = [name for name in RECIPES if name in (cfg.only or RECIPES)]
    shown = {}
    jobs = [(name, seed) for name in names for seed in range(cfg.seeds)]
    rows = {name: [] for name in names}
    for name, seed in run.bar(jobs, len(jobs), name="recipes"):
        scores, digits = one_recipe(name, seed, *parts)
        rows[name].append(scores)
        shown.setdefault(name, digits[:10])
    metrics |= {name: summary(found) for name, found in rows.items()}
    if shown:
        figures.rows(folder / "samples.png", shown)

    # averages: every seed, under both learning rates
    if not cfg.only or "EMA" in cfg.only:
        curves = {}
        for constant, label in ((False, "falling rate"), (True, "constant rate")):
            runs = [all_averages(seed, *parts, constant) for seed in range(cfg.seeds)]
            table = {name: summary([found[name] for found in runs]) for name in runs[0]}
            metrics |= {f"{label}, {name}": row for name, row in table.items()}
            values = [table[f"sigma_rel {width:g}"]["frechet"] for width in cfg.widths]
            curves[label] = (cfg.widths, values)
        label = "width of the average, sigma_rel"
        figures.curves(folder / "ema.png", curves, label, "Frechet distance")
    return run.report(folder, metrics, then=f"open {folder}/samples.png")


if __name__ == "__main__":
    run.cli(main, Config)
