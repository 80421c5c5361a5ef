"""DDPM: every equation equal to diffusers' scheduler; known answers; the script as a command."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from models import ddpm, quality, vae
from models.batches import batches
from tests.conftest import ROOT
from utils import checkpoint, data, figures, run
from utils.run import UserError

KINDS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICT = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def pair(kind="linear", predict="eps", exact=True):
    """Our schedule and diffusers'.

    Its table is single precision, where 1 - alpha_bar = 1e-4 has three digits: `exact` mends that.
    """
    from diffusers import DDPMScheduler

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
    both = (
        [ours.beta, ours.alpha, ours.alpha_bar],
        [theirs.betas, theirs.alphas, theirs.alphas_cumprod],
    )
    parity("DDPM", f"ddpm.Schedule, {kind}", "diffusers.DDPMScheduler", *both, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_add_noise(parity, kind):
    ours, theirs = pair(kind)
    x0, eps, t = images()
    x0.requires_grad_()
    mine, other = ddpm.add_noise(ours, x0, t, eps), theirs.add_noise(x0, eps, t)
    slopes = [torch.autograd.grad(y.square().sum(), x0)[0] for y in (mine, other)]
    parity(
        "DDPM",
        "ddpm.add_noise (Eq. 4)",
        "diffusers.DDPMScheduler.add_noise",
        [mine, slopes[0]],
        [other, slopes[1]],
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("predict", PREDICT)
def test_step(parity, kind, predict):
    """Algorithm 2 from the network's output, at the first step (pure noise), the last (no noise) and between."""
    ours, theirs = pair(kind, predict)
    for i in (999, 998, 500, 1, 0):
        t, xt, output = (
            torch.tensor([i, i]),
            torch.randn(2, 1, 8, 8),
            torch.randn(2, 1, 8, 8).requires_grad_(),
        )
        noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(i))
        mine = ddpm.step(ours, xt, t, ddpm.to_eps(ours, xt, t, output, predict), noise)
        other = theirs.step(output, i, xt, generator=torch.Generator().manual_seed(i)).prev_sample
        slopes = [torch.autograd.grad(y.square().sum(), output)[0] for y in (mine, other)]
        both = [mine, slopes[0]], [other, slopes[1]]
        parity(
            "DDPM", f"ddpm.step (Alg. 2), {predict}", "diffusers.DDPMScheduler.step", *both, 2e-5
        )


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
    torch.testing.assert_close(
        ddpm.to_eps(schedule, xt, t, output, predict), eps, atol=1e-4, rtol=1e-4
    )
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
    a, b = (
        ddpm.step(schedule, xt, t, eps, noise)
        for noise in (torch.randn_like(xt), 100 * torch.randn_like(xt))
    )
    assert torch.equal(a, b)
    t = torch.tensor([0, 5])
    a, b = (
        ddpm.step(schedule, xt, t, eps, noise)
        for noise in (torch.zeros_like(xt), torch.ones_like(xt))
    )
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


def test_images_are_in_minus_one_to_one():
    x = next(batches(data.mnist("test")[0], 256))
    assert x.min() == -1 and x.max() == 1


def test_batches_go_on_where_they_broke_off():
    x = torch.arange(40, dtype=torch.uint8).view(10, 1, 2, 2)
    whole = [b for b, _ in zip(batches(x, 3, seed=1), range(8))]
    rest = [b for b, _ in zip(batches(x, 3, seed=1, start=5), range(3))]
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], rest))
    assert not torch.equal(whole[0], whole[3])  # the second epoch has another order
    assert len(torch.cat(whole[:3])[:, 0, 0, 0].unique()) == 9  # and no image comes twice in one


