"""models/quality.py: the Frechet distance against scipy and torchmetrics; a classifier that knows digits from noise."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import _compute_fid

from models import quality
from utils import data
from utils.run import UserError


@pytest.fixture(scope="module")
def judged():
    """The shipped classifier, 10 000 test digits in [-1, 1], their labels, features and probabilities."""
    images, labels = data.mnist("test")
    model, x = quality.load(), data.to_float(images)
    return model, x, labels, *quality.evaluate(model, x)


def features(n=400, d=12, seed=0):
    """Correlated features with a mean of their own."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=rng) @ torch.randn(d, d, generator=rng) + torch.randn(d, generator=rng)


def test_frechet_distance_is_scipy_s_and_torchmetrics_s(parity):
    x, y = features(seed=1), features(seed=2)
    ours = torch.tensor(quality.frechet_distance(x, y), dtype=torch.float64)
    cx, cy = (np.cov(a.double().numpy(), rowvar=False) for a in (x, y))
    root = scipy.linalg.sqrtm(cx @ cy).real
    theirs = ((x - y).double().mean(0) ** 2).sum() + np.trace(cx + cy - 2 * root)
    parity("Quality", "quality.frechet_distance", "scipy.linalg.sqrtm", ours, theirs, atol=1e-6)
    moments = [m for a in (x.double(), y.double()) for m in (a.mean(0), torch.cov(a.T))]
    parity("Quality", "quality.frechet_distance", "torchmetrics.image.fid", ours, _compute_fid(*moments), atol=1e-6)


def test_frechet_distance_of_known_gaussians():
    """|m1 - m2|^2 + sum (s1 - s2)^2, when the covariances are diagonal."""
    m1, m2 = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([1.0, 1.0, 0.5])
    s1, s2 = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([2.0, 0.5, 0.5])
    x, y = (m + s * torch.randn(200_000, 3) for m, s in ((m1, s1), (m2, s2)))
    expected = float((m1 - m2).square().sum() + (s1 - s2).square().sum())
    assert quality.frechet_distance(x, y) == pytest.approx(expected, rel=0.02)


def test_frechet_distance_is_symmetric_and_zero_at_home():
    x, y = features(seed=3), features(seed=4)
    assert quality.frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    assert quality.frechet_distance(x, y) == pytest.approx(quality.frechet_distance(y, x), rel=1e-8)
    flat = x * torch.tensor([1.0] * 6 + [0.0] * 6)  # features that never fire: a singular covariance
    assert quality.frechet_distance(flat, flat) == pytest.approx(0, abs=1e-8)


def test_recognised_counts_confident_images():
    probabilities = torch.tensor([[0.95, 0.05], [0.5, 0.5], [0.1, 0.9], [0.2, 0.8]])
    assert quality.recognised(probabilities) == 0.5
    assert quality.recognised(probabilities, 0.8) == 0.75


def test_classifier_is_right(judged):
    _, _, labels, _, probabilities = judged
    assert (probabilities.argmax(-1) == labels).float().mean() >= 0.98


def test_digits_are_recognised_and_noise_is_not(judged):
    model, x, _, features, probabilities = judged
    assert quality.recognised(probabilities) >= 0.9
    for noise in (
        torch.randn(500, 1, 28, 28).clamp(-1, 1),
        torch.rand(500, 1, 28, 28) * 2 - 1,
        quality.not_digits(x[:500]),
    ):
        assert quality.recognised(quality.evaluate(model, noise)[1]) <= 0.05


def test_scores_tell_good_from_bad(judged):
    model, x, labels, features, _ = judged
    real, noisy = (
        quality.score(model, y.clamp(-1, 1), features[5000:])
        for y in (x[:2000], x[:2000] + torch.randn(2000, 1, 28, 28))
    )
    ones = quality.score(model, x[labels == 1], features[5000:])
    grey = quality.score(model, (x[:2000] + 1) / 2, features[5000:])  # [0, 1] where [-1, 1] is meant
    assert real["recognised"] > 0.9 > noisy["recognised"]
    assert 10 * real["frechet"] < min(noisy["frechet"], ones["frechet"], grey["frechet"])
    assert real["digits_seen"] > 9.5 and ones["digits_seen"] < 1.2 and ones["recognised"] > 0.9


def test_evaluate_does_not_depend_on_the_batch(judged):
    model, x, *_ = judged
    for a, b in zip(quality.evaluate(model, x[:70], 70), quality.evaluate(model, x[:70], 32)):
        torch.testing.assert_close(a, b)


def test_not_digits_keep_shape_and_range(judged):
    spoiled = quality.not_digits(judged[1][:200])
    assert spoiled.shape == (200, 1, 28, 28) and spoiled.min() >= -1 and spoiled.max() <= 1
    assert not (spoiled == judged[1][:200]).flatten(1).all(1).any()


def test_learning():
    """Eighty steps on real digits: the loss falls by half."""
    model = quality.Classifier().train()
    images, labels = data.mnist("train")
    cfg = quality.Config(epochs=1, batch=128)
    losses = list(quality.train(model, images[: 80 * 128], labels[: 80 * 128], cfg))
    assert len(losses) == 80 and sum(losses[-10:]) < sum(losses[:10]) / 2


def test_hue_names_the_colour_of_most_of_a_picture():
    picture = torch.ones(3, 10, 10)
    assert quality.hue(picture) == ""  # white
    picture[:, 3:] = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    assert quality.hue(picture) == "red"
    picture[:, 5:] = torch.tensor([-1.0, 1.0, -1.0])[:, None, None]
    assert quality.hue(picture) == "green"


def test_nearest_rank_counts_who_is_nearer():
    features = torch.eye(4)
    drawn = torch.tensor([[0.9, 0.3, 0.2, 0.1], [0.9, 0.3, 0.2, 0.1]])
    assert quality.nearest_rank(drawn, features, torch.tensor([0, 2])).tolist() == [0, 2]


@pytest.mark.parametrize(
    "bad", [torch.zeros(4, 3, 28, 28), torch.zeros(4, 1, 32, 32), torch.full((4, 1, 28, 28), torch.nan)]
)
def test_bad_images(judged, bad):
    with pytest.raises(UserError):
        quality.score(judged[0], bad, judged[3])
