"""models/quality.py: the Frechet distance against scipy and torchmetrics; a classifier that knows digits from noise."""

import numpy as np
import pytest
import torch

from models import prompt_alignment, quality
from tests.models.test_ddpm import one_line
from utils import checkpoint, data, figures
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
    return torch.randn(n, d, generator=rng) @ torch.randn(d, d, generator=rng) + torch.randn(
        d, generator=rng
    )


def test_frechet_distance_is_scipy_s_and_torchmetrics_s(parity):
    import scipy.linalg
    from torchmetrics.image.fid import _compute_fid

    x, y = features(seed=1), features(seed=2)
    ours = torch.tensor(quality.frechet_distance(x, y), dtype=torch.float64)
    cx, cy = (np.cov(a.double().numpy(), rowvar=False) for a in (x, y))
    root = scipy.linalg.sqrtm(cx @ cy).real
    theirs = ((x - y).double().mean(0) ** 2).sum() + np.trace(cx + cy - 2 * root)
    parity("Quality", "quality.frechet_distance", "scipy.linalg.sqrtm", ours, theirs, atol=1e-6)
    moments = [m for a in (x.double(), y.double()) for m in (a.mean(0), torch.cov(a.T))]
    parity(
        "Quality",
        "quality.frechet_distance",
        "torchmetrics.image.fid",
        ours,
        _compute_fid(*moments),
        atol=1e-6,
    )


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
    # Features that never fire: a singular covariance
    flat = x * torch.tensor([1.0] * 6 + [0.0] * 6)
    assert quality.frechet_distance(flat, flat) == pytest.approx(0, abs=1e-8)


def test_recognised_counts_confident_images():
    probabilities = torch.tensor([[0.95, 0.05], [0.5, 0.5], [0.1, 0.9], [0.2, 0.8]])
    assert quality.recognised(probabilities) == 0.5
    assert quality.recognised(probabilities, 0.8) == 0.75


def test_standard_error_is_that_of_a_binomial_share():
    """0.656 of 64: the spread of the share over many draws of 64 coins."""
    assert quality.standard_error(0.656, 64) == pytest.approx(0.0594, abs=1e-4)
    share = torch.bernoulli(torch.full((20_000, 64), 0.656)).mean(1)
    assert quality.standard_error(0.656, 64) == pytest.approx(float(share.std()), rel=0.03)


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
    # [0, 1] where [-1, 1] is meant
    grey = quality.score(model, (x[:2000] + 1) / 2, features[5000:])
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


class Sure(torch.nn.Module):
    """A classifier for training tests: pictures are grey values that name their class, and it believes them.

    Its logit for that class is `margin`, so a digit with its own label costs nearly nothing; it notes what it saw.
    """

    def __init__(self, margin=30.0):
        super().__init__()
        self.margin, self.seen = torch.nn.Parameter(torch.tensor(margin)), []

    def forward(self, x):
        self.seen.append(x.detach())
        named = data.to_uint8(x)[:, 0, 14, 14].long() // 20
        return torch.nn.functional.one_hot(named, 10) * self.margin


def greys(n):
    labels = torch.arange(n) % 10
    return (labels * 20).to(torch.uint8).view(-1, 1, 1, 1).expand(
        -1, 1, 28, 28
    ).contiguous(), labels


def test_corrupted_digits_lose_their_label(monkeypatch):
    """An eighth of a batch costs 0.9 of the margin, for nine tenths of the answer lie elsewhere; the rest is free."""
    monkeypatch.setattr(quality, "not_digits", lambda x: x)  # so that the label could still be read
    images, labels = greys(64)
    losses = list(
        quality.train(Sure(), images, labels, quality.Config(epochs=1, batch=16, lr=1e-9))
    )
    assert losses == pytest.approx([0.9 * 30 / 8] * 4, rel=1e-4)


def test_an_eighth_of_every_batch_is_no_digit(monkeypatch):
    """The classifier is shown what `not_digits` makes of it, and digits for the rest."""
    monkeypatch.setattr(quality, "not_digits", lambda x: torch.full_like(x, 0.5))
    model, (images, labels) = Sure(), greys(64)
    images[:] = 0
    list(quality.train(model, images, labels, quality.Config(epochs=2, batch=16)))
    for x in model.seen:
        assert (x[:2] == 0.5).all() and (x[2:] == -1).all() and len(x) == 16
    assert len(model.seen) == 8


