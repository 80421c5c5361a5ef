"""KV cache: greedy decoding that reads each token once, with caches that grow, are pre-allocated, int8, or a window.

A decoder without memory reads the whole text again for every token. Keys and values of earlier
tokens do not change, so a cache keeps them: prefill reads the prompt at once, and each new token
costs a forward pass of length one (Pope et al. 2022, arXiv:2211.05102, Sec. 2). Costs are predicted
(cache_costs.py), then measured, interleaved, in CPU time of one thread, float32, with the products
of few_rows.py; the caches are in caches.py, what int8 and window lose is in cache_quality.py.

Shapes: B prompts of N tokens, equally long, T new tokens.

    python deploy/kv_cache.py                              # the tables and the figure
    python deploy/kv_cache.py --prompt 64 --sinks 1        # a short prompt; one attention sink
"""

import copy
import time
from dataclasses import dataclass

import torch

from deploy import cache_costs, cache_quality, decode
from deploy.caches import GrowingCache, Int8Cache, NoCache, StaticCache, WindowCache
from deploy.few_rows import use_few_rows
from deploy.llama import Llama
from utils import run
from utils.run import check

LAST = torch.tensor([-1])


@dataclass(frozen=True)
class Config:
    """Predict and measure what KV caches cost, and what int8 and a window lose."""

    model: str = "smollm2"  # or a local folder, or a hub id
    prompt: int = 256  # tokens of the prompt, from a page of a manual
    max_new_tokens: int = 24  # tokens that are generated in each round
    uncached: int = 4  # of these, with no cache
    rounds: int = 3  # each cache once a round
    contexts: tuple[int, ...] = (256, 1024, 4096)  # tokens in the caches whose speed is measured
    sinks: int = 4  # first tokens that the window keeps
    window: int = 252  # last tokens that it keeps
    text: int = 2048  # tokens of the page whose log p is compared
    seed: int = 0
    out: str = "outputs/kv_cache"


def read(llama, unread, cache, chunk=None):
    """Read tokens (B,N) into the cache -> logits (B,V) of the last one. chunk: so many at a time
    (chunked prefill).
    """
    *before, last = unread.split(chunk or unread.shape[1], dim=1)
    for piece in before:
        llama(piece, cache.positions(piece.shape[1]), cache, keep=LAST)
    return llama(last, cache.positions(last.shape[1]), cache, keep=LAST)[:, -1]


def stream(llama, ids, max_new_tokens, cache, chunk=None):
    """Greedy decoding, prompts (B,N) of equal length -> yields new tokens (B,1), one after the other.

    Raises UserError for a prompt without tokens, or read in chunks by what keeps none.
    """
    check(ids.shape[1] > 0, "the prompt has no tokens")
    keeps = type(cache) is not NoCache
    check(keeps or chunk is None, "a prompt in chunks needs a cache that keeps them")
    # prefill: the whole prompt, and with it the first token
    text = ids
    logits = read(llama, text, cache, chunk)
    for step in range(max_new_tokens):
        token = logits.argmax(-1, keepdim=True)
        yield token
        text = torch.cat([text, token], dim=1)
        # decode: the one token that was not read yet; without a cache all of the text
        if step + 1 < max_new_tokens:
            logits = read(llama, text[:, cache.seen :], cache)


def generate(llama, ids, max_new_tokens, cache, chunk=None):
    """Greedy decoding: prompts (B,N) of equal length -> new tokens (B,T)."""
    return torch.cat(list(stream(llama, ids, max_new_tokens, cache, chunk)), dim=1)


def make_caches(llama, cfg, length, batch=1):
    """{name: cache} of those that keep tokens, each empty, with room for `length` tokens."""
    return {
        "growing": GrowingCache(llama),
        "static": StaticCache(llama, length, batch),
        "int8": Int8Cache(llama, length, batch),
        "window": WindowCache(llama, cfg.sinks, cfg.window),
    }


class Clock:
    """CPU seconds between tokens; `put` and `end` are what generate of transformers calls."""

    def __init__(self):
        self.began = time.process_time()
        self.seconds = []

    def put(self, tokens):
        now = time.process_time()
        self.seconds.append(now - self.began)
        self.began = now

    def end(self):
        pass


def timed(tokens):
    """Tokens one after the other -> CPU seconds of each, the first with the prefill."""
    clock = Clock()
    for token in tokens:
        clock.put(token)
    return clock.seconds


def timed_transformers(model, ids, max_new_tokens):
    """The same of generate of transformers, greedy, with its default cache."""
    clock = Clock()
    length = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens}
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, streamer=clock, **length
    )
    return clock.seconds[1:]  # the first call is given the prompt


