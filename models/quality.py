"""Metrics of generated digits: Frechet distance of classifier features, and the fraction that a classifier recognises.

Heusel et al. 2017, arXiv:1706.08500 (the FID): pretend that the features of real and of generated images are Gaussian,
and measure the distance of the two Gaussians. Theirs are Inception features of photographs; digits get features of
their own, from a classifier trained on MNIST by this script and shipped with the project. The second number asks the
same classifier how many samples it takes for a digit with a confidence of at least 0.9.

Shapes: B or N images, D = 64 features, K = 10 classes.

    python models/quality.py                # train the classifier, then score real digits and corrupted ones
    python models/quality.py --pretrained   # only the scores
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from utils import checkpoint, data, figures, run

WEIGHTS = Path(__file__).parent / "weights" / "quality.safetensors"


@dataclass(frozen=True)
class Config:
    """Train the classifier that scores generated digits, and try the scores on real and corrupted digits."""

    epochs: int = 4  # passes over the 60 000 training digits
    batch: int = 128  # images per step
    lr: float = 2e-3  # peak learning rate of AdamW; one cycle up and down
    pretrained: bool = False  # use the shipped classifier and skip the training
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/quality"  # where the results go


class Classifier(nn.Module):
    """Three convolutions, two linear layers: images (B, 1, 28, 28) in [-1, 1] -> features (B, 64) -> logits (B, 10)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 7 * 7, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def features(self, x):
        """(B, 1, 28, 28) in [-1, 1] -> (B, 64)."""
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


def frechet_distance(x, y):
    """|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of features (N, D) and (M, D). Heusel et al., Eq. 6.

    The trace of the root is the sum of the roots of the eigenvalues of C_x C_y, taken here from the symmetric
    C_x^(1/2) C_y C_x^(1/2), which has the same ones and no imaginary parts.
    """
    x = x.double()
    y = y.double()
    # means and covariances of the two Gaussians
    mean = (x.mean(0) - y.mean(0)).square().sum()
    cx = torch.cov(x.T)
    cy = torch.cov(y.T)
    # trace of the root of their product
    value, vector = torch.linalg.eigh(cx)
    root = vector * value.clamp(min=0).sqrt() @ vector.T
    trace_root = torch.linalg.eigvalsh(root @ cy @ root).clamp(min=0).sqrt().sum()
    return float(mean + cx.trace() + cy.trace() - 2 * trace_root)


@torch.no_grad()
def evaluate(model, images, batch=500):
    """Images (N, 1, 28, 28) in [-1, 1] -> features (N, 64), probabilities (N, 10)."""
    model.eval()
    device = next(model.parameters()).device
    features = torch.cat([model.features(x.to(device)) for x in images.split(batch)])
    probabilities = model.head(features).softmax(-1)
    return features.cpu(), probabilities.cpu()


def recognised(probabilities, confidence=0.9):
    """Share of images, by (N, K) class probabilities, that the classifier takes for some digit with this confidence."""
    return float((probabilities.max(-1).values >= confidence).float().mean())


def standard_error(share, n):
    """Standard error of a share of n independent trials: with 64 samples one near 0.7 is known to 0.06 only."""
    return math.sqrt(share * (1 - share) / n)


def score(model, images, real):
    """Both numbers for images (N, 1, 28, 28) in [-1, 1]; `real` are features of test digits, (M, 64)."""
    shape = tuple(images.shape)
    digits = shape[1:] == (1, 28, 28)
    run.check(digits, f"quality is measured on (N, 1, 28, 28) digits, not on {shape}")
    run.check(len(images) > 1, "a Frechet distance needs two images or more")
    run.check(images.isfinite().all(), "the images hold numbers that are not finite")
    features, probabilities = evaluate(model, images)
    # how evenly the digits come: the exponential of the entropy of the classes
    spread = probabilities.argmax(-1).bincount(minlength=10) / len(images)
    entropy = float(-(spread * spread.clamp(min=1e-9).log()).sum())
    share = recognised(probabilities)
    return {
        "recognised": share,
        "recognised_error": standard_error(share, len(images)),
        "frechet": frechet_distance(features, real),
        # 10 if all digits come equally often, 1 if one only
        "digits_seen": float(torch.tensor(entropy).exp()),
    }


def load(device="cpu"):
    """The shipped classifier, ready to score."""
    model = Classifier().to(device).eval().requires_grad_(False)
    tensors, _ = checkpoint.read(WEIGHTS)
    # bf16 to fp32; counters of the batch norms stay integers
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor.float()
    model.load_state_dict(tensors)
    return model


def scorer(device="cpu"):
    """A function images -> scores against all test digits, with what as many real training digits would score.

    The distance grows as samples get fewer, for real digits too: compare it with theirs, `frechet_of_real`.
    """
    model = load(device)
    test, _ = data.mnist("test")
    others, _ = data.mnist("train")
    real, _ = evaluate(model, data.to_float(test))

    def scores(images):
        # as many training digits, the same ones in every run
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))
        pick = order[: len(images)]
        features, _ = evaluate(model, data.to_float(others[pick]))
        floor = frechet_distance(features, real)
        return score(model, images.float(), real) | {"frechet_of_real": floor}

    return scores