def test_training_sees_every_digit_once_an_epoch_in_a_new_order_and_moved(monkeypatch):
    monkeypatch.setattr(quality, "not_digits", lambda x: x)
    images, labels = greys(32)
    images[:] = 0
    images[:, 0, 10, 10] = (torch.arange(32) * 8).to(torch.uint8)  # a dot that names the picture
    images[:, 0, 14, 14] = 0
    model = Sure()
    list(quality.train(model, images, labels, quality.Config(epochs=8, batch=16)))
    orders, moves = [], set()
    for x in model.seen:
        dots = data.to_uint8(x)
        assert (dots.flatten(1) > 0).sum() == len(x) - int((dots.flatten(1).amax(1) == 0).sum())
        orders.append((dots.flatten(1).amax(1) // 8).tolist())
        brightest = dots.flatten(1).amax(0).argmax()
        moves.add((int(brightest) // 28 - 10, int(brightest) % 28 - 10))
    epochs = [a + b for a, b in zip(orders[::2], orders[1::2])]
    assert all(sorted(epoch) == list(range(32)) for epoch in epochs) and epochs[0] != epochs[1]
    assert len(moves) > 4 and all(-2 <= m <= 2 for move in moves for m in move)


def test_learning_rate_makes_one_cycle(monkeypatch):
    """Up from a small one to the peak, and down to nearly nothing at the last step."""
    rates, step = [], torch.optim.AdamW.step

    def watched(optimizer, *args, **kw):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kw)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    monkeypatch.setattr(quality, "not_digits", lambda x: x)
    images, labels = greys(320)
    list(quality.train(Sure(), images, labels, quality.Config(epochs=2, batch=16, lr=0.5)))
    assert len(rates) == 40 and max(rates) == pytest.approx(0.5, rel=0.02)
    assert rates[0] < 0.05 and rates[-1] < 0.01 and 5 < rates.index(max(rates)) < 20


def test_the_floor_is_of_training_digits_against_test_digits(monkeypatch):
    """Were it of test digits, spoiled training digits would not show in it; scores are against test digits, too."""
    images, _ = data.mnist("test")
    kinds = {"test": images[:600], "train": 255 - images[600:1000]}
    monkeypatch.setattr(data, "mnist", lambda split: (kinds[split], None))
    judge = quality.scorer()
    result = judge(data.to_float(images[:300]))
    model = quality.load()
    real, negatives = (
        quality.evaluate(model, data.to_float(kinds[k]))[0] for k in ("test", "train")
    )
    pick = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:300]
    assert result["frechet_of_real"] == pytest.approx(
        quality.frechet_distance(negatives[pick], real), rel=1e-4
    )
    assert result["frechet_of_real"] > 10 * result["frechet"]
    expected = quality.score(model, data.to_float(images[:300]), real)
    assert {k: result[k] for k in expected} == pytest.approx(expected, rel=1e-4)
    assert result["recognised_error"] == quality.standard_error(result["recognised"], 300)


def test_main_spoils_training_digits_and_compares_with_test_digits(monkeypatch, tmp_path):
    """And measures the accuracy on test digits with the classifier that it just trained."""
    images, labels = data.mnist("test")
    kinds = {"test": (images[:50], labels[:50]), "train": (images[50:100], labels[50:100])}
    monkeypatch.setattr(data, "mnist", lambda split: kinds[split])
    seen, drawn, trained = {}, {}, []
    monkeypatch.setattr(
        quality, "train", lambda model, *args: trained.append((model, *args)) or iter([1.0])
    )
    monkeypatch.setattr(
        quality,
        "score",
        lambda model, x, real: seen.update({len(seen): (model, x, real)}) or {"frechet": 1.0},
    )
    for name in ("rows", "curves"):
        monkeypatch.setattr(
            figures, name, lambda path, content, *_, **__: drawn.update({path.name: content})
        )
    metrics = quality.main(quality.Config(out=str(tmp_path)))
    model, shown, names, _ = trained[0]
    assert torch.equal(shown, kinds["train"][0]) and torch.equal(names, kinds["train"][1])
    features, probabilities = quality.evaluate(model, data.to_float(kinds["test"][0]))
    right = (probabilities.argmax(-1) == kinds["test"][1]).float().mean()
    assert metrics["test_accuracy"] == pytest.approx(float(right))
    parts = dict(zip(drawn["spoiled.png"], seen.values()))
    assert all(m is model and torch.equal(real, features) for m, _, real in parts.values())
    sums = data.to_float(kinds["train"][0]).sum((1, 2, 3)).sort().values
    torch.testing.assert_close(parts["real"][1].sum((1, 2, 3)).sort().values, sums)
    assert torch.equal(parts["upside down"][1], parts["real"][1].flip(2))
    assert len(parts["one digit only"][1]) == int((kinds["train"][1] == 1).sum())
    apart = [
        float((parts[f"noise {s}"][1] - parts["real"][1]).abs().mean())
        for s in ("0.1", "0.3", "1.0")
    ]
    assert apart == sorted(apart) and apart[0] < 0.1 < apart[2]
    written = checkpoint.read(tmp_path / "model.safetensors")[0]
    assert all(torch.equal(written[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "args",
    [
        ["--epochs", "0"],
        ["--batch", "7"],
        ["--batch", "60001"],
        ["--lr", "-1"],
        ["--lr", "nan"],
        ["--seed", "-1"],
    ],
)
def test_bad_input(args, tmp_path, monkeypatch, capsys):
    printed = one_line(quality, [*args, "--out", str(tmp_path / "x")], monkeypatch, capsys)
    assert args[0] in printed and not (tmp_path / "x").exists()


def test_hue_names_the_colour_of_most_of_a_picture():
    picture = torch.ones(3, 10, 10)
    assert prompt_alignment.hue(picture) == ""  # white
    picture[:, 3:] = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    assert prompt_alignment.hue(picture) == "red"
    picture[:, 3:] = torch.tensor([1.0, -1.0, -0.8])[:, None, None]  # 0.98 of the circle, next to 0
    assert prompt_alignment.hue(picture) == "red"
    picture[:, 5:] = torch.tensor([-1.0, 1.0, -1.0])[:, None, None]
    assert prompt_alignment.hue(picture) == "green"


def test_retrieval_rank_counts_who_is_nearer():
    features = torch.eye(4)
    drawn = torch.tensor([[0.9, 0.3, 0.2, 0.1], [0.9, 0.3, 0.2, 0.1]])
    assert prompt_alignment.retrieval_rank(drawn, features, torch.tensor([0, 2])).tolist() == [0, 2]


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(4, 3, 28, 28), torch.zeros(4, 1, 32, 32), torch.full((4, 1, 28, 28), torch.nan)],
)
def test_bad_images(judged, bad):
    with pytest.raises(UserError):
        quality.score(judged[0], bad, judged[3])
