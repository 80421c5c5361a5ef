"""finetune/preference_losses.py: DPO and its family equal TRL's trainers, gradients too; known answers."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from finetune import dpo
from finetune.preference_losses import implicit_reward, log_odds, log_ratio_margin, loss
from utils import run

TRL = "trl DPOTrainer"
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = range(4)
TOKENS = (torch.tensor([4.0, 7.0, 3.0, 9.0, 1.0]), torch.tensor([6.0, 2.0, 3.0, 8.0, 1.0]))


def log_probabilities():
    """Sums over completions, policy and reference, chosen and rejected: four leaves (5,) in float64."""
    torch.manual_seed(3)
    return [(-8 * torch.rand(5, dtype=torch.float64) - 0.1).requires_grad_() for _ in range(4)]


def with_gradients(values, leaves):
    """The losses, and the gradients of their mean in the policy's log-probabilities."""
    policy = leaves[:2]
    return {"loss": values, "gradients": list(torch.autograd.grad(values.mean(), policy))}


class Fed:
    """A model for TRL's trainer that returns given log-probabilities, all in the last token."""

    def __init__(self, chosen, rejected):
        self.sums = torch.cat([chosen, rejected])

    def __call__(self, **inputs):
        nothing = torch.zeros(len(self.sums), 1)
        about = {"entropy": nothing, "mean_logits": nothing, "is_top1": nothing.bool()}
        return SimpleNamespace(log_probs=self.sums[:, None], **about)


def by_trl(kind, beta, leaves):
    """DPOTrainer's own loss, pair after pair, for it returns the mean of a batch."""
    from accelerate import Accelerator
    from trl.trainer.dpo_trainer import DPOTrainer

    accelerator = Accelerator(cpu=True)
    values = []
    for i in range(5):
        one = [leaf[i : i + 1] for leaf in leaves]
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=True), accelerator=accelerator, beta=beta,
            aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, label_smoothing=0.0,
            f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0],
            use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0, _tp_size=1,
        )  # fmt: skip
        # a prompt of one token and a completion of one: TRL's mean over tokens is the sum
        inputs = {
            "input_ids": torch.ones(2, 2, dtype=torch.long),
            "attention_mask": torch.ones(2, 2, dtype=torch.long),
            "completion_mask": torch.tensor([[0, 1], [0, 1]]),
            "ref_chosen_logps": one[REF_CHOSEN].detach(),
            "ref_rejected_logps": one[REF_REJECTED].detach(),
        }
        model = Fed(one[CHOSEN], one[REJECTED])
        values.append(DPOTrainer._compute_loss(trainer, model, inputs, False))
    return torch.stack(values)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_losses_equal_those_of_trl(kind, beta, parity):
    leaves = log_probabilities()
    mine = with_gradients(dpo.loss(*leaves, beta=beta, kind=kind), leaves)
    theirs = with_gradients(by_trl(kind, beta, leaves), leaves)
    parity("DPO", f"dpo.loss, {kind}, gradients", f"{TRL} {kind}", mine, theirs, atol=1e-6)


