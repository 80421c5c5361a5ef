"""Post-hoc EMA: the length of an EMA of the weights, chosen after the training. Karras et al. 2024, arXiv:2312.02696.

The average of the weights over the last part of the training samples better than the last weights do. How long that
part should be is a hyperparameter, and with an ordinary EMA each length costs a training. Here the average at step n
weighs the weights of step s <= n by s^gamma, a power function: it grows with the training, and its width, sigma_rel, is
a share of the training so far. Two such averages are tracked and saved now and then; the average of any other width is,
nearly, a sum of the saved ones (Sec. 3.2). Equations are the paper's Appendix C.

Shapes: K snapshots, P weights.
"""

import numpy as np
import torch

from models.ddpm import update_ema
from utils import run


def width_to_exponent(sigma_rel):
    """gamma of the power function whose standard deviation is sigma_rel times the length of the training.

    The largest root of (gamma + 1) = sigma_rel^2 (gamma + 2)^2 (gamma + 3). Raises UserError outside (0, 0.2886]: wider
    than the uniform average, gamma = 0, would weigh early weights more than late ones.
    """
    fits = 0 < sigma_rel <= 12**-0.5
    run.check(fits, f"sigma_rel must be in (0, 0.288], not {sigma_rel:g}")
    # (gamma + 2)^2 (gamma + 3) - (gamma + 1) / sigma_rel^2 = 0
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots[np.abs(roots.imag) < 1e-6].real.max())


def power_decay(step, gamma):
    """The decay of update number `step` = 1, 2, ... that keeps the average a power function. Sec. 3.1."""
    return (1 - 1 / step) ** (gamma + 1)


def inner_product(step_a, gamma_a, step_b, gamma_b):
    """Integral of the product of two profiles, each (gamma + 1) s^gamma / step^(gamma + 1) for s up to its step."""
    shorter = np.minimum(step_a, step_b)
    # in logarithms: step^gamma overflows
    log = (gamma_a + gamma_b + 1) * np.log(shorter)
    log -= (gamma_a + 1) * np.log(step_a) + (gamma_b + 1) * np.log(step_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * np.exp(log)


def coefficients(steps, gammas, step, gamma):
    """Shares of K snapshots whose sum is nearest to the profile (step, gamma), by least squares: (K,), (K,) -> (K,)."""
    steps = np.asarray(steps, float)
    gammas = np.asarray(gammas, float)
    gram = inner_product(steps[:, None], gammas[:, None], steps[None], gammas[None])
    wanted = inner_product(steps, gammas, float(step), gamma)
    return np.linalg.lstsq(gram, wanted, rcond=None)[0]


class PowerEMA:
    """Two averages of a model's weights and their snapshots, from which `average` makes others. Algorithm 2.

    averages: copies of the model, one for each of the widths.
    """

    def __init__(self, averages, widths=(0.05, 0.1)):
        run.check(len(averages) == len(widths), "one average of the weights for each width")
        self.averages = averages
        self.gammas = [width_to_exponent(width) for width in widths]
        self.step = 0
        self.snapshots = []

    def update(self, model):
        """After each training step. The first one copies the weights: what was before the training has no share."""
        self.step += 1
        for ema, gamma in zip(self.averages, self.gammas, strict=True):
            update_ema(ema, model, power_decay(self.step, gamma))

    def save(self):
        """A snapshot of each average, in memory."""
        for ema, gamma in zip(self.averages, self.gammas, strict=True):
            weights = torch.cat([weight.detach().flatten() for weight in ema.parameters()])
            self.snapshots.append((self.step, gamma, weights))

    @torch.no_grad()
    def average(self, model, sigma_rel):
        """Write the average of width sigma_rel at the last snapshot into the model. Raises UserError without any."""
        run.check(self.snapshots, "no snapshot was saved: there is nothing to average")
        steps, gammas, weights = zip(*self.snapshots, strict=True)
        shares = coefficients(steps, gammas, steps[-1], width_to_exponent(sigma_rel))
        mixed = sum(float(share) * weight for share, weight in zip(shares, weights, strict=True))
        torch.nn.utils.vector_to_parameters(mixed, model.parameters())
        return model
