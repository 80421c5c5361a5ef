"""Full fine-tuning, and training the head alone: the yardstick, and the training loop that all methods share.

Nothing is frozen, so each weight costs its gradient and two numbers of AdamW besides itself: 16 bytes each in single
precision. Head-only training moves the last layer alone and shows the other end: little memory, and little said.

Shapes: as in sentiment.py; B texts, L tokens, V words of the vocabulary.
Precision: trained weights are fp32, matrix products bf16 (autocast); a bf16 weight cannot take a small step: next to 1
its neighbours are 0.008 away.

    python finetune/llama2_full.py
    python finetune/llama2_full.py --part head
    python finetune/llama2_full.py --model meta-llama/Llama-2-7b-hf --lr 1e-5 --batch 32 --steps 1000    # for GPUs
"""

import inspect
import os
import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from finetune import adapters, sentiment
from finetune.sentiment import IGNORE
from utils import checkpoint, figures, pretrained, run


@dataclass(frozen=True)
class Training(sentiment.Task):
    """The flags that all trained methods share, after those of the task."""

    model: str = "smollm2"  # smollm2, a local folder, or a hub id such as meta-llama/Llama-2-7b-hf
    steps: int = 100  # training steps
    batch: int = 16  # texts per step
    lr: float = 1e-3  # peak learning rate: up in a line over a tenth of the steps, down to zero
    resume: bool = False  # go on from the last checkpoint in --out, bit for bit
    save_every: int = 50  # steps between checkpoints; 0: none are written
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/llama2"  # where the results go


@dataclass(frozen=True)
class Config(Training):
    """Fine-tune a whole language model, or its head alone, and score it."""

    lr: float = 5e-5  # peak learning rate
    steps: int = 60  # training steps; each costs nearly twice what one of LoRA costs
    part: Literal["all", "head"] = "all"  # what moves: every weight, or the last layer
    # steps between checkpoints; one has weights and the optimizer's two numbers for each: 1.6 GB
    save_every: int = 0
    out: str = "outputs/llama2_full"  # where the results go


def loss(network, ids, mask, labels):
    """Mean of -log p(token | all before it) over the tokens to be learned: ids, mask, labels (B, L) -> ().

    Logits at position i speak of token i + 1. Answers are at the end, so logits are made for the end alone.
    """
    first = int((labels != IGNORE).any(0).int().argmax())  # where the longest answer begins
    last = labels.shape[1] - first
    logits = network(ids, mask, last + 1)[:, :-1]  # (B, last, V)
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels[:, -last:].flatten(), ignore_index=IGNORE
    )


def learning_rate(cfg, i):
    """Up in a line over the first tenth of the steps, then down in a line to zero."""
    warm = max(1, cfg.steps // 10)
    return cfg.lr * min((i + 1) / warm, (cfg.steps - i) / max(1, cfg.steps - warm))


def draw(tokenizer, pairs, cfg, i):
    """The texts of step i, the same in every run with this seed -> ids, mask, labels (B, L).

    `pairs` are sorted by length: texts of one neighbourhood need little padding, and padding costs what texts cost.
    """
    random = np.random.default_rng([cfg.seed, i])
    near = np.abs(np.arange(len(pairs)) - random.integers(len(pairs))).argsort()[: 8 * cfg.batch]
    pick = random.choice(near, cfg.batch, replace=len(near) < cfg.batch)
    return sentiment.batch(tokenizer, cfg, [pairs[j] for j in pick])


def step(network, optimizer, batch, device):
    """One step down the gradient, which is shortened to length 1 if it is longer -> loss ()."""
    with run.autocast(device):
        value = loss(network, *(x.to(device) for x in batch))
    value.backward()
    torch.nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], 1.0
    )
    optimizer.step()
    optimizer.zero_grad()  # here, so that gradients are gone before the next text is read
    return value.detach()


