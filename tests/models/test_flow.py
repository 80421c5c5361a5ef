"""Flow matching: equal to diffusers' flow-matching schedulers; Gaussian flows in closed form."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import flow
from tests.conftest import gradients
from tests.models.gaussian_flow import Gaussian
from utils import data


def scheduler(n, kind="Euler"):
    """diffusers' scheduler with n equal steps from 1 to 0, as its pipelines call it."""
    import diffusers

    theirs = getattr(diffusers, f"FlowMatch{kind}DiscreteScheduler")()
    if kind == "Heun":  # which takes no sigmas; its own go from 1 to 1/1000
        theirs.set_timesteps(n)
    else:
        theirs.set_timesteps(sigmas=np.linspace(1, 1 / n, n))
    return theirs


def small_unet():
    return flow.build((8, 16), 1)


def test_interpolate(parity):
    """And its slopes: at t = 1 all noise, at t = 1/6 most of it gone."""
    theirs = scheduler(6)
    x0 = torch.randn(6, 1, 4, 4).requires_grad_()
    eps = torch.randn(6, 1, 4, 4).requires_grad_()
    mine = flow.interpolate(x0, eps, theirs.sigmas[:-1])
    other = theirs.scale_noise(x0, theirs.timesteps, eps)
    slopes = torch.autograd.grad(mine.square().sum(), [x0, eps])
    their_slopes = torch.autograd.grad(other.square().sum(), [x0, eps])
    counterpart = "diffusers.FlowMatchEulerDiscreteScheduler.scale_noise"
    mine, other = [mine, *slopes], [other, *their_slopes]
    parity("Flow matching", "flow.interpolate", counterpart, mine, other)


def test_velocity_is_the_derivative_of_the_line(parity):
    x0 = torch.randn(3, 1, 4, 4)
    eps = torch.randn(3, 1, 4, 4)
    t = torch.tensor([0.1, 0.5, 0.9])
    slope = torch.func.jvp(lambda t: flow.interpolate(x0, eps, t), (t,), (torch.ones(3),))[1]
    parity("Flow matching", "flow.velocity", "torch.func.jvp", flow.velocity(x0, eps), slope)


def test_draw_times(parity):
    from diffusers.training_utils import compute_density_for_timestep_sampling

    torch.manual_seed(3)
    mine = flow.draw_times(1000, "logit-normal")
    torch.manual_seed(3)
    other = compute_density_for_timestep_sampling("logit_normal", 1000, 0, 1)
    counterpart = "diffusers compute_density_for_timestep_sampling"
    parity("Flow matching", "flow.draw_times, logit-normal", counterpart, mine, other)
    # a quarter of uniform times is below 1/4; of logit-normal ones Phi(-log 3) = 0.136
    assert (mine < 0.25).float().mean() == pytest.approx(0.136, abs=0.03)
    assert (flow.draw_times(1000) < 0.25).float().mean() == pytest.approx(0.25, abs=0.04)


def test_loss(parity):
    """With noisy images and target as in diffusers' training scripts of Stable Diffusion 3; gradients of the U-Net."""
    theirs = scheduler(4)
    model = small_unet()
    x0 = torch.randn(4, 1, 28, 28)
    eps = torch.randn(4, 1, 28, 28)
    mine = flow.loss(model, x0, eps, theirs.sigmas[:-1])
    xt = theirs.scale_noise(x0, theirs.timesteps, eps)
    other = F.mse_loss(model(xt, theirs.timesteps), eps - x0)
    slopes = [gradients(model, y) for y in (mine, other)]
    both = [mine, slopes[0]], [other, slopes[1]]
    parity("Flow matching", "flow.loss, gradients", "diffusers scale_noise, timesteps", *both)


def test_sample(parity):
    """Every x on the way of five Euler steps of a U-Net, and the gradient of one step."""
    theirs = scheduler(5)
    model = small_unet()
    eps = torch.randn(2, 1, 28, 28)
    xt = eps
    chain = [xt]
    for t in theirs.timesteps:
        with torch.no_grad():
            xt = theirs.step(model(xt, t.expand(2)), t, xt).prev_sample
        chain.append(xt)
    counterpart = "diffusers.FlowMatchEulerDiscreteScheduler.step"
    mine = list(flow.sample(model, eps, 5))
    parity("Flow matching", "flow.sample, Euler", counterpart, mine, chain)
    one = scheduler(5)
    t = one.timesteps[0]
    other = gradients(model, one.step(model(eps, t.expand(2)), t, eps).prev_sample)
    mine = gradients(model, flow.euler_step(model, eps, 1.0, 0.8))
    parity("Flow matching", "flow.euler_step, gradients", counterpart, mine, other)


