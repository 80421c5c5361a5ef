"""DPM-Solver++(2M) and Heun's method for a trained diffusion model: the ODE of DDIM, with steps of second order.

DPM-Solver++: Lu et al. 2022, arXiv:2211.01095 (L). Heun: Karras et al. 2022, arXiv:2206.00364 (K, EDM). A noisy image
is xt = alpha x0 + sigma eps, and DDIM without noise is Euler's method for an ordinary differential equation (ODE). What
is known exactly in it is solved exactly, and only the network's answer is extrapolated: from the last two answers (2M,
one call a step), or from both ends of a step (Heun, two calls). Time is lambda = log(alpha / sigma), half the logarithm
of the signal-to-noise ratio.

Shapes: B images, C channels, H x W pixels, T training steps, n steps. lambda is a float: -5 is nearly all noise, 5
nearly all image, infinity the clean image. `denoise(xt, lambda)` is the image that the network sees in xt (data
prediction). There is nothing to run here: `few_steps.py` compares.
"""

import math
from typing import Literal

import torch

from models import prediction_type
from models.ddim import timesteps
from utils import run

Grid = Literal["time", "log-snr", "karras"]
Solver = Literal["ddim", "dpm++", "heun"]
LAMBDA_MIN = (
    -5.1
)  # as diffusers advises for the cosine schedule, whose last step is at lambda = -9.9


def alpha_sigma(lam):
    """Signal and noise of a level: alpha^2 + sigma^2 = 1 and alpha / sigma = e^lambda; (1, 0) for infinity."""
    alpha = 1 / math.sqrt(1 + math.exp(-2 * lam))
    sigma = 1 / math.sqrt(1 + math.exp(2 * lam)) if lam < math.inf else 0.0
    return alpha, sigma


def lambda_table(schedule):
    """lambda_t = log(alpha_t / sigma_t) of every training step, falling: (T,), double precision. (L) Sec. 2."""
    return (schedule.sqrt_alpha_bar / schedule.sqrt_one_minus_alpha_bar).log().double().cpu()


def time_of(table, lam):
    """The time step t_lambda(lambda) at which the network is asked, a float: between two steps by interpolation."""
    # the last step that still holds less noise, and the first that holds more
    after = int((table > lam).sum())
    after = min(max(after, 1), len(table) - 1)
    before = after - 1
    share = (table[before] - lam) / (table[before] - table[after])
    return float(before + share.clamp(0, 1))


def noise_levels(schedule, n, grid="time"):
    """n + 1 levels lambda, from noise to the clean image, which is infinity; a list of floats.

    time: evenly in t, the trailing steps of ddim.py. log-snr: evenly in lambda. karras: evenly in sigma~^(1/7), with
    sigma~ = sigma / alpha = e^-lambda, (K) Eq. 5. The last two begin at LAMBDA_MIN or above, and the level that would
    be last, t = 0, is replaced by the clean image. Raises UserError for another grid.
    """
    run.check(grid in ("time", "log-snr", "karras"), f"there is no grid '{grid}' of noise levels")
    run.check(1 <= n <= schedule.steps, f"cannot take {n} of {schedule.steps} steps")
    table = lambda_table(schedule)
    if grid == "time":
        return [*table[timesteps(schedule, n)].tolist(), math.inf]
    first = max(float(table[-1]), LAMBDA_MIN)
    last = float(table[0])
    ramp = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    if grid == "log-snr":
        levels = first + ramp * (last - first)
    else:
        rho = 7
        sigma_max = math.exp(-first) ** (1 / rho)
        sigma_min = math.exp(-last) ** (1 / rho)
        levels = -rho * (sigma_max + ramp * (sigma_min - sigma_max)).log()  # (K) Eq. 5
    return [*levels[:-1].tolist(), math.inf]


def data_prediction(xt, lam, output, predict="eps"):
    """The clean image that the network's output stands for: (B, C, H, W) twice -> (B, C, H, W)."""
    alpha, sigma = alpha_sigma(lam)
    return prediction_type.data_prediction(xt, alpha, sigma, output, predict)


def denoiser(model, schedule, predict="eps", clip=True):
    """The function denoise(xt, lambda) -> x0 of a network; clip: keep x0 in [-1, 1]; not for latents."""
    table = lambda_table(schedule)

    def denoise(xt, lam):
        t = torch.full((len(xt),), time_of(table, lam), device=xt.device)
        x0 = data_prediction(xt, lam, model(xt, t).float(), predict)
        return x0.clamp(-1, 1) if clip else x0

    return denoise


def first_order_update(xt, x0, lam, lam_next):
    """DPM-Solver++(1), which is DDIM: exact if the network's x0 does not change on the way. (L) Sec. 4."""
    alpha_next, sigma_next = alpha_sigma(lam_next)
    _, sigma = alpha_sigma(lam)
    h = lam_next - lam
    return sigma_next / sigma * xt - alpha_next * math.expm1(-h) * x0  # expm1(-h) = e^-h - 1


def second_order_data(x0, x0_before, h, h_before):
    """The data prediction in the middle of the step, on the line through the last two. (L) Algorithm 2, line of D."""
    r = h_before / h
    return (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before


@torch.no_grad()
def multistep(denoise, xt, levels, order=2):
    """DPM-Solver++(2M), one call a step; order 1 is DDIM. Yields every x, the noise first. (L) Algorithm 2.

    The first step is of order 1, for nothing is known before it; the step to the clean image, too: its h is infinite.
    """
    yield xt
    x0_before = None
    h_before = None
    for lam, lam_next in zip(levels[:-1], levels[1:], strict=True):
        x0 = denoise(xt, lam)
        h = lam_next - lam
        data = x0
        if order == 2 and x0_before is not None and h < math.inf:
            data = second_order_data(x0, x0_before, h, h_before)
        xt = first_order_update(xt, data, lam, lam_next)
        x0_before = x0
        h_before = h
        yield xt


@torch.no_grad()
def heun(denoise, xt, levels):
    """Heun's method, two calls a step, one in the last. Yields every x, the noise first. (K) Algorithm 1.

    In x~ = xt / alpha and sigma~ = sigma / alpha the ODE is dx~ / dsigma~ = (x~ - x0) / sigma~, which is eps.
    """
    yield xt
    for lam, lam_next in zip(levels[:-1], levels[1:], strict=True):
        alpha, sigma = alpha_sigma(lam)
        alpha_next, sigma_next = alpha_sigma(lam_next)
        # the slope at the beginning, and where Euler would end
        x0 = denoise(xt, lam)
        guess = first_order_update(xt, x0, lam, lam_next)
        # no slope at the clean image, sigma = 0: Euler ends it
        if lam_next == math.inf:
            xt = guess
        else:
            slope = (xt - alpha * x0) / sigma
            slope_next = (guess - alpha_next * denoise(guess, lam_next)) / sigma_next
            # the mean of both slopes in place of the first
            length = sigma_next / alpha_next - sigma / alpha
            xt = guess + alpha_next * length * (slope_next - slope) / 2
        yield xt


def sample(model, schedule, xt, n, predict="eps", solver="dpm++", grid="time", clip=True):
    """From noise xt (B, C, H, W) to images in n steps of a solver: yields every x, the noise first.

    Raises UserError for another solver or grid.
    """
    run.check(solver in ("ddim", "dpm++", "heun"), f"there is no solver '{solver}'")
    levels = noise_levels(schedule, n, grid)
    denoise = denoiser(model, schedule, predict, clip)
    if solver == "heun":
        return heun(denoise, xt, levels)
    return multistep(denoise, xt, levels, order=1 if solver == "ddim" else 2)
