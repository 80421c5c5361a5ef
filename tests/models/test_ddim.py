"""DDIM: equal to diffusers' scheduler; a thousand of its steps at eta 1 are DDPM's; inversion inverts."""

import json
from dataclasses import asdict

import pytest
import torch

from models import ddim, ddpm, quality
from tests.models.test_ddpm import KINDS, Spy, command, one_line
from utils import checkpoint, data
from utils.run import UserError


def scheduler(kind, spacing):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        1000, beta_schedule=KINDS[kind], timestep_spacing=spacing, set_alpha_to_one=True
    )
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
        other = theirs.step(
            eps, now, xt, eta=eta, use_clipped_model_output=True, generator=g
        ).prev_sample
        slopes = [torch.autograd.grad(y.square().sum(), eps)[0] for y in (mine, other)]
        atol = 2e-5
        pairs = [mine, slopes[0]], [other, slopes[1]]
        parity("DDIM", f"ddim.step, eta {eta:g}", "diffusers.DDIMScheduler.step", *pairs, atol)


def test_linspace_spacing_of_diffusers_is_not_a_ddim_chain():
    """A known error of a famous library: with `linspace` steps it subtracts T // n, which is not the next step."""
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(1000, timestep_spacing="linspace")
    theirs.set_timesteps(8)
    strides = (theirs.timesteps[:-1] - theirs.timesteps[1:]).unique()
    assert 1000 // 8 not in strides.tolist()


def test_a_thousand_steps_at_eta_one_are_ddpm():
    schedule = ddpm.Schedule()
    for i in (999, 400, 1):
        t, xt, eps, noise = (
            torch.tensor([i]),
            torch.randn(1, 1, 4, 4),
            torch.randn(1, 1, 4, 4),
            torch.randn(1, 1, 4, 4),
        )
        a, b = (
            ddim.step(schedule, xt, t, t - 1, eps, 1.0, noise),
            ddpm.step(schedule, xt, t, eps, noise),
        )
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
        float(
            (ddim.last(ddim.sample(oracle(schedule, 0.01), schedule, z, n)) - 0.1 * z).abs().mean()
        )
        for n in (10, 100, 1000)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 0.002


def test_inversion_gives_the_noise_back():
    """With the network asked where `sample` asks it, the way up undoes the way down; one round of guessing, mostly."""
    schedule = ddpm.Schedule()
    # So that no x0 is clipped
    model, z = oracle(schedule, 0.01), torch.randn(20, 1, 2, 2).clamp(-2, 2)
    x = ddim.last(ddim.sample(model, schedule, z, 100))
    errors = [
        float((ddim.last(ddim.invert(model, schedule, x, 100, rounds=r)) - z).abs().max())
        for r in (1, 4, 12)
    ]
    assert errors[0] > 5 * errors[1] and errors[2] < 1e-3, errors


def test_slerp_stays_on_the_sphere():
    a, b = torch.randn(2, 1, 1, 28, 28)
    norms = torch.tensor([ddim.slerp(a, b, w).norm() for w in torch.linspace(0, 1, 5)])
    assert (norms - a.norm()).abs().max() < 2 and ((a + b) / 2).norm() < 0.8 * a.norm()
    torch.testing.assert_close(ddim.slerp(a, b, torch.tensor(0.0)), a)
    torch.testing.assert_close(ddim.slerp(a, b, torch.tensor(1.0)), b)


def test_slerp_between_equal_and_between_opposite_noises():
    """From a noise to itself there is no way to go; to its opposite there are too many, and to zero there is none."""
    a = torch.randn(1, 1, 28, 28)
    for weight in (0.0, 0.3, 1.0):
        torch.testing.assert_close(ddim.slerp(a, a, weight), a)
        torch.testing.assert_close(ddim.slerp(a, 2 * a, weight), (1 + weight) * a)
    for b in (-a, 0 * a):
        with pytest.raises(UserError, match="no arc"):
            ddim.slerp(a, b, 0.5)


def test_unknown_spacing_is_refused():
    with pytest.raises(UserError, match="linspace"):
        ddim.timesteps(ddpm.Schedule(), 10, "linspace")


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_sample_asks_at_the_steps_of_its_spacing(spacing):
    asked, schedule = [], ddpm.Schedule()
    chain = list(
        ddim.sample(
            lambda xt, t: asked.append(int(t[0])) or xt,
            schedule,
            torch.zeros(1, 1, 2, 2),
            7,
            spacing=spacing,
        )
    )
    assert asked == ddim.timesteps(schedule, 7, spacing).tolist() and len(chain) == 8


def test_sample_walks_from_step_to_step_with_its_eta():
    """A chain of `step`, which equals diffusers', each landing where the next begins, the last on the clean image."""
    schedule, z = ddpm.Schedule(), torch.randn(3, 1, 2, 2)
    model = oracle(schedule, 0.25)
    torch.manual_seed(5)
    found = ddim.last(ddim.sample(model, schedule, z, 5, eta=0.7))
    torch.manual_seed(5)
    x, steps = z, ddim.timesteps(schedule, 5).tolist()
    for now, before in zip(steps, [*steps[1:], -1]):
        t, t_prev = torch.full((3,), now), torch.full((3,), before)
        x = ddim.step(schedule, x, t, t_prev, model(x, t), 0.7)
    torch.testing.assert_close(found, x)


