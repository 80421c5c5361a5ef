"""DPM-Solver++(2M) and Heun: equal to the schedulers of diffusers, every x on the way."""

import math

import numpy as np
import pytest
import torch

from models import ddim, ddpm, dpm_solver
from tests.models.test_ddpm import KINDS
from utils.run import UserError

TOPIC = "DPM-Solver++, Heun"
TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def scheduler(name, predict="v", kind="cosine", **more):
    """diffusers' scheduler of that name, its tables in double precision (see test_ddpm.pair)."""
    import diffusers

    flags = dict(beta_schedule=KINDS[kind], prediction_type=TYPES[predict])
    theirs = getattr(diffusers, name)(1000, timestep_spacing="trailing", **flags, **more)
    theirs.alphas_cumprod = (1 - theirs.betas.double()).cumprod(0)
    return theirs


def multistep_scheduler(predict="v", kind="cosine", order=2):
    """A quantile of 1 and a limit of 1 make its dynamic thresholding a clamp to [-1, 1]."""
    more = dict(solver_order=order, algorithm_type="dpmsolver++", solver_type="midpoint")
    clip = dict(thresholding=True, dynamic_thresholding_ratio=1.0, sample_max_value=1.0)
    return scheduler("DPMSolverMultistepScheduler", predict, kind, **more, **clip)


def set_levels(theirs, levels, table):
    """Give a scheduler our noise levels; the last is the clean image, sigma = 0."""
    sigmas = [math.exp(-lam) for lam in levels]
    times = [dpm_solver.time_of(table, lam) for lam in levels[:-1]]
    theirs.set_timesteps(len(times))
    theirs.timesteps = torch.tensor(times)
    theirs.sigmas = torch.tensor(sigmas)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(4)
    return ddpm.build((8, 16), 1).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_lambda_table(parity, kind):
    theirs = multistep_scheduler(kind=kind)
    other = ((theirs.alphas_cumprod / (1 - theirs.alphas_cumprod)).sqrt()).log()
    mine = dpm_solver.lambda_table(ddpm.Schedule(kind=kind))
    counterpart = "diffusers.DPMSolverMultistepScheduler.lambda_t"
    parity(TOPIC, "dpm_solver.lambda_table", counterpart, mine, other)
    assert (mine.diff() < 0).all()


def test_alpha_sigma(parity):
    theirs = multistep_scheduler()
    levels = [-9.0, -2.0, 0.0, 3.0, 6.0]
    other = [theirs._sigma_to_alpha_sigma_t(torch.tensor(math.exp(-lam))) for lam in levels]
    mine = torch.tensor([dpm_solver.alpha_sigma(lam) for lam in levels])
    counterpart = "diffusers _sigma_to_alpha_sigma_t"
    parity(TOPIC, "dpm_solver.alpha_sigma", counterpart, mine, torch.tensor(other))
    assert dpm_solver.alpha_sigma(math.inf) == (1, 0)


def test_time_of(parity):
    """The inverse of the table at its steps, and between them; beyond its ends the ends."""
    theirs = scheduler("HeunDiscreteScheduler")
    table = dpm_solver.lambda_table(ddpm.Schedule(kind="cosine"))
    levels = [-9.0, -5.1, -0.3, 2.0, 5.0]
    sigmas = np.exp(-np.array(levels))
    other = [float(theirs._sigma_to_t(s, -table.numpy())) for s in sigmas]
    mine = [dpm_solver.time_of(table, lam) for lam in levels]
    both = torch.tensor(mine), torch.tensor(other)
    parity(TOPIC, "dpm_solver.time_of", "diffusers _sigma_to_t", *both, atol=1e-3)
    for t in (0, 1, 500, 999):
        assert dpm_solver.time_of(table, float(table[t])) == pytest.approx(t, abs=1e-9)
    assert dpm_solver.time_of(table, 99.0) == 0 and dpm_solver.time_of(table, -99.0) == 999


