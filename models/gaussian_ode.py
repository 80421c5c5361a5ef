"""Gaussian data, of which the best denoiser and the paths of its ODE are known: there solvers show their order.

If x0 ~ N(mean, std^2), then xt = alpha x0 + sigma eps is Gaussian, too, and the probability-flow ODE (Song et al. 2020,
arXiv:2011.13456, Sec. 4.3) only moves and stretches it. There is nothing to run here: `few_steps.py` draws the errors.

Shapes: as in `dpm_solver.py`; lambda = log(alpha / sigma).
"""

import torch

from models.ddim import last
from models.dpm_solver import alpha_sigma, heun, multistep

MEAN = 0.5
STD = 0.4


def variance(lam):
    """Variance of xt: alpha^2 std^2 + sigma^2."""
    alpha, sigma = alpha_sigma(lam)
    return alpha**2 * STD**2 + sigma**2


def denoise(xt, lam):
    """E[x0 | xt], the best answer of any network: linear regression of x0 on xt."""
    alpha, _ = alpha_sigma(lam)
    return MEAN + alpha * STD**2 / variance(lam) * (xt - alpha * MEAN)


def exact(x_first, first, lam):
    """Where the ODE is at lambda, if it was at x_first at `first`: as many standard deviations from the mean."""
    alpha_first, _ = alpha_sigma(first)
    deviations = (x_first - alpha_first * MEAN) / variance(first) ** 0.5
    alpha, _ = alpha_sigma(lam)
    return alpha * MEAN + variance(lam) ** 0.5 * deviations


def convergence(counts=(4, 8, 16, 32, 64, 128), first=-3.0, final=3.0):
    """Mean absolute error at lambda = final, in n even steps of lambda from `first`: {solver: (calls, errors)}."""
    x = torch.linspace(-2, 2, 101, dtype=torch.float64)
    target = exact(x, first, final)
    solvers = {
        "DDIM": (1, lambda levels: multistep(denoise, x, levels, order=1)),
        "DPM-Solver++(2M)": (1, lambda levels: multistep(denoise, x, levels)),
        "Heun": (2, lambda levels: heun(denoise, x, levels)),
    }
    found = {}
    for name, (calls, solve) in solvers.items():
        errors = []
        for n in counts:
            levels = torch.linspace(first, final, n + 1, dtype=torch.float64).tolist()
            errors.append(float((last(solve(levels)) - target).abs().mean()))
        found[name] = ([calls * n for n in counts], errors)
    return found
