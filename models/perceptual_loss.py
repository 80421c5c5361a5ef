"""Perceptual loss: the distance of two images in the features of a frozen classifier.

Zhang et al. 2018, arXiv:1801.03924, Eq. 1. Theirs (LPIPS) are features of VGG with learned weights; here those of
EfficientNet-lite0, all with weight one.

Shapes: B images of 3 x H x W in [-1, 1].
"""

import torch.nn.functional as F


def features(classifier, x):
    """(B, 3, H, W) in [-1, 1] -> maps of the frozen EfficientNet: after its stem and its stages of stride 4, 8, 16."""
    x = F.relu6(classifier._bn0(classifier._conv_stem(x)))
    maps = [x]
    for i, block in enumerate(classifier._blocks[:11]):
        x = block(x)
        # the last block of a stage
        if i in (2, 4, 10):
            maps.append(x)
    return maps


def perceptual_distance(classifier, x, y):
    """Squared distance of unit feature vectors, averaged over positions, summed over maps. Eq. 1, without weights."""
    distance = 0.0
    for a, b in zip(features(classifier, x), features(classifier, y), strict=True):
        # unit vectors at each position: a large norm counts no more than a small one
        difference = F.normalize(a, eps=1e-6) - F.normalize(b, eps=1e-6)
        distance = distance + difference.square().sum(1).mean()
    return distance
