"""Speculative decoding: cheap guesses, verified by the model in one pass; the same text, in fewer passes.

Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318. A drafter proposes some tokens, the
model reads all of them at once, and keeps the beginning that it would have written itself, with one token more.
Greedy, that is where its own choice is the draft; in sampling, by a rule that leaves its distribution as it is.
Drafters, in drafters.py: prompt lookup, which copies what followed the last words earlier in the text (Saxena
2023); a smaller model; the first layers of the model itself (early exit).

Shapes: one text of N tokens, drafts of G tokens, V tokens in the vocabulary.

    python deploy/speculative.py                       # passages to copy, to go on with, questions
    python deploy/speculative.py --fixed 5             # always five tokens
    python deploy/speculative.py --precision bf16
    python deploy/speculative.py --draft outputs/distill_draft/draft   # a draft model, see distill_draft.py
"""

import time
from dataclasses import dataclass, field
from typing import Literal

import torch

from deploy import decode
from deploy.caches import StaticCache
from deploy.drafters import DraftModel, EarlyExit, PromptLookup, load_draft
from deploy.few_rows import use_few_rows
from deploy.llama import Llama
from utils import data, run
from utils.run import check
from utils.text import clean

# Everyday questions
QUESTIONS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper.",
    "How does a bicycle stay upright?",
    "What should I cook tonight?",
    "Explain what money is to a child.",
    "Which animals sleep in winter, and why?",
)


@dataclass(frozen=True)
class Config:
    """Decode with and without drafts; tokens a pass, and the time of a token."""

    max_new_tokens: int = 64
    texts: int = 3  # of each kind
    longest: int = 8  # tokens of the longest draft
    fixed: int = 0  # always drafts of so many; 0: adaptive length
    shortest: int = 2  # tokens of the shortest run that prompt lookup looks for
    layers: int = 6  # that the drafter "early exit" has
    draft: str = ""  # folder of a draft model with the same vocabulary
    precision: Literal["fp32", "bf16"] = "fp32"
    model: str = "smollm2"
    seed: int = 0
    out: str = "outputs/speculative"


@dataclass
class Counts:
    """What happened: passes of the model, tokens proposed, and accepted."""

    passes: int = 0
    proposed: int = 0
    accepted: int = 0
    lengths: list[int] = field(default_factory=list)


def expected_tokens(alpha, draft):
    """Tokens of a pass, if each of `draft` tokens is accepted with probability alpha: Leviathan et al., Eq. 1."""
    if alpha == 1:
        return draft + 1
    return (1 - alpha ** (draft + 1)) / (1 - alpha)


def accept_greedy(logits, draft):
    """Greedy: logits (G+1,V) at the last token and at each of the draft (G,) -> tokens that are kept: the
    beginning of the draft that is the model's own choice, and the choice behind it."""
    own = logits.argmax(-1).tolist()
    kept = []
    for token, choice in zip(draft, own):
        if token != choice:
            break
        kept.append(token)
    return [*kept, own[len(kept)]]


def accept_sampled(p, q, draft, generator=None):
    """Speculative sampling, Leviathan et al., Algorithm 1: the tokens that are kept have the distribution p.

    p (G+1,V) of the model, q (G,V) of the drafter, that the draft (G,) was drawn from.
    """
    kept = []
    for place, token in enumerate(draft):
        # a token that the drafter likes too much is kept with probability p / q
        ratio = p[place, token] / q[place, token]
        if torch.rand((), generator=generator) >= ratio:
            # instead of it one from what p has more of than q
            rest = (p[place] - q[place]).clamp(min=0)
            return [*kept, int(torch.multinomial(rest, 1, generator=generator))]
        kept.append(token)
    return [*kept, int(torch.multinomial(p[len(draft)], 1, generator=generator))]


def next_length(length, accepted, proposed, longest):
    """Adaptive length: two tokens more after a draft that was right to its end, else one less; a text
    in which nothing can be guessed costs little."""
    if proposed and accepted == proposed:
        return min(longest, length + 2)
    return max(1, length - 1)


