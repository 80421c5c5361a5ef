"""Contrastive search: of the k likeliest tokens the one that is likely, and unlike all before it.

Su et al. 2022, arXiv:2202.06417. A text that repeats itself has hidden states that are alike: a
candidate whose state is near to that of a token before it is punished (Eq. 5). No draws: the same
prompt gives the same text. transformers 5 has moved its version out, to code on the hub that it runs
with trust only; this one is proven against Eq. 5 computed directly.

Shapes: B prompts of N tokens, V tokens in the vocabulary, K candidates, D width.
"""

import torch
from einops import rearrange
from torch.nn.functional import normalize

from deploy.generation import check_length, extend_mask, forward, is_end, start, width_of
from utils.run import check


class HiddenStates:
    """A model that keeps the hidden states of its last pass, after the final norm: `last` (B,N,D)."""

    def __init__(self, model):
        self.model = model
        self.config = model.config

    def __call__(self, **inputs):
        out = self.model(**inputs, output_hidden_states=True)
        self.last = out.hidden_states[-1].float()
        return out


def degeneration_penalty(candidates, before, mask):
    """The largest cosine similarity of a candidate to a token before it: (B,K,D), (B,N,D), (B,N) ->
    (B,K). Su et al. 2022, Eq. 5, second term. Where the mask is 0 there is padding.
    """
    similarity = normalize(candidates, dim=-1) @ normalize(before, dim=-1).mT
    return similarity.masked_fill(mask[:, None] == 0, -torch.inf).amax(-1)


@torch.no_grad()
def contrastive_stream(model, k=4, alpha=0.6, max_new_tokens=40, eos=None, pad=0, **prompt):
    """Yields the next token of every prompt, (B,), as soon as it is chosen; `pad` after an end,
    until all have ended.

    alpha: weight of the penalty, 0 is greedy decoding. Each step is one pass over K tokens of each prompt.
    prompt, eos: those of generation.stream. Raises UserError for values that make no sense.
    """
    possible = k >= 1 and 0 <= alpha <= 1 and max_new_tokens > 0
    check(possible, "contrastive search needs k of at least 1, alpha in [0, 1], and tokens to make")
    check_length(model, width_of(prompt), max_new_tokens)
    model = HiddenStates(model)
    # prefill: the states of the whole prompt are what is compared with
    logits, cache, mask, _ = start(model, **prompt)
    before = model.last
    k = min(k, logits.shape[-1])
    first_row = k * torch.arange(len(logits), device=logits.device)
    going = mask[:, -1] > 0
    for _ in range(max_new_tokens):
        # the candidates, read side by side: the cache of each prompt is copied K times
        confidence, candidates = logits.softmax(-1).topk(k)
        cache.batch_repeat_interleave(k)
        wide = extend_mask(mask).repeat_interleave(k, 0)
        after, cache = forward(model, wide, cache, input_ids=candidates.view(-1, 1))
        states = rearrange(model.last, "(b k) 1 d -> b k d", k=k)
        # Eq. 5: confidence of the model, and degeneration penalty
        penalty = degeneration_penalty(states, before, mask)
        choice = ((1 - alpha) * confidence - alpha * penalty).argmax(-1)
        # what was read of the chosen one is kept
        rows = first_row + choice
        cache.batch_select_indices(rows)
        logits = after[rows]
        before = torch.cat([before, model.last[rows]], dim=1)
        mask = extend_mask(mask)
        token = torch.where(going, candidates.flatten()[rows], pad)
        yield token
        going = going & ~is_end(token, eos)
        if not going.any():
            return


def contrastive_search(model, **options):
    """Contrastive search: new tokens (B,T). Options: those of `contrastive_stream`."""
    return torch.stack(list(contrastive_stream(model, **options)), dim=1)
