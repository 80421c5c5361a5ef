"""Choices of diffusion training: min-SNR weights, logit-normal time steps, zero terminal SNR.

(H) Hang et al. 2023, arXiv:2303.09556; (E) Esser et al. 2024, arXiv:2403.03206; (L) Lin et al. 2023, arXiv:2305.08891.
All three answer one question: which noise levels does the network learn from, and how much? `training_study.py`
measures what they are worth.

Shapes: B images, C channels, H x W pixels, T steps of noise; t is an integer tensor (B,).
"""

from typing import Literal

import torch
import torch.nn.functional as F

from models import ddpm
from models.prediction_type import check_prediction_type, target
from utils import run

Times = Literal["uniform", "logit-normal"]


def snr(schedule):
    """Signal-to-noise ratio of every step, alpha_bar / (1 - alpha_bar): (T,) in double precision. (H) Sec. 3.1."""
    return schedule.sqrt_alpha_bar**2 / schedule.sqrt_one_minus_alpha_bar**2


def min_snr_weight(schedule, t, predict="eps", gamma=5.0):
    """Weight of the squared error at t: (B,) -> (B,). (H) Sec. 3.4: the error of x0 weighs min(SNR, gamma).

    The squared error of eps is SNR times that of x0, and that of v is SNR + 1 times; the weight is divided by it.
    Raises UserError for an unknown prediction, or a gamma that is not above 0.
    """
    check_prediction_type(predict)
    run.check(gamma > 0, "gamma of min-SNR must be above 0")
    ratio = snr(schedule)[t]
    capped = ratio.clamp(max=gamma)
    if predict == "eps":
        return (capped / ratio).float()
    if predict == "v":
        return (capped / (ratio + 1)).float()
    return capped.float()


def draw_timesteps(n, steps, times="uniform", device="cpu"):
    """Training time steps 0..steps-1: (n,). Logit-normal: the sigmoid of a standard normal, (E) Sec. 3.1.

    Raises UserError for another distribution.
    """
    run.check(times in ("uniform", "logit-normal"), f"there is no distribution '{times}' of times")
    if times == "uniform":
        return torch.randint(steps, (n,), device=device)
    share = torch.randn(n, device=device).sigmoid()
    return (share * steps).long().clamp(max=steps - 1)


def scaled_linear_beta(steps, beta_start=0.00085, beta_end=0.012):
    """Stable Diffusion's noise schedule, whose roots grow in a line: (T,). Its last step keeps 0.068 of the image."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2


def rescale_zero_terminal_snr(beta):
    """The noise schedule (T,), stretched so that its last step is pure noise, alpha_bar = 0. (L) Algorithm 1.

    The first step keeps its alpha_bar; between the two the roots of alpha_bar are scaled in a line.
    """
    root = (1 - beta).cumprod(0).sqrt()
    first = root[0]
    last = root[-1]
    # shift the last to 0, then scale the first back to where it was
    root = (root - last) * first / (first - last)
    # back from the products to the factors
    alpha_bar = root**2
    alpha = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alpha


def weighted_loss(model, schedule, x0, predict, t, eps, weight=None):
    """`ddpm.loss` with a weight for each image: (B, C, H, W), (B,), (B, C, H, W), (B,) or None -> ()."""
    xt = ddpm.add_noise(schedule, x0, t, eps)
    output = model(xt, t).float()
    error = F.mse_loss(output, target(schedule, x0, t, eps, predict), reduction="none")
    # the mean over pixels of each image, (B,)
    error = error.mean((1, 2, 3))
    if weight is not None:
        error = weight * error
    return error.mean()
