"""Decoding: greedy search, beam search, temperature, top-k, top-p, repetition penalty, each written out.

Greedy search takes the most probable token, beam search keeps the most probable few sentences, sampling draws: from all
tokens, the k best (top-k), or the fewest that have probability p together (top-p, nucleus). Holtzman et al. 2020,
arXiv:1904.09751; Keskar et al. 2019, arXiv:1909.05858, Sec. 4.1 (repetition penalty); Wu et al. 2016, arXiv:1609.08144,
Sec. 7 (length). Equations and sections are those of Holtzman et al.; lengths are penalised as in transformers.

Shapes: B prompts of N tokens, V tokens in the vocabulary, D width, K beams, T new tokens. A prompt is `input_ids` (B,N)
or, if it has images in it, `inputs_embeds` (B,N,D); shorter ones are padded on the left, `attention_mask` (B,N) is 0
there. Any causal language model of transformers will do.

    python deploy/decode.py --prompt "The best way to learn a language is"     # one prompt, seven decoders
    python deploy/decode.py --prompt "Why is the sky blue?" --chat             # as a question to the assistant
    python deploy/decode.py --temperature 1.5 --top-p 0.7 --beams 8
    python deploy/decode_study.py                                              # against what people wrote
"""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange

from utils import pretrained, run
from utils.run import check
from utils.text import clean, plain


@dataclass(frozen=True)
class Config:
    """Decode a prompt in seven ways."""

    prompt: str = "The best way to learn a language is"  # the text to go on with
    chat: bool = False  # put the prompt as a question to the assistant
    model: str = "smollm2"  # or a local folder, or a hub id
    max_new_tokens: int = 64  # tokens of each continuation
    # tokens of the longest prompt that is read: each of seven decoders reads it
    max_prompt: int = 512
    beams: int = 4  # sentences that beam search keeps
    length_penalty: float = 1.0  # a finished sentence scores sum log p / length ** this
    temperature: float = 0.7  # below 1 likely tokens get likelier
    top_k: int = 40
    top_p: float = 0.9
    # penalty of a token that was there before, in the prompt too; 1 is none
    repetition: float = 1.3
    seed: int = 0  # same seed, same draws
    device: str = "auto"
    out: str = "outputs/decode"


def ends(tokenizer, model=None):
    """The ids that end a text, in order: the tokenizer's, and those of the model's generation_config, often several."""
    named = [tokenizer.eos_token_id]
    config = getattr(model, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    named += more if isinstance(more, (list, tuple)) else [more]
    return sorted({i for i in named if i is not None})


def check_length(model, tokens, new, most=None):
    """Raises UserError unless a prompt of so many tokens and so many new ones fit into the model's positions.

    Past its table of positions a model crashes (GPT-2) or prints noise (rotary ones). most: tokens of a prompt that one
    is ready to wait for.
    """
    check(
        most is None or tokens <= most,
        f"the prompt has {tokens} tokens, --max-prompt is {most}: shorten the prompt",
    )
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    fits = room is None or tokens + new <= room
    check(
        fits,
        f"{tokens} tokens of prompt and {new} new ones, but the model has {room} positions: ask for fewer",
    )


def forward(model, mask, cache=None, **new):
    """Feed what is new: logits of the token that comes next (B,V) in float32, and the cache of all keys and values."""
    width = next(iter(new.values())).shape[1]
    # Padding does not count
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)[:, -width:]
    more = {"position_ids": positions, "cache": cache, "use_cache": True, "logits_to_keep": 1}
    out = model(**new, attention_mask=mask, **more)
    return out.logits[:, -1].float(), out.cache


def all_ones_mask(x):
    """The mask of prompts without padding: (B,N) or (B,N,D) -> ones (B,N)."""
    return torch.ones(x.shape[:2], dtype=torch.long, device=x.device)


