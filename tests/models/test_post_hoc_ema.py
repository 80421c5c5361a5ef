"""Post-hoc EMA: the paper's identities, tracked averages rebuilt from snapshots, wiring of the tracker."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from models import post_hoc_ema
from utils.run import UserError


def profile(n, gamma):
    """Shares of the weights of steps 1..n in the tracked average: the products of its decays."""
    shares = np.zeros(n)
    for step in range(1, n + 1):
        decay = post_hoc_ema.power_decay(step, gamma)
        shares *= decay
        shares[step - 1] = 1 - decay
    return shares


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25, 12**-0.5])
def test_width_is_the_standard_deviation_of_the_profile(width):
    gamma = post_hoc_ema.width_to_exponent(width)
    n = 4000
    shares = profile(n, gamma)
    assert shares.sum() == pytest.approx(1)
    at = np.arange(1, n + 1) / n
    mean = (shares * at).sum()
    deviation = math.sqrt((shares * (at - mean) ** 2).sum())
    assert deviation == pytest.approx(width, rel=0.01)
    # and it is a power of the step
    assert shares[n // 2 - 1] / shares[-1] == pytest.approx(0.5**gamma, rel=0.05, abs=1e-9)


def test_exponents_of_the_paper():
    """Karras et al. 2024, Sec. 3.1: gamma = 6.94 and 16.97 for widths of 0.10 and 0.05."""
    assert post_hoc_ema.width_to_exponent(0.1) == pytest.approx(6.94, abs=0.005)
    assert post_hoc_ema.width_to_exponent(0.05) == pytest.approx(16.97, abs=0.005)


def test_inner_product_is_the_sum_over_steps():
    n = 4000
    long = profile(n, 3.0)
    short = np.concatenate([profile(n // 2, 8.0), np.zeros(n // 2)])
    summed = (long * short).sum()
    assert post_hoc_ema.inner_product(n, 3.0, n // 2, 8.0) == pytest.approx(summed, rel=0.01)
    assert post_hoc_ema.inner_product(n // 2, 8.0, n, 3.0) == pytest.approx(summed, rel=0.01)


def test_a_saved_average_is_rebuilt_by_itself():
    steps = np.repeat([100, 200, 300, 400], 2)
    gammas = np.tile([6.94, 16.97], 4)
    shares = post_hoc_ema.coefficients(steps, gammas, 400, 16.97)
    np.testing.assert_allclose(shares, [0] * 7 + [1], atol=1e-6)


def walk(tracker, others, steps=320, every=20):
    """A model whose weights wander, tracked; `others` are {gamma: average} that are tracked in full."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8).double()
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight += 0.1 * torch.randn(8, 8)
        tracker.update(model)
        for gamma, ema in others.items():
            post_hoc_ema.update_ema(ema, model, post_hoc_ema.power_decay(step, gamma))
        if step % every == 0:
            tracker.save()
    return model


@pytest.mark.parametrize("width", [0.03, 0.07, 0.15, 0.2])
def test_average_of_another_width_is_rebuilt(width):
    """From two tracked ones, to a few percent of how far the average lies from the last weights."""
    new = [nn.Linear(8, 8).double() for _ in range(4)]
    tracker = post_hoc_ema.PowerEMA(new[:2])
    gamma = post_hoc_ema.width_to_exponent(width)
    model = walk(tracker, {gamma: new[2]})
    rebuilt = tracker.average(new[3], width)
    distance = (new[2].weight - model.weight).norm()
    assert (rebuilt.weight - new[2].weight).norm() < 0.03 * distance
    # the tracked ones are no answer: the nearest of them is further off
    nearest = min((ema.weight - new[2].weight).norm() for ema in new[:2])
    assert (rebuilt.weight - new[2].weight).norm() < nearest / 3


def test_start_of_the_training_has_no_share():
    far = nn.Linear(2, 2)
    near = nn.Linear(2, 2)
    averages = [copy.deepcopy(far), copy.deepcopy(far)]
    tracker = post_hoc_ema.PowerEMA(averages)
    tracker.update(near)
    for ema in averages:
        assert ema.weight.equal(near.weight)


def test_snapshots_are_copies():
    ema = nn.Linear(2, 2)
    tracker = post_hoc_ema.PowerEMA([ema, copy.deepcopy(ema)])
    tracker.update(nn.Linear(2, 2))
    tracker.save()
    before = tracker.snapshots[0][2].clone()
    tracker.update(nn.Linear(2, 2))
    assert tracker.snapshots[0][2].equal(before)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3])
def test_bad_width(width):
    with pytest.raises(UserError, match="sigma_rel"):
        post_hoc_ema.width_to_exponent(width)


def test_bad_input():
    with pytest.raises(UserError, match="one average"):
        post_hoc_ema.PowerEMA([nn.Linear(1, 1)])
    tracker = post_hoc_ema.PowerEMA([nn.Linear(1, 1), nn.Linear(1, 1)])
    with pytest.raises(UserError, match="no snapshot"):
        tracker.average(nn.Linear(1, 1), 0.1)
