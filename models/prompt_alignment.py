"""Prompt alignment of text to image: does a picture show its prompt? Measured in features of EfficientNet-lite0.

Three questions. A caption of the training: is its emoji, among all, the nearest to the picture (retrieval)? A held-out
caption: the same, and is the picture nearer to its emoji than to another one's? A colour and a thing: has the picture
that colour?

Shapes: N pictures, M emoji, D = 1280 features.
"""

import hashlib
import math
import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from utils import assets, data, pretrained, run

# Where emoji have them on the circle of colours
HUES = {"red": 0.0, "green": 1 / 3, "blue": 0.58, "yellow": 0.14}
THINGS = ("heart", "circle", "book")  # that are asked for in each of these colours


def picture_features(images):
    """(N, 3, H, W) in [-1, 1] or uint8 -> unit vectors (N, 1280)."""
    network = pretrained.efficientnet()
    parts = images.split(16)
    shown = run.bar(parts, len(parts), name="features") if len(parts) > 4 else parts
    features = [pretrained.efficientnet_features(network, part) for part in shown]
    return F.normalize(torch.cat(features))


def emoji_features(images):
    """The same for the whole emoji set, which takes a minute: kept in the cache, by the hash of the pictures."""
    key = hashlib.sha256(images.contiguous().numpy().data).hexdigest()[:16]
    path = assets.cache() / f"efficientnet-emoji-{key}.safetensors"
    tensors, _ = data.cached(path, lambda: ({"features": picture_features(images)}, None))
    return tensors["features"]


def cosine_similarity(x, y):
    """Similarity of unit vectors, row by row: (N, D), (N, D) -> (N,)."""
    return (x * y).sum(-1)


def retrieval_rank(drawn, features, index):
    """How many emoji are nearer to a picture than the one it should show: (N, D), (M, D), (N,) -> (N,); 0 is best."""
    similarity = drawn @ features.T
    own = similarity.gather(1, index[:, None])
    return (similarity > own).sum(1)


def mean_and_error(values):
    """Mean of values (N,) and its standard error."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def hue(image):
    """The word of HUES for the colour of most of the picture (3, H, W) in [-1, 1]; "" if it is grey."""
    rgb = data.to_uint8(image).permute(1, 2, 0).numpy()
    hsv = np.array(Image.fromarray(rgb).convert("HSV"))
    h, s, _ = (torch.from_numpy(hsv).float() / 255).unbind(-1)
    # pixels with a strong colour have a vote
    strong = s > 0.4
    if strong.float().mean() < 0.02:
        return ""
    # each votes for the word whose hue is the nearest on the circle
    distance = [((h[strong] - at + 0.5) % 1 - 0.5).abs() for at in HUES.values()]
    votes = torch.stack(distance).argmin(0).bincount(minlength=len(HUES))
    return list(HUES)[int(votes.argmax())]


def some(indices, count):
    """At most `count` of the indices, the same ones in every run."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
    return indices[order[:count]]


def evaluate(painter, images, captions, held_out, shape, cfg, count=100):
    """Do pictures show their prompt? -> metrics, figures {file: (rows {label: images}, titles of the columns)}.

    painter: draws prompts from noise (N, D, h, w); images: the emoji, uint8 (M, 3, H, W), with their captions.
    """

    def draw(prompts):
        return painter.draw(prompts, noise[: len(prompts)], cfg.guidance_scale, cfg.sampling_steps)

    # the same noise for captions of the training and for held-out ones
    held_out = torch.tensor(held_out)
    seen = some((~held_out).nonzero()[:, 0], count)
    unseen = some(held_out.nonzero()[:, 0], count)
    noise = torch.randn(count, *shape)
    drawn = draw([captions[i] for i in seen])
    new = draw([captions[i] for i in unseen])

    # captions of the training: is the emoji the nearest of all to the picture?
    features = emoji_features(images)
    ranks = retrieval_rank(picture_features(drawn), features, seen)

    # held-out captions: is it among the nearest; and nearer to the picture than the emoji of the next caption?
    new_features = picture_features(new)
    new_ranks = retrieval_rank(new_features, features, unseen)
    similarity = cosine_similarity(new_features, features[unseen])
    random_similarity = cosine_similarity(new_features, features[unseen.roll(1)])

    # prompts of a colour and a thing: has the picture that colour?
    pairs = [(colour, thing) for colour in HUES for thing in THINGS]
    coloured = draw([" ".join(pair) for pair in pairs])
    right = [hue(picture) == colour for picture, (colour, _) in zip(coloured, pairs)]

    metrics = {
        "seen_top1": float((ranks == 0).float().mean()),
        "seen_top10": float((ranks < 10).float().mean()),
        "held_out_top1": float((new_ranks == 0).float().mean()),
        "held_out_top10": float((new_ranks < 10).float().mean()),
        "chance_top1": 1 / len(images),
        "chance_top10": 10 / len(images),
        "held_out_similarity": float(similarity.mean()),
        "random_similarity": float(random_similarity.mean()),
        "held_out_closer_than_random": float((similarity > random_similarity).float().mean()),
        "colours_right": sum(right) / len(pairs),
    }

    # pictures beside the true emoji, under their captions
    true = data.to_float(images)
    titles = [textwrap.fill(caption, 12) for caption in captions]
    figures = {}
    for name, pictures, pick in (("seen", drawn, seen), ("held_out", new, unseen)):
        rows = {"drawn": pictures[:12], "true": true[pick[:12]]}
        figures[f"{name}.png"] = rows, [titles[i] for i in pick[:12]]
    rows = {thing: coloured[i :: len(THINGS)] for i, thing in enumerate(THINGS)}
    figures["colours.png"] = rows, list(HUES)
    return metrics, figures


def guidance_rows(painter, noise, cfg):
    """The same prompts and noise under several guidance scales: rows {label: images}, titles of the columns."""
    prompts = ["red apple", "blue heart", "cat face", "crying face"]
    prompts += ["evergreen tree", "flag: japan", "yellow circle", "umbrella"]
    rows = {}
    for scale in (1.0, 2.0, 3.0, 5.0, 8.0):
        rows[f"scale {scale:g}"] = painter.draw(prompts, noise, scale, cfg.sampling_steps)
    return rows, [prompt.replace(" ", "\n") for prompt in prompts]
