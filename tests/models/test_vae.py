"""models/vae.py: its formulas against torch.distributions, its failures without noise and without KL, its command."""

import json
import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from models import latent_figures, quality, vae, vae_network
from tests.models.test_ddpm import command, one_line, same
from utils import checkpoint, data, figures
from utils.run import UserError

TINY = (
    "--steps 2 --batch 8 --samples 64 --channels 4 8 --hidden 16 --latents 2 --no-ablations".split()
)


def codes(b=6, d=5):
    """Means and log variances to differentiate by."""
    return (2 * torch.randn(b, d)).requires_grad_(), (2 * torch.randn(b, d)).requires_grad_()


def with_gradients(value, *inputs):
    """A tensor and its gradients, for a weighted sum of its elements."""
    weight = torch.linspace(-1, 1, value.numel()).view_as(value)
    return [value, *torch.autograd.grad((value * weight).sum(), inputs)]


def small(latent=2):
    return vae.VAE(latent, (4, 8), 16)


def test_kl_divergence(parity):
    mu, logvar = codes()
    theirs = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(dim=1)
    ours, theirs = (
        with_gradients(kl, mu, logvar) for kl in (vae.kl_divergence(mu, logvar), theirs)
    )
    assert ours[0].shape == (6,)
    parity("VAE", "vae.kl_divergence", "torch.distributions.kl_divergence", ours, theirs, atol=1e-5)


def test_reparameterize(parity):
    mu, logvar = codes()
    torch.manual_seed(1)
    ours = with_gradients(vae.reparameterize(mu, logvar), mu, logvar)
    torch.manual_seed(1)
    theirs = with_gradients(Normal(mu, (logvar / 2).exp()).rsample(), mu, logvar)
    parity(
        "VAE", "vae.reparameterize", "torch.distributions.Normal.rsample", ours, theirs, atol=1e-6
    )


def test_reconstruction(parity):
    logits, x = (
        (3 * torch.randn(4, 1, 28, 28)).requires_grad_(),
        data.to_float(torch.randint(256, (4, 1, 28, 28))),
    )
    # Grey targets: the mean over black and white draws
    coins = Bernoulli(logits=logits, validate_args=False)
    theirs = -coins.log_prob((x + 1) / 2).sum(dim=(1, 2, 3))
    ours, theirs = (
        with_gradients(error, logits) for error in (vae.reconstruction(logits, x), theirs)
    )
    parity("VAE", "vae.reconstruction", "torch.distributions.Bernoulli", ours, theirs, atol=1e-3)
    parity(
        "VAE",
        "vae_network.picture",
        "torch.distributions.Bernoulli",
        vae_network.picture(logits),
        2 * coins.mean - 1,
        atol=1e-6,
    )


def test_grey_target_is_the_mean_over_binarised_images():
    """E over coins of -log p(coins | z) is the cross-entropy with the grey itself."""
    logits, x = torch.randn(1, 1, 4, 4), torch.rand(1, 1, 4, 4) * 2 - 1
    draws = torch.bernoulli(((x + 1) / 2).expand(40_000, -1, -1, -1)) * 2 - 1
    mean = vae.reconstruction(logits.expand_as(draws), draws).mean()
    torch.testing.assert_close(mean, vae.reconstruction(logits, x)[0], rtol=0.005, atol=0)


def test_kl_divergence_of_known_cases():
    zero = torch.zeros(3, 4)
    assert (vae.kl_divergence(zero, zero) == 0).all()
    shifted = 2.0**2 / 2  # mu^2 / 2 each
    torch.testing.assert_close(vae.kl_divergence(zero + 2, zero), torch.full((3,), 4 * shifted))
    narrow = (0.01 - 1 - math.log(0.01)) / 2  # sigma = 0.1
    torch.testing.assert_close(
        vae.kl_divergence(zero, zero + math.log(0.01)), torch.full((3,), 4 * narrow)
    )
    assert (vae.kl_divergence(torch.randn(1000, 4), 3 * torch.randn(1000, 4)) > 0).all()
    mu, logvar = torch.randn(2, 4), torch.randn(2, 4)  # it adds up over dimensions, not over images
    apart = sum(vae.kl_divergence(mu[:, i : i + 1], logvar[:, i : i + 1]) for i in range(4))
    torch.testing.assert_close(vae.kl_divergence(mu, logvar), apart)