@pytest.mark.parametrize("clip", [True, False])
def test_sample_clips_images_and_leaves_latents(clip):
    x = ddim.last(
        ddim.sample(
            lambda xt, t: torch.full_like(xt, 3.0),
            ddpm.Schedule(),
            torch.randn(2, 1, 2, 2),
            5,
            "x0",
            clip=clip,
        )
    )
    torch.testing.assert_close(x, torch.full_like(x, 1.0 if clip else 3.0))


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_sample_and_invert_read_the_network_as_it_was_trained(predict):
    """The network knows the one image there is, whatever it is asked for: every noise must end there."""
    schedule, x0 = ddpm.Schedule(), torch.rand(2, 1, 2, 2)

    def model(xt, t):
        eps = (xt - ddpm.at(schedule.sqrt_alpha_bar, t) * x0) / ddpm.at(
            schedule.sqrt_one_minus_alpha_bar, t
        )
        return ddpm.target(schedule, x0, t, eps, predict)

    z = torch.randn(2, 1, 2, 2)
    torch.testing.assert_close(
        ddim.last(ddim.sample(model, schedule, z, 9, predict)), x0, atol=1e-4, rtol=1e-3
    )
    chain = list(ddim.invert(model, schedule, x0, 9, predict))
    assert len(chain) == 10 and torch.equal(chain[0], x0) and chain[-1].isfinite().all()


class Chains:
    """Stands in for `sample` and `invert`; notes what they were asked for."""

    def __init__(self, monkeypatch):
        self.asked, self.inverted = [], []
        self.spy = Spy(monkeypatch, ddpm)
        monkeypatch.setattr(ddim, "sample", self.sample)
        monkeypatch.setattr(ddim, "invert", self.invert)
        self.judged = []
        monkeypatch.setattr(quality, "scorer", lambda device: self.judge)

    def sample(self, model, schedule, xt, n, predict="eps", spacing="trailing", eta=0.0, clip=True):
        self.asked.append(dict(noise=xt, n=n, predict=predict, spacing=spacing, eta=eta, clip=clip))
        yield xt
        yield torch.full_like(xt, n / 1000)

    def invert(self, model, schedule, x0, n, predict="eps", rounds=8):
        self.inverted.append((x0, n, predict))
        yield torch.full_like(x0, -float(n))

    def judge(self, images):
        self.judged.append(images)
        return {"recognised": float(images.mean()), "frechet": 1.0}


def weights(tmp_path):
    """A file as models/ddpm.py writes it, of a network that was asked for x0."""
    cfg = ddpm.Config(channels=(8,), layers=1, predict="x0", schedule="linear")
    path = tmp_path / "ddpm" / "model.safetensors"
    checkpoint.write(path, ddpm.build(cfg.channels, cfg.layers).state_dict(), asdict(cfg))
    return str(path)


def test_main_compares_counts_from_one_noise(monkeypatch, tmp_path):
    """Every count starts from the same noise, with the spacing and eta of the flags and the question of the file."""
    chains = Chains(monkeypatch)
    flags = dict(
        counts=(2, 5),
        eta=0.5,
        spacing="leading",
        samples=10,
        weights=weights(tmp_path),
        out=str(tmp_path),
    )
    metrics = ddim.main(ddim.Config(**flags))
    first, second, *rest = chains.asked
    assert (first["n"], second["n"]) == (2, 5) and torch.equal(first["noise"], second["noise"])
    for asked in (first, second):
        assert (asked["predict"], asked["spacing"], asked["eta"], asked["clip"]) == (
            "x0",
            "leading",
            0.5,
            True,
        )
    assert abs(float(first["noise"].std()) - 1) < 0.05 and first["noise"].shape == (10, 1, 28, 28)
    assert [float(x.mean()) for x in chains.judged] == pytest.approx([0.002, 0.005])
    assert metrics["5 steps"]["recognised"] == pytest.approx(0.005)
    # test digits go up, and what was found comes down again, without noise, in as many steps
    (digits, up, _), (_, further, _) = chains.inverted
    assert (up, further) == (20, 100) and torch.equal(
        digits, data.to_float(data.mnist("test")[0][:10])
    )
    for asked, n in zip(rest, (20, 100)):
        assert (asked["n"], asked["predict"], asked["eta"]) == (n, "x0", 0.0) and (
            asked["noise"] == -n
        ).all()
    expected = float((0.1 - digits).abs().mean())
    assert metrics["inversion_error_100_steps"] == pytest.approx(expected)
    path = rest[2]["noise"].unflatten(0, (4, 10))
    torch.testing.assert_close(path[:, 0], first["noise"][:4])
    torch.testing.assert_close(path[:, -1], first["noise"][4:8])
    assert list(chains.spy.strips["steps.png"]) == ["2 steps", "5 steps"]


@pytest.mark.long
def test_command(tmp_path):
    args = [
        "--weights",
        weights(tmp_path),
        "--counts",
        "2",
        "--samples",
        "10",
        "--out",
        str(tmp_path / "ddim"),
    ]
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
    "args",
    [
        ["--counts", "0"],
        ["--counts", "2000"],
        ["--eta", "-1"],
        ["--eta", "2"],
        ["--eta", "nan"],
        ["--spacing", "linspace"],
    ],
)
def test_bad_input(args, tmp_path, monkeypatch, capsys):
    flags = ["--pretrained", *args, "--out", str(tmp_path / "x")]
    assert args[0][2:] in one_line(ddim, flags, monkeypatch, capsys)
