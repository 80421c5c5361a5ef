"""DDPM: every equation equal to diffusers' scheduler; known answers; the script as a command."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from models import ddpm
from tests.conftest import ROOT
from utils import data

KINDS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICT = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def pair(kind="linear", predict="eps", exact=True):
    """Our schedule and diffusers'.

    Its table is single precision, where 1 - alpha_bar = 1e-4 has three digits: `exact` mends that.
    """
    theirs = DDPMScheduler(1000, beta_schedule=KINDS[kind], prediction_type=PREDICT[predict])
    if exact:
        theirs.alphas_cumprod = (1 - theirs.betas.double()).cumprod(0)
    return ddpm.Schedule(kind=kind), theirs


def images(n=6):
    t = torch.tensor([0, 1, 250, 500, 998, 999])[:n]
    return torch.rand(n, 1, 8, 8) * 2 - 1, torch.randn(n, 1, 8, 8), t


@pytest.mark.parametrize("kind", KINDS)
def test_schedule(parity, kind):
    ours, theirs = pair(kind, exact=False)
    both = [ours.beta, ours.alpha, ours.alpha_bar], [theirs.betas, theirs.alphas, theirs.alphas_cumprod]
    parity("DDPM", f"ddpm.Schedule, {kind}", "diffusers.DDPMScheduler", *both, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_add_noise(parity, kind):
    ours, theirs = pair(kind)
    x0, eps, t = images()
    x0.requires_grad_()
    mine, other = ddpm.add_noise(ours, x0, t, eps), theirs.add_noise(x0, eps, t)
    slopes = [torch.autograd.grad(y.square().sum(), x0)[0] for y in (mine, other)]
    parity("DDPM", "ddpm.add_noise (Eq. 4)", "diffusers.DDPMScheduler.add_noise", [mine, slopes[0]], [other, slopes[1]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("predict", PREDICT)
def test_step(parity, kind, predict):
    """Algorithm 2 from the network's output, at the first step (pure noise), the last (no noise) and between."""
    ours, theirs = pair(kind, predict)
    for i in (999, 998, 500, 1, 0):
        t, xt, output = torch.tensor([i, i]), torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8).requires_grad_()
        noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(i))
        mine = ddpm.step(ours, xt, t, ddpm.to_eps(ours, xt, t, output, predict), noise)
        other = theirs.step(output, i, xt, generator=torch.Generator().manual_seed(i)).prev_sample
        slopes = [torch.autograd.grad(y.square().sum(), output)[0] for y in (mine, other)]
        both = [mine, slopes[0]], [other, slopes[1]]
        parity("DDPM", f"ddpm.step (Alg. 2), {predict}", "diffusers.DDPMScheduler.step", *both, 2e-5)


@pytest.mark.parametrize("predict", PREDICT)
def test_objective(parity, predict):
    """Eq. 14 and its relatives: the loss and its gradient with the target that diffusers' training scripts take."""
    ours, theirs = pair("cosine", predict)
    x0, _, _ = images(4)
    net = torch.nn.Conv2d(1, 1, 3, padding=1)
    torch.manual_seed(7)
    mine = ddpm.loss(lambda x, t: net(x), ours, x0, predict)
    torch.manual_seed(7)
    t, eps = torch.randint(1000, (4,)), torch.randn_like(x0)
    goal = {"eps": eps, "x0": x0, "v": theirs.get_velocity(x0, eps, t)}[predict]
    other = F.mse_loss(net(theirs.add_noise(x0, eps, t)), goal)
    slopes = [torch.autograd.grad(y, net.weight)[0] for y in (mine, other)]
    both = [mine, slopes[0]], [other, slopes[1]]
    parity("DDPM", f"ddpm.loss (Eq. 14), {predict}", "diffusers add_noise, get_velocity", *both)


@pytest.mark.parametrize("predict", PREDICT)
def test_conversions_are_exact(predict):
    schedule = ddpm.Schedule()
    x0, eps, t = images()
    xt = ddpm.add_noise(schedule, x0, t, eps)
    output = ddpm.target(schedule, x0, t, eps, predict)
    # two digits go: eps from x0 divides by sqrt(1 - alpha_bar) = 0.01 at t = 0, x0 from eps by 0.006 at the end
    torch.testing.assert_close(ddpm.to_eps(schedule, xt, t, output, predict), eps, atol=1e-4, rtol=1e-4)
    back = ddpm.predict_x0(schedule, xt, t, eps)
    torch.testing.assert_close(back, x0, atol=1e-4, rtol=1e-4)


def test_posterior_of_a_gaussian():
    """If x0 ~ N(0, 1), Bayes gives x_{t-1} | x_t in closed form: mean sqrt(alpha) x_t, whatever x0 is averaged over."""
    schedule = ddpm.Schedule()
    xt, t = torch.randn(5, 1, 4, 4), torch.tensor([1, 10, 100, 500, 999])
    x0 = schedule.alpha_bar[t].sqrt()[:, None, None, None] * xt  # the mean of x0 | x_t
    mean, variance = ddpm.posterior(schedule, x0, xt, t)
    torch.testing.assert_close(mean, schedule.alpha[t].sqrt()[:, None, None, None] * xt)
    assert (variance.flatten() < schedule.beta[t]).all() and (variance > 0).all()


