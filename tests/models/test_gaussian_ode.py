"""Solvers on the ODE of Gaussian data, which is known exactly: where they end, and their order."""

import pytest
import torch

from models import ddim, dpm_solver, gaussian_ode

TOPIC = "DPM-Solver++, Heun"


def test_the_ode_of_a_gaussian_ends_in_its_closed_form(parity):
    x = torch.randn(50, 1, 2, 2, dtype=torch.float64)
    levels = torch.linspace(-4, 4, 401, dtype=torch.float64).tolist()
    other = gaussian_ode.exact(x, -4.0, 4.0)
    counterpart = "closed form of a Gaussian ODE"
    for name, solve in (("multistep", dpm_solver.multistep), ("heun", dpm_solver.heun)):
        mine = ddim.last(solve(gaussian_ode.denoise, x, levels))
        parity(TOPIC, f"dpm_solver.{name}", counterpart, mine, other, atol=1e-4)


def test_gaussian_denoiser_is_the_best_linear_one():
    """Its errors are uncorrelated with xt, and their mean is zero."""
    x0 = gaussian_ode.MEAN + gaussian_ode.STD * torch.randn(100_000)
    for lam in (-1.0, 1.0):
        alpha, sigma = dpm_solver.alpha_sigma(lam)
        xt = alpha * x0 + sigma * torch.randn_like(x0)
        error = gaussian_ode.denoise(xt, lam) - x0
        assert abs(float(error.mean())) < 0.01 and abs(float((error * xt).mean())) < 0.01
        assert float(xt.var()) == pytest.approx(gaussian_ode.variance(lam), rel=0.03)


def test_order_of_convergence():
    """Twice the steps: half the error of DDIM, a quarter of that of 2M and Heun."""
    for name, (calls, errors) in gaussian_ode.convergence((32, 64, 128)).items():
        order = 1 if name == "DDIM" else 2
        assert calls == [n * (2 if name == "Heun" else 1) for n in (32, 64, 128)]
        for a, b in zip(errors[:-1], errors[1:], strict=True):
            assert a / b == pytest.approx(2**order, rel=0.12), name
