"""DPO and its family: losses on the log-probabilities of a chosen and a rejected completion. Rafailov
et al. 2023, arXiv:2305.18290.

A pair says that y_w is preferred to y_l. Bradley and Terry 1952: with a reward r for each, the
probability of that is sigmoid(r_w - r_l). DPO takes as reward how much likelier the policy finds a
completion than the reference model does, so that no reward model is trained. The relatives change
the curve (IPO, hinge, cDPO) or the reward (SimPO, ORPO, which need no reference).

Shapes: (B,) everywhere, B pairs. A log-probability is the sum over the tokens of a completion,
log p(y | x); `tokens` is how many these are. Losses are one for each pair; take the mean.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F

from utils import run

Kind = Literal["sigmoid", "cdpo", "ipo", "hinge", "simpo", "orpo", "sft"]
PER_TOKEN = ("simpo", "orpo", "sft")  # these divide by the number of tokens and need no reference


def implicit_reward(policy, reference, beta):
    """DPO, Sec. 4 below Eq. 7: r(x, y) = beta log(p(y | x) / p_ref(y | x)), up to a term that only
    depends on the prompt.
    """
    return beta * (policy - reference)


def log_ratio_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected):
    """h = log(p(y_w) / p_ref(y_w)) - log(p(y_l) / p_ref(y_l)); IPO, Eq. 17 has this name for it."""
    chosen = policy_chosen - reference_chosen
    rejected = policy_rejected - reference_rejected
    return chosen - rejected


def dpo(h, beta):
    """DPO, Eq. 7: -log sigmoid(beta h), the Bradley-Terry likelihood of the implicit rewards."""
    return -F.logsigmoid(beta * h)


def cdpo(h, beta, smoothing):
    """Conservative DPO (Mitchell 2023): a fraction `smoothing` of the labels is taken to be wrong, so
    that h has a finite best value.
    """
    return (1 - smoothing) * dpo(h, beta) + smoothing * dpo(-h, beta)


def ipo(h, tau):
    """IPO, Eq. 17 (Azar et al. 2023, arXiv:2310.12036): a square, with its lowest point at h = 1 / (2
    tau). More than that is punished, too.
    """
    return (h - 1 / (2 * tau)) ** 2


def hinge(h, beta):
    """Hinge on the same margin (SLiC-HF, Zhao et al. 2023, arXiv:2305.10425, with DPO's
    reward): nothing to gain beyond beta h = 1.
    """
    return F.relu(1 - beta * h)


def simpo(chosen, rejected, beta, gamma):
    """SimPO, Eq. 6 (Meng et al. 2024, arXiv:2405.14734), on mean log-probabilities of a token: no
    reference; y_w has to win by the target margin gamma.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def log_odds(logp):
    """log(p / (1 - p)) of p = exp(logp), without overflow for p near 1."""
    return logp - torch.log(-torch.expm1(logp))


def orpo(chosen, rejected, weight):
    """ORPO, Eq. 6 and 7 (Hong et al. 2024, arXiv:2403.07691), on mean log-probabilities: the SFT loss
    of y_w and `weight` times -log sigmoid of the log odds ratio.
    """
    odds_ratio = log_odds(chosen) - log_odds(rejected)
    return -chosen - weight * F.logsigmoid(odds_ratio)


def loss(
    policy_chosen,
    policy_rejected,
    reference_chosen,
    reference_rejected,
    beta=0.1,
    kind="sigmoid",
    tokens=None,
    gamma=0.5,
    smoothing=0.1,
):
    """A loss of the family for each pair: log-probabilities (B,) -> (B,).

    beta: of DPO, the hinge and SimPO, IPO's tau, ORPO's weight. tokens: (tokens of chosen, of
    rejected), each (B,), for simpo, orpo and sft. Raises UserError for another kind, a beta that is
    not above 0, or lengths that are missing.
    """
    known = get_args(Kind)
    run.check(kind in known, f"there is no loss '{kind}'; there are {', '.join(known)}")
    run.check(beta > 0, "beta must be above 0")
    # without a reference: means over the tokens
    if kind in PER_TOKEN:
        if tokens is None:
            raise run.UserError(f"{kind} divides by the tokens of a completion: pass them")
        chosen = policy_chosen / tokens[0]
        rejected = policy_rejected / tokens[1]
        if kind == "simpo":
            return simpo(chosen, rejected, beta, gamma)
        return orpo(chosen, rejected, beta) if kind == "orpo" else -chosen
    # with a reference: sums
    h = log_ratio_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    if kind == "cdpo":
        return cdpo(h, beta, smoothing)
    return {"sigmoid": dpo, "ipo": ipo, "hinge": hinge}[kind](h, beta)
