"""Visual instruction tuning: LLaVA's two stages, with any part frozen, trained or adapted with LoRA.

Liu et al. 2023, arXiv:2304.08485, Sec. 4.2. First the connector alone learns to speak the language
model's language (align), then it and the language model learn to answer (instruct). Vision features
of a photo are computed once and kept, unless the tower learns, too. Of an answer every token is
supervised, and the one that ends it; of a question none.

Shapes: B conversations that a rank reads at a time, T tokens; A such parts make a step; features
(B,N,D).
Differences from the paper: 732 photos instead of 595 000 pictures and 158 000 conversations; by
default LoRA instead of all weights, and both stages on the same photos.

Flags: train_config.py; trainable parameters and their rates: trainable.py; batches: train_data.py.

    python vlm/train.py                                                     # two cores: 5.4 minutes, 3 of evaluation
    python vlm/train.py --train_type projector                              # the connector alone
    torchrun --nproc_per_node 2 vlm/train.py
    deepspeed --num_gpus 1 vlm/train.py --zero_stage 2
    deepspeed vlm/train.py --vision openai/clip-vit-large-patch14-336 --language meta-llama/Llama-2-7b-chat-hf \\
        --connector mlp2x_gelu --data chat.json --image_folder pictures --zero_stage 2 --gradient_checkpointing
"""

import os
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from finetune import llama2_full, llama2_lora
from training import ranks
from utils import checkpoint, figures, run
from utils.run import check
from vlm import checkpoints, llava, llava_parts, packing, tower, train_evaluation
from vlm.prompts import IGNORE
from vlm.train_config import Config, check_flags
from vlm.train_data import collate, count_supervised, read_samples, step_batches
from vlm.trainable import lr_multipliers, param_groups, set_trainable


