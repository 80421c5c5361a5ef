"""Image-to-image and inpainting measured: strength against prompt, kept pixels, and the seam with resampling.

Image-to-image: emoji whose names the model knows, each under the name of another one. How far is the picture from the
one that was given, and does it show the prompt, at each strength? Inpainting: the right half is redrawn under the
emoji's own name or without words, of emoji from the training and of held-out ones.

    python models/edit_study.py        # 3.3 CPU minutes
"""

from dataclasses import dataclass, replace

import torch

from models import autoencoder, edit
from models.inpainting import pixel_error, seam
from models.prompt_alignment import emoji_features, picture_features, retrieval_rank, some
from utils import data, figures, run

# name: (resamples, eta, whether the emoji's name is the prompt)
WAYS = {
    "no resampling": (1, 0.0, True),
    "2 resamples": (2, 0.0, True),
    "5 resamples": (5, 0.0, True),
    "eta 1": (1, 1.0, True),
    "eta 1, 5 resamples": (5, 1.0, True),
    "no prompt": (1, 0.0, False),
    "no prompt, 5 resamples": (5, 0.0, False),
}


@dataclass(frozen=True)
class Config:
    """Measure image-to-image at several strengths, and inpainting with and without resampling."""

    count: int = 30  # emoji of each kind
    strengths: tuple[float, ...] = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)  # of image-to-image
    sampling_steps: int = 50  # DDIM steps
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/edit_study"  # where the results go


def standard_error(values):
    """Of the mean of values (N,)."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def strengths(painter, images, captions, pick, features, noise, cfg):
    """Each emoji under the name of the next one: scores and pictures by strength."""
    given = data.to_float(images[pick])
    target = pick.roll(-1)
    prompts = [captions[i] for i in target]
    scores = {}
    pictures = {}
    for strength in cfg.strengths:
        flags = edit.Config(strength=strength, sampling_steps=cfg.sampling_steps)
        drawn = edit.edit(painter, images[pick], prompts, noise, flags)
        found = picture_features(drawn)
        everywhere = torch.ones_like(given[:, :1], dtype=torch.bool)
        own = retrieval_rank(found, features, pick) < 10
        asked = retrieval_rank(found, features, target) < 10
        scores[strength] = {
            "pixel_error": pixel_error(drawn, given, everywhere),
            "given_top10": float(own.float().mean()),
            "prompt_top10": float(asked.float().mean()),
        }
        pictures[strength] = drawn
    return scores, pictures


def halves(painter, images, captions, pick, features, noise, cfg):
    """The right half redrawn: scores and pictures of every way, and of the autoencoder alone."""
    given = data.to_float(images[pick])
    mask = edit.part_mask("right").expand(len(pick), -1, -1, -1)
    again = autoencoder.decode_all(
        painter.decoder, autoencoder.encode_all(painter.decoder, images[pick])
    )
    pictures = {"given": given, "right half white": torch.where(mask, 1.0, given)}
    pictures["autoencoder"] = again
    for name, (resamples, eta, named) in WAYS.items():
        run.seed(cfg.seed)
        flags = edit.Config(resamples=resamples, eta=eta, sampling_steps=cfg.sampling_steps)
        # without words there is nothing to guide towards
        flags = flags if named else replace(flags, guidance_scale=1.0)
        prompts = [captions[i] if named else "" for i in pick]
        pictures[name] = edit.edit(painter, images[pick], prompts, noise, flags, mask)
    scores = {}
    first = seam(pictures["no resampling"], mask)
    for name, drawn in pictures.items():
        seams = seam(drawn, mask)
        rank = retrieval_rank(picture_features(drawn), features, pick)
        scores[name] = {
            "seam": float(seams.mean()),
            "seam_minus_no_resampling": float((seams - first).mean()),
            "standard_error": standard_error(seams - first),
            "kept_error": pixel_error(drawn, given, ~mask),
            "top1": float((rank == 0).float().mean()),
        }
    return scores, pictures


def main(cfg: Config) -> dict:
    """Both studies; writes tables into metrics.json, a curve, and rows of pictures."""
    run.check(cfg.count >= 2, "--count must be at least 2: each emoji gets the name of the next")
    given = cfg.strengths and all(0 <= s <= 1 for s in cfg.strengths)
    run.check(given, "--strengths must be one or more numbers in [0, 1]")
    run.check(1 <= cfg.sampling_steps <= 1000, "--sampling-steps must be from 1 to 1000")
    run.seed(cfg.seed)
    folder = run.output(cfg.out, cfg)
    device = run.device(cfg.device)
    painter = edit.load_painter(device)

    # emoji of the training, and held-out ones
    images, captions, _ = data.emoji(64)
    held_out = torch.tensor(autoencoder.split(captions))
    seen = some((~held_out).nonzero()[:, 0], cfg.count)
    unseen = some(held_out.nonzero()[:, 0], cfg.count)
    features = emoji_features(images)
    noise = torch.randn(cfg.count, 4, 16, 16).to(device)
    parts = (features, noise, cfg)

    # image-to-image over the strength
    metrics = {}
    scores, pictures = strengths(painter, images, captions, seen, *parts)
    metrics |= {f"strength {s:g}": row for s, row in scores.items()}
    rows = {"given": data.to_float(images[seen[:10]])}
    rows |= {f"strength {s:g}": x[:10] for s, x in pictures.items()}
    titles = [captions[i].replace(" ", "\n", 2) for i in seen.roll(-1)[:10]]
    figures.rows(folder / "strength.png", rows, titles)
    curves = {}
    for name, label in (("given_top10", "given emoji"), ("prompt_top10", "emoji of the prompt")):
        curves[label] = (list(scores), [row[name] for row in scores.values()])
    label = f"among the ten nearest, of {len(seen)}"
    figures.curves(folder / "strength_curve.png", curves, "strength", label)

    # inpainting of the right half
    for kind, pick in (("seen", seen), ("held out", unseen)):
        scores, pictures = halves(painter, images, captions, pick, *parts)
        metrics |= {f"{kind}, {name}": row for name, row in scores.items()}
        rows = {name: x[:10] for name, x in pictures.items() if name != "autoencoder"}
        titles = [captions[i].replace(" ", "\n", 2) for i in pick[:10]]
        figures.rows(folder / f"inpaint_{kind.replace(' ', '_')}.png", rows, titles)
    return run.report(folder, metrics, then=f"open {folder}/inpaint_held_out.png")


if __name__ == "__main__":
    run.cli(main, Config)
