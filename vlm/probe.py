"""Linear probe: multinomial logistic regression on the mean of frozen vision features. It can classify, not talk.

Alain & Bengio 2016, arXiv:1610.01644. The yardstick of a model that answers from the same features,
beside always saying the most frequent class.

Shapes: features (N,D) of N photos, logits (N,C).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from vlm import tower
from vlm.fruit_photos import truths


def share(right):
    return float(right.float().mean())


def probe(x, y, heldout, weight=1e-4):
    """Multinomial logistic regression on standardised features (N,D) of kinds y -> logits of the
    held-out ones."""
    # standardise by the training photos, and divide by the root of the width
    mean = x.mean(0)
    spread = x.std(0) + 1e-6
    size = x.shape[1] ** 0.5
    x = (x - mean) / spread / size
    heldout = (heldout - mean) / spread / size
    # a linear layer that begins at zero
    head = nn.Linear(x.shape[1], int(y.max()) + 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    # cross-entropy with an L2 penalty: convex, one optimum
    def closure():
        optimizer.zero_grad()
        value = F.cross_entropy(head(x), y) + weight * head.weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(closure)
    return head(heldout).detach()


def probed(vision_tower, fruit, learn, chosen):
    """Linear-probe predictions for the photos `chosen`: {"14 kinds", "5 groups"} of (B,)."""
    x = tower.vision_features(vision_tower, fruit.images[learn]).float().mean(1)
    heldout = tower.vision_features(vision_tower, fruit.images[chosen]).float().mean(1)
    found = {}
    for name, y in truths(fruit).items():
        found[name] = probe(x, y[learn], heldout).argmax(-1)
    return found


def yardsticks(vision_tower, fruit, learn, chosen, found=None):
    """Accuracies of the majority class, and of a linear probe on the mean of the same features."""
    found = probed(vision_tower, fruit, learn, chosen) if found is None else found
    majority = {}
    probes = {}
    for name, y in truths(fruit).items():
        majority[name] = share(y[chosen] == y[learn].mode().values)
        probes[name] = share(found[name] == y[chosen])
    return {"the most frequent": majority, "linear probe": probes}


def paired(ours, theirs):
    """Paired difference of two models on the same photos, right or wrong (B,) each: how much more
    often ours is right, its 95 % interval, and the p-value of the sign test over the photos on
    which they differ (McNemar 1947, exact)."""
    difference = ours.float() - theirs.float()
    mean = float(difference.mean())
    error = float(difference.std()) / len(difference) ** 0.5
    # sign test: as few photos for one of them, by chance
    more = int((difference > 0).sum())
    fewer = int((difference < 0).sum())
    n = more + fewer
    tail = sum(math.comb(n, k) for k in range(min(more, fewer) + 1)) / 2**n
    return {
        "difference": mean,
        "low": mean - 1.96 * error,
        "high": mean + 1.96 * error,
        "p": min(1.0, 2 * tail),
    }
