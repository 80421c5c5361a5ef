"""The autoencoder is diffusers' AutoencoderKL; its losses have known answers; the script as a command."""

import math

import pytest
import torch

from models import adversarial_loss, autoencoder, ddpm, perceptual_loss
from models.autoencoder import Autoencoder
from tests.conftest import gradients
from tests.models.test_ddpm import command, one_line, part_of, same
from utils import checkpoint, data, figures, pretrained


def pair():
    from diffusers import AutoencoderKL

    ours = Autoencoder((8, 16, 16), latent=4)
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=8,
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())  # every name and shape fits
    return ours, theirs


def test_autoencoder_equals_diffusers(parity):
    ours, theirs = pair()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    (mu, logvar), other = ours.encode(x), theirs.encode(x).latent_dist
    parity(
        "Autoencoder",
        "Autoencoder.encode",
        "diffusers.AutoencoderKL",
        [mu, logvar],
        [other.mean, other.logvar],
    )
    a, b = ours.decode(mu), theirs.decode(other.mean).sample
    parity("Autoencoder", "Autoencoder.decode", "diffusers.AutoencoderKL", a, b)
    both = gradients(ours, a), gradients(theirs, b)
    parity("Autoencoder", "Autoencoder, gradients", "diffusers.AutoencoderKL", *both, atol=2e-4)


def test_kl_equals_diffusers(parity):
    ours, theirs = pair()
    posterior = theirs.encode(torch.rand(2, 3, 32, 32)).latent_dist
    mine = autoencoder.kl_divergence(posterior.mean.flatten(1), posterior.logvar.flatten(1))
    parity(
        "Autoencoder",
        "vae.kl_divergence",
        "diffusers DiagonalGaussianDistribution.kl",
        mine,
        posterior.kl(),
    )


def test_perceptual_distance_sees_what_l1_does_not():
    """Half a pixel's worth of blur and a little more brightness: the same L1, but a classifier minds the blur."""
    x = data.to_float(data.emoji(64)[0][:16])
    classifier = pretrained.efficientnet()
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    brighter = x + (blurred - x).abs().mean()
    distance = [
        float(perceptual_loss.perceptual_distance(classifier, x, y)) for y in (x, blurred, brighter)
    ]
    assert distance[0] < 1e-6 and distance[1] > 2 * distance[2] > 0


def test_features_are_compared_as_unit_vectors(monkeypatch):
    """Three times the same features is no distance; at a right angle it is 2, at each place, in each map."""
    monkeypatch.setattr(perceptual_loss, "features", lambda classifier, x: [x, 5 * x])
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    a[:, 0], b[:, 1] = 0.3, 7.0
    assert float(perceptual_loss.perceptual_distance(None, a, 3 * a)) < 1e-6
    assert float(perceptual_loss.perceptual_distance(None, a, b)) == pytest.approx(4.0)  # two maps
    b[:, :, 2:] = a[:, :, 2:]  # half of the places are alike
    assert float(perceptual_loss.perceptual_distance(None, a, b)) == pytest.approx(2.0)


def test_features_are_those_of_the_stem_and_of_strides_4_8_16():
    maps = perceptual_loss.features(pretrained.efficientnet(), torch.zeros(1, 3, 64, 64))
    assert [m.shape[-1] for m in maps] == [32, 16, 8, 4] and float(maps[0].min()) >= 0


@pytest.fixture
def no_features(monkeypatch):
    """The loss without the classifier, which takes most of the time."""
    monkeypatch.setattr(
        autoencoder, "perceptual_distance", lambda classifier, x, y: (x - y).square().mean()
    )
    monkeypatch.setattr(pretrained, "efficientnet", lambda device: None)


class Blank(torch.nn.Module):
    """An autoencoder of three numbers: it answers with one colour, and has one mean and one log-variance."""

    def __init__(self, colour=0.25, mu=2.0, logvar=0.5):
        super().__init__()
        self.colour, self.mu, self.logvar = (
            torch.nn.Parameter(torch.tensor(x)) for x in (colour, mu, logvar)
        )
        self.decoder = torch.nn.Module()
        self.decoder.conv_out = torch.nn.Module()
        self.decoder.conv_out.weight = self.colour

    def forward(self, x):
        latent = torch.ones(len(x), 4, 2, 2)
        return self.colour.expand_as(x), self.mu * latent, self.logvar * latent