def start(model, input_ids=None, inputs_embeds=None, attention_mask=None):
    """Read the prompt: logits (B,V), cache, mask (B,N), and how often each token was there (B,V)."""
    check(
        (input_ids is None) != (inputs_embeds is None),
        "a prompt is input_ids or inputs_embeds, one of the two",
    )
    x: Any = inputs_embeds if input_ids is None else input_ids
    check(x.shape[0] > 0 and x.shape[1] > 0, "the prompt has no token")
    mask = all_ones_mask(x) if attention_mask is None else attention_mask.long()
    check(
        mask.shape == x.shape[:2],
        f"attention_mask is {tuple(mask.shape)}, the prompt {tuple(x.shape[:2])}",
    )
    check(bool(mask[:, -1].all()), "pad prompts on the left: tokenizer.padding_side = 'left'")
    logits, cache = forward(
        model, mask, **({"inputs_embeds": x} if input_ids is None else {"input_ids": x})
    )
    seen = torch.zeros_like(logits)
    return (
        logits,
        cache,
        mask,
        seen if input_ids is None else seen.scatter_add(1, x, mask.to(seen.dtype)),
    )


def width_of(prompt):
    """N, tokens of the longest prompt; 0 if there is none, which `start` refuses."""
    found = prompt.get("input_ids")
    found = prompt.get("inputs_embeds") if found is None else found
    return 0 if found is None else found.shape[1]


def extend_mask(mask):
    """(B,N) -> (B,N+1): the token that was just made is seen from now on."""
    return torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)


def is_end(token, eos):
    """Where a token is one of `eos`: None, an id or several."""
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return torch.isin(token, torch.tensor(ids, dtype=token.dtype, device=token.device))


def repetition_penalty(logits, seen, penalty):
    """Make tokens that were there before less likely: (B,V), counts (B,V) -> (B,V). Keskar et al. 2019, Sec. 4.1.

    The paper divides every logit, which makes a token with a negative one likelier: these are multiplied, as in
    transformers. Words of the prompt count, too: never use it where an answer is to be copied from a passage.
    """
    return torch.where(
        seen > 0, torch.where(logits < 0, logits * penalty, logits / penalty), logits
    )


def top_k(logits, k):
    """Only the k likeliest tokens, and those as likely as the last of them: (B,V), the others -inf. Sec. 3.2."""
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits, p):
    """Only the nucleus, the fewest tokens whose probabilities add up to p or more: (B,V), the others -inf. Eq. 2."""
    ascending, order = logits.sort(dim=-1)
    # Together these have 1 - p at most: the rest has p
    tail = ascending.softmax(-1).cumsum(-1) <= 1 - p
    tail[..., -1] = False  # the likeliest stays, whatever p is
    return logits.masked_fill(tail.scatter(-1, order, tail), -torch.inf)


def sampler(temperature=1.0, k=0, p=1.0, generator=None):
    """A function that draws a token from logits: (B,V) -> (B,). k = 0 and p = 1 leave all tokens in."""
    check(
        temperature > 0 and k >= 0 and 0 < p <= 1,
        "temperature must be above 0, top-k at least 0, top-p in (0, 1]",
    )

    def draw(logits):
        logits = logits / temperature  # Sec. 3.3
        logits = top_k(logits, k) if k else logits
        logits = top_p(logits, p) if p < 1 else logits
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)

    return draw


def argmax_token(logits):
    """The most probable token: (B,V) -> (B,)."""
    return logits.argmax(-1)


@torch.no_grad()
def stream(model, pick=argmax_token, max_new_tokens=40, eos=None, pad=0, repetition=1.0, **prompt):
    """Yields the next token of every prompt, (B,), as soon as it is chosen; `pad` after an end, until all have ended.

    prompt: input_ids or inputs_embeds, attention_mask, as the head of this file says. Raises UserError if they do not
    fit together. eos: the ids that end a text.
    """
    check(
        max_new_tokens > 0 and repetition > 0,
        "max_new_tokens must be at least 1, the repetition penalty above 0",
    )
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
    """The most probable token each time: new tokens (B,T). Options: those of `stream`."""
    return torch.stack(list(stream(model, argmax_token, **options)), dim=1)


