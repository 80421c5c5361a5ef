"""Logits processors: repetition penalty, temperature, top-k, top-p (nucleus), min-p, locally typical
sampling; and the draw of a token.

Holtzman et al. 2019, arXiv:1904.09751, whose sections and equations are named where no other paper
is; Keskar et al. 2019, arXiv:1909.05858 (repetition penalty); Nguyen et al. 2024, arXiv:2407.01082
(min-p); Meister et al. 2022, arXiv:2202.00666 (locally typical sampling). Shapes: B prompts, V
tokens in the vocabulary.
"""

import torch

from utils.run import check


def repetition_penalty(logits, seen, penalty):
    """Make tokens that were there before less likely: (B,V), counts (B,V) -> (B,V). Keskar et al.
    2019, Sec. 4.1.

    The paper divides every logit, which makes a token with a negative one likelier: these are
    multiplied, as in transformers. Words of the prompt count, too: never use it where an answer is
    to be copied from a passage.
    """
    less_likely = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen > 0, less_likely, logits)


def top_k(logits, k):
    """Top-k: only the k likeliest tokens, and those as likely as the last of them. Sec. 3.2.

    (B,V) -> (B,V), the others -inf.
    """
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits, p):
    """Top-p: only the nucleus, the fewest tokens whose probabilities add up to p or more. Eq. 2.

    (B,V) -> (B,V), the others -inf.
    """
    ascending, order = logits.sort(dim=-1)
    # together these have 1 - p at most: the rest has p
    tail = ascending.softmax(-1).cumsum(-1) <= 1 - p
    tail[..., -1] = False  # the likeliest stays, whatever p is
    return logits.masked_fill(tail.scatter(-1, order, tail), -torch.inf)


def min_p_truncation(logits, p):
    """Min-p: only tokens at least p times as likely as the likeliest. Nguyen et al. 2024, Sec. 3.

    The surer the model, the fewer tokens are left. (B,V) -> (B,V), the others -inf.
    """
    probabilities = logits.softmax(-1)
    threshold = p * probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(probabilities < threshold, -torch.inf)


def locally_typical(logits, mass):
    """Locally typical sampling: only tokens whose information -log p is nearest to the entropy, the
    fewest that have this probability mass together. Meister et al. 2022.

    Those as near as the last of them stay, too. (B,V) -> (B,V), the others -inf.
    """
    log_p = logits.log_softmax(-1)
    # the information that is expected; 0 log 0 = 0 for tokens that were cut off before
    entropy = -(log_p.exp() * log_p).nansum(-1, keepdim=True)
    distance = (-log_p - entropy).abs()
    # the nearest first, until they have the mass
    nearest, order = distance.sort(dim=-1)
    together = logits.gather(-1, order).softmax(-1).cumsum(-1)
    last = (together < mass).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(distance > nearest.gather(-1, last), -torch.inf)


def sampler(temperature=1.0, k=0, p=1.0, min_p=0.0, typical_p=1.0, generator=None):
    """A function that draws a token from logits: (B,V) -> (B,).

    k = 0, p = 1, min_p = 0, typical_p = 1: no truncation. Several follow each other as in
    transformers. Raises UserError for values that make no sense.
    """
    possible = temperature > 0 and k >= 0 and 0 < p <= 1
    check(possible, "temperature must be above 0, top-k at least 0, top-p in (0, 1]")
    possible = 0 <= min_p <= 1 and 0 < typical_p <= 1
    check(possible, "min-p must be in [0, 1], typical-p in (0, 1]; 0 and 1 truncate nothing")

    def draw(logits):
        logits = logits / temperature  # Sec. 3.3
        # truncation: what is cut off is -inf
        if k:
            logits = top_k(logits, k)
        if p < 1:
            logits = top_p(logits, p)
        if min_p > 0:
            logits = min_p_truncation(logits, min_p)
        if typical_p < 1:
            logits = locally_typical(logits, typical_p)
        # one token by its probability
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        return token.squeeze(1)

    return draw


def argmax_token(logits):
    """The most probable token: (B,V) -> (B,)."""
    return logits.argmax(-1)