def test_loss_falls():
    cfg = ddpm.Config(steps=80, batch=16, lr=3e-2, channels=(8, 16), layers=1)
    model, ema = (ddpm.build(cfg.channels, cfg.layers) for _ in range(2))
    optimizer, schedule = torch.optim.AdamW(model.parameters()), ddpm.Schedule(kind="cosine")
    losses = list(
        ddpm.train(
            model, ema.requires_grad_(False), optimizer, schedule, data.mnist("test")[0], cfg
        )
    )
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize("clip", [True, False])
def test_clip_keeps_x0_within_the_range_of_images(clip):
    """A network that is sure of an image of 3 everywhere, in every step: clipped, it ends at 1."""
    schedule, xt = ddpm.Schedule(steps=20, beta_end=0.5), torch.randn(2, 1, 4, 4)
    t, eps = torch.tensor([0, 0]), torch.full_like(xt, -9.0)
    x0 = ddpm.predict_x0(schedule, xt, t, eps)
    torch.testing.assert_close(
        ddpm.step(schedule, xt, t, eps, clip=clip), x0.clamp(-1, 1) if clip else x0
    )
    *_, x = ddpm.sample(
        lambda xt, t: torch.full_like(xt, 3.0), schedule, (2, 1, 4, 4), "x0", clip=clip
    )
    torch.testing.assert_close(x, torch.full_like(x, 1.0 if clip else 3.0))


def test_sample_asks_about_every_step_from_the_last_to_the_first():
    asked, schedule = [], ddpm.Schedule(steps=7)
    chain = list(ddpm.sample(lambda xt, t: asked.append(t.tolist()) or xt, schedule, (2, 1, 4, 4)))
    assert asked == [[t, t] for t in (6, 5, 4, 3, 2, 1, 0)] and len(chain) == 8


@pytest.mark.parametrize("call", ["schedule", "target", "to_eps"])
def test_unknown_names_are_refused(call):
    """Not taken for the cosine schedule, or for x0."""
    schedule, x, t = ddpm.Schedule(), torch.zeros(1, 1, 2, 2), torch.tensor([5])
    with pytest.raises(UserError, match="Linear|noise"):
        {
            "schedule": lambda: ddpm.Schedule(kind="Linear"),
            "target": lambda: ddpm.target(schedule, x, t, x, "noise"),
            "to_eps": lambda: ddpm.to_eps(schedule, x, t, x, "noise"),
        }[call]()


def test_learning_rate_rises_for_a_hundred_steps_and_falls_to_zero():
    cfg = ddpm.Config(lr=2.0, steps=1000)
    assert ddpm.learning_rate(cfg, 0) == pytest.approx(0.02)
    assert ddpm.learning_rate(cfg, 49) == pytest.approx(1, rel=0.01)
    assert ddpm.learning_rate(cfg, 500) == pytest.approx(1.0)  # half of the cosine
    assert ddpm.learning_rate(cfg, 750) == pytest.approx(1 - math.sqrt(0.5))
    assert ddpm.learning_rate(cfg, 1000) == 0


def test_update_ema_moves_by_one_minus_the_decay():
    slow, fast = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    slow.weight.data.fill_(1.0)
    fast.weight.data.fill_(2.0)
    ddpm.update_ema(slow.requires_grad_(False), fast, 0.9)
    assert slow.weight.item() == pytest.approx(1.1) and fast.weight.item() == 2


class OneWeight(torch.nn.Module):
    """Answers with its one weight everywhere, whatever it is asked: training it can be followed by hand."""

    def __init__(self, weight=3.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, xt, *_, **__):
        return self.weight.expand_as(xt)


def only_noise():
    """A schedule under which xt is the noise, and the target v is -x0: no chance is left in the loss."""
    schedule = ddpm.Schedule()
    schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar = torch.zeros(1000), torch.ones(1000)
    return schedule


def by_hand(goal, cfg, decay, weight=3.0, mean=-7.0):
    """SGD on (weight - goal)^2 with the gradient cut at 1, and the EMA of the weight -> losses, weights, means."""
    losses, weights, means = [], [], []
    for i in range(cfg.steps):
        losses.append((weight - goal) ** 2)
        slope = 2 * (weight - goal)
        weight -= vae.learning_rate(cfg, i) * max(-1.0, min(1.0, slope))
        remembered = min(decay, (1 + i) / (10 + i))
        mean = remembered * mean + (1 - remembered) * weight
        weights.append(weight)
        means.append(mean)
    return losses, weights, means


