"""Speculative decoding with a distilled draft model: acceptance, costs, and speed, predicted and measured.

Leviathan et al. 2022, arXiv:2211.17192: acceptance rate alpha (Sec. 3.3), tokens of a pass (Eq. 1), speed-up (Theorem
3.8). Theirs takes a pass over a draft to cost as much as one over a token. Here it does not, so its measured cost goes
into the prediction. Texts are of held-out pages, which the draft model has not learned from, and questions.

Shapes: one text of N tokens, drafts of G tokens, V tokens in the vocabulary.

    python deploy/draft_study.py                                          # the same layers, not trained
    python deploy/draft_study.py --draft outputs/distill_draft/draft      # 4 CPU minutes
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from deploy import decode, perplexity, speculative
from deploy.caches import NoCache, StaticCache
from deploy.distill_draft import acceptance_rate, draft_of, frequent_tokens, pieces_of
from deploy.drafters import DraftModel, NGram, PromptLookup, draft_llama, load_draft
from deploy.few_rows import use_few_rows
from deploy.llama import Llama
from utils import data, figures, run
from utils.run import check


@dataclass(frozen=True)
class Config:
    """Measure what a draft model of distill_draft.py gains."""

    draft: str = ""  # folder of the draft model; none: its layers as they are in the model
    model: str = "smollm2"  # the model that verifies
    max_new_tokens: int = 32
    texts: int = 3  # of each kind
    lengths: tuple[int, ...] = (1, 2, 3, 4, 5)  # fixed lengths of drafts
    longest: int = 3  # of adaptive ones
    rounds: int = 5  # in which costs are measured, the least counts
    held_out: int = 8  # pieces for acceptance by position
    length: int = 256  # tokens of a piece
    seed: int = 0
    out: str = "outputs/draft_study"


def speedup(alpha, draft, c, verify=1.0):
    """Speed against plain decoding: Leviathan et al., Theorem 3.8, with the cost of the pass over draft + 1 tokens.

    c: cost of a token of the draft model, verify: of that pass, both in passes of the model over one token.
    """
    return speculative.expected_tokens(alpha, draft) / (verify + draft * c)


@torch.no_grad()
def pass_costs(llama, small, longest, rounds, before=64):
    """CPU seconds of a pass over 1 ... longest + 1 tokens behind `before` others, and of a token of the draft model."""
    cache = StaticCache(llama, before + longest + 1)
    llama(torch.ones(1, before, dtype=torch.long), cache.positions(before), cache)
    drafter = DraftModel(small, before + 2)
    text = list(range(before + 1))
    drafter.propose(text, 1)
    seconds = {}
    for _ in range(rounds):
        # all of them once a round, in turn
        for width in range(1, longest + 2):
            cache.seen = before
            new = torch.ones(1, width, dtype=torch.long)
            start = time.process_time()
            llama(new, cache.positions(width), cache)
            seconds.setdefault(width, []).append(time.process_time() - start)
        start = time.process_time()
        drafter.propose(text, 1)
        seconds.setdefault("draft", []).append(time.process_time() - start)
    least = {name: min(times) for name, times in seconds.items()}
    return [least[width] for width in range(1, longest + 2)], least["draft"]


@torch.no_grad()
def distributions(llama, ids):
    """One text without a cache, (N,) -> p of the token that follows each: (N,V)."""
    cache = NoCache(llama)
    return llama(ids[None], cache.positions(len(ids)), cache)[0].float().softmax(-1)


def alpha_of(llama, small, prompt, new, temperature=0.0):
    """Mean acceptance rate along a text that was written without drafts; greedy: how often both argmax are the same."""
    ids = torch.tensor([*prompt, *new])
    p = distributions(llama, ids)[len(prompt) - 1 : -1]
    q = distributions(small, ids)[len(prompt) - 1 : -1]
    if temperature:
        return float(acceptance_rate(p, q).mean())
    return float((p.argmax(-1) == q.argmax(-1)).float().mean())


def acceptance_by_position(llama, small, ngram, pieces):
    """Held-out pieces (N,T) -> {drafter: mean acceptance rate at each position (T,)} of draws at temperature 1."""
    found = {"draft model": [], "n-grams": []}
    for piece in pieces:
        p = distributions(llama, piece)
        found["draft model"].append(acceptance_rate(p, distributions(small, piece)))
        text = piece.tolist()
        rows = [ngram.distribution(text[: place + 1]) for place in range(len(text))]
        found["n-grams"].append(acceptance_rate(p, torch.stack(rows)))
    return {name: torch.stack(rates).mean(0) for name, rates in found.items()}


def settings_of(cfg, llama, small, ngram):
    """{name: (makes a drafter, fixed length or 0)}; the first one is plain decoding."""
    room = llama.config.max_position_embeddings
    drafts = {"plain": (speculative.NoDrafts, 0)}
    lookup = PromptLookup(llama.config.vocab_size)
    drafts["prompt lookup"] = (lambda: lookup, 0)
    drafts["n-grams"] = (lambda: ngram, 0)
    for length in cfg.lengths:
        drafts[f"draft of {length}"] = (lambda: DraftModel(small, room), length)
    drafts["adaptive draft"] = (lambda: DraftModel(small, room), 0)
    return drafts


def compare_speed(llama, small, settings, prompts, cfg, temperature=0.0):
    """-> {setting: tokens a pass, speed, texts as plain decoding}, mean acceptance rate; all settings in turn."""
    seconds = dict.fromkeys(settings, 0.0)
    passes = dict.fromkeys(settings, 0)
    same = dict.fromkeys(settings, 0)
    alphas = []
    for number, ids in enumerate(prompts):
        plain = None
        for name, (make, fixed) in settings.items():
            generator = torch.Generator().manual_seed(cfg.seed + number)
            about = (make(), cfg.longest, fixed, temperature, generator)
            start = time.process_time()
            new, counts = speculative.generate(llama, ids, cfg.max_new_tokens, *about)
            seconds[name] += time.process_time() - start
            plain = new if plain is None else plain
            passes[name] += counts.passes
            same[name] += new == plain
        alphas.append(alpha_of(llama, small, ids, plain, temperature))
    rows = {}
    for name in settings:
        tokens = cfg.max_new_tokens * len(prompts)
        rows[name] = {
            "tokens a pass": tokens / passes[name],
            "speed": seconds["plain"] / seconds[name],
            "same text": same[name],
        }
    return rows, sum(alphas) / len(alphas)


def figure(path, by_position, rows, cfg, bins=32):
    """Left: acceptance rate by position. Right: speed by length of the draft, predicted and measured."""
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for name, rates in by_position.items():
        width = max(1, len(rates) // bins)
        means = [float(part.mean()) for part in rates.split(width)]
        left.plot([width * (i + 0.5) for i in range(len(means))], means, label=name)
    left.set(xlabel="position in the text", ylabel="acceptance rate", ylim=(0, 1))
    left.legend(frameon=False)
    kinds = dict.fromkeys(name.rpartition(", ")[0] for name in rows if ", draft of" in name)
    for number, kind in enumerate(kinds):
        about = [rows[f"{kind}, draft of {length}"] for length in cfg.lengths]
        color = f"C{number}"
        right.plot(cfg.lengths, [row["speed"] for row in about], "o", color=color, label=kind)
        right.plot(cfg.lengths, [row["predicted"] for row in about], "-", color=color)
    right.axhline(1, color="grey", linewidth=0.8)
    right.set(xlabel="tokens of a draft", ylabel="speed: points measured, lines predicted")
    right.legend(frameon=False)
    figures.close(fig, path)


def read_bytes(llama):
    """Numbers that a pass over one token reads: layers, norms and head, without the embedding's table."""
    layers = sum(p.numel() for p in llama.layers.parameters())
    return layers + llama.norm.weight.numel() + llama.head.weight.numel()


