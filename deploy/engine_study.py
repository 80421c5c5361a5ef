"""Continuous batching against static batches and transformers' own engine: tokens a CPU second, in one run.

The same mixed requests (engine.py), greedy, float32, each way several times in turn: static batches, padded
to the longest prompt and run to the longest answer; transformers' continuous batching, with the same number
of requests at once; the engine of this chapter, also with int8 layers. Beside the speed stands how many
answers are those of each prompt alone, and the perplexity of held-out text with and without int8 layers.

    python deploy/engine_study.py
"""

import copy
import time
from dataclasses import dataclass

import torch

from deploy import decode, generation, perplexity
from deploy.engine import Engine, mixed_requests
from deploy.int8_linear import int8_layers
from deploy.llama import Llama
from utils import run
from utils.run import check


@dataclass(frozen=True)
class Config:
    """Compare three ways to answer the same requests."""

    requests: int = 24
    max_new_tokens: int = 96  # of the longest answer
    batch: int = 8  # requests at once
    blocks: int = 256
    block_size: int = 8
    held_out: int = 8  # pieces of 128 tokens, for the perplexity
    rounds: int = 2  # times each way, in turn
    model: str = "smollm2"
    seed: int = 0
    out: str = "outputs/engine_study"


def static_batches(model, prompts, lengths, batch):
    """Batches in the order of arrival, left-padded; each goes on until its longest answer is done."""
    answers = []
    for first in range(0, len(prompts), batch):
        part = slice(first, first + batch)
        # all wait for the longest answer of the batch
        padded = decode.left_padded(prompts[part], 0)
        longest = max(lengths[part])
        about = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found = model.generate(**padded, max_new_tokens=longest, **about)
        # what goes beyond its own length was computed in vain
        new = found[:, padded["input_ids"].shape[1] :].tolist()
        answers += [row[:length] for row, length in zip(new, lengths[part])]
    return answers


def transformers_engine(model, prompts, lengths, batch, blocks, block_size):
    """transformers' continuous batching through its manager, for every request has its own length."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    about = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=8)
    config = ContinuousBatchingConfig(
        page_size=block_size,
        num_blocks=blocks,
        max_batch_tokens=256,
        max_requests_per_batch=batch,
    )
    # requests in the order of arrival, answers as they end
    done = {}
    with model.continuous_batching_context_manager(
        generation_config=about, continuous_batching_config=config
    ) as manager:
        for number, (prompt, length) in enumerate(zip(prompts, lengths)):
            manager.add_request(prompt, request_id=str(number), max_new_tokens=length)
        while len(done) < len(prompts):
            found = manager.get_result(timeout=1)
            if found is not None and found.is_finished():
                done[int(found.request_id)] = found.generated_tokens
    return [done[number] for number in range(len(prompts))]


def own_engine(llama, prompts, lengths, batch, blocks, block_size):
    """The engine of this chapter."""
    engine = Engine(llama, blocks, block_size, batch)
    requests = [engine.add(p, n) for p, n in zip(prompts, lengths)]
    while any(not request.finished for request in requests):
        engine.step()
    return [request.new for request in requests]


def alone(model, prompts, lengths):
    """Each prompt by itself."""
    answers = []
    for prompt, length in zip(prompts, lengths):
        ids = torch.tensor([prompt])
        answers.append(generation.greedy(model, input_ids=ids, max_new_tokens=length)[0].tolist())
    return answers


def main(cfg: Config) -> dict:
    """Every way in turn; the fastest round of each counts."""
    least = min(cfg.requests, cfg.max_new_tokens, cfg.batch, cfg.rounds, cfg.held_out)
    check(least > 0, "all numbers must be at least 1")
    tokenizer, model = decode.load(cfg.model, "cpu")
    model = model.float()
    folder = run.output(cfg.out, cfg)
    # the same requests for all, weights in float32 and with int8 layers
    prompts, lengths = mixed_requests(tokenizer, cfg.requests, cfg.max_new_tokens, cfg.seed)
    quantised = int8_layers(copy.deepcopy(model))
    llama = Llama(model)
    in_int8 = Llama(quantised)
    cache = (cfg.batch, cfg.blocks, cfg.block_size)
    ways = {
        "static batches": lambda: static_batches(model, prompts, lengths, cfg.batch),
        "transformers, continuous": lambda: transformers_engine(model, prompts, lengths, *cache),
        "engine": lambda: own_engine(llama, prompts, lengths, *cache),
        "engine, int8": lambda: own_engine(in_int8, prompts, lengths, *cache),
    }
    _, held_out = perplexity.texts_of(tokenizer, 1, cfg.held_out, 128)
    # what each prompt gets by itself: the answers to compare with
    wanted = alone(model, prompts, lengths)
    seconds = {name: [] for name in ways}
    same = {}
    # every way once a round
    for _ in range(cfg.rounds):
        for name, way in ways.items():
            start = time.process_time()
            answers = way()
            seconds[name].append(time.process_time() - start)
            same[name] = sum(a == b for a, b in zip(answers, wanted))
    # speed of the quickest round
    metrics = {"requests": cfg.requests, "new tokens": sum(lengths)}
    for name in ways:
        metrics[name] = {
            "new tokens a CPU second": sum(lengths) / min(seconds[name]),
            "answers as alone": same[name],
        }
    metrics["perplexity"] = {
        "fp32": perplexity.perplexity(model, held_out),
        "int8": perplexity.perplexity(quantised, held_out),
    }
    return run.report(folder, metrics)


if __name__ == "__main__":
    run.cli(main, Config)