def followed(train, goal, cfg, decay, network=OneWeight):
    """`train(model, ema, optimizer)` does what `by_hand` does, step by step."""
    model, ema = network(), network(-7.0).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)  # the rate comes from the schedule
    found = [
        (value, model.weight.item(), ema.weight.item()) for value in train(model, ema, optimizer)
    ]
    for mine, expected in zip(zip(*found), by_hand(goal, cfg, decay)):
        assert mine == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(found) == cfg.steps


def test_training_by_hand():
    """Rate, zeroed gradients, clipping and EMA of every step; images of 255 are 1, and x0 is what is predicted."""
    cfg = ddpm.Config(steps=7, batch=4, lr=40.0, ema=0.25, predict="x0")
    white = torch.full((8, 1, 4, 4), 255, dtype=torch.uint8)
    followed(lambda *parts: ddpm.train(*parts, ddpm.Schedule(), white, cfg), 1.0, cfg, 0.25)


@pytest.mark.parametrize("predict, loss", [("x0", 4.0), ("v", 16.0), ("eps", 10.0)])
def test_training_asks_for_what_predict_names(predict, loss):
    """The answer is 3; the image is 1, v is -1, and the noise has mean 0 and variance 1."""
    cfg = ddpm.Config(steps=1, batch=64, predict=predict)
    white = torch.full((64, 1, 8, 8), 255, dtype=torch.uint8)
    model = OneWeight()
    optimizer = torch.optim.SGD(model.parameters())
    values = list(
        ddpm.train(
            model, copy.deepcopy(model).requires_grad_(False), optimizer, only_noise(), white, cfg
        )
    )
    assert values[0] == pytest.approx(loss, abs=1e-5 if predict != "eps" else 0.5)


def test_attention_is_at_the_coarsest_resolution_and_pixels_are_folded():
    model = ddpm.build((8, 16), 1)
    assert [stage.attentions is not None for stage in model.down_blocks] == [
        False,
        True,
    ] and model.patch == 2


class Spy:
    """Stands in for what is slow: the sampler, the judge and the figures; notes what they were given."""

    def __init__(self, monkeypatch, module):
        self.drawn, self.strips = [], {}
        images, labels = data.mnist("test")
        kinds = {"train": (images[:64], labels[:64]), "test": (images[64:128], labels[64:128])}
        monkeypatch.setattr(data, "mnist", kinds.get)
        monkeypatch.setattr(module, "sample", self.sample)
        monkeypatch.setattr(quality, "scorer", lambda device: self.judge)
        for name in ("grid", "curves", "rows"):
            monkeypatch.setattr(figures, name, self.figure)

    def sample(self, model, schedule, shape, predict="eps"):
        self.model, self.schedule, self.predict = copy.deepcopy(model), schedule, predict
        yield from (torch.full(shape, i / schedule.steps) for i in range(schedule.steps + 1))

    def judge(self, images):
        self.judged = images
        return {"recognised": 0.5, "frechet": 1.0}

    def figure(self, path, content, *_, **__):
        self.strips[path.name] = content


SMALL = dict(batch=8, channels=(8, 16), layers=1, samples=6, save_every=2)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def part_of(state, name):
    """The tensors of one part of a checkpoint."""
    return {
        k.removeprefix(f"state.{name}."): v
        for k, v in state.items()
        if k.startswith(f"state.{name}.")
    }


