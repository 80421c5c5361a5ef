"""Flow matching: equal to diffusers' flow-matching schedulers; Gaussian flows in closed form."""

from functools import partial

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
    """That draws fives."""
    model = flow.build((8, 16), 1)
    model.forward = partial(model.forward, y=torch.tensor([5]))
    return model


def their_output(model, xt, timestep):
    """What their scheduler wants of a network: the velocity from image to noise, at 1000 sigma = 1000 (1 - t)."""
    return -model(xt, 1000 - timestep)


def test_interpolate(parity):
    """And its slopes: at t = 0 all noise, at t = 5/6 most of it gone. Their sigma is 1 - t."""
    theirs = scheduler(6)
    x0 = torch.randn(6, 1, 4, 4).requires_grad_()
    x1 = torch.randn(6, 1, 4, 4).requires_grad_()
    mine = flow.interpolate(x0, x1, 1 - theirs.sigmas[:-1])
    other = theirs.scale_noise(x1, theirs.timesteps, x0)
    slopes = torch.autograd.grad(mine.square().sum(), [x0, x1])
    their_slopes = torch.autograd.grad(other.square().sum(), [x0, x1])
    counterpart = "diffusers.FlowMatchEulerDiscreteScheduler.scale_noise"
    mine, other = [mine, *slopes], [other, *their_slopes]
    parity("Flow matching", "flow.interpolate", counterpart, mine, other)


def test_velocity_is_the_derivative_of_the_line(parity):
    x0 = torch.randn(3, 1, 4, 4)
    x1 = torch.randn(3, 1, 4, 4)
    t = torch.tensor([0.1, 0.5, 0.9])
    slope = torch.func.jvp(lambda t: flow.interpolate(x0, x1, t), (t,), (torch.ones(3),))[1]
    parity("Flow matching", "flow.velocity", "torch.func.jvp", flow.velocity(x0, x1), slope)


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
    x1 = torch.randn(4, 1, 28, 28)
    mine = flow.loss(model, x0, x1, 1 - theirs.sigmas[:-1])
    xt = theirs.scale_noise(x1, theirs.timesteps, x0)
    other = F.mse_loss(their_output(model, xt, theirs.timesteps), x0 - x1)
    slopes = [gradients(model, y) for y in (mine, other)]
    both = [mine, slopes[0]], [other, slopes[1]]
    parity("Flow matching", "flow.loss, gradients", "diffusers scale_noise, timesteps", *both)


def test_sample(parity):
    """Every x on the way of five Euler steps of a U-Net, and the gradient of one step."""
    theirs = scheduler(5)
    model = small_unet()
    x0 = torch.randn(2, 1, 28, 28)
    xt = x0
    chain = [xt]
    for t in theirs.timesteps:
        with torch.no_grad():
            xt = theirs.step(their_output(model, xt, t.expand(2)), t, xt).prev_sample
        chain.append(xt)
    counterpart = "diffusers.FlowMatchEulerDiscreteScheduler.step"
    mine = list(flow.sample(model, x0, 5))
    parity("Flow matching", "flow.sample, Euler", counterpart, mine, chain)
    one = scheduler(5)
    t = one.timesteps[0]
    other = gradients(model, one.step(their_output(model, x0, t.expand(2)), t, x0).prev_sample)
    mine = gradients(model, flow.euler_step(model, x0, 0.0, 0.2))
    parity("Flow matching", "flow.euler_step, gradients", counterpart, mine, other)


def test_heun_step(parity):
    """The first step of three, and the last, to t = 1, which is Euler's in both."""
    theirs = scheduler(3, "Heun")
    model = small_unet()
    x0 = torch.randn(2, 1, 28, 28)
    x = x0
    chain = []
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(their_output(model, x, t.expand(2)), t, x).prev_sample
            chain.append(x)
        # each of theirs takes two calls, except the last
        times = (1 - theirs.sigmas[0::2]).tolist()
        first = flow.heun_step(model, x0, times[0], times[1])
        last = flow.heun_step(model, chain[3], times[2], 1.0)
    counterpart = "diffusers.FlowMatchHeunDiscreteScheduler.step"
    mine, other = [first, last], [chain[1], chain[4]]
    parity("Flow matching", "flow.heun_step", counterpart, mine, other, atol=1e-4)


