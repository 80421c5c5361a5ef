"""min-SNR weights, logit-normal time steps and zero terminal SNR: equal to diffusers'; what each of them means."""

from types import SimpleNamespace

import pytest
import torch

from models import ddpm, training_choices
from models.prediction_type import target, to_eps, to_x0
from utils.run import UserError

TOPIC = "Training recipes"


def their_snr(schedule):
    from diffusers.training_utils import compute_snr

    # all it reads of a scheduler; theirs is in single precision, where 1 - 0.9999 leaves three digits
    theirs = SimpleNamespace(alphas_cumprod=schedule.sqrt_alpha_bar**2)
    return compute_snr(theirs, torch.arange(schedule.steps))


def test_snr(parity):
    schedule = ddpm.Schedule(kind="linear")
    mine = training_choices.snr(schedule).log()
    counterpart = "diffusers.training_utils.compute_snr"
    parity(TOPIC, "training_choices.snr", counterpart, mine, their_snr(schedule).log())


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_min_snr_weight(parity, predict):
    """diffusers' training script divides min(SNR, 5) by SNR for eps, by SNR + 1 for v."""
    schedule = ddpm.Schedule(kind="linear")
    ratio = their_snr(schedule)
    wanted = ratio.clamp(max=5.0) / (ratio if predict == "eps" else ratio + 1)
    mine = training_choices.min_snr_weight(schedule, torch.arange(1000), predict)
    counterpart = "diffusers.training_utils.compute_snr, its min(SNR, 5)"
    parity(TOPIC, f"training_choices.min_snr_weight, {predict}", counterpart, mine, wanted)


def test_min_snr_weighs_the_same_error_alike():
    """One error of x0, seen as an error of eps or of v, counts the same: min(SNR, gamma) times its square."""
    schedule = ddpm.Schedule(kind="cosine")
    x0, wrong, eps = torch.randn(3, 5, 1, 2, 2).double()
    t = torch.tensor([10, 300, 500, 700, 950])
    xt = ddpm.add_noise(schedule, x0, t, eps)
    costs = {}
    for predict in ("x0", "eps", "v"):
        # the output of a network that takes `wrong` for the image
        noise = ddpm.at(schedule.sqrt_alpha_bar, t) * wrong
        noise = (xt - noise) / ddpm.at(schedule.sqrt_one_minus_alpha_bar, t)
        output = target(schedule, wrong, t, noise, predict)
        error = (output - target(schedule, x0, t, eps, predict)).square().mean((1, 2, 3))
        costs[predict] = training_choices.min_snr_weight(schedule, t, predict) * error
    torch.testing.assert_close(costs["eps"], costs["x0"], rtol=1e-3, atol=0)
    torch.testing.assert_close(costs["v"], costs["x0"], rtol=1e-3, atol=0)
    ratio = training_choices.snr(schedule)[t]
    distance = (wrong - x0).square().mean((1, 2, 3))
    torch.testing.assert_close(costs["x0"], ratio.clamp(max=5) * distance, rtol=1e-5, atol=0)


def test_logit_normal_timesteps(parity):
    from diffusers.training_utils import compute_density_for_timestep_sampling

    torch.manual_seed(0)
    mine = training_choices.draw_timesteps(1000, 1000, "logit-normal")
    torch.manual_seed(0)
    share = compute_density_for_timestep_sampling("logit_normal", 1000, 0.0, 1.0)
    wanted = (1000 * share).long()
    counterpart = "diffusers.training_utils.compute_density_for_timestep_sampling"
    parity(TOPIC, "training_choices.draw_timesteps", counterpart, mine, wanted)


def test_uniform_timesteps_are_all_equally_likely():
    torch.manual_seed(0)
    t = training_choices.draw_timesteps(100_000, 10)
    share = t.bincount(minlength=10) / len(t)
    torch.testing.assert_close(share, torch.full((10,), 0.1), rtol=0, atol=0.005)


def test_last_step_can_be_drawn_and_no_later_one():
    """In single precision the sigmoid of a large number is 1."""
    torch.manual_seed(0)
    t = training_choices.draw_timesteps(200_000, 4, "logit-normal")
    assert t.unique().tolist() == [0, 1, 2, 3]


