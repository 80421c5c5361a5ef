"""DDIM: equal to diffusers' scheduler; a thousand of its steps at eta 1 are DDPM's; inversion inverts."""

import json

import pytest
import torch
from diffusers import DDIMScheduler

from models import ddim, ddpm
from tests.test_ddpm import KINDS, TINY, command
from utils.run import UserError


def scheduler(kind, spacing):
    theirs = DDIMScheduler(1000, beta_schedule=KINDS[kind], timestep_spacing=spacing, set_alpha_to_one=True)
    theirs.alphas_cumprod = (1 - theirs.betas.double()).cumprod(0)  # see test_ddpm.pair
    return theirs


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("n", [1, 7, 10, 20, 50, 1000])
def test_timesteps(parity, n, spacing):
    theirs = scheduler("linear", spacing)
    theirs.set_timesteps(n)
    ours = ddim.timesteps(ddpm.Schedule(), n, spacing)
    parity("DDIM", f"ddim.timesteps, {spacing}", "diffusers.DDIMScheduler", ours, theirs.timesteps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_step(parity, kind, spacing, eta):
    ours, theirs = ddpm.Schedule(kind=kind), scheduler(kind, spacing)
    theirs.set_timesteps(20)
    steps = [*theirs.timesteps.tolist(), -1]
    # a leading chain of diffusers ends one stride below its last step; of 20 steps that is -50, the clean image
    for i, now in enumerate(steps[:-1]):
        t, t_prev = torch.tensor([now, now]), torch.tensor([steps[i + 1]] * 2)
        xt, eps = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8).requires_grad_()
        noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(i))
        mine = ddim.step(ours, xt, t, t_prev, eps, eta, noise)
        g = torch.Generator().manual_seed(i)
        other = theirs.step(eps, now, xt, eta=eta, use_clipped_model_output=True, generator=g).prev_sample
        slopes = [torch.autograd.grad(y.square().sum(), eps)[0] for y in (mine, other)]
        atol = 2e-5
        pairs = [mine, slopes[0]], [other, slopes[1]]
        parity("DDIM", f"ddim.step, eta {eta:g}", "diffusers.DDIMScheduler.step", *pairs, atol)


def test_linspace_spacing_of_diffusers_is_not_a_ddim_chain():
    """A known error of a famous library: with `linspace` steps it subtracts T // n, which is not the next step."""
    theirs = DDIMScheduler(1000, timestep_spacing="linspace")
    theirs.set_timesteps(8)
    strides = (theirs.timesteps[:-1] - theirs.timesteps[1:]).unique()
    assert 1000 // 8 not in strides.tolist()


def test_a_thousand_steps_at_eta_one_are_ddpm():
    schedule = ddpm.Schedule()
    for i in (999, 400, 1):
        t, xt, eps, noise = torch.tensor([i]), torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
        a, b = ddim.step(schedule, xt, t, t - 1, eps, 1.0, noise), ddpm.step(schedule, xt, t, eps, noise)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def oracle(schedule, variance):
    def eps(xt, t):
        alpha_bar = ddpm.at(schedule.alpha_bar, t)
        return (1 - alpha_bar).sqrt() / (alpha_bar * variance + 1 - alpha_bar) * xt

    return eps


def test_a_gaussian_is_sampled_in_closed_form():
    """For N(0, 0.01) data the flow is linear: noise z must arrive at 0.1 z, the closer the more steps."""
    schedule = ddpm.Schedule()
    z = torch.randn(50, 1, 2, 2)
    errors = [
        float((ddim.last(ddim.sample(oracle(schedule, 0.01), schedule, z, n)) - 0.1 * z).abs().mean())
        for n in (10, 100, 1000)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 0.002


def test_inversion_gives_the_noise_back():
    """With the network asked where `sample` asks it, the way up undoes the way down; one round of guessing, mostly."""
    schedule = ddpm.Schedule()
    model, z = oracle(schedule, 0.01), torch.randn(20, 1, 2, 2).clamp(-2, 2)  # so that no x0 is clipped
    x = ddim.last(ddim.sample(model, schedule, z, 100))
    errors = [float((ddim.invert(model, schedule, x, 100, rounds=r) - z).abs().max()) for r in (1, 4, 12)]
    assert errors[0] > 5 * errors[1] and errors[2] < 1e-3, errors


def test_slerp_stays_on_the_sphere():
    a, b = torch.randn(2, 1, 1, 28, 28)
    norms = torch.tensor([ddim.slerp(a, b, w).norm() for w in torch.linspace(0, 1, 5)])
    assert (norms - a.norm()).abs().max() < 2 and ((a + b) / 2).norm() < 0.8 * a.norm()
    torch.testing.assert_close(ddim.slerp(a, b, torch.tensor(0.0)), a)


def test_command_trains_if_there_are_no_weights(tmp_path):
    first = command(*TINY, "--steps", "2", "--out", str(tmp_path / "ddpm"))
    assert first.returncode == 0, first.stderr
    weights = str(tmp_path / "ddpm" / "model.safetensors")
    args = ["--weights", weights, "--counts", "2", "5", "--samples", "12", "--out", str(tmp_path / "ddim")]
    done = command(*args, script="ddim")
    assert done.returncode == 0, done.stderr
    for name in ("steps.png", "quality.png", "frechet.png", "inversion.png", "interpolation.png"):
        assert (tmp_path / "ddim" / name).stat().st_size > 0
    metrics = json.loads((tmp_path / "ddim" / "metrics.json").read_text())
    assert {"recognised", "seconds_per_64"} <= metrics["2 steps"].keys()


def test_it_says_that_it_trains(tmp_path, capsys, monkeypatch):
    """Without weights in the usual place it trains; a path that was asked for and is not there is an error."""
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(ddpm, "main", lambda cfg: asked.append(cfg))
    ddim.find_weights(ddim.Config())
    assert len(asked) == 1 and "training them first" in capsys.readouterr().out
    missing = str(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="none.safetensors"):
        ddpm.load(ddim.find_weights(ddim.Config(weights=missing)))
    assert len(asked) == 1


@pytest.mark.parametrize(
    "args", [["--counts", "0"], ["--counts", "2000"], ["--eta", "-1"], ["--eta", "2"], ["--spacing", "linspace"]]
)
def test_bad_input(args, tmp_path):
    done = command("--pretrained", *args, "--out", str(tmp_path / "x"), script="ddim")
    assert done.returncode == 2 and args[0][2:] in done.stderr and "Traceback" not in done.stderr, done.stderr
