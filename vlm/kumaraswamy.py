"""Kumaraswamy distribution, a stand-in for Beta whose samples have gradients; log-moments matched.

Beta is the conjugate prior of a gate's probability, but its sampler has no simple gradient.
Kumaraswamy 1980: F(x) = 1 - (1 - x^a)^b has a closed inverse, so that x = (1 - u^(1/b))^(1/a), u
uniform, is differentiable in a and b (Nalisnick and Smyth 2017, arXiv:1605.06197). Kumaraswamy(1,
b) is Beta(1, b), and Kumaraswamy(a, 1) is Beta(a, 1). Elsewhere it is another distribution:
`match_beta` finds the one with the same mean and variance of log x.

Shapes: any, broadcast. psi: digamma, psi': trigamma.

    python vlm/kumaraswamy.py            # how far from Beta the match is, and where it fails
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from utils import figures, run
from utils.run import check
from vlm.sparsity import log_beta

EULER = 0.5772156649015329
# Beta distributions whose densities are drawn
SHOWN = ((2.0, 5.0), (8.0, 2.0), (0.5, 0.5), (0.1, 0.1))


@dataclass(frozen=True)
class Config:
    """Match Kumaraswamy distributions to Beta distributions, and measure how far they are apart."""

    points: int = 25  # of each parameter of Beta, evenly on a logarithmic scale
    largest: float = 30.0  # parameter; the smallest is its inverse
    out: str = "outputs/kumaraswamy"


def log_density(x, a, b):
    """log of a b x^(a-1) (1 - x^a)^(b-1), x in 0..1."""
    return a.log() + b.log() + (a - 1) * x.log() + (b - 1) * (-(x**a)).log1p()


def sample(a, b, u=None):
    """x = (1 - u^(1/b))^(1/a), u uniform, with gradients in a and b. In log space: u^(1/b) is 1 to
    single precision for large b, and 1 - 1 would be 0."""
    if u is None:
        u = torch.rand(torch.broadcast_shapes(a.shape, b.shape))
    u = u.clamp(1e-6, 1 - 1e-6)
    # log(1 - exp(log u / b))
    return torch.exp(torch.log(-torch.expm1(u.log() / b)) / a)


def mean(a, b):
    """E[x] = b B(1 + 1/a, b)."""
    return torch.exp(b.log() + log_beta(1 + 1 / a, b))


def log_moments(a, b):
    """Mean and variance of log x: (psi(1) - psi(b+1)) / a, (psi'(1) - psi'(b+1)) / a^2. For x^a is
    Beta(1, b)."""
    one = torch.ones_like(b)
    first = torch.digamma(one) - torch.digamma(b + 1)
    second = torch.polygamma(1, one) - torch.polygamma(1, b + 1)
    return first / a, second / a**2


def beta_log_moments(alpha, beta):
    """The same of Beta: psi(alpha) - psi(alpha + beta), psi'(alpha) - psi'(alpha + beta)."""
    first = torch.digamma(alpha) - torch.digamma(alpha + beta)
    second = torch.polygamma(1, alpha) - torch.polygamma(1, alpha + beta)
    return first, second


def match_beta(alpha, beta, steps=200):
    """(a, b) of the Kumaraswamy distribution with Beta's mean and variance of log x, by bisection,
    in float64.

    variance / mean^2 does not depend on a, and falls with b from infinity to 0: log b is found
    between -40 and 40. Raises UserError for parameters that are not positive."""
    alpha, beta = alpha.double(), beta.double()
    check(bool((alpha > 0).all() and (beta > 0).all()), "parameters of Beta must be above 0")
    first, second = beta_log_moments(alpha, beta)
    wanted = second / first**2
    low = torch.full_like(wanted, -40.0)
    high = torch.full_like(wanted, 40.0)
    for _ in range(steps):
        middle = (low + high) / 2
        ours = log_moments(torch.ones_like(middle), middle.exp())
        too_high = ours[1] / ours[0] ** 2 > wanted
        # a larger b has a smaller ratio
        low = torch.where(too_high, middle, low)
        high = torch.where(too_high, high, middle)
    b = ((low + high) / 2).exp()
    a = log_moments(torch.ones_like(b), b)[0] / first
    return a, b


def kl_from_beta(a, b, alpha, beta, terms=50):
    """KL(Kumaraswamy(a, b) || Beta(alpha, beta)). Nalisnick and Smyth 2017, Eq. 12; the series is
    cut after `terms`.

    (a - alpha)/a (-gamma - psi(b) - 1/b) + log(a b) + log B(alpha, beta) - (b - 1)/b + (beta - 1) b
    sum B(m/a, b) / (m + a b)"""
    found = (a - alpha) / a * (-EULER - torch.digamma(b) - 1 / b)
    found = found + a.log() + b.log() + log_beta(alpha, beta) - (b - 1) / b
    m = torch.arange(1, terms + 1).to(a).view(-1, *[1] * a.dim())
    series = torch.exp(log_beta(m / a, b)) / (m + a * b)
    return found + (beta - 1) * b * series.sum(0)


class GateParameters(nn.Module):
    """Auxiliary network: patches (B,N,D) -> positive a, b (B,N) of each gate's probability."""

    def __init__(self, dim, hidden=64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, 2))

    def forward(self, patches):
        # softplus(0.54) = 1: it begins near the uniform distribution
        both = F.softplus(self.layers(patches) + 0.54) + 1e-3
        return both[..., 0], both[..., 1]