def train(network, optimizer, tokenizer, pairs, cfg, device, start=0):
    """Steps `start` to cfg.steps; yields the loss of each. Learning rates of the groups keep their proportion."""
    for i in range(start, cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["times"] * learning_rate(cfg, i)
        yield step(network, optimizer, draw(tokenizer, pairs, cfg, i), device).item()


def numbers(tensors):
    """Bytes of the storages behind these tensors, shared ones counted once."""
    return sum(
        {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values()
    )


@contextmanager
def hushed():
    """Nothing reaches stderr, not even from C++: the profiler announces there that it begins and ends."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak(model, optimizer, step):
    """Bytes of tensors at the highest moment of a training step: what is there before it, and what it allocates.

    `step` is a function that makes one step. On a CPU the profiler reports every allocation and release in order.
    """
    optimizer.zero_grad()
    if next(model.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    state = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
    before = numbers([*model.parameters(), *model.buffers(), *state])
    with hushed(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    results: Any = trace.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return before + max(0, int(np.cumsum(sizes).max()))


def process_peak():
    """The largest resident size of this process so far, in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


class Trained:
    """The weights of a model that move, as one part of a checkpoint."""

    def __init__(self, model):
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def state_dict(self):
        return {name: p.detach() for name, p in self.weights.items()}

    @torch.no_grad()
    def load_state_dict(self, state):
        if state.keys() != self.weights.keys():
            raise KeyError("other weights are trained")
        for name, p in self.weights.items():
            p.copy_(state[name])


@dataclass
class Bench:
    """What a run works with."""

    folder: Path
    device: torch.device
    tokenizer: Any
    model: Any
    parts: dict  # of the data: {"train", "valid", "test": [(text, label)]}


def supported(model, tokenizer, cfg, before=0):
    """Raises UserError for a model that cannot be asked as this chapter asks, or has too few positions for the texts.

    before: positions that stand before every text, soft words or a prefix.
    """
    kind = model.config.model_type
    accepted = inspect.signature(model.forward).parameters
    lacking = [
        name for name in ("position_ids", "inputs_embeds", "logits_to_keep") if name not in accepted
    ]
    run.check(
        not lacking,
        f"models of the kind {kind} take no {', '.join(lacking)}; choose a Llama, GPT-2, OPT or Qwen",
    )
    end = tokenizer.eos_token_id
    words = model.get_input_embeddings().num_embeddings
    run.check(
        end is not None,
        "the tokenizer of this model has no end token; set eos_token in tokenizer_config.json",
    )
    run.check(end < words, f"the end token has the number {end}, and the model knows {words} words")
    # The longest question there can be: a text is cut to MAX_TOKENS, its answer and the end token follow.
    pattern = len(tokenizer(cfg.pattern.replace("{text}", ""))["input_ids"])
    answer = max(map(len, sentiment.answers(tokenizer, cfg))) + 1
    sentiment.room(model, before + pattern + sentiment.MAX_TOKENS + answer)


def start(cfg, allow=None, before=0):
    """Check the flags, load data and model, make the folder, fix the seed -> Bench. Raises UserError.

    allow: a function that refuses a model by a UserError, before anything is written; before: positions that stand
    before every text.
    """
    if isinstance(cfg, Training):
        run.check(
            min(cfg.steps, cfg.batch) > 0 and cfg.lr > 0,
            "--steps, --batch and --lr must be above 0",
        )
    parts = sentiment.load(cfg)
    device = run.device(cfg.device)
    load = (
        pretrained.smollm2
        if cfg.model == "smollm2"
        else partial(pretrained.language_model, cfg.model)
    )
    tokenizer, model = load(device)
    if device.type == "cpu":
        # On texts as short as these a fifth faster than the fused kernel
        model.set_attn_implementation("eager")
    supported(model, tokenizer, cfg, before)
    if allow:
        allow(model)
    run.seed(cfg.seed)
    return Bench(run.output(cfg.out, cfg), device, tokenizer, model, parts)


def group(weights, lr):
    """Weights for the optimizer, and how many times the learning rate of the run is theirs."""
    return {"params": list(weights), "times": lr}


def moving(model):
    return [p for p in model.parameters() if p.requires_grad]


def experiment(cfg, bench, network, model, groups=None):
    """Train what moves in `model`, score the texts held out -> metrics. Writes the loss curve and, on the way, state.

    network: the function (ids, mask, last) -> logits that asks the model; groups: of `group`, if not all weights have
    one learning rate.
    """
    state, texts = (
        bench.folder / "state.safetensors",
        sorted(bench.parts["train"], key=lambda pair: len(pair[0])),
    )
    optimizer = torch.optim.AdamW(groups or [group(moving(model), 1.0)], cfg.lr, weight_decay=0.0)
    kept, losses, seconds = {"weights": Trained(model), "optimizer": optimizer}, [], []
    if cfg.resume:
        before = checkpoint.load_state(state, cfg, **kept)
        losses, seconds = before["losses"], before["seconds"]
    with_it = {"config": asdict(cfg), "losses": losses, "seconds": seconds}
    save = lambda: checkpoint.save_state(state, **kept, **with_it)  # noqa: E731
    model.train()
    steps = train(network, optimizer, bench.tokenizer, texts, cfg, bench.device, len(losses))
    # Neighbours cost no CPU time
    clock = time.process_time if bench.device.type == "cpu" else time.perf_counter
    then = clock()
    for value in run.progress(steps, cfg.steps, len(losses), cfg.save_every, save):
        seconds.append(clock() - then)
        losses.append(value)
        then = clock()
    if cfg.save_every:
        save()
    figures.curves(bench.folder / "loss.png", {"loss": losses}, "step", "-log p(answer)", smooth=5)
    metrics = {
        "trained": sum(p.numel() for p in moving(model)), "final_loss": float(np.mean(losses[-10:])),
        # Of all cores together
        "train_seconds": sum(seconds), "seconds_per_step": float(np.median(seconds)),
        "process_MiB": process_peak() / 2**20,
    }  # fmt: skip
    for g in optimizer.param_groups:
        g["lr"] = 0.0  # one more step, to look at, moves nothing
    again = lambda: step(network, optimizer, draw(bench.tokenizer, texts, cfg, 0), bench.device)  # noqa: E731
    metrics["tensor_MiB"] = peak(model, optimizer, again) / 2**20
    model.eval()
    return metrics | sentiment.judge(
        network, bench.tokenizer, cfg, bench.parts["scored"], bench.device
    )


def choose(model, part):
    """Let every weight move, or the last layer only; what moves is fp32. -> the model.

    Llama-class models may share the last layer with the embedding: then it gets a copy of its own to train.
    """
    if part == "all":
        return model.float().requires_grad_(True)
    head = model.get_output_embeddings()
    run.check(
        isinstance(head, torch.nn.Linear), "--part head: this model has no linear layer as its head"
    )
    bias = head.bias is not None
    own = torch.nn.Linear(head.in_features, head.out_features, bias=bias, device=head.weight.device)
    own.load_state_dict(head.state_dict())
    model.set_output_embeddings(own)
    model.config.tie_word_embeddings = False
    return model


def by_peft(cfg, bench, model, network):
    """Train and score a PEFT model, and let PEFT write its files -> metrics."""
    base = adapters.base_of(bench.model)
    model.peft_config["default"].base_model_name_or_path = base
    metrics = experiment(cfg, bench, network, model)
    model.save_pretrained(bench.folder / "adapter")
    print(adapters.usage(bench.folder / "adapter", base))
    return metrics | {"checkpoint_MiB": size(bench.folder / "adapter")}


def size(folder):
    """MiB of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20


def main(cfg: Config) -> dict:
    """Fine-tune, score, save an ordinary model folder."""
    bench = start(cfg)
    model = choose(bench.model, cfg.part)
    metrics = experiment(cfg, bench, sentiment.network(model), model)
    pretrained.save(model.to(torch.bfloat16), bench.tokenizer, bench.folder / "model")
    metrics["checkpoint_MiB"] = size(bench.folder / "model")
    return run.report(bench.folder, metrics, then="python finetune/llama2_lora.py")


if __name__ == "__main__":
    run.cli(main, Config)
