"""Patches: an image cut into squares, put together again, and the mean and spread of each.

Shapes: B images of C x H x W, patches of P x P pixels, N = (H/P)(W/P) of them.
"""

from einops import rearrange

from utils.run import check


def patchify(imgs, p):
    """Images (B,C,H,W) -> patches (B,N,P*P*C), row by row; within a patch pixel by pixel, colours together."""
    fits = imgs.shape[2] % p == 0 and imgs.shape[3] % p == 0
    check(fits, f"{tuple(imgs.shape[2:])} pixels are no patches of {p}")
    return rearrange(imgs, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)


def unpatchify(x, p, grid=None):
    """Patches (B,N,P*P*C) -> images (B,C,H,W), for a grid of (rows, columns); a square one if it is not given."""
    # in torch.jit.trace a size is a tensor, which round() does not take
    side = round(int(x.shape[1]) ** 0.5)
    h, w = grid or (side, side)
    check(h * w == x.shape[1], f"{x.shape[1]} patches do not fill {h} rows of {w}")
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=p, q=p)


def moments(patches):
    """Mean and standard deviation of each patch: (B,N,1) twice. He et al. 2021, "Reconstruction target"."""
    mean = patches.mean(-1, keepdim=True)
    spread = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return mean, spread
