"""Benchmark of LoRA: a training step against PEFT's on the same model, in one process: `make
bench`.

Steps are interleaved, CPU time is counted, on one thread, and the median of the ratios is reported:
so neighbours on the machine do not count. fp32: weights and products. bf16: weights and products,
adapters kept in fp32.

    python finetune/bench.py    # about 5 min on one CPU core
"""

import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from finetune import llama2_full, llama2_lora, llama2_qlora, sentiment
from finetune.lora_inject import inject
from finetune.lora_layers import Variant
from utils import pretrained, run


@dataclass(frozen=True)
class Config:
    """Compare training steps of LoRA and its variants with those of the PEFT library."""

    model: str = "smollm2"  # smollm2, a local folder, or a hub id
    rounds: int = 6  # interleaved repetitions; the median of the ratios is reported
    batch: int = 4  # texts per step
    length: int = 64  # tokens of a text
    variants: tuple[Variant, ...] = ("lora", "dora")  # what is compared
    seed: int = 0  # same seed, same weights
    out: str = "outputs/finetune_bench"  # where the results go


def training_step(model, batch, bf16):
    """A function that makes one training step: forward, backward, AdamW."""
    network = sentiment.network(model)
    optimizer = torch.optim.AdamW(llama2_full.trainable_parameters(model), 1e-4)

    def step():
        with run.autocast(torch.device("cpu")) if bf16 else nullcontext():
            value = llama2_full.loss(network, *batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def seconds(action):
    start = time.process_time()
    action()
    return time.process_time() - start


def interleaved(actions, rounds):
    """Run the actions in turn, after one unmeasured turn -> [seconds of each]."""
    for action in actions:
        action()
    times = [[seconds(action) for action in actions] for _ in range(rounds)]
    return list(zip(*times))


def pair(cfg, lora, bf16):
    """The same model with our adapters, and with PEFT's."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    models = []
    for who in ("ours", "peft"):
        # weights in fp32 or bf16, the adapter in fp32
        if cfg.model == "smollm2":
            _, model = pretrained.smollm2()
        else:
            _, model = pretrained.language_model(cfg.model)
        llama2_qlora.cast(model, dtype)
        if who == "ours":
            inject(model, lora.targets, lora.rank, lora.alpha, variant=lora.variant)
        else:
            llama2_lora.through_peft(model, lora)
        models.append(model.train())
    return models


def main(cfg: Config) -> dict:
    """Each variant in fp32 and in bf16 -> milliseconds of a step, ours and theirs, and the ratio."""
    run.check(min(cfg.rounds, cfg.batch) > 0, "--rounds and --batch must be at least 1")
    run.check(cfg.length > 3, "--length must be at least 4")
    # one thread: neighbours on the machine do not count
    torch.set_num_threads(1)
    run.seed(cfg.seed)
    folder = run.output(cfg.out, cfg)
    metrics = {}
    for variant in cfg.variants:
        for kind, bf16 in (("fp32", False), ("bf16", True)):
            models = pair(cfg, llama2_lora.Config(variant=variant), bf16)
            # random texts, of which the last two tokens are supervised: the answer and the end
            ids = torch.randint(models[0].config.vocab_size, (cfg.batch, cfg.length))
            labels = ids.masked_fill(torch.arange(cfg.length) < cfg.length - 2, sentiment.IGNORE)
            batch = ids, torch.ones_like(ids, dtype=torch.bool), labels
            # steps in turn; the ratio of each pair
            ours, theirs = interleaved([training_step(m, batch, bf16) for m in models], cfg.rounds)
            ratios = [b / a for a, b in zip(ours, theirs)]
            metrics[f"{variant}, {kind} step"] = {
                "times_faster": statistics.median(ratios),
                "ms": 1e3 * statistics.median(ours),
                "their_ms": 1e3 * statistics.median(theirs),
            }
    return run.report(folder, metrics)


if __name__ == "__main__":
    run.cli(main, Config)
