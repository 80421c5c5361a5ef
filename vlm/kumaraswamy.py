"""Kumaraswamy distribution, a stand-in for Beta whose samples have gradients; log-moments matched.

Beta is the conjugate prior of a gate's probability, but its sampler has no simple gradient.
Kumaraswamy 1980: F(x) = 1 - (1 - x^a)^b has a closed inverse, so that x = (1 - u^(1/b))^(1/a), u
uniform, is differentiable in a and b (Nalisnick and Smyth 2017, arXiv:1605.06197). Kumaraswamy(1,
b) is Beta(1, b), and Kumaraswamy(a, 1) is Beta(a, 1). Elsewhere it is another distribution:
`match_beta` finds the one with the same mean and variance of log x.

Shapes: any, broadcast. psi: digamma, psi': trigamma.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.run import check
from vlm.sparsity import log_beta

EULER = 0.5772156649015329


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
