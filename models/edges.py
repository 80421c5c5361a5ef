"""Edge detection (Canny 1986, IEEE PAMI 8(6)): thin lines where the colour changes, and how well two maps agree.

Shapes: B pictures (B, 3, H, W) in [-1, 1]; an edge map is bool (B, 1, H, W), True on an edge.
Differences from Canny: the strongest of the three colours counts at each pixel; two rounds of hysteresis, not all.
"""

import math

import torch
import torch.nn.functional as F


def gaussian_blur(x, sigma=1.0):
    """(B, C, H, W) smoothed by a Gaussian of `sigma` pixels, cut at three sigmas; the border pixels go on outside."""
    reach = math.ceil(3 * sigma)
    at = torch.arange(-reach, reach + 1, dtype=x.dtype)
    kernel = (-(at**2) / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)
    # one axis after the other
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    x = F.conv2d(padded, kernel, groups=x.shape[1])
    return F.conv2d(x, kernel.transpose(2, 3), groups=x.shape[1])


def sobel(x):
    """Gradient of each channel, by Sobel's kernels: (B, C, H, W) -> d/dx, d/dy, each of the same shape."""
    smooth = torch.tensor([1.0, 2.0, 1.0])
    difference = torch.tensor([-1.0, 0.0, 1.0])
    kernel = torch.outer(smooth, difference)[None, None].expand(x.shape[1], 1, 3, 3)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    dx = F.conv2d(padded, kernel, groups=x.shape[1])
    dy = F.conv2d(padded, kernel.transpose(2, 3), groups=x.shape[1])
    return dx, dy


def thin(strength, dx, dy):
    """Non-maximum suppression: keep a pixel that is the strongest of three across the edge. All (B, 1, H, W)."""
    # the direction across the edge, to the nearest eighth of a turn: 0 is right, 1 down right, 2 down, 3 down left
    direction = (torch.atan2(dy, dx) / (math.pi / 4)).round().long() % 4
    padded = F.pad(strength, (1, 1, 1, 1))
    height, width = strength.shape[2:]
    keep = torch.zeros_like(strength, dtype=torch.bool)
    for k, (right, down) in enumerate(((1, 0), (1, 1), (0, 1), (-1, 1))):
        ahead = padded[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]
        behind = padded[..., 1 - down : 1 - down + height, 1 - right : 1 - right + width]
        # of two equals one is kept
        strongest = (strength > ahead) & (strength >= behind)
        keep |= (direction == k) & strongest
    return keep


def dilate(edges):
    """Edges and their eight neighbours: (B, 1, H, W) -> (B, 1, H, W)."""
    return F.max_pool2d(edges.float(), 3, stride=1, padding=1) > 0


def canny(images, low=0.4, high=0.8, sigma=0.7):
    """Edge map of images in [-1, 1]: blur, gradient, thinning, two thresholds: (B, 3, H, W) -> (B, 1, H, W) bool."""
    dx, dy = sobel(gaussian_blur(images.float(), sigma))
    # the colour that changes most
    strength, colour = (dx**2 + dy**2).sqrt().max(1, keepdim=True)
    line = thin(strength, dx.gather(1, colour), dy.gather(1, colour))
    # hysteresis: weak edges count where they go on from a strong one
    weak = line & (strength > low)
    edges = line & (strength > high)
    for _ in range(2):
        edges = weak & dilate(edges)
    return edges


def f1(drawn, wanted):
    """Agreement of two edge maps with a tolerance of one pixel, 0 to 1: (B, 1, H, W) twice -> (B,)."""
    dims = (1, 2, 3)
    # precision: drawn edges that are wanted; recall: wanted edges that are drawn
    precision = (drawn & dilate(wanted)).sum(dims) / drawn.sum(dims).clamp(min=1)
    recall = (wanted & dilate(drawn)).sum(dims) / wanted.sum(dims).clamp(min=1)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-6)