def total_variation(alpha, beta, points=4000):
    """Half of the integral of |Beta's density - its match's|, 0..1: shares of probability that must move.

    By differences of the distribution functions over a grid that is fine at both ends.
    """
    from scipy import special

    a, b = match_beta(alpha, beta)
    # a grid in the logit of x
    x = torch.sigmoid(torch.linspace(-60, 30, points, dtype=torch.float64))
    shape = (*alpha.shape, 1)
    ours = 1 - torch.exp(b.view(shape) * torch.log1p(-(x ** a.view(shape))))
    pair = alpha.double().view(shape).numpy(), beta.double().view(shape).numpy()
    theirs = torch.from_numpy(special.betainc(*pair, x.numpy()))
    return (ours.diff(dim=-1) - theirs.diff(dim=-1)).abs().sum(-1) / 2


def draw(path, grid, distance):
    """Total variation over the parameters of Beta; densities of some pairs."""
    import matplotlib.pyplot as plt
    from scipy import stats

    figure, axes = plt.subplots(1, 1 + len(SHOWN), figsize=(13, 2.7), layout="constrained")
    mesh = axes[0].pcolormesh(grid, grid, distance.T, cmap="viridis", shading="nearest", vmin=0)
    axes[0].set(xscale="log", yscale="log", xlabel="alpha", ylabel="beta", title="total variation")
    figure.colorbar(mesh, ax=axes[0])
    x = torch.linspace(0.001, 0.999, 400, dtype=torch.float64)
    for axis, (alpha, beta) in zip(axes[1:], SHOWN):
        a, b = match_beta(torch.tensor(alpha), torch.tensor(beta))
        theirs = stats.beta.pdf(x, alpha, beta)
        axis.plot(x, theirs, label="Beta")
        axis.plot(x, log_density(x, a, b).exp(), "--", label="Kumaraswamy")
        axis.set(title=f"Beta({alpha:g}, {beta:g})", ylim=(0, min(6, 1.2 * float(theirs.max()))))
    axes[1].legend(fontsize=7)
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Total variation between Beta and its match over a grid of parameters."""
    check(cfg.points > 1 and cfg.largest > 1, "--points and --largest must be above 1")
    folder = run.output(cfg.out, cfg)
    grid = torch.logspace(-1, 1, cfg.points, base=cfg.largest, dtype=torch.float64)
    alpha, beta = torch.meshgrid(grid, grid, indexing="ij")
    distance = total_variation(alpha, beta)
    draw(folder / "kumaraswamy.png", grid, distance)
    worst = int(distance.argmax())
    metrics: dict = {
        "total variation": {
            "median": float(distance.median()), "largest": float(distance.max()),
            "at alpha": float(alpha.flatten()[worst]), "and beta": float(beta.flatten()[worst]),
        },
    }  # fmt: skip
    for pair in SHOWN:
        one, two = map(torch.tensor, pair)
        a, b = match_beta(one, two)
        metrics[f"Beta{pair}"] = {
            "a": float(a), "b": float(b), "total variation": float(total_variation(one[None], two[None])[0]),
            "mean": float(one / (one + two)), "mean of the match": float(mean(a, b)),
        }  # fmt: skip
    return run.report(folder, metrics)


if __name__ == "__main__":
    run.cli(main, Config)
