"""Training recipes: the sampler equals diffusers'; each recipe changes what its name says; seeds, averages."""

import pytest
import torch
from torch import nn

from models import ddim, training_study
from models.post_hoc_ema import PowerEMA
from models.training_study import RECIPES, Config
from utils.run import UserError

TOPIC = "Training recipes"


class Small(nn.Module):
    """A network of xt and t with four weights."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.asked = []

    def forward(self, xt, t):
        self.asked.append(t)
        return self.conv(xt) * (1 + t[:, None, None, None] / 1000)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Small()


@pytest.mark.parametrize("predict", ["v", "eps"])
def test_sample_is_ddim(network, predict):
    """Where nothing is divided by zero, and in one step: clipped images keep the network's noise here only."""
    schedule = training_study.noise_schedule("scaled-linear")
    noise = 0.1 * torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        network.conv.weight *= 0.1
        mine = training_study.sample(network, schedule, noise, 1, predict)
        theirs = ddim.last(ddim.sample(network, schedule, noise, 1, predict))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["cosine", "scaled-linear", "zero-snr"])
def test_sample_equals_diffusers(network, parity, kind):
    """Their DDIM with trailing time steps, v-prediction and, for the last kind, rescale_betas_zero_snr."""
    from diffusers import DDIMScheduler

    schedule = training_study.noise_schedule(kind)
    theirs = DDIMScheduler(
        trained_betas=schedule.beta.numpy(), prediction_type="v_prediction", clip_sample=True,
        timestep_spacing="trailing", set_alpha_to_one=True,
    )  # fmt: skip
    if kind == "zero-snr":
        theirs = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=True,
            prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=True,
            rescale_betas_zero_snr=True,
        )  # fmt: skip
    theirs.set_timesteps(10)
    noise = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        mine = training_study.sample(network, schedule, noise, 10, "v")
        x = noise
        for t in theirs.timesteps:
            output = network(x, t.expand(2))
            x = theirs.step(output, t, x, use_clipped_model_output=False).prev_sample
    parity(TOPIC, f"training_study.sample, {kind}", "diffusers.DDIMScheduler", mine, x, atol=2e-4)


