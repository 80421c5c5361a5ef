"""Inpainting with a model that never learned it: RePaint. Lugmayr et al. 2022, arXiv:2201.09865.

Denoise from pure noise; after every step put the picture, noised to that step, back where it is known. What is drawn
inside learns of the rest too late to fit it well. Resampling, some steps back to more noise and down again, lets both
settle. Equation and algorithm numbers are the paper's. There is nothing to run here: `edit.py` imports it.

Shapes: B pictures, D latent channels, h x w latents, H x W pixels; a mask is True where pixels are redrawn.
Differences from the paper: latents, not pixels; DDIM steps (eta 0), which add no noise of their own.
"""

import torch
import torch.nn.functional as F

from models import ddim, ddpm


def noise_to(schedule, z0, t, eps):
    """z0 (B, D, h, w) with the noise of step t, an integer; -1: the clean latents. Eq. 8a."""
    t = torch.full((len(z0),), t, device=z0.device)
    sqrt_alpha_bar, sqrt_one_minus_alpha_bar = ddim.alpha_bar_roots(schedule, t)
    return (sqrt_alpha_bar * z0 + sqrt_one_minus_alpha_bar * eps).to(z0.dtype)


def denoise(network, schedule, xt, t, t_prev, predict="v", eta=0.0, noise=None):
    """One DDIM step of all pictures, from the integer step t to t_prev: the unknown part, Eq. 8b."""
    t = torch.full((len(xt),), t, device=xt.device)
    t_prev = torch.full((len(xt),), t_prev, device=xt.device)
    output = network(xt, t).float()
    eps = ddpm.to_eps(schedule, xt, t, output, predict)
    return ddim.step(schedule, xt, t, t_prev, eps, eta, noise, clip=False)


def latent_mask(mask, size):
    """Mask of pixels, bool (B, 1, H, W) -> of latents (B, 1, *size): True where any of their pixels is redrawn."""
    cell = (mask.shape[2] // size[0], mask.shape[3] // size[1])
    return F.max_pool2d(mask.float(), cell) > 0


def merge(mask, unknown, known):
    """What is drawn inside the mask, the picture outside: x_{t-1} of both parts. Eq. 8c."""
    return torch.where(mask, unknown, known)


def undo_step(schedule, x, t_prev, t, noise):
    """Back to more noise, from the integer step t_prev to t > t_prev, all of the forward process between. Eq. 1."""
    before, after = torch.tensor([t_prev], device=x.device), torch.tensor([t], device=x.device)
    sqrt_alpha_bar_before, _ = ddim.alpha_bar_roots(schedule, before)
    sqrt_alpha_bar_after, _ = ddim.alpha_bar_roots(schedule, after)
    # the product of the alphas between the two
    sqrt_alpha = sqrt_alpha_bar_after / sqrt_alpha_bar_before
    return (sqrt_alpha * x + (1 - sqrt_alpha**2).sqrt() * noise).to(x.dtype)


def resampling_levels(n, jump_length, resamples):
    """Steps left to go after each move, from n - 1 to 0: down one, or up again in a jump. Algorithm 1, Fig. 9.

    After every `jump_length` steps down as many up again, `resamples` - 1 times at each place.
    """
    # how many jumps are left at each place
    jumps = {place: resamples - 1 for place in range(0, n - jump_length, jump_length)}
    levels = []
    level = n
    while level > 0:
        level -= 1
        levels.append(level)
        if jumps.get(level, 0) > 0:
            jumps[level] -= 1
            levels += range(level + 1, level + jump_length + 1)
            level += jump_length
    return levels


@torch.no_grad()
def inpaint(
    network, schedule, z0, mask, noise, n, jump_length=5, resamples=1, predict="v", eta=0.0
):
    """Latents z0 (B, D, h, w), redrawn where the mask (B, 1, h, w) is True; yields every move. Algorithm 1."""
    # the step at which the latents are with so many steps to go; 0: clean
    times = [-1, *ddim.timesteps(schedule, n).flip(0).tolist()]
    levels = [n, *resampling_levels(n, jump_length, resamples)]
    # line 1: x_T ~ N(0, I)
    xt = noise
    yield xt
    for now, then in zip(levels[:-1], levels[1:], strict=True):
        if then < now:
            # lines 4 to 8: a step down; the picture, with fresh noise, takes its place outside the mask
            unknown = denoise(network, schedule, xt, times[now], times[then], predict, eta)
            known = noise_to(schedule, z0, times[then], torch.randn_like(z0))
            xt = merge(mask, unknown, known)
        else:
            # line 10: a step up
            xt = undo_step(schedule, xt, times[now], times[then], torch.randn_like(xt))
        yield xt


def pixel_error(drawn, given, where):
    """Mean absolute difference of pixels where a mask (B, 1, H, W) is True, in steps of 0 to 255."""
    error = (drawn - given).abs().mean(1, keepdim=True) * 127.5
    return float(error[where].mean())


def seam(images, mask):
    """Mean difference of neighbouring pixels, one inside the mask and one outside: (B, 3, H, W) -> (B,), 0 to 255."""
    total = torch.zeros(len(images))
    pairs = torch.zeros(len(images))
    for dim in (2, 3):
        border = mask.diff(dim=dim)
        total += (images.diff(dim=dim).abs() * border).mean(1).sum((1, 2)) * 127.5
        pairs += border.sum((1, 2, 3))
    return total / pairs