def sample(model, temperature=1.0, k=0, p=1.0, generator=None, **options):
    """Draws, from the k best tokens or the nucleus p if given: new tokens (B,T). Options: those of `stream`."""
    return torch.stack(list(stream(model, sampler(temperature, k, p, generator), **options)), dim=1)


@torch.no_grad()
def beam(
    model, beams=4, num_return=1, length_penalty=1.0, early_stopping=False, max_new_tokens=40, eos=None, pad=0,
    repetition=1.0, **prompt,
):  # fmt: skip
    """The likeliest sentences that a search K wide finds, best first: tokens (B,num_return,T), scores (B,num_return).

    The score of a sentence that ended is sum log p / T ** length_penalty. A prompt is done when K sentences have ended
    and none that goes on could score better at its present length (early_stopping: when K have ended).
    """
    check(
        1 <= num_return <= beams and max_new_tokens > 0,
        "beams must be at least num_return, and both at least 1",
    )
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
        ends = is_end(token, eos) | (length == max_new_tokens)
        going = (best - 1e9 * ends).topk(beams).indices
        # of those that ended, keep the best K by their score for this length
        for b in range(prompts):
            if not is_open[b]:
                continue
            for j in range(beams):  # an end outside of the best K is not a sentence that was found
                if ends[b, j]:
                    ended[b].append((best[b, j].item() / length**length_penalty, grown[b, j]))
            ended[b] = sorted(ended[b], key=lambda e: e[0], reverse=True)[:beams]
            best_possible = best[b, going[b, 0]].item() / length**length_penalty
            is_open[b] = len(ended[b]) < beams or (
                not early_stopping and best_possible > ended[b][-1][0]
            )
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
    found = [e for row in ended for e in row[:num_return]]
    tokens = torch.nn.utils.rnn.pad_sequence(
        [t for _, t in found], batch_first=True, padding_value=pad
    )
    scores = torch.tensor([s for s, _ in found], device=tokens.device)
    return rearrange(tokens, "(b r) t -> b r t", r=num_return), rearrange(
        scores, "(b r) -> b r", r=num_return
    )


@torch.no_grad()
def log_probs(model, tokens, input_ids=None, inputs_embeds=None, attention_mask=None):
    """log p of each of the tokens (B,T) after the prompt and the tokens before it: (B,T), in one pass."""
    embed = model.get_input_embeddings()
    x = embed(input_ids) if inputs_embeds is None else inputs_embeds
    mask = all_ones_mask(x) if attention_mask is None else attention_mask.long()
    x, mask = (
        torch.cat([x, embed(tokens)], dim=1),
        torch.cat([mask, torch.ones_like(tokens)], dim=1),
    )
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    out = model(
        inputs_embeds=x,
        attention_mask=mask,
        position_ids=positions,
        logits_to_keep=tokens.shape[1] + 1,
    )
    return out.logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def pieces(tokens, tokenizer):
    """Ids one after the other -> pieces of text, each as soon as its letters are whole: an emoji has several tokens."""
    ids, shown = [], ""
    for token in tokens:
        ids.append(int(token))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # the sign for bytes that are no letter yet
            yield text[len(shown) :]
            shown = text


def repeated(tokens, n=4):
    """Share of the runs of n tokens that stood there before, 0 ... 1: [id] -> float. 1 - distinct-n, Li et al. 2016."""
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def decoders(model, cfg, **options):
    """{name: a function from a prompt to new tokens (B,T)}: the seven decoders. Options: those of `stream`."""
    options = {"max_new_tokens": cfg.max_new_tokens} | options
    width = {"beams": cfg.beams, "length_penalty": cfg.length_penalty}
    return {
        "greedy": lambda prompt: greedy(model, **prompt, **options),
        f"{cfg.beams} beams": lambda prompt: beam(model, **width, **prompt, **options)[0][:, 0],
        f"penalty {cfg.repetition:g}": lambda prompt: greedy(
            model, repetition=cfg.repetition, **prompt, **options
        ),
        f"temperature {cfg.temperature:g}": lambda prompt: sample(
            model, cfg.temperature, **prompt, **options
        ),
        f"top-k {cfg.top_k}": lambda prompt: sample(model, k=cfg.top_k, **prompt, **options),
        f"top-p {cfg.top_p:g}": lambda prompt: sample(model, p=cfg.top_p, **prompt, **options),
        "all tokens": lambda prompt: sample(model, **prompt, **options),
    }


