"""The autoencoder is diffusers' AutoencoderKL; its losses have known answers; the script as a command."""

import pytest
import torch
from diffusers import AutoencoderKL

from models import autoencoder
from models.autoencoder import Autoencoder
from tests.conftest import gradients
from tests.test_ddpm import command
from utils import data, pretrained


def pair():
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
    parity("Autoencoder", "Autoencoder.encode", "diffusers.AutoencoderKL", [mu, logvar], [other.mean, other.logvar])
    a, b = ours.decode(mu), theirs.decode(other.mean).sample
    parity("Autoencoder", "Autoencoder.decode", "diffusers.AutoencoderKL", a, b)
    both = gradients(ours, a), gradients(theirs, b)
    parity("Autoencoder", "Autoencoder, gradients", "diffusers.AutoencoderKL", *both, atol=2e-4)


def test_kl_equals_diffusers(parity):
    ours, theirs = pair()
    posterior = theirs.encode(torch.rand(2, 3, 32, 32)).latent_dist
    mine = autoencoder.kl_divergence(posterior.mean.flatten(1), posterior.logvar.flatten(1))
    parity("Autoencoder", "vae.kl_divergence", "diffusers DiagonalGaussianDistribution.kl", mine, posterior.kl())


def test_perceptual_distance_sees_what_l1_does_not():
    """Half a pixel's worth of blur and a little more brightness: the same L1, but a classifier minds the blur."""
    x = data.to_float(data.emoji(64)[0][:16])
    classifier = pretrained.efficientnet()
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    brighter = x + (blurred - x).abs().mean()
    distance = [float(autoencoder.perceptual_distance(classifier, x, y)) for y in (x, blurred, brighter)]
    assert distance[0] < 1e-6 and distance[1] > 2 * distance[2] > 0


def test_adaptive_weight_balances_the_gradients():
    """Esser et al., Eq. 7: weighted so, the adversarial loss pulls at the last layer as hard as the reconstruction."""
    w = torch.randn(5, requires_grad=True)
    a, b = (w * 3).sum(), (w**2).sum() * 40
    weight = autoencoder.adaptive_weight(a, b, w)
    grad = torch.autograd.grad(weight * b, w)[0]
    torch.testing.assert_close(grad.norm(), torch.tensor(3 * 5**0.5), rtol=1e-3, atol=0)


def test_discriminator_loss_is_hinge():
    assert float(autoencoder.discriminator_loss(torch.tensor([2.0]), torch.tensor([-2.0]))) == 0
    assert float(autoencoder.discriminator_loss(torch.tensor([0.0]), torch.tensor([0.0]))) == 1
    assert autoencoder.Discriminator()(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 8, 8)


def test_scaled_latents_have_variance_one():
    z = torch.randn(50, 4, 8, 8) * 7
    assert abs(float((z * autoencoder.scale_factor(z)).std()) - 1) < 1e-5


def test_split_is_a_tenth_and_depends_on_the_words_only():
    captions = data.emoji(64)[1]
    held_out = autoencoder.split(captions)
    assert 0.07 < sum(held_out) / len(captions) < 0.13
    assert autoencoder.split(captions[::-1]) == held_out[::-1]


def test_command(tmp_path):
    args = "--steps 4 --batch 4 --channels 8 16 16 16 --latent 4 --adversarial 0.5 --save-every 2".split()
    done = command(*args, "--out", str(tmp_path / "a"), script="autoencoder")
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "reconstructions.png", "latents.png", "loss.png", "metrics.json"):
        assert (tmp_path / "a" / name).stat().st_size > 0
    model, scale = autoencoder.load(tmp_path / "a" / "model.safetensors")
    assert model.encode(torch.zeros(1, 3, 64, 64))[0].shape == (1, 4, 8, 8) and scale > 0


def test_shipped_weights_keep_what_a_picture_shows():
    model, _ = autoencoder.load(autoencoder.WEIGHTS)
    images, captions, _ = data.emoji(64)
    unseen = images[torch.tensor(autoencoder.split(captions))]
    again = autoencoder.decode_all(model, autoencoder.encode_all(model, unseen))
    assert float((again - data.to_float(unseen)).abs().mean()) < 0.06  # of a range of 2


@pytest.mark.parametrize("args", [["--steps", "0"], ["--channels", "12"], ["--latent", "0"], ["--kl", "-1"]])
def test_bad_input(args, tmp_path):
    done = command(*args, "--out", str(tmp_path / "x"), script="autoencoder")
    assert done.returncode == 2 and args[0] in done.stderr and "Traceback" not in done.stderr, done.stderr
