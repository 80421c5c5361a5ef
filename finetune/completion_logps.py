"""Log-probabilities of completions under a policy and its reference: what DPO and its family learn
from.

Prompt and padding are masked out, the completion and its end token count. The policy is a model
with adapters, the reference the same model without them, so that no second copy is in memory.

Shapes: B rows, L tokens, V words of the vocabulary. Padding is on the left.
"""

from contextlib import contextmanager

import numpy as np
import torch

from finetune import sentiment
from finetune.lora_inject import names, replace_module


def sequence_logps(logits, ids, completion):
    """log p(completion | prompt), the sum over its tokens: logits (B, L, V), ids and completion (B,
    L) -> (B,).

    completion is True at the tokens that count: no prompt, no padding. Logits at position j speak of
    token j + 1.
    """
    log_p = logits[:, :-1].float().log_softmax(-1)  # (B, L-1, V)
    of_token = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, L-1)
    return (of_token * completion[:, 1:]).sum(-1)


def rows_to_batch(tokenizer, rows):
    """[(prompt, tokens of a completion)] -> ids, mask, completion, each (B, L)."""
    prompts = [tokenizer(text)["input_ids"] for text, _ in rows]
    written = [list(tokens) for _, tokens in rows]
    whole = [before + after for before, after in zip(prompts, written)]
    ids = sentiment.pad(whole, tokenizer.eos_token_id)
    mask = sentiment.pad([[True] * len(row) for row in whole], False)
    # the end of each row; padding is on the left
    place = torch.arange(ids.shape[1])
    length = torch.tensor([len(row) for row in written])
    completion = place >= ids.shape[1] - length[:, None]
    return ids, mask, completion


def pairs_to_batch(tokenizer, pairs):
    """[Pair] -> ids, mask, completion (2 B, L): the chosen ones, then the rejected ones."""
    chosen = [(pair.prompt, pair.chosen) for pair in pairs]
    rejected = [(pair.prompt, pair.rejected) for pair in pairs]
    return rows_to_batch(tokenizer, chosen + rejected)


def draw(tokenizer, pairs, cfg, i):
    """The batch of step i, the same in every run with this seed: each pair once before any is used
    again.
    """
    epoch, place = divmod(i * cfg.batch, len(pairs) - len(pairs) % cfg.batch)
    order = np.random.default_rng([cfg.seed, epoch]).permutation(len(pairs))
    return pairs_to_batch(tokenizer, [pairs[j] for j in order[place : place + cfg.batch]])


def logps(model, ids, mask, completion):
    """`sequence_logps` of a model; the head is asked for the completions alone."""
    last = int(completion.sum(-1).max()) + 1
    logits = sentiment.network(model)(ids, mask, last)
    return sequence_logps(logits, ids[:, -last:], completion[:, -last:])


@contextmanager
def reference(model):
    """The model without its adapters, in eval mode and without gradients; on leaving it is what it
    was.
    """
    found = {name: model.get_submodule(name) for name in names(model)}
    training = model.training
    for name, adapter in found.items():
        replace_module(model, name, adapter.base)
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for name, adapter in found.items():
            replace_module(model, name, adapter)
        model.train(training)