def not_digits(x):
    """As many pictures that are no digits: noise of every strength, and digits cut into 16 squares and shuffled."""
    # digits cut into squares, in another order
    squares = rearrange(x, "b c (h p) (w q) -> b (h w) c p q", h=4, w=4)
    squares = squares[:, torch.randperm(16)]
    shuffled = rearrange(squares, "b (h w) c p q -> b c (h p) (w q)", h=4)

    def uniform():
        """A number in [0, 1) for each picture."""
        return torch.rand(len(x), 1, 1, 1, device=x.device)

    # noise of any strength around any grey; for each picture a coin says which of the two
    noise = uniform() * torch.randn_like(x) * 2 + uniform() * 2 - 1
    return torch.where(uniform() < 0.5, shuffled, noise.clamp(-1, 1))


def train(model, images, labels, cfg):
    """Cross-entropy with AdamW and one cycle of the learning rate; yields the loss of every step.

    A plain classifier is sure of everything: it calls pure noise an 8 with confidence 1. So an eighth of every batch is
    no digit at all, and the right answer there is a tenth for each class.
    """
    device = next(model.parameters()).device
    per_epoch = len(images) // cfg.batch  # steps
    steps = cfg.epochs * per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.lr, total_steps=steps)
    for step in range(steps):
        # a new order every epoch
        if step % per_epoch == 0:
            order = torch.randperm(len(images)).split(cfg.batch)
        pick = order[step % per_epoch]
        # digits moved: they stand anywhere, and generated ones are rarely centred
        shift = torch.randint(-2, 3, (2,)).tolist()
        x = data.to_float(images[pick]).roll(shift, (2, 3)).to(device)
        target = F.one_hot(labels[pick], 10).float().to(device)
        # an eighth of them corrupted
        corrupted = len(x) // 8
        x[:corrupted] = not_digits(x[:corrupted])
        target[:corrupted] = 0.1
        # forward and backward pass, then the learning rate of the next step
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        yield loss.item()


def corruptions(x, names):
    """Digits (N, 1, 28, 28) and what becomes of them: {name: images}; names: which digit each is."""
    return {
        "real": x,
        "noise 0.1": x + 0.1 * torch.randn_like(x),
        "noise 0.3": x + 0.3 * torch.randn_like(x),
        "noise 1.0": x + torch.randn_like(x),
        "blurred": F.avg_pool2d(x, 5, 1, 2),
        "upside down": x.flip(2),
        "one digit only": x[names == 1],
        "pure noise": torch.randn_like(x),
    }


def main(cfg: Config) -> dict:
    """Train or load the classifier; score real digits and digits corrupted by noise, blur and repetition."""
    run.check(cfg.epochs > 0, "--epochs must be at least 1")
    run.check(
        8 <= cfg.batch <= 60_000,
        "--batch must be 8 to 60 000: an eighth is no digit, and there are 60 000",
    )
    run.check(0 < cfg.lr < math.inf, "--lr must be above 0 and finite")
    run.seed(cfg.seed)
    folder = run.output(cfg.out, cfg)
    device = run.device(cfg.device)
    clock = run.Clock()
    metrics = {}

    # the classifier
    images, names = data.mnist("train")
    if cfg.pretrained:
        model = load(device)
    else:
        model = Classifier().to(device).train()
        steps = train(model, images, names, cfg)
        losses = list(run.progress(steps, cfg.epochs * (60_000 // cfg.batch)))
        checkpoint.write(folder / "model.safetensors", model.state_dict(), {"class": "Classifier"})
        curve = {"cross-entropy": losses}
        figures.curves(folder / "loss.png", curve, "step", "cross-entropy, nats", smooth=50)
        metrics["train_seconds"] = clock()

    # its accuracy, and features of the test digits
    test, labels = data.mnist("test")
    features, probabilities = evaluate(model, data.to_float(test))
    metrics["test_accuracy"] = float((probabilities.argmax(-1) == labels).float().mean())

    # scores of training digits, corrupted in several ways: of other writers than those of the test digits
    pick = torch.randperm(len(images))[:5000]
    kinds = corruptions(data.to_float(images[pick]), names[pick])
    for name, x in run.bar(kinds.items(), len(kinds), name="score"):
        result = score(model, x.clamp(-1, 1), features)
        metrics |= {f"{name}: {k}": v for k, v in result.items()}
    figures.rows(folder / "spoiled.png", {name: x[:10] for name, x in kinds.items()})
    return run.report(folder, metrics, then="python models/ddpm.py --pretrained")


if __name__ == "__main__":
    run.cli(main, Config)