class Brightness(torch.nn.Module):
    """A discriminator that takes what is bright for real, with a weight to learn."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, x):
        return self.weight * x.mean((1, 2, 3))


def weighted(**weights):
    return autoencoder.Config(**{"perceptual": 0.0, "kl": 0.0, "adversarial": 0.0} | weights)


def test_loss_is_the_sum_of_its_weighted_parts(monkeypatch):
    """L1 of 0.75; a perceptual distance of 4; the KL of N(2, e^0.5) of 16 latents, per number of the image."""
    monkeypatch.setattr(
        autoencoder, "perceptual_distance", lambda classifier, x, y: 16 * (x - y).mean() ** 2
    )
    model, x = Blank(), torch.full((2, 3, 8, 8), -0.25)
    value, y = autoencoder.loss(model, x, None, weighted())
    assert float(value.detach()) == pytest.approx(0.5) and (y == 0.25).all()
    assert float(autoencoder.loss(model, x, None, weighted(perceptual=0.1))[0]) == pytest.approx(
        0.5 + 0.1 * 4
    )
    kl = 16 * (4 + math.exp(0.5) - 0.5 - 1) / 2 / (3 * 8 * 8)
    value = autoencoder.loss(model, x, None, weighted(kl=2.0))[0]
    assert float(value) == pytest.approx(0.5 + 2 * kl)
    value.backward()
    assert float(model.mu.grad) > 0 and float(model.logvar.grad) > 0  # less is nearer to N(0, 1)


def test_generator_paints_what_the_discriminator_takes_for_real(no_features):
    """The adversarial part pulls the colour up, as hard as its weight times the pull of the reconstruction."""
    x, slopes = torch.full((2, 3, 8, 8), -0.25), {}
    for adversarial in (0.0, 0.5):
        model = Blank()
        value, _ = autoencoder.loss(model, x, None, weighted(adversarial=adversarial), Brightness())
        value.backward()
        slopes[adversarial] = float(model.colour.grad)
    assert slopes[0.0] == pytest.approx(1.0) and slopes[0.5] == pytest.approx(1.0 - 0.5, abs=1e-3)


def test_discriminator_learns_real_from_painted(no_features):
    """Real pictures are white, painted ones grey: brightness must count for real, and only it is learned from them."""
    model, critic = Blank(), Brightness(0.0)
    ema = Blank().requires_grad_(False)
    optimizer, optimizer_d = (torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model, critic))
    white = torch.full((8, 3, 8, 8), 255, dtype=torch.uint8)
    cfg = weighted(steps=3, batch=4, adversarial=0.5)
    list(autoencoder.train(model, ema, optimizer, white, cfg, 0, critic, optimizer_d))
    assert float(critic.weight) == pytest.approx(3 * 1e-3 * (1 - 0.25) / 2, rel=0.01)


def test_training_steps_by_hand(no_features):
    """Rate, zeroed gradients, clipping and EMA: the colour 0.25 walks to white, 1, by the sign of L1 + 3 x square."""
    cfg = weighted(steps=6, batch=4, perceptual=3.0, lr=5.0)
    model, ema = Blank(), Blank(-7.0).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    white = torch.full((8, 3, 8, 8), 255, dtype=torch.uint8)
    colour, mean = 0.25, -7.0
    for i, value in enumerate(autoencoder.train(model, ema, optimizer, white, cfg)):
        gap = 1 - colour
        assert value == pytest.approx(abs(gap) + 3 * gap**2, rel=1e-4)
        slope = -math.copysign(1, gap) - 6 * gap
        colour -= ddpm.learning_rate(cfg, i) * max(-1.0, min(1.0, slope))
        decay = (1 + i) / (10 + i)
        mean = decay * mean + (1 - decay) * colour
        assert (model.colour.item(), ema.colour.item()) == pytest.approx((colour, mean), rel=1e-4)
    assert i == 5


def test_training_mirrors_half_of_the_pictures(no_features, monkeypatch):
    seen, loss = [], autoencoder.loss
    monkeypatch.setattr(
        autoencoder, "loss", lambda model, x, *rest: seen.append(x) or loss(model, x, *rest)
    )
    left = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    left[..., :4] = 255
    model = Blank()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    list(
        autoencoder.train(
            model, Blank().requires_grad_(False), optimizer, left, weighted(steps=40, batch=8)
        )
    )
    x = torch.cat(seen)
    mirrored = x[:, 0, 0, 0] == -1
    assert 0.35 < mirrored.float().mean() < 0.65
    assert torch.equal(
        x[mirrored].flip(3), x[~mirrored][:1].expand(int(mirrored.sum()), -1, -1, -1)
    )


def test_decoder_learns_from_noisy_latents_and_shows_means():
    """A training pass draws from the posterior; encode_all gives its mean, decode_all pictures within [-1, 1]."""
    model, x = Autoencoder((8, 16), 2), torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        first, second = model(x)[0], model(x)[0]
        assert not torch.equal(first, second)
        bytes_ = data.to_uint8(x)
        z = autoencoder.encode_all(model, bytes_, batch=2)
        with torch.autocast("cpu", torch.bfloat16):
            mu, _ = model.encode(data.to_float(bytes_))
        torch.testing.assert_close(z, mu.float(), atol=0.02, rtol=0.02)
        pictures = autoencoder.decode_all(model, 100 * z, batch=2)
        assert pictures.shape == x.shape and pictures.abs().max() == 1


def test_main_trains_on_all_but_the_held_out_and_writes_the_ema(no_features, monkeypatch, tmp_path):
    """The scale is that of training latents under the written weights; what is shown and measured was held out."""
    images, captions, names = data.emoji(64)
    captions, images = captions[:60], images[:60].clone()
    held_out = torch.tensor(autoencoder.split(captions))
    assert 0 < held_out.sum() < 20
    images[held_out] = 0  # black; no training picture is
    monkeypatch.setattr(data, "emoji", lambda size: (images, captions, names[:60]))
    drawn, trained = {}, []
    for name in ("rows", "curves"):
        monkeypatch.setattr(
            figures, name, lambda path, content, *_, **__: drawn.update({path.name: content})
        )
    train = autoencoder.train

    def watched(model, ema, optimizer, pictures, *rest, **critic):
        trained.append(pictures)
        yield from train(model, ema, optimizer, pictures, *rest, **critic)

    monkeypatch.setattr(autoencoder, "train", watched)
    cfg = autoencoder.Config(
        steps=2, batch=4, channels=(8, 8, 8), latent=2, lr=0.1, out=str(tmp_path)
    )
    metrics = autoencoder.main(cfg)
    assert torch.equal(trained[0], images[~held_out])
    state = checkpoint.read(tmp_path / "state.safetensors")[0]
    written, meta = checkpoint.read(tmp_path / "model.safetensors")
    assert same(written, part_of(state, "ema")) and not same(written, part_of(state, "model"))
    model, scale = autoencoder.load(tmp_path / "model.safetensors")
    latents = autoencoder.encode_all(model, images[~held_out])
    assert (
        float((latents * scale).std()) == pytest.approx(1, abs=1e-4) and metrics["scale"] == scale
    )
    again = autoencoder.decode_all(model, autoencoder.encode_all(model, images[held_out]))
    assert metrics["held_out_l1"] == pytest.approx(float((again + 1).abs().mean()), rel=1e-4)
    psnr = -10 * torch.log10(((again + 1) / 2).square().mean((1, 2, 3))).mean()
    assert metrics["held_out_psnr"] == pytest.approx(float(psnr), rel=1e-4)
    assert (drawn["reconstructions.png"]["held out"] == -1).all()


def test_adaptive_weight_balances_the_gradients():
    """Esser et al., Eq. 7: weighted so, the adversarial loss pulls at the last layer as hard as the reconstruction."""
    w = torch.randn(5, requires_grad=True)
    a, b = (w * 3).sum(), (w**2).sum() * 40
    weight = adversarial_loss.adaptive_weight(a, b, w)
    grad = torch.autograd.grad(weight * b, w)[0]
    torch.testing.assert_close(grad.norm(), torch.tensor(3 * 5**0.5), rtol=1e-3, atol=0)


def test_discriminator_loss_is_hinge():
    assert (
        float(adversarial_loss.discriminator_loss(torch.tensor([2.0]), torch.tensor([-2.0]))) == 0
    )
    assert float(adversarial_loss.discriminator_loss(torch.tensor([0.0]), torch.tensor([0.0]))) == 1
    assert adversarial_loss.Discriminator()(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 8, 8)


def test_scaled_latents_have_variance_one():
    z = torch.randn(50, 4, 8, 8) * 7
    assert abs(float((z * autoencoder.scale_factor(z)).std()) - 1) < 1e-5


def test_split_is_a_tenth_and_depends_on_the_words_only():
    captions = data.emoji(64)[1]
    held_out = autoencoder.split(captions)
    assert 0.07 < sum(held_out) / len(captions) < 0.13
    assert autoencoder.split(captions[::-1]) == held_out[::-1]


def test_command(tmp_path):
    args = (
        "--steps 2 --batch 4 --channels 8 8 8 8 --latent 4 --adversarial 0.5 --save-every 2".split()
    )
    done = command(*args, "--out", str(tmp_path / "a"), script="autoencoder")
    assert done.returncode == 0, done.stderr
    for name in (
        "model.safetensors",
        "reconstructions.png",
        "latents.png",
        "loss.png",
        "metrics.json",
    ):
        assert (tmp_path / "a" / name).stat().st_size > 0
    model, scale = autoencoder.load(tmp_path / "a" / "model.safetensors")
    assert model.encode(torch.zeros(1, 3, 64, 64))[0].shape == (1, 4, 8, 8) and scale > 0


def test_shipped_weights_keep_what_a_picture_shows():
    model, _ = autoencoder.load(autoencoder.WEIGHTS)
    images, captions, _ = data.emoji(64)
    unseen = images[torch.tensor(autoencoder.split(captions))][::2]
    again = autoencoder.decode_all(model, autoencoder.encode_all(model, unseen))
    assert float((again - data.to_float(unseen)).abs().mean()) < 0.06  # of a range of 2


@pytest.mark.parametrize(
    "args",
    [
        ["--steps", "0"], ["--channels", "12"], ["--channels"], ["--channels", *["8"] * 7], ["--latent", "0"],
        ["--kl", "-1"], ["--kl", "nan"], ["--perceptual", "inf"], ["--lr", "nan"], ["--save-every", "-1"],
    ],
)  # fmt: skip
def test_bad_input(args, tmp_path, monkeypatch, capsys):
    printed = one_line(autoencoder, [*args, "--out", str(tmp_path / "x")], monkeypatch, capsys)
    assert args[0] in printed and not (tmp_path / "x").exists()
