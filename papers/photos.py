"""Photos of fruit: random crops, the data set's split, linear probes and baselines, ImageNet features in a cache."""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils import assets, data, pretrained, run


def crops(images, size, smallest=0.2):
    """Random pieces of images (B,C,H,W), of `smallest` to all of the area, some mirrored -> (B,C,size,size)."""
    b = len(images)
    device = images.device
    # width and height of each piece, as parts of the image's, from its area and aspect ratio
    area = torch.empty(b, device=device).uniform_(smallest, 1)
    aspect = torch.empty(b, device=device).uniform_(-1, 1).mul(np.log(4 / 3)).exp()
    wide = (area * aspect).sqrt().clamp(max=1)
    high = (area / aspect).sqrt().clamp(max=1)
    # its centre, such that the piece lies within the image
    x = (1 - wide) * (2 * torch.rand(b, device=device) - 1)
    y = (1 - high) * (2 * torch.rand(b, device=device) - 1)
    wide = wide * (1 - 2 * torch.randint(2, (b,), device=device))  # mirrored
    # the affine map from the piece to the image, and the image read there
    zero = torch.zeros_like(x)
    first_row = torch.stack([wide, zero, x], 1)
    second_row = torch.stack([zero, high, y], 1)
    theta = torch.stack([first_row, second_row], 1)
    where = F.affine_grid(theta, [b, images.shape[1], size, size], align_corners=False)
    options = {"mode": "bilinear", "padding_mode": "reflection", "align_corners": False}
    return F.grid_sample(images, where, **options)


def whole(images, size):
    """Images uint8 (N,C,H,W) -> all of each, float (N,C,size,size)."""
    return F.interpolate(data.to_float(images), size=(size, size), mode="area")


def split(fruit):
    """Indices of the photos to learn from and of the held-out ones: the data set's own split."""
    part = np.array(fruit.split)
    learn = torch.from_numpy(np.flatnonzero(part != "test"))
    held_out = torch.from_numpy(np.flatnonzero(part == "test"))
    return learn, held_out


def accuracies(logits, fruit, chosen):
    """Share of right answers for 14 kinds and for the 5 groups they fall into, whose probabilities are added up."""
    # the group of each kind
    group = torch.stack([fruit.coarse[fruit.fine == k][0] for k in range(len(fruit.fine_names))])
    grouped = torch.zeros(len(logits), len(fruit.coarse_names))
    grouped.index_add_(1, group, logits.softmax(-1))
    return {
        "14 kinds": float((logits.argmax(-1) == fruit.fine[chosen]).float().mean()),
        "5 groups": float((grouped.argmax(-1) == fruit.coarse[chosen]).float().mean()),
    }


def majority(fruit, learn, judge):
    """Majority-class baseline: what always answering the most frequent kind, or group, would reach."""
    shares = {}
    for name, y in (("14 kinds", fruit.fine), ("5 groups", fruit.coarse)):
        right = y[judge] == y[learn].mode().values
        shares[name] = float(right.float().mean())
    return shares


def probe(x, y, learn, judge, weight=1e-4):
    """Linear probe: multinomial logistic regression on standardised features (N,D) -> logits of the held-out photos."""
    # standardised by what is learned from, and divided by the root of D
    mean = x[learn].mean(0)
    spread = x[learn].std(0) + 1e-6
    x = (x - mean) / spread / x.shape[1] ** 0.5
    # a linear layer, fitted to the optimum
    head = nn.Linear(x.shape[1], int(y.max()) + 1)
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = F.cross_entropy(head(x[learn]), y[learn]) + weight * head.weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(closure)
    return head(x[judge]).detach()


def probed(x, fruit, learn, judge):
    """Share of right answers of a probe on features (N,D) for the 14 kinds, and of another for the 5 groups."""
    shares = {}
    for kind, y in (("14 kinds", fruit.fine), ("5 groups", fruit.coarse)):
        answer = probe(x, y, learn, judge).argmax(-1)
        shares[kind] = float((answer == y[judge]).float().mean())
    return shares


def imagenet(images, device):
    """Features (N,1280) of uint8 images by a network that ImageNet's labels taught: made once, kept by their hash."""
    content = str(tuple(images.shape)).encode() + images.numpy().tobytes()
    name = hashlib.sha256(content).hexdigest()[:16]
    path = assets.cache() / "features" / f"efficientnet-{name}.safetensors"

    def make():
        network = pretrained.efficientnet(device)
        parts = images.split(32)
        x = []
        for part in run.bar(parts, len(parts), name="look"):
            # a larger batch is slower on a CPU
            x.append(pretrained.efficientnet_features(network, part, batch=4).cpu())
        return {"features": torch.cat(x)}, None

    return data.cached(path, make)[0]["features"]