def median(values):
    return sorted(values)[len(values) // 2]


def compare_speed(model, llama, ids, cfg):
    """{name: {"first token, ms", "a token, ms", "of transformers"}}, all of them once a round, in turn."""
    seconds = {}
    for _ in range(cfg.rounds):
        found = {"transformers": timed_transformers(model, ids, cfg.max_new_tokens)}
        found["no cache"] = timed(stream(llama, ids, cfg.uncached, NoCache(llama)))
        for name, cache in make_caches(llama, cfg, ids.shape[1] + cfg.max_new_tokens).items():
            found[name] = timed(stream(llama, ids, cfg.max_new_tokens, cache))
        for name, times in found.items():
            seconds.setdefault(name, []).append(times)
    rows = {}
    for name, rounds in seconds.items():
        later = [x for times in rounds for x in times[1:]]
        first = [times[0] for times in rounds]
        rows[name] = {"first token, ms": 1000 * median(first), "a token, ms": 1000 * median(later)}
    for row in rows.values():
        row["of transformers"] = row["a token, ms"] / rows["transformers"]["a token, ms"]
    return rows


def fill(cache, llama, length):
    """Put `length` random keys and values of one sequence into an empty cache."""
    heads = llama.config.num_key_value_heads
    for layer in range(len(llama.layers)):
        k, v = torch.randn(2, 1, heads, length, llama.head_dim)
        cache.store(layer, k, v)
        cache.advance(layer, length)


def compare_contexts(llama, cfg, steps=4):
    """{"static, 256 tokens": {"MB held", "MB predicted", "a token, ms"}} of full caches."""
    small = cache_costs.kv_bytes_per_token(llama.config, 1 + 4 / llama.head_dim)
    full = cache_costs.kv_bytes_per_token(llama.config, llama.embed.weight.element_size())
    rows = {}
    for length in cfg.contexts:
        caches = make_caches(llama, cfg, length + steps)
        seconds = {name: [] for name in caches}
        for cache in caches.values():
            fill(cache, llama, length)
        # one token each, in turn
        for _ in range(steps):
            for name, cache in caches.items():
                clock = Clock()
                clock.put(read(llama, torch.ones(1, 1, dtype=torch.long), cache))
                seconds[name] += clock.seconds
        room = length + steps
        predicted = {"growing": full * room, "static": full * room, "int8": small * room}
        predicted["window"] = full * min(room, cfg.sinks + cfg.window)
        for name, cache in caches.items():
            rows[f"{name}, {length} tokens"] = {
                "MB held": cache.bytes() / 1e6,
                "MB predicted": predicted[name] / 1e6,
                "a token, ms": 1000 * median(seconds[name]),
            }
    return rows


def predict(llama, prompt):
    """{"machine, float32": rates, "prefill, predicted": FLOPs, bytes and ms of each limit}."""
    bandwidths = {}
    rates = {}
    rows = {}
    for name, dtype in {"float32": torch.float32, "bf16": torch.bfloat16}.items():
        bandwidths[name] = cache_costs.bandwidth(dtype)
        rates[name] = cache_costs.gemm_rate(dtype)
        rows[f"machine, {name}"] = {
            "one row (GEMV), GB/s": bandwidths[name] / 1e9,
            "256 rows (GEMM), GFLOP/s": rates[name] / 1e9,
        }
    number = llama.embed.weight.element_size()
    cached = prompt * cache_costs.kv_bytes_per_token(llama.config, number)
    size = cache_costs.weight_bytes(llama) + cached
    passes = {
        "prefill, predicted": cache_costs.forward_flops(llama.config, prompt),
        "a token, predicted": cache_costs.forward_flops(llama.config, 1, prompt),
    }
    for name, flops in passes.items():
        rows[name] = {
            "GFLOPs": flops / 1e9,
            "MB read": size / 1e6,
            "FLOPs a byte": flops / size,
            "arithmetic, ms": 1000 * flops / rates["float32"],
            "memory, ms": 1000 * size / bandwidths["float32"],
        }
    # the products of a token alone, with the model's own matrices
    half = copy.deepcopy(llama).to(torch.bfloat16)
    rows["linear layers of a token"] = {
        "float32, ms": 1000 * cache_costs.products_seconds(llama),
        "bf16, ms": 1000 * cache_costs.products_seconds(half),
    }
    return rows


def main(cfg: Config) -> dict:
    """Costs predicted and measured; writes the table and the figure of log p by position."""
    numbers = (cfg.prompt, cfg.uncached - 1, cfg.max_new_tokens - 1, cfg.rounds, *cfg.contexts)
    check(min(numbers) > 0, "tokens, rounds ... start at 1, new tokens at 2")
    check(cfg.text > cfg.prompt, "--text must be longer than --prompt")
    run.seed(cfg.seed)
    torch.set_num_threads(1)  # CPU time of several threads is no latency
    tokenizer, model = decode.load(cfg.model, "cpu")
    model = model.float()
    llama = Llama(model)
    ids = cache_quality.long_text(tokenizer, cfg.text)
    WindowCache(llama, cfg.sinks, cfg.window)  # raises UserError if it makes no sense
    longest = max(cfg.text, cfg.prompt + cfg.max_new_tokens, *cfg.contexts)
    known = llama.config.max_position_embeddings
    check(longest <= known, f"{longest} tokens, but the model has {known} positions: ask for less")
    folder = run.output(cfg.out, cfg)
    rows = predict(llama, cfg.prompt)
    seconds = cache_costs.products_seconds(use_few_rows(llama))
    rows["linear layers of a token"]["float32, few rows, ms"] = 1000 * seconds
    rows |= compare_speed(model, llama, ids[:, : cfg.prompt], cfg)
    rows |= compare_contexts(llama, cfg)
    rows |= cache_quality.compare_quality(llama, ids, cfg, folder / "kv_cache.png")
    return run.report(folder, rows, then=f"open {folder}/kv_cache.png")


if __name__ == "__main__":
    run.cli(main, Config)