def test_cdpo_and_simpo_equal_those_of_trl(parity):
    """TRL's CPO trainer holds both: label smoothing, and SimPO's margin on means over the tokens."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    leaves = log_probabilities()
    about = {"alpha": 0.0, "beta": 0.4, "accelerator": SimpleNamespace(device="cpu")}
    # conservative DPO: the same curve on log-ratios
    ratios = [leaves[CHOSEN] - leaves[REF_CHOSEN], leaves[REJECTED] - leaves[REF_REJECTED]]
    trainer = SimpleNamespace(loss_type="sigmoid", label_smoothing=0.2, **about)
    theirs = CPOTrainer.cpo_loss(trainer, *ratios)[0]
    mine = dpo.loss(*leaves, beta=0.4, kind="cdpo", smoothing=0.2)
    mine, theirs = with_gradients(mine, leaves), with_gradients(theirs, leaves)
    parity("DPO", "dpo.loss, cdpo, gradients", "trl CPOTrainer label_smoothing", mine, theirs)
    # SimPO
    means = [leaves[CHOSEN] / TOKENS[0], leaves[REJECTED] / TOKENS[1]]
    trainer = SimpleNamespace(loss_type="simpo", label_smoothing=0.0, simpo_gamma=0.7, **about)
    theirs = CPOTrainer.cpo_loss(trainer, *means)[0]
    mine = dpo.loss(*leaves, beta=0.4, kind="simpo", tokens=TOKENS, gamma=0.7)
    mine, theirs = with_gradients(mine, leaves), with_gradients(theirs, leaves)
    parity("DPO", "dpo.loss, simpo, gradients", "trl CPOTrainer simpo", mine, theirs)


def test_orpo_equals_that_of_trl(parity):
    """TRL subtracts its odds-ratio term from the SFT loss, which is a mean over pairs here."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    leaves = log_probabilities()
    means = [leaves[CHOSEN] / TOKENS[0], leaves[REJECTED] / TOKENS[1]]
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    theirs = -means[0] - ORPOTrainer.odds_ratio_loss(trainer, *means)[0]
    mine = dpo.loss(*leaves, beta=0.3, kind="orpo", tokens=TOKENS)
    mine, theirs = with_gradients(mine, leaves), with_gradients(theirs, leaves)
    parity("DPO", "dpo.loss, orpo, gradients", "trl ORPOTrainer", mine, theirs, atol=1e-5)


def test_gradient_of_dpo_is_that_of_the_paper():
    """Rafailov et al. 2023, Sec. 4: beta sigmoid(r_l - r_w), up for the chosen and down for the rejected."""
    leaves = log_probabilities()
    chosen, rejected = torch.autograd.grad(dpo.loss(*leaves, beta=0.3).sum(), leaves[:2])
    won = implicit_reward(leaves[CHOSEN], leaves[REF_CHOSEN], 0.3)
    lost = implicit_reward(leaves[REJECTED], leaves[REF_REJECTED], 0.3)
    weight = 0.3 * torch.sigmoid(lost - won)
    torch.testing.assert_close(chosen, -weight.detach())
    torch.testing.assert_close(rejected, weight.detach())


@pytest.mark.parametrize(
    "kind, value", [("sigmoid", math.log(2)), ("cdpo", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)]
)
def test_a_policy_that_is_the_reference_has_a_known_loss(kind, value):
    chosen, rejected, _, _ = log_probabilities()
    found = loss(chosen, rejected, chosen, rejected, beta=0.1, kind=kind)
    torch.testing.assert_close(found, torch.full_like(found, value))


def lowest(kind, **about):
    """The margin h at which a loss is lowest."""
    h = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    nothing = torch.zeros_like(h)
    return float(h[loss(h, nothing, nothing, nothing, kind=kind, **about).argmin()])


def test_ipo_and_cdpo_have_a_best_margin_and_dpo_has_none():
    assert lowest("ipo", beta=0.1) == pytest.approx(1 / 0.2, abs=0.01)
    # sigmoid(beta h) = 1 - smoothing
    best = math.log(0.9 / 0.1) / 0.2
    assert lowest("cdpo", beta=0.2, smoothing=0.1) == pytest.approx(best, abs=0.01)
    assert lowest("sigmoid", beta=0.1) == pytest.approx(30)


def test_the_margin_is_that_of_chosen_over_rejected():
    one = torch.ones(1)
    assert float(log_ratio_margin(-2 * one, -7 * one, -3 * one, -5 * one)) == 3.0


def test_log_odds_of_known_probabilities():
    p = torch.tensor([0.5, 0.9, 1e-6], dtype=torch.float64)
    torch.testing.assert_close(log_odds(p.log()), torch.logit(p))


def test_sft_reads_the_chosen_one_alone():
    leaves = log_probabilities()
    found = loss(*leaves, kind="sft", tokens=TOKENS)
    torch.testing.assert_close(found, -leaves[CHOSEN] / TOKENS[0])


@pytest.mark.parametrize(
    "about, says",
    [
        ({"kind": "ppo"}, "no loss 'ppo'"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"kind": "simpo"}, "divides by the tokens"),
        ({"kind": "orpo"}, "divides by the tokens"),
    ],
)
def test_bad_arguments_are_refused(about, says):
    with pytest.raises(run.UserError, match=says):
        loss(*log_probabilities(), **about)
