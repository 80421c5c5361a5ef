"""Supervised fine-tuning through Hugging Face's accelerate: the loop stays ours.

Four calls turn a loop for one CPU into one for many GPUs: `prepare` wraps model and optimizer,
`accumulate` says when gradients are exchanged, `backward` divides by the parts, `save_state` writes
what a run needs to go on. Data, loss and score are those of training/sft.py, as with DeepSpeed.
What moves is fp32, matrix products are bf16 (autocast). Gugger et al. 2022,
https://github.com/huggingface/accelerate.

    python training/accelerate_train.py --ranks 2
    torchrun --nproc_per_node 2 training/accelerate_train.py          # not `accelerate launch --cpu`: it starts one
"""

import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from training import faq, manifest, ranks, sft
from training.lr_schedule import learning_rate
from utils import checkpoint, run


@dataclass(frozen=True)
class Config:
    """Fine-tune a chat model on questions and answers, with LoRA and accelerate."""

    # smollm2, a local folder, or a hub id; its tokenizer has a chat template
    model: str = "smollm2"
    # what moves: adapters, or every weight (then --lr 2e-5)
    method: Literal["lora", "full"] = "lora"
    lora_rank: int = 8  # r, columns of an adapter
    # of matrix products, and of weights that do not move
    precision: Literal["bf16", "fp32"] = "bf16"
    batch: int = 4  # B, texts that a rank reads at a time
    accumulation: int = 1  # A, such parts before a step
    length: int = 192  # longest text, in tokens
    checkpointing: bool = False  # keep no activations, compute them again
    lr: float = 1e-3  # peak learning rate: up in a line over a tenth of the steps, down to zero
    steps: int = 40  # training steps
    save_every: int = 0  # steps between checkpoints; 0: none
    resume: bool = False  # go on from the last checkpoint in --out, bit for bit
    ranks: int = 1  # N, processes, where torchrun does not start them
    seed: int = 0  # same seed, same numbers
    out: str = "outputs/accelerate_train"  # where the results go


def train(accelerator, model, optimizer, rows, cfg, ending, start=0):
    """Steps `start` to cfg.steps; yields the loss of each, a mean over the tokens of all ranks."""
    for step in range(start, cfg.steps):
        # Learning rate of this step
        rate = learning_rate(step, cfg.steps, cfg.lr, warmup=cfg.steps // 10, decay="linear")
        for group in optimizer.param_groups:
            group["lr"] = rate
        parts, tokens = faq.draw(rows, cfg, step, ending)
        # Backward divides by A, averaging by N
        weight = cfg.accumulation * accelerator.num_processes / tokens
        total = 0.0
        for part in parts:
            with accelerator.accumulate(model):  # ranks exchange gradients at the last part only
                value = sft.loss(model, *part)
                accelerator.backward(weight * value)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()  # does nothing before the last part
                optimizer.zero_grad()
            total += value.item()
        yield sft.add(total)[0] / tokens


def build_accelerator(cfg, find_unused=False):
    """accelerate's Accelerator, told what it would guess badly on CPUs.

    find_unused: some parameters that learn get no gradient in some step.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    cpu = not torch.cuda.is_available()
    wanted = {
        "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"],
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    if cpu:
        wanted["DS_ACCELERATOR"] = "cpu"
    # What the environment says already counts
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # no word on tied weights at every save
    return Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if cfg.precision == "bf16" else "no",
        gradient_accumulation_steps=cfg.accumulation,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused)],
    )


def worker(cfg):
    """What every rank does -> its numbers."""
    # Model, data, optimizer
    accelerator = build_accelerator(cfg)
    folder = Path(cfg.out)
    tokenizer, model = sft.prepare(cfg)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()  # a bf16 weight cannot take a small step
    ending = tokenizer.eos_token_id
    learn, held_out = faq.conversations(tokenizer, cfg.length)
    optimizer = torch.optim.AdamW(trained, cfg.lr, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    # The last checkpoint, or a new run with its score before training
    if cfg.resume:
        last, so_far = sft.last_checkpoint(cfg)
        accelerator.load_state(str(last))
    else:
        if accelerator.is_main_process:
            run.output(cfg.out, cfg)
        so_far = {"losses": [], "before": sft.score(model, held_out, cfg.batch, ending)}
    losses = so_far["losses"]

    def put(place):
        accelerator.save_state(str(place))
        own = place / f"rank{accelerator.process_index}.safetensors"
        flags = asdict(cfg) | {"ranks": accelerator.num_processes}
        checkpoint.save_state(own, config=flags, deepspeed=None, **so_far)

    def save():
        manifest.save(folder / "checkpoints", len(losses), put)

    # Train
    start = len(losses)
    clock = time.perf_counter()
    steps = train(accelerator, model, optimizer, learn, cfg, ending, start)
    for value in run.progress(steps, cfg.steps, start, cfg.save_every, save):
        losses.append(value)
    seconds = (time.perf_counter() - clock) / max(1, cfg.steps - start)
    if cfg.save_every:
        save()
    # Score, then write the adapter or the model
    after = sft.score(model, held_out, cfg.batch, ending)
    if accelerator.is_main_process:
        whole: Any = accelerator.unwrap_model(model)
        target = folder / ("adapter" if cfg.method == "lora" else "model")
        whole.save_pretrained(target)
        checkpoint.shared_mode(target)
        tokenizer.save_pretrained(target)
    # What this rank holds
    states = ranks.states(model, optimizer)
    held = {name: states[name] / 2**20 for name in ("weights", "optimizer")}
    numbers = sum(p.numel() for p in trained)
    found = {"trained": numbers, "seconds_per_step": seconds, "after": after, "held": held}
    return found | so_far


def main(cfg: Config) -> dict:
    """Train, score held-out questions before and after, write the adapter or the model."""
    sft.check_flags(cfg)
    found = ranks.launch(worker, cfg, cfg.ranks)
    return sft.summary(cfg, found, "python training/fsdp.py") if found else {}


if __name__ == "__main__":
    run.cli(main, Config)