def test_karras_levels(parity):
    schedule = ddpm.Schedule(kind="cosine")
    theirs = scheduler("HeunDiscreteScheduler")
    ends = np.array([math.exp(5.1), math.exp(-float(dpm_solver.lambda_table(schedule)[0]))])
    other = theirs._convert_to_karras(ends, 9)
    levels = dpm_solver.noise_levels(schedule, 8, "karras")
    mine = torch.tensor([math.exp(-lam) for lam in levels])
    assert levels[-1] == math.inf and len(levels) == 9
    both = mine[:-1], torch.tensor(other)[:-1].to(mine)
    parity(TOPIC, "dpm_solver.noise_levels, karras", "diffusers _convert_to_karras", *both, 1e-4)


def test_log_snr_levels(parity):
    schedule = ddpm.Schedule(kind="linear")
    theirs = multistep_scheduler()
    table = dpm_solver.lambda_table(schedule)
    # their lambdas are log(sigma / alpha), -ours, from the noisiest on
    other = -torch.tensor(theirs._convert_to_lu(-table.flip(0), 9))
    mine = torch.tensor(dpm_solver.noise_levels(schedule, 8, "log-snr"), dtype=torch.float64)
    assert mine[-1] == math.inf
    both = mine[:-1], other[:-1]
    parity(TOPIC, "dpm_solver.noise_levels, log-snr", "diffusers _convert_to_lu", *both, 1e-4)


def test_time_levels_are_the_steps_of_ddim():
    schedule = ddpm.Schedule(kind="cosine")
    levels = dpm_solver.noise_levels(schedule, 5)
    table = dpm_solver.lambda_table(schedule)
    found = [dpm_solver.time_of(table, lam) for lam in levels[:-1]]
    assert found == pytest.approx(ddim.timesteps(schedule, 5).tolist())


def test_grids_leave_out_the_last_steps_of_the_cosine_schedule():
    """Its lambda falls to -9.9 in three steps; a grid over that range would spend a third of itself there."""
    schedule = ddpm.Schedule(kind="cosine")
    assert dpm_solver.noise_levels(schedule, 4, "time")[0] < -9
    for grid in ("log-snr", "karras"):
        assert dpm_solver.noise_levels(schedule, 4, grid)[0] == pytest.approx(-5.1)
    linear = ddpm.Schedule(kind="linear")
    first = dpm_solver.noise_levels(linear, 4, "log-snr")[0]
    assert first == pytest.approx(float(dpm_solver.lambda_table(linear)[-1])) and first > -5.1


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_data_prediction(parity, predict):
    theirs = multistep_scheduler(predict)
    schedule = ddpm.Schedule(kind="cosine")
    table = dpm_solver.lambda_table(schedule)
    set_levels(theirs, [float(table[600]), math.inf], table)
    theirs._step_index = 0
    xt = torch.randn(3, 1, 4, 4)
    output = torch.randn(3, 1, 4, 4)
    other = theirs.convert_model_output(output, sample=xt)
    mine = dpm_solver.data_prediction(xt, float(table[600]), output, predict).clamp(-1, 1)
    counterpart = "diffusers convert_model_output"
    parity(TOPIC, f"dpm_solver.data_prediction, {predict}", counterpart, mine, other)


@pytest.mark.parametrize("grid", ["time", "log-snr", "karras"])
@pytest.mark.parametrize("order", [1, 2])
def test_multistep(parity, unet, grid, order):
    """Every x on the way of six steps of a U-Net that predicts v under the cosine schedule."""
    schedule = ddpm.Schedule(kind="cosine")
    table = dpm_solver.lambda_table(schedule)
    levels = dpm_solver.noise_levels(schedule, 6, grid)
    theirs = multistep_scheduler(order=order)
    set_levels(theirs, levels, table)
    noise = torch.randn(2, 1, 28, 28)
    x = noise
    other = [x]
    for t in theirs.timesteps:
        x = theirs.step(unet(x, t.expand(2)), t, x).prev_sample
        other.append(x)
    solver = "ddim" if order == 1 else "dpm++"
    mine = list(dpm_solver.sample(unet, schedule, noise, 6, "v", solver, grid))
    counterpart = "diffusers.DPMSolverMultistepScheduler.step"
    parity(TOPIC, f"dpm_solver.multistep, order {order}", counterpart, mine, other, atol=1e-4)