def test_scaled_linear_beta(parity):
    from diffusers import DDIMScheduler

    settings = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    theirs = DDIMScheduler(**settings).betas
    mine = training_choices.scaled_linear_beta(1000).float()
    parity(TOPIC, "training_choices.scaled_linear_beta", "diffusers.DDIMScheduler", mine, theirs)
    left = (1 - mine.double()).prod().sqrt()
    assert left == pytest.approx(0.0683, abs=1e-4)


def test_rescale_zero_terminal_snr(parity):
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    beta = training_choices.scaled_linear_beta(1000)
    mine = training_choices.rescale_zero_terminal_snr(beta)
    theirs = rescale_zero_terminal_snr(beta.clone())
    counterpart = "diffusers' rescale_zero_terminal_snr"
    parity(TOPIC, "training_choices.rescale_zero_terminal_snr", counterpart, mine, theirs)


def test_last_step_is_pure_noise_and_the_first_is_unchanged():
    beta = training_choices.scaled_linear_beta(1000)
    new = training_choices.rescale_zero_terminal_snr(beta)
    assert new[0] == pytest.approx(float(beta[0]), rel=1e-9)
    assert new[-1] == 1
    schedule = ddpm.Schedule(beta=new)
    x0, eps = torch.randn(2, 2, 1, 4, 4)
    assert ddpm.add_noise(schedule, x0, torch.tensor([999, 999]), eps).equal(eps)


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_three_predictions_give_the_same_image(predict):
    schedule = ddpm.Schedule(kind="linear")
    x0, eps = torch.randn(2, 3, 1, 4, 4)
    t = torch.tensor([0, 400, 800])
    xt = ddpm.add_noise(schedule, x0, t, eps)
    output = target(schedule, x0, t, eps, predict)
    torch.testing.assert_close(to_x0(schedule, xt, t, output, predict), x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(to_eps(schedule, xt, t, output, predict), eps, rtol=1e-3, atol=1e-3)


def test_v_gives_the_image_from_pure_noise():
    """Where alpha_bar is 0, v is -x0; eps would divide by zero."""
    beta = training_choices.rescale_zero_terminal_snr(training_choices.scaled_linear_beta(1000))
    schedule = ddpm.Schedule(beta=beta)
    x0, eps = torch.randn(2, 1, 1, 4, 4)
    t = torch.tensor([999])
    v = target(schedule, x0, t, eps, "v")
    assert to_x0(schedule, eps, t, v, "v").equal(x0)
    assert not to_x0(schedule, eps, t, eps, "eps").isfinite().all()


def slopes(model, value):
    return torch.autograd.grad(value, list(model.parameters()))


def test_weighted_loss_without_weights_is_that_of_ddpm():
    schedule = ddpm.Schedule(kind="cosine")
    model = torch.nn.Conv2d(1, 1, 3, padding=1)
    x0, eps = torch.randn(2, 4, 1, 8, 8)
    t = torch.tensor([3, 200, 500, 900])

    def network(xt, t):
        return model(xt)

    mine = training_choices.weighted_loss(network, schedule, x0, "v", t, eps)
    theirs = ddpm.loss(network, schedule, x0, "v", t, eps)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(slopes(model, mine), slopes(model, theirs))


def test_each_image_has_its_own_weight():
    schedule = ddpm.Schedule(kind="cosine")
    x0, eps = torch.randn(2, 3, 1, 4, 4)
    t = torch.tensor([100, 500, 900])

    def network(xt, t):
        return 0 * xt

    each = [
        training_choices.weighted_loss(
            network, schedule, x0[i, None], "v", t[i, None], eps[i, None]
        )
        for i in range(3)
    ]
    weight = torch.tensor([1.0, 0.0, 5.0])
    mine = training_choices.weighted_loss(network, schedule, x0, "v", t, eps, weight)
    torch.testing.assert_close(mine, (each[0] + 5 * each[2]) / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: training_choices.draw_timesteps(4, 10, "normal"), "distribution 'normal'"),
        (lambda s: training_choices.min_snr_weight(s, torch.tensor([1]), "w"), "predict 'w'"),
        (lambda s: training_choices.min_snr_weight(s, torch.tensor([1]), "v", 0), "above 0"),
        (lambda s: to_x0(s, torch.zeros(1, 1, 1, 1), torch.tensor([1]), None, "w"), "predict 'w'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call(ddpm.Schedule())
