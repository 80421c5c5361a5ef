"""Generation with a KV cache: greedy search, sampling, beam search, and the log probability of
given tokens.

Greedy search takes the most probable token, sampling draws one, beam search keeps the most probable
K beginnings. Wu et al. 2016, arXiv:1609.08144, Sec. 7 (length); lengths are penalised as in
transformers. What happens to the logits before a token is chosen is in logits_processors.py.

Shapes: B prompts of N tokens, V tokens in the vocabulary, D width, K beams, T new tokens. A prompt
is `input_ids` (B,N) or, if it has images in it, `inputs_embeds` (B,N,D); shorter ones are padded on
the left, `attention_mask` (B,N) is 0 there. Any causal language model of transformers will do.
"""

from typing import Any

import torch
from einops import rearrange

from deploy.logits_processors import argmax_token, repetition_penalty, sampler
from utils.run import check


def ends(tokenizer, model=None):
    """The ids that end a text, in order: the tokenizer's, and those of the model's
    generation_config, often several.
    """
    # the tokenizer names one, the model none, one or several
    named = [tokenizer.eos_token_id]
    config = getattr(model, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    named += more if isinstance(more, (list, tuple)) else [more]
    return sorted({i for i in named if i is not None})


def check_length(model, tokens, new, most=None):
    """Raises UserError unless a prompt of so many tokens and so many new ones fit into the model's
    positions.

    Past its table of positions a model crashes (GPT-2) or prints noise (rotary ones). most: tokens
    of a prompt that one is ready to wait for.
    """
    short = most is None or tokens <= most
    check(short, f"the prompt has {tokens} tokens, --max-prompt is {most}: shorten the prompt")
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    fits = room is None or tokens + new <= room
    asked = f"{tokens} tokens of prompt and {new} new ones"
    check(fits, f"{asked}, but the model has {room} positions: ask for fewer")


def forward(model, mask, cache=None, **new):
    """Feed what is new: logits of the token that comes next (B,V) in float32, and the cache of all
    keys and values.
    """
    width = next(iter(new.values())).shape[1]
    # padding does not count
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)[:, -width:]
    more = {"position_ids": positions, "cache": cache, "use_cache": True, "logits_to_keep": 1}
    out = model(**new, attention_mask=mask, **more)
    return out.logits[:, -1].float(), out.cache


def all_ones_mask(x):
    """The mask of prompts without padding: (B,N) or (B,N,D) -> ones (B,N)."""
    return torch.ones(x.shape[:2], dtype=torch.long, device=x.device)


def start(model, input_ids=None, inputs_embeds=None, attention_mask=None):
    """Read the prompt: logits (B,V), cache, mask (B,N), and how often each token was there (B,V)."""
    one = (input_ids is None) != (inputs_embeds is None)
    check(one, "a prompt is input_ids or inputs_embeds, one of the two")
    x: Any = inputs_embeds if input_ids is None else input_ids
    check(x.shape[0] > 0 and x.shape[1] > 0, "the prompt has no token")
    mask = all_ones_mask(x) if attention_mask is None else attention_mask.long()
    fits = mask.shape == x.shape[:2]
    check(fits, f"attention_mask is {tuple(mask.shape)}, the prompt {tuple(x.shape[:2])}")
    check(bool(mask[:, -1].all()), "pad prompts on the left: tokenizer.padding_side = 'left'")
    # one pass over all of it; embeddings have no ids to count
    kind = "inputs_embeds" if input_ids is None else "input_ids"
    logits, cache = forward(model, mask, **{kind: x})
    seen = torch.zeros_like(logits)
    if input_ids is not None:
        seen = seen.scatter_add(1, x, mask.to(seen.dtype))
    return logits, cache, mask, seen


def width_of(prompt):
    """N, tokens of the longest prompt; 0 if there is none, which `start` refuses."""
    for name in ("input_ids", "inputs_embeds"):
        if prompt.get(name) is not None:
            return prompt[name].shape[1]
    return 0


def extend_mask(mask):
    """(B,N) -> (B,N+1): the token that was just made is seen from now on."""
    return torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)


def is_end(token, eos):
    """Where a token is one of `eos`: None, an id or several."""
    ids = [eos] if isinstance(eos, int) else list(eos or ())
    return torch.isin(token, torch.tensor(ids, dtype=token.dtype, device=token.device))


@torch.no_grad()
def stream(model, pick=argmax_token, max_new_tokens=40, eos=None, pad=0, repetition=1.0, **prompt):
    """Yields the next token of every prompt, (B,), as soon as it is chosen; `pad` after an end,
    until all have ended.

    prompt: input_ids or inputs_embeds, attention_mask, as the head of this file says. Raises
    UserError if they do not fit together. eos: the ids that end a text.
    """
    possible = max_new_tokens > 0 and repetition > 0
    check(possible, "max_new_tokens must be at least 1, the repetition penalty above 0")
    check_length(model, width_of(prompt), max_new_tokens)
    # prefill: the whole prompt is read at once
    logits, cache, mask, seen = start(model, **prompt)
    going = mask[:, -1] > 0
    for i in range(max_new_tokens):
        # choose a token for every prompt; one that has ended gets padding
        token = pick(repetition_penalty(logits, seen, repetition))
        token = torch.where(going, token, pad)
        yield token
        going = going & ~is_end(token, eos)
        if not going.any() or i == max_new_tokens - 1:
            return
        # decode: only the new token is read, all before it are in the cache
        seen = seen.scatter_add(1, token[:, None], torch.ones_like(seen[:, :1]))
        mask = extend_mask(mask)
        logits, cache = forward(model, mask, cache, input_ids=token[:, None])


