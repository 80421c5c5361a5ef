"""Guidance scales compared: how often the digit is the class asked for, how far samples are from real digits."""

import math

from models import quality
from utils import figures, run


def check_guidance_scale(scale, negative=""):
    """Raises UserError for what is no scale, or too small a one to steer away from a negative prompt."""
    run.check(0 <= scale < math.inf, "--guidance-scale must be finite and not negative")
    needed = "--negative needs a --guidance-scale above 1: less steers towards it"
    run.check(scale > 1 or not negative, needed)


def accuracy(classifier, images, y):
    """Share of images (N, 1, 28, 28) that the classifier takes for the digit asked for, y (N,)."""
    _, probabilities = quality.evaluate(classifier, images)
    return float((probabilities.argmax(-1) == y).float().mean())


def scorer(y, device="cpu"):
    """A function images (N, 1, 28, 28) -> how many are the digits asked for, y (N,), and the scores of quality.py."""
    classifier = quality.load(device)
    judge = quality.scorer(device)

    def scores(images):
        return {"accuracy": accuracy(classifier, images, y.cpu())} | judge(images)

    return scores


def draw(folder, digits, y, scores, best):
    """Four figures: samples at the best scale, the same noises at all of them, two scores over the scale.

    digits: {scale: images (N, 1, 28, 28)} of the classes y (N,); scores: {scale: {name: value}}.
    """
    # eight samples of each digit
    rows = {str(k): digits[best][y == k][:8] for k in range(10)}
    figures.rows(folder / "samples.png", rows)
    # what guidance does to the same noises
    rows = {f"scale {scale:g}": images[:10] for scale, images in digits.items()}
    figures.rows(folder / "guidance.png", rows, range(10))
    # accuracy and Frechet distance over the scale
    labels = {
        "accuracy": f"share drawn as asked, of {len(y)}",
        "frechet": "Frechet distance to test digits",
    }
    for name, label in labels.items():
        values = [score[name] for score in scores.values()]
        curve = {label: (list(scores), values)}
        figures.curves(folder / f"guidance_{name}.png", curve, "guidance scale (1: none)", label)