def left_padded(prompts, pad, device="cpu"):
    """[ids] of any lengths -> {"input_ids": (B,N), "attention_mask": (B,N)}."""
    wide = max(map(len, prompts))
    rows = [[pad] * (wide - len(ids)) + ids for ids in prompts]
    mask = [[0] * (wide - len(ids)) + [1] * len(ids) for ids in prompts]
    return {
        "input_ids": torch.tensor(rows, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def prompt_ids(tokenizer, prompt, chat):
    """A text to go on with, or a question to the assistant, in which no word is a command -> ids."""
    if not chat:
        return tokenizer(clean(prompt))["input_ids"]
    check(tokenizer.chat_template, "--chat: this model has no chat template; leave it out")
    turn = [{"role": "user", "content": plain(prompt, tokenizer)}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote them already


def check_flags(cfg):
    """Raises UserError for flags of which one makes no sense."""
    check(cfg.prompt.strip(), "--prompt is empty")
    numbers = (cfg.max_new_tokens, cfg.max_prompt, cfg.beams, cfg.top_k)
    check(min(numbers) > 0, "numbers of tokens, beams ... start at 1")
    sampler(cfg.temperature, cfg.top_k, cfg.top_p)
    check(cfg.repetition > 0, "--repetition must be above 0; 1 is no penalty")


def load(name, device):
    """-> tokenizer, model: smollm2, or a folder or hub id."""
    return (
        pretrained.smollm2(device) if name == "smollm2" else pretrained.language_model(name, device)
    )


def score(model, tokens, eos, **prompt):
    """Each new text up to its end: [(log p of each token (T,), share of 4-grams that are repeated)]."""
    log_p = log_probs(model, tokens, **prompt).cpu()
    lengths = [
        (is_end(row, eos).nonzero().flatten().tolist() + [len(row) - 1])[0] + 1 for row in tokens
    ]
    return [(log_p[i, :n], repeated(tokens[i, :n].tolist())) for i, n in enumerate(lengths)]


def main(cfg: Config) -> dict:
    """Decode one prompt in seven ways; writes the texts and their log probabilities."""
    check_flags(cfg)
    run.seed(cfg.seed)
    device = run.device(cfg.device)
    tokenizer, model = load(cfg.model, device)
    eos = ends(tokenizer, model)
    pad = tokenizer.eos_token_id or 0
    asked = prompt_ids(tokenizer, cfg.prompt, cfg.chat)
    check_length(model, len(asked), cfg.max_new_tokens, cfg.max_prompt)
    folder = run.output(cfg.out, cfg)
    prompt = left_padded([asked], pad, device)
    print(clean(cfg.prompt))
    texts = {}
    rows = {}
    for name, decoder in decoders(model, cfg, eos=eos, pad=pad).items():
        tokens = decoder(prompt)
        ((log_p, again),) = score(model, tokens, eos, **prompt)
        texts[name] = tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
        rows[name] = {"tokens": len(log_p), "log p": float(log_p.sum()), "repeated": again}
        print(
            f"\n{name}, sum log p {log_p.sum():.1f}, {100 * again:.0f} % of 4-grams repeated:\n{texts[name]}"
        )
    if cfg.repetition > 1:
        print(
            f"\npenalty {cfg.repetition:g} counts words of the prompt, too: not for answers out of a passage"
        )
    run.write_json(folder / "texts.json", texts)
    return run.report(folder, rows, then="python deploy/decode_study.py")


if __name__ == "__main__":
    run.cli(main, Config)
