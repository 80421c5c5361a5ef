"""torch.compile and torch.jit.trace of a decode step, with a static cache whose position is an input.

torch.compile (Ansel et al. 2024, ASPLOS, PyTorch 2) follows Python code at its first call and writes
kernels for what it saw; where a number of Python changes, it has to compile again. A cache that counts
its tokens in Python does so at each token, one whose position is a tensor never. torch.jit.trace, the
older way, records one call: a branch is recorded as it went.

Shapes: a sequence of T new tokens, a cache of N slots, L layers, K heads of D numbers.

    python deploy/export_compile.py                # compile, count graphs, time; trace
    python deploy/export_compile.py --layers 4
"""

import os
import shutil
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from deploy import decode, kv_cache
from deploy.caches import StaticCache
from deploy.export_onnx import quiet
from deploy.export_step import DecodeStep
from deploy.export_times import measure
from deploy.llama import attention
from utils import run
from utils.run import check


@dataclass(frozen=True)
class Config:
    """Compile and trace a decode step, and compare with eager PyTorch."""

    model: str = "smollm2"  # or a local folder, or a hub id
    layers: int = 0  # only the first so many; 0: all
    length: int = 160  # slots of the static cache
    prompt: int = 32  # tokens of the prompt
    max_new_tokens: int = 12  # tokens that are generated
    rounds: int = 12  # each way once a round, the quickest counts
    deepspeed: bool = False  # ask DeepSpeed's init_inference for a quicker model, too
    seed: int = 0
    out: str = "outputs/export_compile"


class SlotCache:
    """A static cache without a counter: new keys and values go into the slots of their positions, and the mask lets a
    token see all slots up to its own. Every shape is the same at each token.

    keys, values: (L,1,K,N,D); positions (T,).
    """

    def __init__(self, keys, values, positions):
        self.keys = keys
        self.values = values
        self.positions = positions

    def attend(self, layer, q, k, v):
        """Queries (1,H,T,D), keys and values (1,K,T,D) of new tokens -> (1,H,T,D)."""
        keys = self.keys[layer].index_copy_(2, self.positions, k)
        values = self.values[layer].index_copy_(2, self.positions, v)
        slots = torch.arange(keys.shape[2], device=q.device)
        return attention(q, keys, values, slots <= self.positions[:, None])


class StaticStep(nn.Module):
    """A Llama of llama.py with the memory of one sequence of at most N tokens: (ids, positions) -> logits."""

    def __init__(self, llama, length):
        super().__init__()
        self.llama = llama
        heads = llama.config.num_key_value_heads
        shape = (len(llama.layers), 1, heads, length, llama.head_dim)
        self.keys: torch.Tensor
        self.values: torch.Tensor
        self.register_buffer("keys", llama.embed.weight.new_zeros(shape), persistent=False)
        self.register_buffer("values", llama.embed.weight.new_zeros(shape), persistent=False)

    def forward(self, ids, positions):
        """ids (1,T), positions (T,) -> logits (1,V) of the last token."""
        cache = SlotCache(self.keys, self.values, positions)
        return self.llama(ids, positions[None], cache, keep=torch.tensor([-1]))[:, -1]


@torch.no_grad()
def generate(step, ids, max_new_tokens, compiled=None):
    """Greedy decoding: a prompt (1,N) -> new tokens (1,T). The prompt is read by `step`, whose shapes
    vary, each new token by `compiled`.

    Raises UserError if the cache is too short: index_copy_ writes nothing beyond its end.
    """
    size = ids.shape[1]
    room = step.keys.shape[3]
    check(size > 0, "the prompt has no tokens")
    needed = size + max_new_tokens - 1
    check(needed <= room, f"{needed} tokens do not fit into a cache of {room}; make it longer")
    # the prompt at once
    logits = step(ids, torch.arange(size))
    # each new token at its position
    one = step if compiled is None else compiled
    found = []
    for position in range(size, size + max_new_tokens):
        token = logits.argmax(-1, keepdim=True)
        found.append(token)
        if position + 1 < size + max_new_tokens:
            logits = one(token, torch.tensor([position]))
    return torch.cat(found, dim=1)