def trained(recipe, monkeypatch=None, constant=False, steps=3):
    cfg = Config(steps=steps, batch=4)
    images = torch.randint(256, (8, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator())
    torch.manual_seed(0)
    model = Small()
    schedule = training_study.noise_schedule(recipe[1])
    losses = list(training_study.train(model, [], schedule, images, recipe, cfg, 0, constant))
    return model, losses


def test_every_recipe_trains_something_else():
    found = {name: trained(recipe)[1] for name, recipe in RECIPES.items()}
    assert len({tuple(losses) for losses in found.values()}) == len(RECIPES)
    assert found["v"] == trained(RECIPES["v"])[1]


def test_recipes_use_their_parts(monkeypatch):
    """Prediction, schedule, weights and time steps of the name reach the loss."""
    seen = {}

    def loss(model, schedule, x0, predict, t, eps, weight):
        seen.update(schedule=schedule, predict=predict, t=t, weight=weight)
        return model(x0, t).mean()

    def drawn(n, steps, times, device):
        seen["times"] = times
        return torch.zeros(n, dtype=torch.long)

    monkeypatch.setattr(training_study, "weighted_loss", loss)
    monkeypatch.setattr(training_study, "draw_timesteps", drawn)
    for name, (predict, kind, times, weighted) in RECIPES.items():
        trained(RECIPES[name], steps=1)
        assert seen["predict"] == predict == ("eps" if name.startswith("eps") else "v")
        assert seen["times"] == times == ("logit-normal" if "logit" in name else "uniform")
        assert weighted == ("min-SNR" in name)
        assert (seen["weight"] is not None) == weighted
        last = seen["schedule"].sqrt_alpha_bar[-1]
        assert (last == 0) == name.endswith("zero SNR")
        assert (0.06 < last < 0.07) == name.endswith("scaled linear")
        assert kind in ("cosine", "scaled-linear", "zero-snr")


def test_rate_falls_or_stays(monkeypatch):
    """Warm-up in both; constant afterwards, or down to zero."""
    rates = []

    class Watched(torch.optim.AdamW):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    trained(RECIPES["v"], constant=True, steps=120)
    assert rates[0] == pytest.approx(2e-5)
    assert rates[99:] == [2e-3] * 21
    rates.clear()
    trained(RECIPES["v"], steps=120)
    assert rates[-1] < 1e-5 < max(rates) < 2e-3


def test_averages_follow_the_training(monkeypatch):
    """Every one is updated once a step, after the step of the optimizer."""
    cfg = Config(steps=5, batch=4)
    images = torch.randint(256, (8, 1, 28, 28), dtype=torch.uint8)
    model = Small()
    met = []

    def watch(model, i):
        met.append((i, model.conv.weight.detach().clone()))

    schedule = training_study.noise_schedule("cosine")
    for i, _ in enumerate(
        training_study.train(model, [watch], schedule, images, RECIPES["v"], cfg, 0)
    ):
        assert met[-1][0] == i
        assert met[-1][1].equal(model.conv.weight)
    assert len(met) == 5


def test_ordinary_ema():
    ema = nn.Linear(2, 2)
    model = nn.Linear(2, 2)
    old = ema.weight.detach().clone()
    update = training_study.ema_updater(ema, 0.9)
    update(model, 10_000)
    torch.testing.assert_close(ema.weight, 0.9 * old + 0.1 * model.weight)
    # in the first step a small decay: 1/10
    old = ema.weight.detach().clone()
    update(model, 0)
    torch.testing.assert_close(ema.weight, 0.1 * old + 0.9 * model.weight)
    # decay 0: the weights themselves
    training_study.ema_updater(ema, 0.0)(model, 5)
    assert ema.weight.equal(model.weight)


@pytest.fixture(scope="module")
def tiny():
    """Parts of a tiny study: (images, noise, scorer, cfg)."""
    cfg = Config(steps=4, batch=4, samples=10, sampling_steps=2, widths=(0.05, 0.2), snapshots=2)
    images = torch.randint(256, (8, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator())
    noise = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(0))

    def scorer(digits):
        return {"frechet": float(digits.square().mean()), "recognised": 0.0, "other": 1.0}

    return images, noise, scorer, cfg


def test_recipe_samples_its_ema(tiny, monkeypatch):
    """Not the raw weights; and with its own schedule and prediction."""
    seen = []

    def measure(model, schedule, predict, noise, scorer, cfg):
        seen.append((model, float(schedule.sqrt_alpha_bar[-1]), predict))
        return {}, noise

    made = []
    first = training_study.ema_updater
    monkeypatch.setattr(training_study, "measure", measure)
    monkeypatch.setattr(
        training_study, "ema_updater", lambda ema, d: made.append((ema, d)) or first(ema, d)
    )
    training_study.one_recipe("v, scaled linear to zero SNR", 0, *tiny)
    training_study.one_recipe("eps", 0, *tiny)
    assert [row[0] is ema for row, (ema, _) in zip(seen, made, strict=True)] == [True, True]
    assert [decay for _, decay in made] == [0.995, 0.995]
    assert seen[0][1:] == (0.0, "v")
    assert seen[1][2] == "eps"


def test_seeds_differ_and_repeat(tiny):
    one, _ = training_study.one_recipe("v", 0, *tiny)
    again, _ = training_study.one_recipe("v", 0, *tiny)
    other, _ = training_study.one_recipe("v", 1, *tiny)
    assert one == again != other
    assert set(one) == {"frechet", "recognised", "brightness"}


def test_all_averages_of_one_run(tiny, monkeypatch):
    """Snapshots end at the last step; decay 0.995 is the row of the recipe; widths are averages of their own."""
    saved = []
    monkeypatch.setattr(PowerEMA, "save", watch_saves(PowerEMA.save, saved))
    found = training_study.all_averages(0, *tiny, False)
    assert saved == [2, 4]
    recipe, _ = training_study.one_recipe("v", 0, *tiny)
    assert found["decay 0.995"] == recipe
    assert set(found) == {f"decay {d:g}" for d in training_study.DECAYS} | {
        "sigma_rel 0.05", "sigma_rel 0.2",
    }  # fmt: skip
    assert found["sigma_rel 0.05"] != found["sigma_rel 0.2"]
    assert training_study.all_averages(0, *tiny, True) != found


def watch_saves(save, saved):
    def watched(self):
        saved.append(self.step)
        save(self)

    return watched


def test_summary():
    rows = [{"frechet": 1.0}, {"frechet": 3.0}, {"frechet": 5.0}]
    assert training_study.summary(rows) == {
        "frechet": 3.0,
        "frechet_error": pytest.approx(2 / 3**0.5),
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(only=("w",)), "--only takes names of recipes: 'v', "),
        (dict(seeds=1), "--seeds must be at least 2"),
        (dict(steps=0), "--steps, --batch"),
        (dict(samples=9), "--samples"),
        (dict(sampling_steps=0), "--sampling-steps"),
        (dict(sampling_steps=1001), "--sampling-steps"),
        (dict(lr=0.0), "--lr"),
        (dict(lr=float("inf")), "--lr"),
        (dict(ema=1.0), "--ema"),
        (dict(widths=(0.3,)), "--widths"),
        (dict(widths=()), "--widths"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(UserError, match=message):
        training_study.main(Config(**flags))


def test_command(tmp_path):
    flags = dict(
        steps=2, batch=4, seeds=2, samples=10, sampling_steps=1, widths=(0.1,), snapshots=1
    )
    metrics = training_study.main(Config(**flags, only=("eps", "EMA"), out=str(tmp_path)))
    assert {"eps", "falling rate, decay 0", "constant rate, sigma_rel 0.1"} < set(metrics)
    assert "v" not in metrics
    assert metrics["brightness_of_real"] == pytest.approx(-0.74, abs=0.01)
    for name in ("samples.png", "ema.png", "metrics.json"):
        assert (tmp_path / name).is_file()


def test_seed_sets_the_weights_and_what_follows():
    draws = []
    for seed in (0, 1, 0):
        model = training_study.new_model(seed, "cpu")
        draws.append((model.conv_in.weight.detach(), torch.rand(3)))
    assert draws[0][0].equal(draws[2][0]) and draws[0][1].equal(draws[2][1])
    assert not draws[0][0].equal(draws[1][0]) and not draws[0][1].equal(draws[1][1])
