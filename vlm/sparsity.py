"""Token sparsification by the prompt: top-k by cosine, thresholds, stochastic gates, tokens dropped
with their positions kept.

A question is about a part of a picture, and a language model pays for every token. Patches are
chosen by their cosine with a query vector made of the prompt: the k best (their number is known
beforehand), or those whose gate is open. A gate is a Bernoulli variable with p = sigmoid(cosine);
it is sampled by the Gumbel trick so that gradients pass (Jang et al. 2017, arXiv:1611.01144;
Maddison et al. 2017, arXiv:1611.00712). How many are open has a Beta-Bernoulli prior
(kumaraswamy.py has the Beta distribution's stand-in). Plug-ins that do not read the prompt are in
token_sparsity.py.

Shapes: B pictures, N patches of width D, a query (B,D), scores and gates (B,N), K patches kept.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.run import check
from vlm.token_sparsity import take


def cosine(patches, query):
    """Cosine of each patch (B,N,D) with the query (B,D) -> (B,N) in -1..1."""
    return F.cosine_similarity(patches, query[:, None], dim=-1)


def top_k(patches, query, k):
    """The k patches of the highest cosine with the query, in the order of their places -> (B,k,D),
    indices (B,k).

    Raises UserError unless 1 <= k <= N.
    """
    check(0 < k <= patches.shape[1], f"top-k keeps 1 to {patches.shape[1]} patches, not {k}")
    best = cosine(patches, query).topk(k, dim=1).indices
    indices = best.sort(dim=1).values
    return take(patches, indices), indices


def two_resolutions(coarse, fine, query, k):
    """All coarse patches (B,M,D), and the k fine ones (B,N,D) that the query asks for: (B,M+k,D).

    The number of tokens is known beforehand, and nothing of the picture is lost altogether.
    """
    return torch.cat([coarse, top_k(fine, query, k)[0]], dim=1)


def evenly_spaced(n, k):
    """Places of k of n patches, in the middle of as many equal stretches: the choice without a query."""
    return (2 * torch.arange(k) + 1) * n // (2 * k)


class Query(nn.Module):
    """Query vector of a prompt: mean of its token embeddings (B,T,E), projected to the patches' width D.

    A prompt without words has a learned null vector: mask (B,T) is 0 where there is no word.
    """

    def __init__(self, dim_text, dim):
        super().__init__()
        self.project = nn.Linear(dim_text, dim)
        self.null = nn.Parameter(torch.randn(dim) / dim**0.5)

    def forward(self, embeddings, mask):
        count = mask.sum(1, keepdim=True)
        mean = (embeddings * mask[..., None]).sum(1) / count.clamp(min=1)
        return torch.where(count > 0, self.project(mean), self.null)


def threshold(patches, query, least):
    """Gates (B,N), 1 where the cosine is at least `least`; the best patch is always kept."""
    scores = cosine(patches, query)
    best = F.one_hot(scores.argmax(1), scores.shape[1])
    return torch.maximum((scores >= least).to(scores), best.to(scores))


def gate_probability(patches, query, scale=10.0, bias=0.0):
    """p = sigmoid(scale * (cosine - bias)) of each gate: (B,N)."""
    return torch.sigmoid(scale * (cosine(patches, query) - bias))


def gumbel_sigmoid(logits, temperature=1.0, hard=True, noise=None):
    """Sample of Bernoulli(sigmoid(logits)) through which gradients pass. Maddison et al. 2017, Eq.
    2 (binary).

    The difference of two Gumbel variables is a logistic one. Soft: in 0..1, and closer to its ends
    at low temperatures. hard: 0 or 1, with the soft one's gradient (straight-through, Bengio et al.
    2013, arXiv:1308.3432). noise: uniform (B,N), drawn if there is none."""
    if noise is None:
        noise = torch.rand_like(logits)
    noise = noise.clamp(1e-6, 1 - 1e-6)
    logistic = noise.log() - (-noise).log1p()
    soft = torch.sigmoid((logits + logistic) / temperature)
    if not hard:
        return soft
    return (soft > 0.5).to(soft) + (soft - soft.detach())


def log_beta(a, b):
    """log B(a, b), the normaliser of the Beta distribution."""
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def beta_posterior(alpha, beta, open_gates, n):
    """Beta(alpha, beta) after k of n gates were open: (alpha + k, beta + n - k)."""
    return alpha + open_gates, beta + n - open_gates


def beta_bernoulli_log_prior(gates, alpha, beta):
    """log p of gates (B,N), their common probability drawn from Beta(alpha, beta) and integrated out: (B,).

    log B(alpha + k, beta + n - k) - log B(alpha, beta), k = sum of the gates, which may be soft.
    """
    k = gates.sum(1)
    a, b = torch.as_tensor(alpha).to(k), torch.as_tensor(beta).to(k)
    return log_beta(*beta_posterior(a, b, k, gates.shape[1])) - log_beta(a, b)


def gate_loss(p, alpha, beta, eps=1e-6):
    """Upper bound of the KL divergence of independent gates, probabilities p (B,N), from the
    Beta-Bernoulli prior: (B,).

    The entropy is exact. The prior depends on the number k of open gates alone and its log is convex
    in k, so that by Jensen's inequality its mean is at least its value at the mean of k.
    """
    p = p.clamp(eps, 1 - eps)
    negative_entropy = (p * p.log() + (1 - p) * (-p).log1p()).sum(1)
    return negative_entropy - beta_bernoulli_log_prior(p, alpha, beta)


def drop(tokens, gates, positions):
    """Open tokens only, moved to the left, with the positions that they had: tokens (B,N,E), gates
    (B,N) of 0 and 1, positions (B,N) -> tokens (B,M,E), mask (B,M), positions (B,M); M is the
    largest number of open gates.

    A language model reads them as it would read all of them with the closed ones masked: its rotary
    embeddings need the old positions. Padding repeats position 0 and is masked.
    """
    is_open = gates > 0.5
    most = int(is_open.sum(1).max())
    # a stable sort keeps the order of places
    order = (~is_open).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    mask = is_open.gather(1, order)
    return take(tokens, order), mask.long(), positions.gather(1, order) * mask