def graphs(function, calls):
    """Compile a function and call it with each of these arguments -> graphs that were made.

    More than one for arguments of one shape: something in Python changed, and what was compiled does not fit. Nothing
    is generated here ("eager" backend): only graphs are counted.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, backend="eager")
    with torch.no_grad(), quiet():
        for args in calls:
            compiled(*args)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    return made


def count_graphs(llama, length, tokens=6):
    """{"graph breaks", "graphs, position a tensor", "graphs, position a number of Python"} for a few tokens."""
    step = StaticStep(llama, length)
    token = torch.ones(1, 1, dtype=torch.long)
    # position as a tensor
    breaks = torch._dynamo.explain(step)(token, torch.tensor([0])).graph_break_count
    places = [(token, torch.tensor([i])) for i in range(tokens)]
    # the cache of kv_cache.py knows how many tokens it has seen
    cache = StaticCache(llama, length)

    def counted(token):
        return llama(token, cache.positions(1), cache)

    return {
        "graph breaks": breaks,
        "graphs, position a tensor": graphs(step, places),
        "graphs, position a Python number": graphs(counted, [(token,)] * tokens),
    }


def compile_module(module, args):
    """A module -> compiled for these arguments, and the CPU seconds that its first call takes, the C++ compiler's too.

    Raises UserError without a C++ compiler: on a CPU kernels are C++.
    """
    from torch._inductor import config as inductor

    found = shutil.which("g++") or shutil.which("clang++")
    check(found, "torch.compile needs a C++ compiler, such as g++")
    # no pool of processes: what a child of this process used is counted when it ends
    inductor.compile_threads = 1
    compiled = torch.compile(module, dynamic=False)
    start = sum(os.times()[:4])
    with torch.no_grad(), quiet():
        compiled(*args)
    return compiled, sum(os.times()[:4]) - start


def compile_step(step):
    """StaticStep -> compiled for one token, and the CPU seconds to compile."""
    return compile_module(step, (torch.ones(1, 1, dtype=torch.long), torch.tensor([0])))


def trace(step, tokens=3, past=5):
    """DecodeStep -> torch.jit.trace of one call. Its sizes may change afterwards, its branches may not."""
    args = (torch.ones(1, tokens, dtype=torch.long), step.empty(past))
    with quiet(), torch.no_grad():
        return torch.jit.trace(step, args, check_trace=False)


def deepspeed_difference(model, ids):
    """Largest difference of logits before and after DeepSpeed's init_inference, which has kernels for GPUs only."""
    import deepspeed

    with torch.no_grad():
        before = model(ids).logits
        engine = deepspeed.init_inference(
            model, dtype=torch.float32, replace_with_kernel_inject=False
        )
        return float((engine(ids).logits - before).abs().max())


def main(cfg: Config) -> dict:
    """Compile, trace, time; writes the numbers."""
    check(min(cfg.prompt, cfg.max_new_tokens, cfg.rounds) > 0, "tokens and rounds: 1 or more")
    needed = cfg.prompt + cfg.max_new_tokens
    check(cfg.length >= needed, f"--length {cfg.length}: {needed} tokens want room")
    run.seed(cfg.seed)
    torch.set_num_threads(1)  # CPU time of several threads is no latency
    tokenizer, model = decode.load(cfg.model, "cpu")
    model = model.float()
    exported = DecodeStep(model, cfg.layers)
    llama = exported.llama
    folder = run.output(cfg.out, cfg)
    metrics: dict = count_graphs(llama, cfg.length)
    # compiled, its tokens as eager's
    step = StaticStep(llama, cfg.length)
    compiled, metrics["CPU seconds to compile"] = compile_step(step)
    text = "A decode step is a function of a token and of what came before. " * 8
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : cfg.prompt]
    eager = kv_cache.generate(llama, ids, cfg.max_new_tokens, StaticCache(llama, cfg.length))
    mine = generate(step, ids, cfg.max_new_tokens, compiled)
    metrics["compiled tokens as eager"] = int((mine == eager).sum())
    # traced
    traced: Any = trace(exported)
    args = (ids, exported.empty(7))
    with torch.no_grad():
        off = (traced(*args)[0] - exported(*args)[0]).abs().max()
    metrics["traced, largest difference of logits"] = float(off)
    # a token of each, in turn
    token = torch.ones(1, 1, dtype=torch.long)
    place = torch.tensor([cfg.length - 1])
    past = exported.empty(cfg.length - 1)
    ways = {
        "eager, growing cache": partial(exported, token, past),
        "traced": partial(traced, token, past),
        "eager, static cache": partial(step, token, place),
        "compiled, static cache": partial(compiled, token, place),
    }
    with torch.no_grad():
        found = measure(ways, cfg.rounds)
    slowest = found["eager, growing cache"]["ms"]
    for name, row in found.items():
        metrics[name] = {
            "ms a token": row["ms"],
            "of eager": row["ms"] / slowest,
            "idle fraction": row["idle fraction"],
        }
    if cfg.deepspeed:
        metrics["DeepSpeed, largest difference"] = deepspeed_difference(model, ids)
    return run.report(folder, metrics, then="python deploy/export.py")


if __name__ == "__main__":
    run.cli(main, Config)