def test_sampling_a_gaussian_gives_it_back():
    """The best noise predictor of N(0, 0.25) data is linear; a thousand steps of Algorithm 2 must end in N(0, 0.25)."""
    schedule, variance = ddpm.Schedule(), 0.25

    def oracle(xt, t):
        alpha_bar = ddpm.at(schedule.alpha_bar, t)
        return (1 - alpha_bar).sqrt() / (alpha_bar * variance + 1 - alpha_bar) * xt

    *_, x = ddpm.sample(oracle, schedule, (2000, 1, 2, 2))
    assert abs(float(x.mean())) < 0.02
    # clamping x0 to [-1, 1] cuts the tails at two standard deviations: 0.77 of a Gaussian's variance is left
    assert 0.75 * variance < float(x.var()) < 1.05 * variance


def test_no_noise_at_the_last_step():
    schedule = ddpm.Schedule()
    xt, eps, t = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([0, 0])
    a, b = (ddpm.step(schedule, xt, t, eps, noise) for noise in (torch.randn_like(xt), 100 * torch.randn_like(xt)))
    assert torch.equal(a, b)
    t = torch.tensor([0, 5])
    a, b = (ddpm.step(schedule, xt, t, eps, noise) for noise in (torch.zeros_like(xt), torch.ones_like(xt)))
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


def test_images_are_in_minus_one_to_one():
    x = next(ddpm.batches(data.mnist("test")[0], 256))
    assert x.min() == -1 and x.max() == 1


def test_batches_go_on_where_they_broke_off():
    x = torch.arange(40, dtype=torch.uint8).view(10, 1, 2, 2)
    whole = [b for b, _ in zip(ddpm.batches(x, 3, seed=1), range(8))]
    rest = [b for b, _ in zip(ddpm.batches(x, 3, seed=1, start=5), range(3))]
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], rest))
    assert not torch.equal(whole[0], whole[3])  # the second epoch has another order


def test_loss_falls():
    cfg = ddpm.Config(steps=120, batch=32, channels=(16, 32), layers=1)
    model, ema = (ddpm.build(cfg.channels, cfg.layers) for _ in range(2))
    optimizer, schedule = torch.optim.AdamW(model.parameters()), ddpm.Schedule(kind="cosine")
    losses = list(ddpm.train(model, ema.requires_grad_(False), optimizer, schedule, data.mnist("test")[0], cfg))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def command(*args, script="ddpm"):
    return subprocess.run([sys.executable, f"models/{script}.py", *args], cwd=ROOT, capture_output=True, text=True)


TINY = "--batch 8 --channels 8 16 --layers 1 --samples 16 --save-every 2".split()


def test_command_and_bit_exact_resume(tmp_path):
    """Six steps in one go, and three steps, a kill, three more: the same weights to the last bit."""
    done = command(*TINY, "--steps", "6", "--out", str(tmp_path / "a"))
    assert done.returncode == 0, done.stderr
    for name in "config.json metrics.json samples.png film.png loss.png model.safetensors state.safetensors".split():
        assert (tmp_path / "a" / name).stat().st_size > 0, name
    assert {"recognised", "frechet"} <= json.loads((tmp_path / "a" / "metrics.json").read_text()).keys()
    interrupt = f"""
import sys
from models import ddpm
from utils import checkpoint
real = checkpoint.save_state
def save(*a, **k):
    real(*a, **k)
    len(k["losses"]) == 4 and sys.exit(9)
checkpoint.save_state = save
tiny = dict(batch=8, channels=(8, 16), layers=1, samples=16, save_every=2)
ddpm.main(ddpm.Config(steps=6, out={str(tmp_path / "b")!r}, **tiny))
"""
    assert subprocess.run([sys.executable, "-c", interrupt], cwd=ROOT, capture_output=True).returncode == 9
    assert not (tmp_path / "b" / "model.safetensors").exists()
    done = command(*TINY, "--steps", "6", "--resume", "--out", str(tmp_path / "b"))
    assert done.returncode == 0, done.stderr
    from utils import checkpoint

    a, b = (checkpoint.read(tmp_path / x / "model.safetensors")[0] for x in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "args, word",
    [
        (["--steps", "0"], "--steps"),
        (["--channels", "12"], "--channels"),
        (["--channels", "8", "8", "8"], "--channels"),
        (["--lr", "-1"], "--lr"),
        (["--seed", str(2**70)], "--seed"),
        (["--batch", "70000"], "--batch"),
        (["--predict", "noise"], "predict"),
        (["--resume"], "no checkpoint"),
        (["--device", "cuda:77"], "--device"),
    ],
)
def test_bad_input(args, word, tmp_path):
    done = command(*args, "--out", str(tmp_path / "x"))
    assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr, done.stderr
