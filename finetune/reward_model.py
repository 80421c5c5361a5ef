"""Reward model: a language model with one number at its end, learned from pairs. Ouyang et al. 2022,
arXiv:2203.02155 (InstructGPT).

Bradley and Terry 1952: of two completions the first is preferred with probability sigmoid(r_w -
r_l). The reward r(x, y) is a linear head on the state of the last token, where all of prompt and
completion has been read; its loss is -log of that probability (Eq. 1). Only differences count, so a
reward has no zero. RLHF trains a policy on it; the simplest policy is best-of-n: write n times, keep
what the reward model likes best.

Pairs are those of dpo.py: two samples of the model, ranked by VADER. So the truth is known here, and
"how right is the reward model?" has an answer.

Shapes: B pairs a step, so 2 B rows, chosen ones first; L tokens, D width of the model.
Differences from the paper: two completions of a prompt and not up to nine, LoRA instead of all
weights.

    python finetune/reward_model.py
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from finetune import llama2_full, preference_data
from finetune.completion_logps import draw, rows_to_batch
from finetune.lora_inject import inject
from finetune.preference_scores import mean_interval
from utils import checkpoint, figures, run

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")  # where LoRA goes


@dataclass(frozen=True)
class Config(preference_data.Training):
    """Train a reward model on preference pairs and score it on held-out ones."""

    bins: int = 5  # of the calibration curve
    out: str = "outputs/reward_model"  # where the results go


class RewardModel(nn.Module):
    """A language model without its head, and a linear head with one output on its last state."""

    def __init__(self, model):
        super().__init__()
        self.language = model
        self.head = nn.Linear(model.config.hidden_size, 1, bias=False)
        # zero: before training each pair is undecided
        nn.init.zeros_(self.head.weight)

    def forward(self, ids, mask):
        """(B, L) -> rewards (B,). Padding is on the left, so the last position is the last token."""
        position = (mask.long().cumsum(-1) - 1).clamp(min=0)
        states = self.language.model(
            input_ids=ids, attention_mask=mask.long(), position_ids=position, use_cache=False
        ).last_hidden_state  # (B, L, D)
        # in fp32: in bf16 two rewards near 3 that differ by 0.01 are one
        with torch.autocast(ids.device.type, enabled=False):
            return self.head(states[:, -1].float()).squeeze(-1)


def bradley_terry(chosen, rejected):
    """-log sigmoid(r_w - r_l), Eq. 1: (B,), (B,) -> (B,)."""
    return -F.logsigmoid(chosen - rejected)


def pair_loss(model, ids, mask, completion):
    """The mean of `bradley_terry` over a batch of pairs, chosen ones first -> ()."""
    chosen, rejected = model(ids, mask).chunk(2)
    return bradley_terry(chosen, rejected).mean()


@torch.no_grad()
def rate(model, tokenizer, rows, size=32):
    """The reward of many rows [(prompt, tokens)] -> (N,), in their order."""
    model.eval()
    found = np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    on = model.head.weight.device
    for k in range(0, len(order), size):
        pick = order[k : k + size]
        ids, mask, _ = rows_to_batch(tokenizer, [rows[i] for i in pick])
        found[pick] = model(ids.to(on), mask.to(on)).cpu().numpy()
    return found


def calibration(margins, bins):
    """Reliability of sigmoid(r_w - r_l): for each bin of confidence, how sure and how often right ->
    [(confidence, accuracy, pairs)], and the mean gap between both (ECE, Guo et al. 2017,
    arXiv:1706.04599).
    """
    margins = np.asarray(margins, dtype=float)
    # how sure the model is of its own answer, from 1/2 to 1, and whether that is the right one
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = (np.sign(margins) + 1) / 2
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = []
    for k in range(bins):
        inside = which == k
        if inside.any():
            row = (float(confidence[inside].mean()), float(right[inside].mean()), int(inside.sum()))
            rows.append(row)
    error = sum(abs(sure - hit) * count for sure, hit, count in rows) / len(margins)
    return rows, error


def best_of_n(scores, truth, n):
    """The true reward of what the reward model chooses of the first n completions: (N, samples) both
    -> (N,).
    """
    chosen = scores[:, :n].argmax(1)
    return truth[np.arange(len(truth)), chosen]


def best_of_n_kl(n):
    """KL of best-of-n from the model that writes, an upper bound: log n - (n - 1) / n (Stiennon et
    al. 2020, arXiv:2009.01325, App. G.3).
    """
    return float(np.log(n) - (n - 1) / n)


def evaluate(model, tokenizer, answers, cfg):
    """Accuracy, calibration and best-of-n on held-out prompts -> metrics, and "reliability"."""
    rows = [(row.prompt, tokens) for row in answers for tokens in row.completions]
    scores = rate(model, tokenizer, rows).reshape(len(answers), -1)
    truth = np.array([row.rewards for row in answers])
    # pairs as in training: best against worst, if they differ enough
    best = truth.argmax(1)
    worst = truth.argmin(1)
    place = np.arange(len(truth))
    differ = truth[place, best] - truth[place, worst] >= cfg.least
    run.check(differ.any(), "no held-out pair differs enough: more --held-out, or less --least")
    margins = (scores[place, best] - scores[place, worst])[differ]
    lengths = np.array([[len(tokens) for tokens in row.completions] for row in answers])
    longer = (lengths[place, best] - lengths[place, worst])[differ]
    reliability, error = calibration(margins, cfg.bins)
    metrics = {
        "held-out pairs": int(differ.sum()),
        "pair accuracy": mean_interval(margins > 0),
        "pair accuracy of length": mean_interval((np.sign(longer) + 1) / 2),
        "held-out loss": float(np.logaddexp(0, -margins).mean()),
        "calibration error": error,
        "correlation with the truth": float(np.corrcoef(scores.ravel(), truth.ravel())[0, 1]),
    }
    # best-of-n, and what could be had if the truth itself chose
    n = 1
    while n <= cfg.samples:
        row = mean_interval(best_of_n(scores, truth, n))
        row |= {"by the truth": float(best_of_n(truth, truth, n).mean()), "KL": best_of_n_kl(n)}
        metrics[f"reward of best of {n}"] = row
        n *= 2
    return metrics | {"reliability": reliability}


def draw_reliability(path, rows):
    """How often the model is right against how sure it is; on the diagonal it is calibrated."""
    sure = [row[0] for row in rows]
    right = [row[1] for row in rows]
    named = {"reward model": (sure, right), "calibrated": ([0.5, 1.0], [0.5, 1.0])}
    figures.curves(path, named, "confidence", "accuracy")


def main(cfg: Config) -> dict:
    """Train adapters and head on the pairs, score them, keep both."""
    preference_data.check_flags(cfg)
    run.check(cfg.bins > 0, "--bins must be 1 or more")
    device = run.device(cfg.device)
    tokenizer, model, pairs, held_out = preference_data.load(cfg, device)
    folder = run.output(cfg.out, cfg)
    run.seed(cfg.seed)
    # adapters and a head
    inject(model, TARGETS, cfg.rank, 2.0 * cfg.rank, cfg.dropout)
    judge = RewardModel(model).to(device)
    make_batch = partial(draw, tokenizer, pairs, cfg)
    loss = partial(pair_loss, judge)
    about = {"label": "-log p(the pair)"}
    metrics = llama2_full.fit(cfg, folder, device, judge, loss, make_batch, **about)
    # held-out pairs and best-of-n
    metrics = {"pairs": len(pairs)} | metrics | evaluate(judge, tokenizer, held_out, cfg)
    draw_reliability(folder / "reliability.png", metrics.pop("reliability"))
    weights = llama2_full.Trained(judge).state_dict()
    checkpoint.write(folder / "reward_model.safetensors", weights, {"rank": cfg.rank})
    return run.report(folder, metrics, then="python finetune/dpo.py")


if __name__ == "__main__":
    run.cli(main, Config)
