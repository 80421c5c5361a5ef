"""Scores of multimodal retrieval on held-out images: rank of the own image, precision at 10.

Emoji: each held-out caption searches for its own image among all held-out emoji. Near-duplicates
between training and test images are measured by training once more without them. Photos: queries
for coarse and fine classes, scored by how many of the first ten photos are of that class.

Shapes: N images, D features of an image, E numbers of a text, Q queries.
"""

import numpy as np
import torch
import torch.nn.functional as F

from rag import scores
from rag.image_data import subset
from rag.image_projection import fit, project
from utils.run import check


def retrieval_ranks(z, t):
    """Images (N,E), their captions (N,E) -> rank, from 1, of each caption's own image: (N,)."""
    similarity = t @ z.T
    closer = similarity > similarity.diagonal()[:, None]
    return (closer.sum(1) + 1).numpy()


def without_near_duplicates(x, t, test, limit):
    """Mask of the training images (N,) with no test image near in features or in caption.

    Near: a cosine above `limit`. Features are centred by the training images before.
    """
    unit = F.normalize(x - x[~test].mean(0), dim=-1)
    nearest = torch.maximum(unit @ unit[test].T, t @ t[test].T).amax(1)
    return ~test & (nearest <= limit)


def score_row(ranks):
    """Ranks (Q,) -> {score: (mean, low, high)}."""
    return {name: scores.interval(values) for name, values in scores.all_of(ranks).items()}


def without_intervals(rows, about):
    """A table as numbers without intervals, for metrics.json."""
    metrics = {}
    for name, row in rows.items():
        means = {score: v[0] if isinstance(v, tuple) else v for score, v in row.items()}
        metrics[f"{about}, {name}"] = means
    return metrics


def random_subset(mask, count, seed):
    """Mask of `count` random elements out of those where `mask` (N,) holds."""
    order = torch.randperm(int(mask.sum()), generator=torch.Generator().manual_seed(seed))
    drawn = mask.nonzero()[:, 0][order[:count]]
    return torch.zeros_like(mask).index_fill(0, drawn, True)


def emoji_scores(images, t, cfg):
    """Held-out emoji retrieved by their captions: three ways to fit, and two ablations of the
    split.

    Flags, families and faces come in rows that look alike and are called alike. A training image
    beside a test image gives it away: the last row trains without such near-duplicates, the row
    before without as many others at random.
    """
    test = images.test
    # Training sets: all, without near-duplicates, and a random subset of the same size
    clean = without_near_duplicates(images.x, t, test, cfg.twin)
    message = (
        "no training emoji is left without near-duplicates: take a higher --twin or more --emoji"
    )
    check(clean.sum() > 1, message)
    fewer = random_subset(~test, int(clean.sum()), cfg.seed)
    count = int(test.sum())
    learnable = int((~test).sum())
    duplicates = learnable - int(clean.sum())
    print(
        f"{count} held-out emoji, {learnable} to train on: {duplicates} near-duplicates of held-out"
    )
    # Chance: the own image stands at any rank equally often
    chance = scores.all_of(np.arange(1, count + 1))
    rows = {"chance": {name: float(values.mean()) for name, values in chance.items()}}
    trained = {
        "ridge": (~test, "ridge"),
        "infonce": (~test, "infonce"),
        "both": (~test, "both"),
        f"{cfg.space}, random subset": (fewer, cfg.space),
        f"{cfg.space}, near-duplicates removed": (clean, cfg.space),
    }
    # Fit each on its training set, and rank the held-out images
    for name, (mask, how) in trained.items():
        space = fit(images.x[mask], t[mask], cfg, how, name)
        rows[name] = score_row(retrieval_ranks(project(space, images.x[test]), t[test]))
    return rows


def with_article(noun):
    """The noun with its article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def photo_queries(names, encode):
    """Class names -> unit vectors (Q,E) of queries for photos of them."""
    return encode([f"a photo of {with_article(name)}" for name in names])


def photo_scores(images, t, encode, cfg):
    """Precision at 10 of queries for classes of photos, trained with and without photos."""
    # What is searched: held-out photos, and all held-out images
    is_photo = torch.tensor([c != "" for c in images.coarse])
    shown = subset(images, images.test & is_photo)
    index = subset(images, images.test)
    index_is_photo = torch.tensor([c != "" for c in index.coarse]).float()
    classes = {"5 coarse classes": shown.coarse, "fine classes": shown.captions}
    rows = {"chance": {}}
    training_sets = {
        "trained on emoji": ~images.test & ~is_photo,
        "trained on emoji and photos": ~images.test,
    }
    # A space for each training set
    for training, mask in training_sets.items():
        space = fit(images.x[mask], t[mask], cfg, name=training)
        rows[training] = {}
        # Precision at 10 among the held-out photos
        z = project(space, shown.x)
        for what, truth in classes.items():
            # A query for each class, and which photos are relevant to it
            names = sorted(set(truth))
            right = torch.tensor([[name == c for c in truth] for name in names]).float()  # (Q,N)
            # The ten most similar photos of each query
            similarity = photo_queries(names, encode) @ z.T
            found = similarity.topk(min(10, len(z))).indices
            rows[training][f"{what}, P@10"] = scores.interval(right.gather(1, found).mean(1))
            rows["chance"][f"{what}, P@10"] = float(right.mean())
        # Part of photos in the first ten, where emoji are in the index as well
        queries = photo_queries(sorted(set(shown.captions)), encode)
        top = (queries @ project(space, index.x).T).topk(10).indices
        rows[training]["photos in the top 10"] = float(index_is_photo[top].mean())
    rows["chance"]["photos in the top 10"] = len(shown.x) / int(images.test.sum())
    return rows
