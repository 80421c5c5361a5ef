"""What the papers on pictures share: photos of fruit, random crops, and how an encoder is scored."""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils import assets, data, pretrained, run


def crops(images, size, smallest=0.2):
    """Random pieces of images (B,C,H,W), of `smallest` to all of the area, some mirrored -> (B,C,size,size)."""
    b, device = len(images), images.device
    area = torch.empty(b, device=device).uniform_(smallest, 1)
    aspect = torch.empty(b, device=device).uniform_(-1, 1).mul(np.log(4 / 3)).exp()
    wide, high = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x, y = ((1 - s) * (2 * torch.rand(b, device=device) - 1) for s in (wide, high))
    wide = wide * (1 - 2 * torch.randint(2, (b,), device=device))  # mirrored
    zero = torch.zeros_like(x)
    theta = torch.stack([torch.stack([wide, zero, x], 1), torch.stack([zero, high, y], 1)], 1)
    where = F.affine_grid(theta, [b, images.shape[1], size, size], align_corners=False)
    return F.grid_sample(
        images, where, mode="bilinear", padding_mode="reflection", align_corners=False
    )


def whole(images, size):
    """Images uint8 (N,C,H,W) -> all of each, float (N,C,size,size)."""
    return F.interpolate(data.to_float(images), size=(size, size), mode="area")


def split(fruit):
    """Indices of the photos to learn from and of those to be judged by: the data set's own split."""
    part = np.array(fruit.split)
    return torch.from_numpy(np.flatnonzero(part != "test")), torch.from_numpy(
        np.flatnonzero(part == "test")
    )


def accuracies(logits, fruit, chosen):
    """Share of right answers for 14 kinds and for the 5 groups they fall into, whose probabilities are added up."""
    group = torch.stack([fruit.coarse[fruit.fine == k][0] for k in range(len(fruit.fine_names))])
    grouped = torch.zeros(len(logits), len(fruit.coarse_names)).index_add_(
        1, group, logits.softmax(-1)
    )
    return {
        "14 kinds": float((logits.argmax(-1) == fruit.fine[chosen]).float().mean()),
        "5 groups": float((grouped.argmax(-1) == fruit.coarse[chosen]).float().mean()),
    }


def majority(fruit, learn, judge):
    """What always answering the most frequent kind, or group, would reach."""
    return {
        name: float((y[judge] == y[learn].mode().values).float().mean())
        for name, y in (("14 kinds", fruit.fine), ("5 groups", fruit.coarse))
    }


def probe(x, y, learn, judge, weight=1e-4):
    """Multinomial logistic regression on standardised features (N,D): -> logits of the photos to be judged."""
    mean, spread = x[learn].mean(0), x[learn].std(0) + 1e-6
    x = (x - mean) / spread / x.shape[1] ** 0.5
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
    return {
        kind: float((probe(x, y, learn, judge).argmax(-1) == y[judge]).float().mean())
        for kind, y in (("14 kinds", fruit.fine), ("5 groups", fruit.coarse))
    }


def imagenet(images, device):
    """Features (N,1280) of uint8 images by a network that ImageNet's labels taught: made once, kept by their hash."""
    name = hashlib.sha256(str(tuple(images.shape)).encode() + images.numpy().tobytes()).hexdigest()[
        :16
    ]
    path = assets.cache() / "features" / f"efficientnet-{name}.safetensors"

    def look():
        network, parts = pretrained.efficientnet(device), images.split(32)
        shown = run.bar(parts, len(parts), name="look")
        # Larger is slower on a CPU
        x = [pretrained.efficientnet_features(network, p, batch=4).cpu() for p in shown]
        return {"features": torch.cat(x)}, None

    return data.cached(path, look)[0]["features"]
