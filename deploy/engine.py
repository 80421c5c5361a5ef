"""Continuous batching: an inference engine with a paged KV cache, chunked prefill and prefix sharing.

Yu et al. 2022 (Orca, OSDI): requests join and leave the batch at every step, so that a short answer
need not wait for a long one. Kwon et al. 2023, arXiv:2309.06180 (vLLM): keys and values lie in blocks
(paged_cache.py); who takes part in a step is decided by scheduler.py. One forward pass (llama.py) reads
the new tokens of all requests, one after the other: a chunk of a prompt, or the last token of an answer.

Shapes: T new tokens of all requests of a step (1,T), E width, V tokens in the vocabulary.

    python deploy/engine.py                          # 24 requests about the manuals, blocks over time
    python deploy/engine.py --common 128             # a system prompt is read once
    python deploy/engine.py --blocks 40              # too few blocks: preemption
    python deploy/engine.py --int8
    python deploy/engine_study.py                    # against static batches and transformers' engine
"""

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from deploy import decode, engine_blocks
from deploy.int8_linear import int8_layers
from deploy.llama import Llama
from deploy.paged_cache import BlockPool, PagedCache, Part
from deploy.scheduler import Request, Scheduler
from utils import data, run
from utils.run import check
from utils.text import clean


@dataclass(frozen=True)
class Config:
    """Answer a mixed bag of requests, and show who holds which block."""

    requests: int = 24
    max_new_tokens: int = 96  # of the longest answer; most are shorter
    common: int = 0  # tokens that all prompts begin with, as after a system prompt
    blocks: int = 256
    block_size: int = 8  # tokens
    max_batch: int = 8  # requests that run at once
    max_tokens: int = 128  # new tokens of a step: longer prompts are read in chunks
    policy: Literal["fcfs", "shortest"] = "fcfs"
    prefix_sharing: bool = True
    int8: bool = False  # linear layers in int8 (int8_linear.py)
    model: str = "smollm2"  # or a folder, or a hub id
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/engine"


class Engine:
    """Requests in, tokens out, one forward pass for all of them at a time.

    model: a Llama of transformers, or of llama.py. blocks x block_size tokens fit into the cache. max_batch:
    requests that run at once; max_tokens: new tokens of a step. policy: "fcfs" or "shortest".
    cache: PagedCache, or TritonPagedCache of triton_paged.py.
    """

    def __init__(
        self,
        model,
        blocks=256,
        block_size=8,
        max_batch=16,
        max_tokens=256,
        policy="fcfs",
        prefix_sharing=True,
        cache=PagedCache,
    ):
        check(min(max_batch, max_tokens) > 0, "max_batch and max_tokens must be at least 1")
        check(policy in ("fcfs", "shortest"), f"policy {policy}: there are fcfs and shortest")
        self.llama = model if isinstance(model, Llama) else Llama(model)
        self.pool = BlockPool(blocks, block_size)
        self.cache = cache(self.llama, blocks, block_size)
        about = (max_batch, max_tokens, policy, prefix_sharing)
        self.scheduler = Scheduler(self.pool, self.cache.copy, *about)
        # counters: steps, and tokens that were read
        self.steps = 0
        self.fed = 0

    def add(self, prompt, max_new_tokens, **about):
        """Put a request into the queue -> Request; `about`: its further fields.

        Raises UserError for a request that can never fit.
        """
        # a request that never fits would wait for ever
        request = Request(list(prompt), max_new_tokens, **about)
        asked = request.prompt and max_new_tokens > 0
        check(asked, "a request needs a prompt of one token, and asks for one")
        total = len(request.prompt) + max_new_tokens
        positions = self.llama.config.max_position_embeddings
        check(total <= positions, f"{total} tokens, but the model has {positions} positions")
        room = len(self.pool.holders) * self.pool.size
        check(total <= room, f"{total} tokens never fit into a cache of {room}")
        self.scheduler.waiting.append(request)
        return request

    def fork(self, request, **about):
        """One more answer to the same prompt (parallel sampling) -> Request. It shares the blocks of the
        prompt, if that is read and there is room in the batch; else it waits like any other."""
        scheduler = self.scheduler
        fields = {"eos": request.eos, "embeds": request.embeds, "names": request.names}
        twin = self.add(request.prompt, request.max_new_tokens, **fields | about)
        is_read = request.cached >= len(request.prompt)
        if is_read and len(scheduler.running) < scheduler.max_batch:
            scheduler.waiting.remove(twin)
            scheduler.fork(request, twin)
        return twin

    def cancel(self, request):
        """Stop a request, wherever it is; its blocks are free at once."""
        if not request.finished:
            self.scheduler.remove(request, "cancelled")

    def embeddings(self, parts):
        """Embeddings of the new tokens of all requests (1,T,E), and their positions (1,T)."""
        ids = []
        positions = []
        shown = []
        for request, count in parts:
            places = range(request.cached, request.cached + count)
            # image tokens bring embeddings of their own
            for i in places:
                if i in request.embeds:
                    shown.append((len(ids) + i - request.cached, request.embeds[i]))
            ids += request.tokens(places.start, places.stop)
            positions += places
        on = self.llama.inv_freq.device
        x = self.llama.embed(torch.tensor([ids], device=on))
        for row, embedding in shown:
            x[0, row] = embedding
        return x, torch.tensor([positions], device=on)

    @torch.no_grad()
    def step(self):
        """One forward pass over all that takes part -> [(request, its new token)]."""
        # who takes part, and with how many tokens
        parts = self.scheduler.schedule()
        if not parts:
            return []
        x, positions = self.embeddings(parts)
        self.cache.begin([Part(request.table, request.cached, count) for request, count in parts])
        # logits of the last token of each request
        ends = torch.tensor([count for _, count in parts]).cumsum(0) - 1
        logits = self.llama(x, positions, self.cache, keep=ends.to(x.device))[0].float()
        self.steps += 1
        self.fed += x.shape[1]
        # a token for each whose prompt is read
        said = []
        for (request, count), row in zip(parts, logits):
            request.cached += count
            # a chunk in the middle of a prompt says nothing yet
            if request.cached < request.length:
                continue
            token = int(request.pick(row[None]))
            request.new.append(token)
            said.append((request, token))
            if token in request.eos:
                self.scheduler.remove(request, "stop")
            elif len(request.new) == request.max_new_tokens:
                self.scheduler.remove(request, "length")
        return said

    def generate(self, prompts, max_new_tokens, **about):
        """Answers to prompts, lists of ids -> new tokens of each, in their order. Greedy, if `about` names
        no other `pick`."""
        requests = [self.add(prompt, max_new_tokens, **about) for prompt in prompts]
        while any(not request.finished for request in requests):
            self.step()
        return [request.new for request in requests]


