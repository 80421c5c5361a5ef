"""Linear probe: multinomial logistic regression on the mean of frozen vision features. It can classify, not talk.

Alain & Bengio 2016, arXiv:1610.01644. The yardstick of a model that answers from the same features, beside always
saying the most frequent class.

Shapes: features (N,D) of N photos, logits (N,C).
"""

import torch
import torch.nn.functional as F
from torch import nn

from vlm import tower
from vlm.fruit_photos import truths


def share(right):
    return float(right.float().mean())


def probe(x, y, unseen, weight=1e-4):
    """Multinomial logistic regression on standardised features (N,D) of kinds y -> logits of the unseen ones."""
    mean, spread, size = x.mean(0), x.std(0) + 1e-6, x.shape[1] ** 0.5
    x, unseen = (x - mean) / spread / size, (unseen - mean) / spread / size
    head = nn.Linear(x.shape[1], int(y.max()) + 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = F.cross_entropy(head(x), y) + weight * head.weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(closure)
    return head(unseen).detach()


def probed(eye, fruit, learn, chosen):
    """What a linear probe on the mean of the features says of the photos `chosen`: {"14 kinds", "5 groups"} of (B,)."""
    x, unseen = (tower.said(eye, fruit.images[i]).float().mean(1) for i in (learn, chosen))
    return {name: probe(x, y[learn], unseen).argmax(-1) for name, y in truths(fruit).items()}


def yardsticks(eye, fruit, learn, chosen, found=None):
    """What the most frequent answer, and a linear probe on the mean of the same features, would reach."""
    found = probed(eye, fruit, learn, chosen) if found is None else found
    often = {name: share(y[chosen] == y[learn].mode().values) for name, y in truths(fruit).items()}
    probes = {name: share(found[name] == y[chosen]) for name, y in truths(fruit).items()}
    return {"the most frequent": often, "linear probe": probes}