class Learner(nn.Module):
    """A Llava whose forward pass is the loss: the form that DeepSpeed and we need."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, features):
        """Sum of -log p(token | photo, all before it) over the supervised tokens. Eq. 3 of LLaVA,
        Sec. 4.2.

        features: vision features (photos,N,D), or pixels (photos,3,S,S) if the tower learns; None:
        text alone.
        """
        model = self.model
        # image tokens: through the connector, and through the tower, if it learns
        seen = None
        if features is not None:
            is_pixels = features.dim() == 4 and features.shape[1] == 3
            seen = model.image_features(features) if is_pixels else model.project(features)
        # the language model reads them among the words
        states = model.language.base_model(
            inputs_embeds=model.embed(batch["ids"], seen),
            attention_mask=batch["mask"],
            position_ids=batch["positions"],
            use_cache=False,
        ).last_hidden_state
        # cross-entropy at supervised tokens: logits there only, for the head has 49 152 words
        labels = batch["labels"][:, 1:]
        supervised = labels != IGNORE
        logits = model.language.get_output_embeddings()(states[:, :-1][supervised])
        value = F.cross_entropy(logits.float(), labels[supervised], reduction="sum")
        # the connector has gradients of zero, not none: it may be all that learns
        if features is None:
            value = value + 0 * sum(p.sum() for p in model.connector.parameters())
        return value


def total(*values):
    """Numbers, each summed over all ranks."""
    if not dist.is_initialized():
        return list(values)
    x = torch.tensor(values, dtype=torch.float64, device=ranks.device())
    dist.all_reduce(x)
    return x.tolist()


def train(learner, optimizer, samples, photos, pad, cfg, on, engine=None, start=0):
    """Steps `start` to cfg.max_steps; yields the loss of each: the mean over the supervised tokens
    of all ranks."""
    rank, n = ranks.rank_and_world_size()
    trainable = [p for p in learner.parameters() if p.requires_grad]
    for step in range(start, cfg.max_steps):
        # learning rate of each parameter group
        factors = lr_multipliers(cfg, step)
        for group in optimizer.param_groups:
            group["lr"] = group["top"] * factors[group["old"]]
        # batches of this step and rank, and the supervised tokens of all ranks
        parts = step_batches(samples, cfg, step, rank, n)
        random = np.random.default_rng([cfg.seed, 4, step, rank])
        (tokens,) = total(sum(count_supervised(part) for part in parts))
        summed = 0.0
        for part in parts:
            # forward pass
            batch, seen = collate(part, cfg, learner.model, pad, photos, random)
            batch = {k: v.to(on) for k, v in batch.items()}
            with run.autocast(on) if cfg.precision == "bf16" else nullcontext():
                value = (engine or learner)(batch, None if seen is None else seen.to(on))
            summed += value.item()
            # backward pass, of the mean over all tokens; DeepSpeed divides by A and by n
            if engine:
                engine.backward(value * cfg.gradient_accumulation_steps * n / tokens)
                engine.step()
            else:
                (value / tokens).backward()
        if not engine:
            # all-reduce: the sum of gradients over ranks; one without photos has none for the tower
            for p in trainable:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                if n > 1:
                    dist.all_reduce(p.grad)
            # gradient clipping, then a step
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        yield total(summed)[0] / tokens


def prepare(cfg, on):
    """-> tokenizer, model with its trainable parameters, samples, their photos, counts of rows that
    were changed."""
    # language model
    tokenizer, language = llava_parts.language_model(cfg.language, on)
    room = packing.positions_of(language)
    longest = cfg.model_max_length or room
    fits = room is None or longest <= room
    check(
        fits, f"--model_max_length {longest}: the language model has {room} positions, take no more"
    )
    if on.type == "cpu":
        # on rows as short as these faster than the fused kernel
        language.set_attn_implementation("eager")
    # vision tower, connector, all three together
    vision_tower = tower.load(cfg.vision, cfg.layer, cfg.select, on=on)
    run.seed(cfg.seed)
    model = llava.build(vision_tower, cfg.connector, language, tokenizer, on=on)
    set_trainable(model, cfg)
    if cfg.gradient_checkpointing:
        language.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    # data
    samples, photos, counts = read_samples(cfg, tokenizer, model, longest)
    return tokenizer, model, samples, photos, counts


def worker(cfg):
    """Training on one rank -> its numbers; rank 0 writes the weights and evaluates them."""
    rank, n = ranks.rank_and_world_size()
    on = ranks.device() if n > 1 else run.device(cfg.device)
    folder = Path(cfg.out)
    first = rank == 0
    # model, data, optimizer, and the state of an earlier run
    tokenizer, model, samples, photos, counts = prepare(cfg, on)
    learner = Learner(model).train()
    model.vision.train(cfg.train_type == "none")
    groups = param_groups(model, cfg)
    if cfg.zero_stage >= 0:
        engine = checkpoints.engine_of(learner, groups, cfg)
        optimizer = engine.optimizer
    else:
        engine = None
        optimizer = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay)
    losses = checkpoints.load(cfg, model, optimizer, engine) if cfg.resume else []
    if first and not cfg.resume:
        run.output(folder, cfg)
    if first:
        report_lengths(counts, cfg)
        print(llama2_lora.tree(model) or f"no adapters; what learns: {cfg.train_type}", flush=True)
    # training, with checkpoints and metric loggers
    save = partial(checkpoints.save, cfg, model, optimizer, losses, engine)
    start = len(losses)
    clock = time.perf_counter()
    cpu_clock = time.process_time()
    loggers = checkpoints.metric_loggers(cfg, folder) if first else []
    pad = tokenizer.pad_token_id
    steps = train(learner, optimizer, samples, photos, pad, cfg, on, engine, start)
    for value in run.progress(steps, cfg.max_steps, start, cfg.save_every, save):
        losses.append(value)
        for log in loggers:
            log(len(losses), value)
    seconds = time.perf_counter() - clock
    cpu_seconds = time.process_time() - cpu_clock
    if cfg.save_every:
        save()
    # numbers; weights and evaluation on the first rank
    numbers = {"losses": losses, "train_seconds": seconds, "train_cpu_seconds": cpu_seconds}
    numbers |= {"process_MiB": llama2_full.process_peak() / 2**20} | counts
    if first:
        weights = checkpoints.tensors(model)
        checkpoint.write(folder / "model.safetensors", weights, checkpoints.about(cfg))
        numbers["learned"] = sum(x.numel() for x in weights.values())
        if not cfg.data:
            numbers |= train_evaluation.evaluate_run(cfg, tokenizer, model.eval(), folder)
    return numbers


def report_lengths(counts, cfg):
    """One line, if there were conversations longer than the model can read."""
    shortened = counts["conversations shortened"]
    left_out = counts["conversations left out"]
    if not shortened and not left_out:
        return
    most = "the model's positions"
    if cfg.model_max_length:
        most = f"--model_max_length {cfg.model_max_length}"
    print(
        f"longer than {most}: {shortened} conversations lost turns at their end, {left_out} are left out"
    )


def main(cfg: Config) -> dict:
    """Train on one process or several, write the weights, evaluate them on held-out photos."""
    check_flags(cfg)
    if cfg.learning_rate_pretraining_components == 0:
        # parameters that may not move need no gradient, no fp32, no optimizer
        cfg = replace(cfg, train_type="projector")
    alone = cfg.ranks == 1 and cfg.zero_stage < 0 and "RANK" not in os.environ
    found = [worker(cfg)] if alone else ranks.launch(worker, cfg, cfg.ranks)
    if found is None:
        return {}
    # the first rank's numbers
    numbers = found[0]
    folder = Path(cfg.out)
    losses = numbers.pop("losses")
    run.write_json(folder / "losses.json", losses)
    figures.curves(
        folder / "loss.png", {"loss": losses}, "step", "-log p(token of an answer)", smooth=5
    )
    metrics: dict[str, Any] = {"final_loss": float(np.mean(losses[-10:]))} | numbers
    weights = folder / "model.safetensors"
    then = f'python vlm/llava.py --model {weights} --image PHOTO --prompt "What fruit is this?"'
    return run.report(folder, metrics, then) | {"losses": losses}


if __name__ == "__main__":
    run.cli(main, Config)
