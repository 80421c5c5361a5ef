"""Scores of a policy against its reference: win rate by reward, accuracy of the implicit reward, and
what it cost: text loss, length, variety.

Everything is measured on beginnings of tweets that no pair was made from. Intervals are bootstrap
over prompts.
"""

import math

import numpy as np
import torch

from finetune import preference_data
from finetune.classification_metrics import interval
from finetune.completion_logps import logps, reference, rows_to_batch

MAX_REST = 40  # tokens of a real tweet that the text loss is measured on


def mean_interval(values):
    """-> mean of the values and the ends of its 95 % interval."""
    values = np.asarray(values, dtype=float)

    def mean(drawn, _):
        return drawn.mean(-1)

    low, high = interval(values, values, mean)
    return {"mean": float(values.mean()), "low": low, "high": high}


def wins(mine, theirs):
    """1 where the first reward is higher, 0 where it is lower, 1/2 for a tie: (N,), (N,) -> (N,)."""
    return (np.sign(np.subtract(mine, theirs)) + 1) / 2


@torch.no_grad()
def completion_logps(model, tokenizer, rows, size=16):
    """log p(completion | prompt) of many rows [(prompt, tokens)] -> (N,), in their order."""
    found = torch.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for k in range(0, len(order), size):
        pick = order[k : k + size]
        batch = rows_to_batch(tokenizer, [rows[i] for i in pick])
        found[pick] = logps(model, *(x.to(model.device) for x in batch)).cpu()
    return found.double().numpy()


def before_and_after(model, tokenizer, rows):
    """`completion_logps` of the reference and of the policy -> (N,), (N,)."""
    with reference(model):
        before = completion_logps(model, tokenizer, rows)
    return before, completion_logps(model, tokenizer, rows)


def text_loss(model, tokenizer, answers):
    """-log p of a token of what the authors of the tweets went on with -> before, after."""
    rows = []
    for row in answers:
        rest = tokenizer(row.rest, add_special_tokens=False)["input_ids"][:MAX_REST]
        rows.append((row.prompt, tuple(rest)))
    tokens = sum(len(rest) for _, rest in rows)
    before, after = before_and_after(model, tokenizer, rows)
    return -float(before.sum()) / tokens, -float(after.sum()) / tokens


def distinct(completions):
    """Distinct-2 (Li et al. 2015, arXiv:1510.03055): different pairs of neighbours over all pairs."""
    found = [pair for row in completions for pair in zip(row, row[1:])]
    return len(set(found)) / max(1, len(found))


def length(completions):
    return float(np.mean([len(row) for row in completions]))


def pair_scores(model, tokenizer, pairs):
    """On held-out pairs: whether the implicit reward finds the chosen one, and where both likelihoods
    went.
    """
    chosen_before, chosen = before_and_after(
        model, tokenizer, [(pair.prompt, pair.chosen) for pair in pairs]
    )
    rejected_before, rejected = before_and_after(
        model, tokenizer, [(pair.prompt, pair.rejected) for pair in pairs]
    )
    won = chosen - chosen_before
    lost = rejected - rejected_before
    return {
        "pair accuracy": mean_interval(won > lost),
        "pair accuracy of the reference's likelihood": mean_interval(
            chosen_before > rejected_before
        ),
        "log p(chosen)": {"before": chosen_before.mean(), "after": chosen.mean()},
        "log p(rejected)": {"before": rejected_before.mean(), "after": rejected.mean()},
    }


def evaluate(model, tokenizer, answers, cfg):
    """All scores of the policy on held-out prompts -> metrics, and "texts", both completions of each
    prompt.

    answers: [Answers] of the reference; its first completion is its side of the comparison.
    """
    # one completion of the policy for each prompt, drawn as those of the reference were
    prompts = [row.prompt for row in answers]
    one = preference_data.Sampling(1, cfg.min_new_tokens, cfg.max_new_tokens, cfg.temperature)
    drawn = preference_data.sample(model, tokenizer, prompts, one, cfg.seed + 2)
    mine = [completions[0] for completions in drawn]
    theirs = [row.completions[0] for row in answers]
    reward = preference_data.rewards(tokenizer, mine)
    reward_before = [row.rewards[0] for row in answers]
    won = wins(reward, reward_before)
    # how far the policy went: log(p / p_ref) of what it writes itself
    ref_logp, logp = before_and_after(model, tokenizer, list(zip(prompts, mine)))
    loss_before, loss_after = text_loss(model, tokenizer, answers)
    metrics = {
        "win rate": mean_interval(won) | {"ties": float((won == 0.5).mean())},
        "reward": {"before": np.mean(reward_before), "after": np.mean(reward)},
        "tokens": {"before": length(theirs), "after": length(mine)},
        "distinct-2": {"before": distinct(theirs), "after": distinct(mine)},
        "log-ratio of own samples": float((logp - ref_logp).mean()),
        "text loss": {"before": loss_before, "after": loss_after},
        "text perplexity": {"before": math.exp(loss_before), "after": math.exp(loss_after)},
    }
    # a longer text has more to find for a word list: prompts where both were cut at the same length
    end = tokenizer.eos_token_id
    cut = np.array([end not in (*a, *b) for a, b in zip(mine, theirs)])
    if cut.any():
        metrics["win rate at equal length"] = mean_interval(won[cut]) | {"prompts": int(cut.sum())}
    pairs = preference_data.rank(answers, cfg.least)
    if pairs:
        metrics |= pair_scores(model, tokenizer, pairs)
    # both texts, to be read
    texts = []
    for row, before, after in zip(answers, theirs, mine):
        beginning = row.prompt.rpartition("\n")[2]
        text = {"before": tokenizer.decode(before), "after": tokenizer.decode(after)}
        texts.append({"prompt": beginning} | text)
    return metrics | {"texts": texts}