def main(cfg: Config) -> dict:
    """Acceptance by position, costs, then each kind of text; writes the table and the figure."""
    numbers = (cfg.max_new_tokens, cfg.texts, cfg.longest, cfg.rounds, cfg.held_out, *cfg.lengths)
    check(cfg.lengths and min(numbers) > 0 and cfg.length > 1, "numbers start at 1, --length at 2")
    check(cfg.texts <= len(speculative.QUESTIONS), f"--texts: {len(speculative.QUESTIONS)} at most")
    run.seed(cfg.seed)
    torch.set_num_threads(1)  # CPU time of several threads is no latency
    tokenizer, model = decode.load(cfg.model, "cpu")
    llama = use_few_rows(Llama(model.float()))
    small: Any = load_draft(cfg.draft, llama) if cfg.draft else None
    folder = run.output(cfg.out, cfg)
    learned, held_out = perplexity.split(data.docs())
    ids = tokenizer(learned, add_special_tokens=False, verbose=False).input_ids
    if small is None:
        tokens = frequent_tokens(ids, 8192, llama.config.vocab_size)
        small = draft_llama(draft_of(model, 2, tokens), llama)
    ngram = NGram(ids, llama.config.vocab_size, torch.Generator().manual_seed(cfg.seed))
    ids = tokenizer(held_out, add_special_tokens=False, verbose=False).input_ids
    pieces = pieces_of(ids, cfg.held_out, cfg.length)
    by_position = acceptance_by_position(llama, small, ngram, pieces)
    rows = {}
    for name, rates in by_position.items():
        rows[f"held-out pages, {name}"] = {"acceptance rate": float(rates.mean())}
    # costs, in passes over one token
    verify, draft = pass_costs(llama, small, max(cfg.lengths), cfg.rounds)
    c = draft / verify[0]
    for width, seconds in enumerate(verify, 1):
        rows[f"pass over {width}"] = {"ms": 1000 * seconds, "passes": seconds / verify[0]}
    rows["token of the draft"] = {"ms": 1000 * draft, "c": c}
    memory = read_bytes(small) / read_bytes(llama)
    rows["c by bytes read"] = {"c": memory}
    # speed, predicted and measured
    settings = settings_of(cfg, llama, small, ngram)
    prompts = speculative.texts(tokenizer, cfg.texts, cfg.seed, held_out)
    kinds = [(kind, prompts[kind], 0.0) for kind in prompts]
    kinds.append(("go on, sampled", prompts["go on"], 1.0))
    for kind, asked, temperature in kinds:
        about = (llama, small, settings, asked, cfg, temperature)
        found, alpha = compare_speed(*about)
        rows[f"{kind}, alpha"] = {"alpha": alpha}
        for length in cfg.lengths:
            row = found[f"draft of {length}"]
            row["predicted"] = speedup(alpha, length, c, verify[length] / verify[0])
            row["tokens predicted"] = speculative.expected_tokens(alpha, length)
            row["memory-bound"] = speedup(alpha, length, memory)
        rows |= {f"{kind}, {name}": row for name, row in found.items()}
    figure(folder / "draft_study.png", by_position, rows, cfg)
    return run.report(folder, rows, then=f"open {folder}/draft_study.png")


if __name__ == "__main__":
    run.cli(main, Config)