@torch.no_grad()
def generate(
    llama,
    ids,
    max_new_tokens,
    drafter,
    longest=8,
    fixed=0,
    temperature=0.0,
    generator=None,
    eos=(),
):
    """A text, list of ids -> new tokens, Counts. temperature 0: greedy, the same tokens as without drafts.

    drafter: propose(tokens, count, temperature) -> ids of the draft, their distributions (G,V) or None
    if greedy; fixed: drafts of so many tokens, 0: adaptive length; eos: ids that end the text.
    """
    check(len(ids) > 0 and max_new_tokens > 0, "a text needs a token, and asks for one")
    check(longest > 0 and fixed >= 0, "drafts have a token at least")
    tokens = list(ids)
    cache = StaticCache(llama, len(ids) + max_new_tokens + max(longest, fixed))
    counts = Counts()
    length = fixed or longest // 2 + 1
    while len(tokens) < len(ids) + max_new_tokens:
        # a draft; the last token comes from the model itself
        room = len(ids) + max_new_tokens - len(tokens) - 1
        draft, q = drafter.propose(tokens, min(length, room), temperature)
        # one pass over what the model has not read yet and the draft
        new = tokens[cache.seen :] + draft
        keep = torch.arange(len(new) - len(draft) - 1, len(new))
        logits = llama(torch.tensor([new]), cache.positions(len(new)), cache, keep)[0].float()
        if temperature:
            p = (logits / temperature).softmax(-1)
            kept = accept_sampled(p, q, draft, generator)
        else:
            kept = accept_greedy(logits, draft)
        accepted = len(kept) - 1
        # nothing comes after an end
        ends = [place for place, token in enumerate(kept) if token in eos]
        kept = kept[: ends[0] + 1] if ends else kept
        tokens += kept
        # what was read of a wrong draft is forgotten
        cache.seen = len(tokens) - 1
        counts.passes += 1
        counts.proposed += len(draft)
        counts.accepted += accepted
        counts.lengths.append(len(draft))
        if ends:
            break
        length = fixed or next_length(length, accepted, len(draft), longest)
    return tokens[len(ids) :], counts


class NoDrafts:
    """Plain decoding: a token a pass."""

    def propose(self, tokens, count, temperature=0.0):
        return [], torch.empty(0, 1)


def texts(tokenizer, count, seed=0, pages=None):
    """Prompts of three kinds -> {kind: lists of ids}: a passage to be copied, a passage to go on with, questions
    whose answers are in nothing that was said. pages: texts that passages are from; None: all of the manuals."""
    if pages is None:
        pages = [page for _, page in data.docs()]
    pages = [clean(page) for page in pages]
    paragraphs = [p for page in pages for p in page.split("\n\n") if 300 < len(p) < 500]
    order = torch.randperm(len(paragraphs), generator=torch.Generator().manual_seed(seed))
    found = {"copy": [], "go on": [], "answer": []}
    for i in order[:count].tolist():
        asked = f"Copy this text word for word:\n\n{paragraphs[i]}"
        found["copy"].append(decode.prompt_ids(tokenizer, asked, True))
        found["go on"].append(tokenizer(paragraphs[i]).input_ids[:24])
    for question in QUESTIONS[:count]:
        found["answer"].append(decode.prompt_ids(tokenizer, question, True))
    return found


def main(cfg: Config) -> dict:
    """Each drafter on each kind of text, beside plain decoding, in turn."""
    check(min(cfg.max_new_tokens, cfg.texts, cfg.longest, cfg.layers) > 0, "numbers start at 1")
    check(cfg.fixed >= 0, "--fixed must be 0 or more")
    check(0 < cfg.shortest <= 3, "--shortest must be 1, 2 or 3")
    check(cfg.texts <= len(QUESTIONS), f"--texts: there are {len(QUESTIONS)} of each kind")
    tokenizer, model = decode.load(cfg.model, "cpu")
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    llama = use_few_rows(Llama(model.to(dtype)))
    check(cfg.layers < len(llama.layers), f"--layers: the model has {len(llama.layers)}")
    small = load_draft(cfg.draft, llama) if cfg.draft else None
    folder = run.output(cfg.out, cfg)
    drafters = {
        "plain": lambda: NoDrafts(),
        "prompt lookup": lambda: PromptLookup(llama.config.vocab_size, shortest=cfg.shortest),
        "early exit": lambda: EarlyExit(llama, cfg.layers),
    }
    if small is not None:
        drafters["draft model"] = lambda: DraftModel(small)
    rows = {}
    for kind, prompts in texts(tokenizer, cfg.texts, cfg.seed).items():
        seconds = dict.fromkeys(drafters, 0.0)
        total = {name: Counts() for name in drafters}
        same = dict.fromkeys(drafters, 0)
        for ids in prompts:
            plain = None
            for name, make in drafters.items():
                start = time.process_time()
                about = (llama, ids, cfg.max_new_tokens, make(), cfg.longest, cfg.fixed)
                new, counts = generate(*about)
                seconds[name] += time.process_time() - start
                plain = new if plain is None else plain
                same[name] += new == plain
                total[name].passes += counts.passes
                total[name].proposed += counts.proposed
                total[name].accepted += counts.accepted
        for name in drafters:
            tokens = cfg.max_new_tokens * len(prompts)
            rows[f"{kind}, {name}"] = {
                "tokens a pass": tokens / total[name].passes,
                "accepted": total[name].accepted / max(1, total[name].proposed),
                "ms a token": 1000 * seconds[name] / tokens,
                "speed": seconds["plain"] / seconds[name],
                "same text": same[name],
            }
    return run.report(folder, rows)


if __name__ == "__main__":
    run.cli(main, Config)