def test_heun_step(parity):
    """The first step of three, and the last, to t = 0, which is Euler's in both."""
    theirs = scheduler(3, "Heun")
    model = small_unet()
    eps = torch.randn(2, 1, 28, 28)
    x = eps
    chain = []
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(model(x, t.expand(2)), t, x).prev_sample
            chain.append(x)
        # each of theirs takes two calls, except the last
        sigmas = theirs.sigmas[0::2].tolist()
        first = flow.heun_step(model, eps, sigmas[0], sigmas[1])
        last = flow.heun_step(model, chain[3], sigmas[2], 0.0)
    counterpart = "diffusers.FlowMatchHeunDiscreteScheduler.step"
    mine, other = [first, last], [chain[1], chain[4]]
    parity("Flow matching", "flow.heun_step", counterpart, mine, other, atol=1e-4)


def test_the_ode_of_a_gaussian_ends_in_its_closed_form(parity):
    oracle = Gaussian()
    eps = torch.randn(50, 1, 2, 2, dtype=torch.float64)
    path = list(flow.sample(lambda x, t: oracle(x, t).double(), eps, 200, "heun"))
    mine = [path[i] for i in (0, 50, 100, 200)]
    other = [oracle.path(eps, t) for t in (1, 0.75, 0.5, 0)]
    exact = "closed form of a Gaussian flow"
    parity("Flow matching", "flow.sample, Heun", exact, mine, other, atol=1e-4)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_order_of_the_solver(solver, order):
    """Half the step: half the error of Euler, a quarter of Heun's."""
    oracle = Gaussian()
    eps = torch.linspace(-2, 2, 40).view(10, 1, 2, 2)
    errors = []
    for n in (16, 32):
        *_, x0 = flow.sample(oracle, eps, n, solver)
        errors.append(float((x0 - oracle.path(eps, 0)).abs().mean()))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_one_euler_step_gives_the_mean_of_the_data():
    """At t = 1 nothing is known of the image, so all noises are sent to the mean."""
    _, x0 = flow.sample(Gaussian(mean=0.5), torch.randn(20, 1, 2, 2), 1)
    torch.testing.assert_close(x0, torch.full_like(x0, 0.5))


def test_no_velocity_has_a_smaller_loss_than_the_closed_form():
    """Its loss is what x_t leaves open of eps - x0; answers that are 10 % off or of the other sign lose more."""
    oracle = Gaussian()
    x0 = 0.5 + 0.4 * torch.randn(20_000, 1, 2, 2)
    eps = torch.randn_like(x0)
    t = flow.draw_times(len(x0))
    best = flow.loss(oracle, x0, eps, t)
    variance = (1 - t) ** 2 * 0.16 + t**2
    expected = 1.16 - (t - (1 - t) * 0.16) ** 2 / variance
    assert best.item() == pytest.approx(expected.mean().item(), rel=0.02)
    for factor in (0.9, 1.1, -1):
        xt = flow.interpolate(x0, eps, t)
        answers = factor * oracle(xt, 1000 * t)
        assert F.mse_loss(answers, flow.velocity(x0, eps)) > best + 0.005


def test_the_network_is_asked_at_a_thousand_t():
    asked = []

    def model(xt, t):
        asked.extend(t.tolist())
        return xt

    list(flow.sample(model, torch.zeros(1, 1, 2, 2), 4))
    assert asked == [1000, 750, 500, 250]
    asked.clear()
    list(flow.sample(model, torch.zeros(1, 1, 2, 2), 2, "heun"))
    assert asked == [1000, 500, 500]  # the last step, to t = 0, is Euler's


def test_pairs_are_digits_and_fresh_noise():
    cfg = flow.Config(batch=64)
    images = data.mnist("test")[0][:128]
    pairs = flow.independent_pairs(images, cfg, 0, torch.device("cpu"))
    (x0, eps), (_, later), (again, newer) = [next(pairs) for _ in range(3)]
    assert x0.min() == -1 and x0.max() == 1 and x0.shape == eps.shape == (64, 1, 28, 28)
    assert eps.mean().abs() < 0.02 and eps.std() == pytest.approx(1, abs=0.02)
    assert not torch.equal(eps, later) and not torch.equal(eps, newer)
    resumed, _ = next(flow.independent_pairs(images, cfg, 2, torch.device("cpu")))
    assert torch.equal(resumed, again) and not torch.equal(resumed, x0)