def greedy(model, **options):
    """Greedy decoding: the most probable token each time -> (B,T). Options: those of `stream`."""
    tokens = list(stream(model, argmax_token, **options))
    return torch.stack(tokens, dim=1)


def sample(model, temperature=1.0, k=0, p=1.0, min_p=0.0, typical_p=1.0, generator=None, **options):
    """Sampling, from the full distribution or from what the truncations of `sampler` leave of it:
    new tokens (B,T).

    Options: those of `stream`.
    """
    pick = sampler(temperature, k, p, min_p, typical_p, generator)
    tokens = list(stream(model, pick, **options))
    return torch.stack(tokens, dim=1)


@torch.no_grad()
def beam(
    model,
    beams=4,
    num_return=1,
    length_penalty=1.0,
    early_stopping=False,
    max_new_tokens=40,
    eos=None,
    pad=0,
    repetition=1.0,
    **prompt,
):
    """Beam search, the likeliest sentences that K beams find, best first.

    -> tokens (B,num_return,T), scores (B,num_return). The score of a sentence that ended is
    (sum log p) / T ** length_penalty. A prompt is done when K sentences have ended and none that goes on
    could score better at its present length (early_stopping: when K have ended).
    """
    possible = 1 <= num_return <= beams and max_new_tokens > 0
    check(possible, "beams must be at least num_return, and both at least 1")
    check(repetition > 0, "the repetition penalty must be above 0")
    check_length(model, width_of(prompt), max_new_tokens)
    # prefill: the prompt is read once, and its keys and values are copied to all K beams
    logits, cache, mask, seen = start(model, **prompt)
    prompts, vocabulary = logits.shape
    cache.batch_repeat_interleave(beams)
    logits, mask, seen = (x.repeat_interleave(beams, 0) for x in (logits, mask, seen))
    score = torch.full((prompts, beams), -1e9, device=logits.device)
    score[:, 0] = 0  # all beams are still the same: only the first may go on
    text = torch.empty(prompts, beams, 0, dtype=torch.long, device=logits.device)
    # (score, tokens) of the best K sentences that ended
    ended: list[list] = [[] for _ in range(prompts)]
    is_open = [True] * prompts
    first_row = beams * torch.arange(prompts, device=logits.device)[:, None]
    end_ids = 1 if eos is None or isinstance(eos, int) else len(eos)
    extra_candidates = 1 + end_ids  # so many times K: enough that do not end
    for length in range(1, max_new_tokens + 1):
        # score every beam with every next token: (B, K V), and take the best
        log_p = repetition_penalty(logits.log_softmax(-1), seen, repetition)
        total = rearrange(score.view(-1, 1) + log_p, "(b k) v -> b (k v)", k=beams)
        best, index = total.topk(extra_candidates * beams)
        parent = index // vocabulary
        token = index % vocabulary
        before = text.gather(1, parent[..., None].expand(-1, -1, length - 1))
        grown = torch.cat([before, token[..., None]], dim=-1)
        # of those that did not end, the best K go on
        ended_now = is_end(token, eos) | (length == max_new_tokens)
        going = (best - 1e9 * ended_now).topk(beams).indices
        # of those that ended, keep the best K by their score for this length
        for b in range(prompts):
            if not is_open[b]:
                continue
            for j in range(beams):  # an end outside of the best K is not a sentence that was found
                if ended_now[b, j]:
                    ended[b].append((best[b, j].item() / length**length_penalty, grown[b, j]))
            ended[b] = sorted(ended[b], key=lambda e: e[0], reverse=True)[:beams]
            # the prompt is done when K ended, and no open beam could score better than they do
            best_possible = best[b, going[b, 0]].item() / length**length_penalty
            better = best_possible > ended[b][-1][0] if ended[b] else True
            is_open[b] = len(ended[b]) < beams or (better and not early_stopping)
        if not any(is_open) or length == max_new_tokens:
            break
        # the beams of the next step: their scores, texts, and the past of the parent of each
        score = best.gather(1, going)
        text = grown.gather(1, going[..., None].expand(-1, -1, length))
        rows = (first_row + parent.gather(1, going)).flatten()
        token = token.gather(1, going).view(-1, 1)
        cache.reorder_cache(rows)  # the past of each beam is that of its parent
        seen = seen[rows].scatter_add(1, token, torch.ones_like(seen[:, :1]))
        mask = extend_mask(mask)
        logits, cache = forward(model, mask, cache, input_ids=token)
    # the best sentences of every prompt, padded to one length
    found = [e for row in ended for e in row[:num_return]]
    sentences = [text for _, text in found]
    tokens = torch.nn.utils.rnn.pad_sequence(sentences, batch_first=True, padding_value=pad)
    scores = torch.tensor([score for score, _ in found], device=tokens.device)
    tokens = rearrange(tokens, "(b r) t -> b r t", r=num_return)
    scores = rearrange(scores, "(b r) -> b r", r=num_return)
    return tokens, scores


@torch.no_grad()
def log_probs(model, tokens, input_ids=None, inputs_embeds=None, attention_mask=None):
    """log p of each of the tokens (B,T) after prompt and tokens before it, in one pass: (B,T)."""
    embed = model.get_input_embeddings()
    x = embed(input_ids) if inputs_embeds is None else inputs_embeds
    mask = all_ones_mask(x) if attention_mask is None else attention_mask.long()
    # the prompt and the tokens, one after the other
    x = torch.cat([x, embed(tokens)], dim=1)
    mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    out = model(
        inputs_embeds=x,
        attention_mask=mask,
        position_ids=positions,
        logits_to_keep=tokens.shape[1] + 1,
    )
    # logits at a position speak of the next token
    log_p = out.logits[:, :-1].float().log_softmax(-1)
    return log_p.gather(-1, tokens[..., None]).squeeze(-1)
