"""The same fine-tuning through Hugging Face's accelerate: the loop stays ours; device, precision and ranks are its.

Four calls turn a loop for one CPU into one for many GPUs: `prepare` wraps model and optimizer, `accumulate` says when
gradients are exchanged, `backward` divides by the parts, `save_state` writes what a run needs to go on. Data, loss and
score are those of training/llama2_clm_sft_lora_with_zero.py. What moves is fp32, matrix products are bf16 (autocast).
Gugger et al. 2022, https://github.com/huggingface/accelerate.

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

from training import faq, manifest, ranks
from training import llama2_clm_sft_lora_with_zero as sft
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
    """Steps `start` to cfg.steps; yields the loss of each, a mean over the tokens that all ranks saw."""
    for step in range(start, cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = sft.learning_rate(cfg, step)
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


def worker(cfg):
    """What every rank does -> its numbers."""
    from accelerate import Accelerator

    mixed, cpu = "bf16" if cfg.precision == "bf16" else "no", not torch.cuda.is_available()
    wanted = {
        "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"],
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    # It guesses badly
    os.environ |= wanted | ({"DS_ACCELERATOR": "cpu"} if cpu else {}) | dict(os.environ)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # no word on tied weights at every save
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=mixed, gradient_accumulation_steps=cfg.accumulation
    )
    tokenizer, model = sft.prepare(cfg)
    moving = [p for p in model.parameters() if p.requires_grad]
    for p in moving:
        p.data = p.data.float()  # a bf16 weight cannot take a small step
    ending, folder = tokenizer.eos_token_id, Path(cfg.out)
    learn, held_out = faq.conversations(tokenizer, cfg.length)
    model, optimizer = accelerator.prepare(
        model, torch.optim.AdamW(moving, cfg.lr, weight_decay=0.0)
    )
    if cfg.resume:
        last, so_far = sft.newest(cfg)
        accelerator.load_state(str(last))
    else:
        _ = accelerator.is_main_process and run.output(cfg.out, cfg)
        so_far = {"losses": [], "before": sft.score(model, held_out, cfg.batch, ending)}

    def put(place):
        accelerator.save_state(str(place))
        own = place / f"rank{accelerator.process_index}.safetensors"
        flags = asdict(cfg) | {"ranks": accelerator.num_processes}
        checkpoint.save_state(own, config=flags, deepspeed=None, **so_far)

    save = lambda: manifest.save(folder / "checkpoints", len(losses), put)  # noqa: E731
    losses, start, clock = so_far["losses"], len(so_far["losses"]), time.perf_counter()
    steps = train(accelerator, model, optimizer, learn, cfg, ending, start)
    for value in run.progress(steps, cfg.steps, start, cfg.save_every, save):
        losses.append(value)
    seconds = (time.perf_counter() - clock) / max(1, cfg.steps - start)
    if cfg.save_every:
        save()
    after = sft.score(model, held_out, cfg.batch, ending)
    if accelerator.is_main_process:
        whole: Any = accelerator.unwrap_model(model)
        target = folder / ("adapter" if cfg.method == "lora" else "model")
        whole.save_pretrained(target)
        tokenizer.save_pretrained(target)
    held = {k: v / 2**20 for k, v in ranks.states(model, optimizer).items() if k != "gradients"}
    numbers = {
        "trained": sum(p.numel() for p in moving),
        "seconds_per_step": seconds,
        "after": after,
    }
    return numbers | so_far | {"held": held}


def main(cfg: Config) -> dict:
    """Train, score held-out questions before and after, write the adapter or the model."""
    sft.sane(cfg)
    found = ranks.launch(worker, cfg, cfg.ranks)
    return sft.summary(cfg, found, "python training/fsdp.py") if found else {}


if __name__ == "__main__":
    run.cli(main, Config)
