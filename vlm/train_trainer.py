"""Visual instruction tuning by transformers' Trainer: the data, model and rates of train.py, the loop of the library.

What Trainer is given: a module whose forward pass is the loss, an optimizer with a schedule for each
parameter group, and the batches of every step. What it does: autocast, backward pass, gradient
clipping, DDP or DeepSpeed by its own flags, logging. The losses are those of train.py.

Shapes: as in train.py. Difference from it: one part a step; no checkpoints to go on from.

    python vlm/train_trainer.py
    torchrun --nproc_per_node 2 vlm/train_trainer.py
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from training import ranks
from utils import checkpoint, figures, run
from utils.run import check
from vlm import checkpoints, engines, peft_files, train
from vlm.config_file import with_file
from vlm.train_config import Config, check_flags, engine_name, with_steps
from vlm.train_data import count_supervised
from vlm.trainable import lr_multipliers, param_groups


class Steps(torch.utils.data.IterableDataset):
    """Batches of the steps from `start` on of this rank, as train.py reads them."""

    def __init__(self, source, cfg, start=0):
        self.source = source
        self.cfg = cfg
        self.start = start

    def __len__(self):
        return self.cfg.train.steps - self.start

    def __iter__(self):
        for ((batch, features),) in self.source.batches(self.cfg, self.start):
            yield {"batch": batch, "features": features}


def schedule(optimizer, cfg):
    """A learning-rate multiplier for each parameter group, of new or of pretrained parts."""

    def multiplier(old):
        return lambda step: lr_multipliers(cfg.train, min(step, cfg.train.steps - 1))[old]

    return LambdaLR(optimizer, [multiplier(group["old"]) for group in optimizer.param_groups])


def build_trainer(learner, source, cfg, start=0):
    """transformers' Trainer around the learner, for the steps from `start` on; `losses` are those of
    the steps, over all ranks."""
    from transformers import Trainer, TrainingArguments

    class LossTrainer(Trainer):
        """The forward pass is the summed loss: divided by the supervised tokens of all ranks."""

        losses: list[float] = []  # noqa: RUF012  (of this run: the class is made anew for each)

        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(Steps(source, cfg, start), batch_size=None)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            batch = inputs["batch"]
            (tokens,) = train.total(count_supervised(batch))
            value = model(batch, inputs["features"])
            self.losses.append(train.total(value.item())[0] / tokens)
            # DDP averages over ranks, and the mean is over all tokens
            _, world_size = ranks.rank_and_world_size()
            return value * world_size / tokens

    steps = cfg.train
    arguments = TrainingArguments(
        output_dir=cfg.out,
        max_steps=steps.steps - start,
        per_device_train_batch_size=steps.batch_size,
        max_grad_norm=steps.grad_clip,
        bf16=steps.precision == "bf16",
        fp16=steps.precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=engines.has_unused(cfg),
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        logging_steps=steps.log_steps,
        seed=steps.seed,
    )
    optimizer = engines.adamw(param_groups(learner.model, cfg), cfg)
    both: Any = (optimizer, schedule(optimizer, cfg))
    return LossTrainer(learner, arguments, optimizers=both)


def worker(cfg):
    """Training on one rank -> its losses; rank 0 writes the weights."""
    rank, n = ranks.rank_and_world_size()
    on = ranks.device() if n > 1 else run.device(cfg.train.device)
    tokenizer, model, source = train.prepare(cfg, on)
    cfg = with_steps(cfg, len(source), n)
    learner = train.Learner(model).train()
    model.vision.train(cfg.train.train_type == "none")
    if rank == 0:
        run.output(cfg.out, cfg)
    trainer = build_trainer(learner, source, cfg)
    trainer.train()
    if rank == 0:
        path = Path(cfg.out) / "model.safetensors"
        weights = checkpoints.tensors(model)
        checkpoint.write(path, weights, checkpoints.about(cfg, tokenizer))
        peft_files.write(cfg, weights, model, tokenizer)
    return {"losses": trainer.losses} | source.counts()


def main(cfg: Config) -> dict:
    """Train by transformers' Trainer, write the weights."""
    check_flags(cfg)
    cfg = peft_files.with_adapter(cfg)
    check(engine_name(cfg) == "plain", "Trainer has engines of its own: leave out --engine, --fsdp")
    one_part = cfg.train.gradient_accumulation_steps == 1
    check(one_part, "--gradient_accumulation_steps: one part a step here; train.py takes more")
    check(not cfg.resume and not cfg.train.save_steps, "no checkpoints here; train.py writes them")
    alone = cfg.train.ranks == 1 and "RANK" not in os.environ
    found: Any = [worker(cfg)] if alone else ranks.launch(worker, cfg, cfg.train.ranks)
    if found is None:
        return {}
    losses: list[float] = found[0].pop("losses")
    folder = Path(cfg.out)
    run.write_json(folder / "losses.json", losses)
    label = "-log p(token of an answer)"
    figures.curves(folder / "loss.png", {"loss": losses}, "step", label, smooth=5)
    last = losses[-10:]
    metrics = {"final_loss": sum(last) / len(last)} | found[0]
    then = f"python vlm/llava.py --model {folder / 'model.safetensors'} --image PHOTO"
    return run.report(folder, metrics, then) | {"losses": losses}


if __name__ == "__main__":
    run.cli(main, Config, expand=with_file)