def mixed_requests(tokenizer, count, most, seed=0, common=0):
    """Requests as people send them: openings of paragraphs of the manuals, 16 to 160 tokens, and lengths of
    answers of which most are short and some are long (exponential, 4 to `most`) -> prompts, lengths. All
    prompts begin with the same `common` tokens."""
    random = np.random.default_rng([seed, 3])
    pages = [page for _, page in data.docs()]
    paragraphs = [text for page in pages for text in page.split("\n\n")]
    beginning = tokenizer(clean(max(pages, key=len)[: 10 * common])).input_ids[:common]
    prompts = []
    for i in random.permutation(len(paragraphs)):
        ids = tokenizer(clean(paragraphs[i])).input_ids
        length = int(random.integers(16, 161))
        if len(ids) >= length:
            prompts.append(beginning + ids[:length])
        if len(prompts) == count:
            break
    lengths = random.exponential(most / 4, count).clip(min(4, most), most)
    return prompts, lengths.astype(int).tolist()


def main(cfg: Config) -> dict:
    """Answer all requests; tokens a CPU second, and the blocks over time."""
    check(min(cfg.requests, cfg.max_new_tokens) > 0, "--requests, --max-new-tokens: at least 1")
    check(cfg.common >= 0, "--common must be 0 or more")
    on = run.device(cfg.device)
    tokenizer, model = decode.load(cfg.model, on)
    about = (cfg.blocks, cfg.block_size, cfg.max_batch, cfg.max_tokens)
    model = model.float()
    if cfg.int8:
        int8_layers(model)
    # requests that arrive all at once
    engine = Engine(model, *about, cfg.policy, cfg.prefix_sharing)
    about = (cfg.requests, cfg.max_new_tokens, cfg.seed, cfg.common)
    prompts, lengths = mixed_requests(tokenizer, *about)
    requests = [engine.add(p, n) for p, n in zip(prompts, lengths)]
    folder = run.output(cfg.out, cfg)
    # all of them, step by step
    history = []
    start = time.process_time()
    while any(not request.finished for request in requests):
        engine.step()
        history.append(engine_blocks.owners(engine, requests))
    seconds = time.process_time() - start
    # answers, blocks, counters
    answers = [tokenizer.decode(request.new) for request in requests]
    run.write_json(folder / "answers.json", answers)
    engine_blocks.draw(folder / "blocks.png", history, len(requests))
    said = sum(len(request.new) for request in requests)
    metrics = {
        "prompt tokens": sum(map(len, prompts)),
        "new tokens": said,
        "steps": engine.steps,
        "tokens read": engine.fed,
        "tokens found in shared blocks": engine.scheduler.shared,
        "preemptions": engine.scheduler.preempted,
        "new tokens a CPU second": said / seconds,
    }
    return run.report(folder, metrics, then="python deploy/engine_study.py")


if __name__ == "__main__":
    run.cli(main, Config)