def test_reparameterize_draws_from_the_normal_it_is_given():
    mu, sigma = torch.tensor([1.0, -3.0]), torch.tensor([0.5, 3.0])
    z = vae.reparameterize(mu.expand(200_000, 2), sigma.square().log().expand(200_000, 2))
    torch.testing.assert_close(z.mean(0), mu, atol=0.03, rtol=0)
    torch.testing.assert_close(z.std(0), sigma, atol=0, rtol=0.01)


def test_reparameterize_is_new_every_time_and_still_without_variance():
    mu, logvar = torch.randn(4, 3), torch.zeros(4, 3)
    assert not (vae.reparameterize(mu, logvar) == vae.reparameterize(mu, logvar)).any()
    assert torch.equal(vae.reparameterize(mu, torch.full((4, 3), -400.0)), mu)


def test_loss_is_the_negative_bound_and_reaches_every_weight():
    model, x = small(), data.to_float(torch.randint(256, (8, 1, 28, 28)))
    value, error, kl = vae.loss(model, x)
    assert value.shape == () and value.item() == pytest.approx((error + kl).item())
    value.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    for beta, noise in ((0.0, True), (1.0, False), (4.0, True)):
        value, error, kl = vae.loss(model, x, beta, noise)
        assert value.item() == pytest.approx((error + beta * kl).item())
    still = [vae.loss(model, x, noise=False)[0].item() for _ in range(2)]
    noisy = [vae.loss(model, x)[0].item() for _ in range(2)]
    assert still[0] == still[1] and noisy[0] != noisy[1]


def test_bound_stays_below_the_likelihood():
    """With a linear decoder of one latent and one pixel, log p(x) is an integral that a sum can do."""
    slope, x, mu, logvar = 2.0, 1.0, torch.tensor([[0.6]]), torch.tensor([[-0.4]])
    z = torch.linspace(-12, 12, 20_001)
    exact = (Normal(0, 1).log_prob(z).exp() * torch.sigmoid(slope * z)).sum().log() + math.log(
        24 / 20_000
    )
    z = vae.reparameterize(mu.expand(100_000, 1), logvar.expand(100_000, 1))[..., None, None]
    bound = -vae.reconstruction(slope * z, torch.full_like(z, x)).mean() - vae.kl_divergence(
        mu, logvar
    )
    assert exact - 0.1 < bound.item() < exact


def test_shapes():
    model = small(latent=7)
    mu, logvar = model.encode(torch.zeros(5, 1, 28, 28))
    assert mu.shape == logvar.shape == (5, 7)
    assert model.decode(mu).shape == (5, 1, 28, 28)
    images = vae.sample(model, 9)
    assert (
        images.shape == (9, 1, 28, 28)
        and images.min() >= -1
        and images.max() <= 1
        and images[0].ne(images[1]).any()
    )
    assert latent_figures.interpolate(model, *torch.zeros(2, 1, 28, 28), n=4).shape == (
        4,
        1,
        28,
        28,
    )


