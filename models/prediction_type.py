"""Prediction type: what a diffusion network predicts, the noise eps, the image x0, or v. All three say the same.

v-prediction is Salimans & Ho 2022, arXiv:2202.00512, App. D. Eq. 4 is that of Ho, Jain & Abbeel 2020,
arXiv:2006.11239: xt = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps. The tables (T,) of a schedule are those of
`ddpm.Schedule`.

Shapes: B images, C channels, H x W pixels; t is an integer tensor (B,).
"""

from typing import Literal

from utils import run

Predict = Literal["eps", "x0", "v"]


def at(table, t):
    """table[t] for a batch: (T,), (B,) -> (B, 1, 1, 1) in single precision, to be multiplied with images."""
    return table[t][:, None, None, None].float()


def check_prediction_type(predict):
    """Raises UserError unless a network can be asked for that."""
    run.check(
        predict in ("eps", "x0", "v"),
        f"a network cannot predict '{predict}'; it may be eps, x0 or v",
    )


def target(schedule, x0, t, eps, predict="eps"):
    """What the network should predict: the noise, the image, or v (v-prediction)."""
    check_prediction_type(predict)
    if predict == "eps":
        return eps
    if predict == "x0":
        return x0
    sqrt_alpha_bar = at(schedule.sqrt_alpha_bar, t)
    sqrt_one_minus_alpha_bar = at(schedule.sqrt_one_minus_alpha_bar, t)
    # v-prediction: Salimans & Ho 2022, App. D
    return sqrt_alpha_bar * eps - sqrt_one_minus_alpha_bar * x0


def to_eps(schedule, xt, t, output, predict="eps"):
    """The noise that the network's output stands for; exact for all three kinds of prediction."""
    check_prediction_type(predict)
    if predict == "eps":
        return output
    sqrt_alpha_bar = at(schedule.sqrt_alpha_bar, t)
    sqrt_one_minus_alpha_bar = at(schedule.sqrt_one_minus_alpha_bar, t)
    if predict == "x0":
        return (xt - sqrt_alpha_bar * output) / sqrt_one_minus_alpha_bar  # Eq. 4, solved for eps
    # v-prediction: v and xt are two linear equations for x0 and eps
    return sqrt_alpha_bar * output + sqrt_one_minus_alpha_bar * xt


def data_prediction(xt, alpha, sigma, output, predict="eps"):
    """The image that the network's output stands for, if xt = alpha x0 + sigma eps.

    v needs no division, so alpha may be 0: the last step of a schedule with zero terminal SNR (Lin et al. 2023).
    """
    check_prediction_type(predict)
    if predict == "x0":
        return output
    if predict == "eps":
        return (xt - sigma * output) / alpha
    return alpha * xt - sigma * output  # v = alpha eps - sigma x0


def to_x0(schedule, xt, t, output, predict="eps"):
    """`data_prediction` at the steps t (B,) of a schedule."""
    sqrt_alpha_bar = at(schedule.sqrt_alpha_bar, t)
    sqrt_one_minus_alpha_bar = at(schedule.sqrt_one_minus_alpha_bar, t)
    return data_prediction(xt, sqrt_alpha_bar, sqrt_one_minus_alpha_bar, output, predict)
