"""Logits processors: repetition penalty, temperature, top-k, top-p (nucleus); and the draw of a
token.

Holtzman et al. 2019, arXiv:1904.09751, whose sections and equations are named; Keskar et al. 2019,
arXiv:1909.05858 (repetition penalty). Shapes: B prompts, V tokens in the vocabulary.
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


def sampler(temperature=1.0, k=0, p=1.0, generator=None):
    """A function that draws a token from logits: (B,V) -> (B,). k = 0, p = 1: no truncation."""
    possible = temperature > 0 and k >= 0 and 0 < p <= 1
    check(possible, "temperature must be above 0, top-k at least 0, top-p in (0, 1]")

    def draw(logits):
        logits = logits / temperature  # Sec. 3.3
        # truncation: what is cut off is -inf
        if k:
            logits = top_k(logits, k)
        if p < 1:
            logits = top_p(logits, p)
        # one token by its probability
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        return token.squeeze(1)

    return draw


def argmax_token(logits):
    """The most probable token: (B,V) -> (B,)."""
    return logits.argmax(-1)