def test_latent_grid_lies_like_the_scatter_plot():
    """Codes by equal steps of probability; z_1 grows to the right and z_2 upwards."""
    model = small()
    model.decode = lambda z: z[:, :, None, None]
    z = 2 * latent_figures.latent_grid(model, 5).atanh()[:, :, 0, 0].unflatten(0, (5, 5))
    expected = Normal(0, 1).icdf(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    torch.testing.assert_close(z[2, :, 0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(z[:, 2, 1], expected.flip(0), atol=1e-4, rtol=0)


def test_interpolation_goes_straight_from_code_to_code():
    model, images = small(), torch.rand(2, 1, 28, 28) * 2 - 1
    a, b = model.encode(images)[0].detach()
    model.decode = lambda z: z[:, :, None, None]
    path = 2 * latent_figures.interpolate(model, *images, n=6).atanh()[:, :, 0, 0]
    expected = torch.stack([a + (b - a) * i / 5 for i in range(6)])
    torch.testing.assert_close(path, expected, atol=1e-6, rtol=0)
    assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize(
    "bad",
    [
        torch.full((2, 1, 28, 28), 255.0), torch.full((2, 1, 28, 28), -1.5),
        torch.zeros(2, 3, 28, 28), torch.zeros(2, 1, 32, 32),
    ],
)  # fmt: skip
def test_wrong_images(bad):
    with pytest.raises(UserError):
        vae.loss(small(), bad)


class Codes:
    """Stands in for a VAE: codes are what is asked about, and a picture is its code."""

    latent = 3

    def parameters(self):
        yield torch.zeros(1)

    def encode(self, x):
        return x.flatten(1)[:, :3], torch.full((len(x), 3), -4.0)

    def decode(self, z):
        return z[:, :, None, None]


def test_samples_come_from_the_prior():
    """z ~ N(0, 1), no wider and no narrower; the picture is 2 sigmoid(logits) - 1."""
    z = 2 * vae.sample(Codes(), 20_000).double().atanh().flatten(1)
    assert z.shape == (20_000, 3)
    torch.testing.assert_close(z.mean(0), torch.zeros(3).double(), atol=0.03, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(3).double(), atol=0.03, rtol=0)


def test_measure_is_the_whole_bound_of_all_images_and_codes_are_means(monkeypatch):
    """With KL and with noise, whatever was left out in training; uneven batches count by their size."""
    model, x = small(), torch.rand(700, 1, 28, 28) * 2 - 1
    asked = []

    def loss(model, x, beta=1.0, noise=True):
        asked.append((beta, noise))
        return tuple(torch.tensor(float(k * len(x))) for k in (3, 1, 2))

    monkeypatch.setattr(vae, "loss", loss)
    result, codes = vae.measure(model, x)
    assert asked == [(1.0, True)] * 2
    mean = (500 * 500 + 200 * 200) / 700
    assert result == pytest.approx({"elbo": -3 * mean, "reconstruction": mean, "kl": 2 * mean})
    torch.testing.assert_close(codes, model.encode(x)[0], atol=1e-5, rtol=1e-4)


def test_variants_leave_out_one_part_each():
    chosen = vae.variants(vae.Config(latents=(2, 16)))
    parts = {name: (v.latent, v.beta, v.noise) for name, v in chosen.items()}
    assert parts["2-d"] == (2, 1.0, True) and parts["16-d"] == (16, 1.0, True)
    assert parts["no noise"] == (2, 1.0, False) and parts["no KL"] == (2, 0.0, True)
    assert list(vae.variants(vae.Config(latents=(2,), ablations=False))) == ["2-d"]


def test_training_sets_the_rate_clips_and_hands_the_variant_on(monkeypatch):
    """SGD moves by the schedule's rate times a gradient that is cut at 100; every step begins from no gradient."""
    cfg = vae.Config(steps=5, batch=4, lr=3.0)
    images, asked = torch.full((6, 1, 28, 28), 255, dtype=torch.uint8), []
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)

    def loss(model, x, beta, noise):
        asked.append((beta, noise, tuple(x.shape), float(x.min())))
        value = model.weight.sum() * (7.0 if len(asked) % 2 else 900.0)
        return value, value + 1, value + 2

    monkeypatch.setattr(vae, "loss", loss)
    curves, weights = {"reconstruction": [], "kl": []}, [0.0]
    for value in vae.train(model, optimizer, images, cfg, curves, vae.Variant(2, 0.25, False)):
        assert (curves["reconstruction"][-1], curves["kl"][-1]) == pytest.approx(
            (value + 1, value + 2)
        )
        weights.append(model.weight.item())
    moves = [a - b for a, b in zip(weights, weights[1:])]
    assert moves == pytest.approx(
        [vae.learning_rate(cfg, i) * (100.0 if i % 2 else 7.0) for i in range(5)], rel=1e-4
    )
    assert asked == [(0.25, False, (4, 1, 28, 28), 1.0)] * 5


def test_main_measures_test_digits_and_judges_samples(monkeypatch, tmp_path):
    """Training sees training digits only; the bound is of test digits; the judge sees samples from the prior."""
    kinds = {
        "train": torch.zeros(70, 1, 28, 28).byte(),
        "test": torch.full((70, 1, 28, 28), 255).byte(),
    }
    monkeypatch.setattr(data, "mnist", lambda split: (kinds[split], torch.arange(70) % 10))
    monkeypatch.setattr(
        quality,
        "scorer",
        lambda device: lambda images: judged.append(images) or {"recognised": 0.5},
    )
    monkeypatch.setattr(vae, "draw", lambda folder, cfg, *rest: drawn.append(rest))
    judged, drawn, trained, measured = [], [], [], []
    train, measure = vae.train, vae.measure

    def watched(model, optimizer, images, *rest):
        trained.append((images, rest[-1]))
        yield from train(model, optimizer, images, *rest)

    monkeypatch.setattr(vae, "train", watched)
    monkeypatch.setattr(vae, "measure", lambda model, x: measured.append(x) or measure(model, x))
    small = dict(steps=1, batch=8, channels=(4, 8), hidden=16, samples=64, latents=(2, 3))
    metrics = vae.main(vae.Config(**small, out=str(tmp_path)))
    assert all((images == 0).all() for images, _ in trained) and all(
        (x == 1).all() for x in measured
    )
    names = ["2-d", "3-d", "no noise", "no KL"]
    assert [variant for _, variant in trained] == list(vae.variants(vae.Config(**small)).values())
    _, models, codes, samples, test, labels = drawn[0]
    assert (
        list(models) == names
        and codes["3-d"].shape == (70, 3)
        and test.min() == 1
        and labels[3] == 3
    )
    for images, name in zip(judged, names):
        assert torch.equal(images, samples[name]) and images.shape == (64, 1, 28, 28)
        assert metrics[f"{name}: elbo"] == pytest.approx(
            -metrics[f"{name}: reconstruction"] - metrics[f"{name}: kl"]
        )
    loaded = vae.load(tmp_path / "model.safetensors")
    for name in names:
        assert same(loaded[name].state_dict(), models[name].state_dict())


def test_figures_show_the_largest_model_and_every_ablation(monkeypatch, tmp_path):
    """Samples are of the last of --latents, the map of the first; clouds of the first and of what was left out."""
    drawn = {}
    for name in ("grid", "rows", "panels", "curves"):
        monkeypatch.setattr(
            figures, name, lambda path, content, *_, **__: drawn.update({path.name: content})
        )
    cfg = vae.Config(latents=(2, 3), channels=(4, 8), hidden=16)
    models = {
        name: vae.VAE(v.latent, cfg.channels, cfg.hidden).requires_grad_(False)
        for name, v in vae.variants(cfg).items()
    }
    test, labels = torch.rand(40, 1, 28, 28) * 2 - 1, torch.arange(40) % 10
    codes = {name: torch.randn(40, model.latent) for name, model in models.items()}
    samples = {name: torch.full((64, 1, 28, 28), float(i)) for i, name in enumerate(models)}
    curves = {
        name: {"reconstruction": [2.0 * i], "kl": [3.0 * i]} for i, name in enumerate(models, 1)
    }
    latent_figures.draw(tmp_path, cfg, curves, models, codes, samples, test, labels)
    assert (drawn["samples.png"] == 1).all()
    assert torch.equal(
        drawn["map.png"][0]["after training"], latent_figures.latent_grid(models["2-d"])
    )
    clouds, below = drawn["latents.png"]
    assert list(clouds) == [
        f"{name}: codes of test digits" for name in ("2-d", "no noise", "no KL")
    ]
    assert [float(x.mean()) for x in below.values()] == [0.0, 2.0, 3.0]
    assert drawn["loss.png"] == {"2-d": [5.0], "3-d": [10.0]} and drawn["kl.png"]["no KL"] == [12.0]
    back = drawn["reconstructions.png"]
    torch.testing.assert_close(back["no KL"], vae.paint(models["no KL"], codes["no KL"][:10]))


@pytest.fixture(scope="module")
def trained():
    """{variant: losses, what it measures on 500 test digits, their codes} after some steps on real digits."""
    cfg, results = (
        vae.Config(latents=(2,), steps=200, batch=32, channels=(8, 8), hidden=64, lr=4e-3),
        {},
    )
    images, test = data.mnist("train")[0], data.to_float(data.mnist("test")[0][:500])
    for name, variant in vae.variants(cfg).items():
        curves = {"reconstruction": [], "kl": []}
        torch.manual_seed(0)
        model = vae.VAE(variant.latent, cfg.channels, cfg.hidden)
        optimizer = torch.optim.Adam(model.parameters(), cfg.lr)
        losses = list(vae.train(model, optimizer, images, cfg, curves, variant))
        assert len(losses) == 200 == len(curves["kl"]) and all(math.isfinite(x) for x in losses)
        results[name] = losses, *vae.measure(model, test)
    return results


def test_learning_and_what_each_part_is_for(trained):
    """The bound improves; without KL the codes leave the prior, without noise the code is a free point."""
    losses, whole, codes = trained["2-d"]
    assert losses[0] > 500 and sum(losses[-10:]) / 10 < 200  # grey everywhere costs 784 ln 2 = 543
    assert (
        whole["elbo"] == pytest.approx(-whole["reconstruction"] - whole["kl"])
        and -200 < whole["elbo"] < -120
    )
    _, no_kl, far = trained["no KL"]
    assert no_kl["kl"] > 2 * whole["kl"] and far.abs().max() > 2 * codes.abs().max()
    _, no_noise, _ = trained["no noise"]
    assert no_noise["elbo"] < whole["elbo"] - 20


def test_command_writes_what_it_promises(tmp_path):
    done = command(*TINY, "--out", str(tmp_path / "a"), script="vae")
    assert done.returncode == 0, done.stderr
    promised = "config.json metrics.json model.safetensors samples.png reconstructions.png map.png interpolation.png"
    for name in f"{promised} latents.png reconstruction.png kl.png loss.png".split():
        assert (tmp_path / "a" / name).stat().st_size > 0 and name in done.stdout
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    elbo = -metrics["2-d: reconstruction"] - metrics["2-d: kl"]
    assert metrics["2-d: elbo"] == pytest.approx(elbo, rel=1e-5)
    assert {
        f"2-d: {k}" for k in ("recognised", "recognised_error", "frechet", "digits_seen")
    } <= metrics.keys()
    assert list(vae.load(tmp_path / "a" / "model.safetensors")) == ["2-d"]


def test_resume_goes_on_bit_for_bit(tmp_path):
    """Broken off after two of six steps, then resumed: the same weights and curves as in one go."""
    cfg = vae.Config(latents=(2,), steps=6, batch=8, channels=(4, 8), hidden=16, save_every=2)
    images, (whole, broken) = (
        data.mnist("train")[0][:100],
        (tmp_path / "whole", tmp_path / "broken"),
    )
    variant = vae.variants(cfg)["2-d"]
    model, curves = vae.fit("2-d", variant, images, cfg, whole, torch.device("cpu"))

    def interrupted(*arguments):
        yield from (loss for loss, _ in zip(train(*arguments), range(3)))
        raise KeyboardInterrupt

    train, vae.train = vae.train, interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            vae.fit("2-d", variant, images, cfg, broken, torch.device("cpu"))
    finally:
        vae.train = train
    state = checkpoint.read(broken / "state_2-d.safetensors")[0]
    assert not torch.equal(
        state["state.model.encoder.0.weight"], model.state_dict()["encoder.0.weight"]
    )
    resumed = vae.Config(**{**vars(cfg), "resume": True})
    other, again = vae.fit("2-d", variant, images, resumed, broken, torch.device("cpu"))
    assert again == curves and len(curves["kl"]) == 6
    for a, b in zip(model.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b)


def test_weights_of_another_network_are_refused():
    with pytest.raises(UserError, match="no weights of models/vae.py"):
        vae.load(quality.WEIGHTS)


@pytest.mark.parametrize(
    "flags, word",
    [
        ({"latents": (0,)}, "--latents"), ({"latents": ()}, "--latents"),
        ({"steps": -1}, "--steps"), ({"lr": -1.0}, "--lr"), ({"lr": math.nan}, "--lr"),
        ({"save_every": -1}, "--save-every"),
        ({"samples": 9}, "--samples"),
        ({"batch": 0}, "--batch"), ({"device": "abacus"}, "--device"), ({"resume": True}, "no checkpoint"),
    ],
)  # fmt: skip
def test_bad_flags(tmp_path, flags, word):
    with pytest.raises(UserError, match=word) as error:
        vae.main(vae.Config(**{"out": str(tmp_path / "out"), "steps": 1, "latents": (2,), **flags}))
    assert "\n" not in str(error.value)


def test_damaged_checkpoint_and_blocked_folder(tmp_path, monkeypatch, capsys):
    state = tmp_path / "state_2-d.safetensors"
    state.write_bytes(b"\x00" * 100)
    assert "not a whole safetensors file" in one_line(
        vae, [*TINY, "--resume", "--out", str(tmp_path)], monkeypatch, capsys
    )
    assert state.read_bytes() == b"\x00" * 100
    with pytest.raises(UserError, match="--out"):
        vae.main(vae.Config(out=str(state / "below")))