def test_main_samples_writes_and_loads_the_ema(monkeypatch, tmp_path):
    """And hands the network's question, the schedule and the last images of the chain on."""
    spy = Spy(monkeypatch, ddpm)
    cfg = ddpm.Config(steps=3, predict="x0", schedule="linear", ema=0.5, out=str(tmp_path), **SMALL)
    metrics = ddpm.main(cfg)
    state, meta = checkpoint.read(tmp_path / "state.safetensors")
    written = checkpoint.read(tmp_path / "model.safetensors")[0]
    assert same(written, part_of(state, "ema")) and same(written, spy.model.state_dict())
    assert not same(written, part_of(state, "model"))
    assert spy.predict == "x0" and torch.equal(
        spy.schedule.alpha_bar, ddpm.Schedule(kind="linear").alpha_bar
    )
    assert (spy.judged == 1).all() and spy.judged.shape == (6, 1, 28, 28)
    for strip in spy.strips["film.png"].values():  # x_1000 is the first of the chain, x_0 the last
        expected = 1 - torch.tensor([1000, 800, 600, 500, 400, 300, 200, 100, 50, 0]) / 1000
        torch.testing.assert_close(strip[:, 0, 0, 0], expected)
    losses = list(spy.strips["loss.png"]["loss"])
    assert metrics["final_loss"] == pytest.approx(sum(losses) / 3)
    # What the file says, not the flags
    monkeypatch.setattr(ddpm, "WEIGHTS", tmp_path / "model.safetensors")
    ddpm.main(ddpm.Config(pretrained=True, samples=6, out=str(tmp_path / "again")))
    assert spy.predict == "x0" and same(spy.model.state_dict(), written)
    assert torch.equal(spy.schedule.alpha_bar, ddpm.Schedule(kind="linear").alpha_bar)


def test_resume_is_bit_exact(monkeypatch, tmp_path):
    """Six steps in one go, and four steps, a kill after the checkpoint, two more: the same weights to the last bit."""
    Spy(monkeypatch, ddpm)
    ddpm.main(ddpm.Config(steps=6, out=str(tmp_path / "a"), **SMALL))
    save = checkpoint.save_state

    def killed(*args, **parts):
        save(*args, **parts)
        if len(parts["losses"]) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        ddpm.main(ddpm.Config(steps=6, out=str(tmp_path / "b"), **SMALL))
    assert not (tmp_path / "b" / "model.safetensors").exists()
    monkeypatch.setattr(checkpoint, "save_state", save)
    ddpm.main(ddpm.Config(steps=6, resume=True, out=str(tmp_path / "b"), **SMALL))
    for name in ("model", "state"):
        a, b = (checkpoint.read(tmp_path / out / f"{name}.safetensors")[0] for out in "ab")
        assert same(a, b)


def command(*args, script="ddpm"):
    return subprocess.run(
        [sys.executable, f"models/{script}.py", *args], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.long
def test_command(tmp_path):
    """The only run of the script as a reader's: every file that it promises is there."""
    tiny = "--steps 2 --batch 8 --channels 8 --layers 1 --samples 6".split()
    done = command(*tiny, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for name in "config.json metrics.json samples.png film.png loss.png model.safetensors state.safetensors".split():
        assert (tmp_path / name).stat().st_size > 0, name
    assert {"recognised", "recognised_error", "frechet"} <= json.loads(
        (tmp_path / "metrics.json").read_text()
    ).keys()


def one_line(module, flags, monkeypatch, capsys):
    """Run a command in this process: exit code 2, one line that names the error, no traceback. -> what was printed."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        run.cli(module.main, module.Config)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in printed
    ours = [line for line in printed.splitlines() if line.startswith("error: ")]
    # tyro refuses in a frame of its own
    assert len(ours) == 1 or "For full helptext" in printed, printed
    return printed


@pytest.mark.parametrize(
    "args, word",
    [
        (["--steps", "0"], "--steps"),
        (["--channels", "12"], "--channels"),
        (["--channels", "8", "8", "8"], "--channels"),
        (["--channels"], "channels"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--ema", "nan"], "--ema"),
        (["--save-every", "-1"], "--save-every"),
        (["--seed", str(2**70)], "--seed"),
        (["--batch", "70000"], "--batch"),
        (["--predict", "noise"], "predict"),
        (["--resume"], "no checkpoint"),
        (["--device", "cuda:77"], "--device"),
    ],
)
def test_bad_input(args, word, tmp_path, monkeypatch, capsys):
    assert word in one_line(ddpm, [*args, "--out", str(tmp_path / "x")], monkeypatch, capsys)
    assert not list(tmp_path.rglob("*.safetensors"))