def test_the_ode_of_a_gaussian_ends_in_its_closed_form(parity):
    oracle = Gaussian()
    x0 = torch.randn(50, 1, 2, 2, dtype=torch.float64)
    path = list(flow.sample(lambda x, t: oracle(x, t).double(), x0, 200, "heun"))
    mine = [path[i] for i in (0, 50, 100, 200)]
    other = [oracle.path(x0, t) for t in (0, 0.25, 0.5, 1)]
    exact = "closed form of a Gaussian flow"
    parity("Flow matching", "flow.sample, Heun", exact, mine, other, atol=1e-4)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_order_of_the_solver(solver, order):
    """Half the step: half the error of Euler, a quarter of Heun's."""
    oracle = Gaussian()
    x0 = torch.linspace(-2, 2, 40).view(10, 1, 2, 2)
    errors = []
    for n in (16, 32):
        *_, x1 = flow.sample(oracle, x0, n, solver)
        errors.append(float((x1 - oracle.path(x0, 1)).abs().mean()))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_one_euler_step_gives_the_mean_of_the_data():
    """At t = 0 nothing is known of the image, so all noises are sent to the mean."""
    _, x1 = flow.sample(Gaussian(mean=0.5), torch.randn(20, 1, 2, 2), 1)
    torch.testing.assert_close(x1, torch.full_like(x1, 0.5))


def test_a_constant_velocity_is_followed_from_noise_to_image():
    x0 = torch.randn(3, 1, 2, 2)
    for solver in ("euler", "heun"):
        *_, x1 = flow.sample(lambda xt, t: torch.full_like(xt, 2.0), x0, 4, solver)
        torch.testing.assert_close(x1, x0 + 2)


def test_no_velocity_has_a_smaller_loss_than_the_closed_form():
    """Its loss is what x_t leaves open of x1 - x0; answers that are 10 % off or of the other sign lose more."""
    oracle = Gaussian()
    x1 = 0.5 + 0.4 * torch.randn(20_000, 1, 2, 2)
    x0 = torch.randn_like(x1)
    t = flow.draw_times(len(x0))
    best = flow.loss(oracle, x0, x1, t)
    variance = t**2 * 0.16 + (1 - t) ** 2
    expected = 1.16 - (t * 0.16 - (1 - t)) ** 2 / variance
    assert best.item() == pytest.approx(expected.mean().item(), rel=0.02)
    for factor in (0.9, 1.1, -1):
        xt = flow.interpolate(x0, x1, t)
        answers = factor * oracle(xt, 1000 * t)
        assert F.mse_loss(answers, flow.velocity(x0, x1)) > best + 0.005


def test_the_network_is_asked_at_a_thousand_t():
    asked = []

    def model(xt, t):
        asked.extend(t.tolist())
        return xt

    list(flow.sample(model, torch.zeros(1, 1, 2, 2), 4))
    assert asked == [0, 250, 500, 750]
    asked.clear()
    list(flow.sample(model, torch.zeros(1, 1, 2, 2), 2, "heun"))
    assert asked == [0, 500, 500]  # the last step, to t = 1, is Euler's


def test_pairs_are_digits_with_their_classes_and_fresh_noise():
    cfg = flow.Config(batch=64)
    images, labels = data.mnist("test")
    images = images[:128]
    about = (images, labels[:128], cfg)
    pairs = flow.independent_pairs(*about, 0, torch.device("cpu"))
    (x0, x1, y), (later, _, _), (newer, again, _) = [next(pairs) for _ in range(3)]
    # each image is one of the set, and the class is its own
    found = (data.to_float(images)[None] == x1[:, None]).flatten(2).all(-1)
    assert torch.equal(labels[:128][found.float().argmax(1)], y) and found.any(1).all()
    assert x1.min() == -1 and x1.max() == 1 and x0.shape == x1.shape == (64, 1, 28, 28)
    assert x0.mean().abs() < 0.02 and x0.std() == pytest.approx(1, abs=0.02)
    assert not torch.equal(x0, later) and not torch.equal(x0, newer)
    _, resumed, _ = next(flow.independent_pairs(*about, 2, torch.device("cpu")))
    assert torch.equal(resumed, again) and not torch.equal(resumed, x1)