@pytest.mark.parametrize("grid", ["log-snr", "karras"])
def test_heun(parity, unet, grid):
    """Theirs walks in x / alpha, and takes two calls of `step` for one of ours."""
    schedule = ddpm.Schedule(kind="cosine")
    table = dpm_solver.lambda_table(schedule)
    levels = dpm_solver.noise_levels(schedule, 5, grid)
    theirs = scheduler("HeunDiscreteScheduler", clip_sample=True)
    set_levels(theirs, levels, table)
    theirs.timesteps = torch.cat([theirs.timesteps[:1], theirs.timesteps[1:].repeat_interleave(2)])
    inner = theirs.sigmas[1:-1].repeat_interleave(2)
    theirs.sigmas = torch.cat([theirs.sigmas[:1], inner, theirs.sigmas[-1:]])
    noise = torch.randn(2, 1, 28, 28)
    alphas = [dpm_solver.alpha_sigma(lam)[0] for lam in levels]
    x = noise / alphas[0]
    other = [noise]
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(unet(theirs.scale_model_input(x, t), t.expand(2)), t, x).prev_sample
        if i % 2 == 1 or i == len(theirs.timesteps) - 1:
            other.append(x * alphas[len(other)])
    mine = list(dpm_solver.sample(unet, schedule, noise, 5, "v", "heun", grid))
    counterpart = "diffusers.HeunDiscreteScheduler.step"
    parity(TOPIC, "dpm_solver.heun", counterpart, mine, other, atol=2e-3)


def test_order_1_is_ddim(parity, unet):
    schedule = ddpm.Schedule()
    noise = torch.randn(2, 1, 28, 28)
    mine = list(dpm_solver.sample(unet, schedule, noise, 5, "v", "ddim"))
    other = list(ddim.sample(unet, schedule, noise, 5, "v"))
    parity(TOPIC, "dpm_solver.multistep, order 1", "ddim.sample", mine, other, atol=1e-4)


def test_second_order_data_follows_a_line_exactly():
    """Of an x0 that is a line in lambda it is the value in the middle of the step, whatever the steps before."""
    lam, before, after = 0.3, -0.4, 0.7
    found = dpm_solver.second_order_data(2 * lam + 1, 2 * before + 1, after - lam, lam - before)
    assert found == pytest.approx(2 * (lam + after) / 2 + 1)


@pytest.mark.parametrize("solver, calls", [("ddim", 4), ("dpm++", 4), ("heun", 7)])
def test_the_last_step_returns_the_denoised_image(solver, calls):
    """And the network is asked once a step, or twice, but once in the last."""
    answers = []

    def model(xt, t):
        answers.append(0.1 * xt + 0.001 * t[0])
        return answers[-1]

    noise = torch.randn(2, 1, 2, 2)
    chain = list(
        dpm_solver.sample(model, ddpm.Schedule(), noise, 4, "x0", solver, "karras", clip=False)
    )
    assert len(answers) == calls and len(chain) == 5 and torch.equal(chain[0], noise)
    torch.testing.assert_close(chain[-1], answers[-1])


@pytest.mark.parametrize("clip", [True, False])
def test_clip_keeps_images_in_range_and_leaves_latents(clip):
    def model(xt, t):
        return torch.full_like(xt, 3.0)

    noise = torch.randn(2, 1, 2, 2)
    x = ddim.last(dpm_solver.sample(model, ddpm.Schedule(), noise, 3, "x0", clip=clip))
    torch.testing.assert_close(x, torch.full_like(x, 1.0 if clip else 3.0))


def test_unknown_names_are_refused():
    schedule = ddpm.Schedule()
    with pytest.raises(UserError, match="no grid"):
        dpm_solver.noise_levels(schedule, 4, "linear")
    with pytest.raises(UserError, match="cannot take 0"):
        dpm_solver.noise_levels(schedule, 0)
    with pytest.raises(UserError, match="no solver"):
        dpm_solver.sample(None, schedule, torch.randn(1, 1, 2, 2), 4, "v", "euler")
    with pytest.raises(UserError, match="cannot predict"):
        dpm_solver.data_prediction(torch.zeros(1), 0.0, torch.zeros(1), "noise")
