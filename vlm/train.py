"""Visual instruction tuning: LLaVA's two stages, with any part frozen, trained or adapted with LoRA.

Liu et al. 2023, arXiv:2304.08485, Sec. 4.2. First the connector alone learns to speak the language
model's language (align), then it and the language model learn to answer (instruct). Vision features
of a photo are computed once and kept, unless the tower learns, too. Of an answer every token is
supervised, and the one that ends it; of a question none.

Shapes: B conversations that a rank reads at a time, T tokens; A such parts make a step; features
(B,N,D).
Differences from the paper: 732 photos instead of 595 000 pictures and 158 000 conversations; by
default LoRA instead of all weights, and both stages on the same photos.

Flags: flags.py; the model: train_model.py; trainable parameters and their rates: trainable.py;
batches: train_data.py; one process, DDP, FSDP, DeepSpeed, accelerate: engines.py.

    python vlm/train.py                                                     # two cores: 5.4 minutes, 3 of evaluation
    python vlm/train.py --train_type projector                              # the connector alone
    python vlm/train.py --model outputs/vlm_train/model.safetensors         # go on from it
    torchrun --nproc_per_node 2 vlm/train.py --fsdp
    deepspeed --num_gpus 1 vlm/train.py --zero_stage 2
    deepspeed vlm/train.py --vision openai/clip-vit-large-patch14-336 --language meta-llama/Llama-2-7b-chat-hf \\
        --connector mlp2x_gelu --data chat.json --image_folder pictures --zero_stage 2 --gradient_checkpointing
"""

import os
import time
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
from vlm import (
    checkpoints,
    engines,
    llava,
    llava_io,
    llava_parts,
    metric_loggers,
    packing,
    peft_files,
    train_evaluation,
)
from vlm.config_file import with_file
from vlm.lazy_data import Lazy
from vlm.prompt_sparsity import prompts_of, reads_prompt
from vlm.prompts import IGNORE
from vlm.train_config import Config, changed, check_flags, engine_name, with_steps
from vlm.train_data import InMemory, count_supervised, report_lengths
from vlm.train_flops import Throughput, throughput_metrics
from vlm.train_model import build_model
from vlm.trainable import lr_multipliers


class Learner(nn.Module):
    """A Llava whose forward pass is the loss: the form that all engines need.

    A frozen tower is no part of it: no engine shards or casts it.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        vision_tower = model.vision
        if not any(p.requires_grad for p in vision_tower.parameters()):
            del model.vision
            # an attribute, and no submodule
            object.__setattr__(model, "vision", vision_tower)

    def forward(self, batch, features):
        """Sum of -log p(token | photo, all before it) over the supervised tokens. Eq. 3 of LLaVA,
        Sec. 4.2.

        features: vision features (photos,N,D), or pixels (photos,3,S,S) if the tower learns; None:
        text alone. With tiles of each photo the whole and its tiles, and batch["sizes"] (photos,2).
        """
        model = self.model
        # image tokens: through the connector, and through the tower, if it learns
        shown = self.stand_in(batch) if features is None else features
        image_tokens = self.image_tokens(shown, batch.get("sizes"))
        # among the words; without a picture nothing is added to them but a zero, so that on every rank
        # the backward pass goes through the same layers, and what sees has gradients of zero
        if features is None:
            embeds = model.embed(batch["ids"])
            if reads_prompt(model.connector):
                words = embeds.detach()[:1]
                image_tokens = model.connector.by_prompt(image_tokens, words, words[..., 0] > 0)
            embeds = embeds + 0 * image_tokens.sum().to(embeds.dtype)
            if model.newline is not None:
                embeds = embeds + 0 * model.newline.sum().to(embeds.dtype)
        else:
            about = (batch["ids"], batch["mask"], batch["labels"], batch.get("segments"))
            embeds = model.embed(batch["ids"], image_tokens, prompts_of(*about))
        # the language model reads on
        states = model.language.base_model(
            inputs_embeds=embeds,
            attention_mask=batch["mask"],
            position_ids=batch["positions"],
            use_cache=False,
        ).last_hidden_state
        # cross-entropy at supervised tokens: logits there only, for the head has 49 152 words
        labels = batch["labels"][:, 1:]
        supervised = labels != IGNORE
        logits = model.language.get_output_embeddings()(states[:, :-1][supervised])
        return F.cross_entropy(logits.float(), labels[supervised], reduction="sum")

    def image_tokens(self, features, sizes=None):
        """Vision features or pixels -> image tokens (photos,M,E); of photos with tiles and their sizes
        (photos,2) one sequence (1,N',E)."""
        model = self.model
        is_pixels = features.dim() == 4 and features.shape[1] == 3
        seen = model.vision(features) if is_pixels else features
        if sizes is None:
            return model.project(seen)
        return llava_parts.tile_tokens(model, seen, sizes.tolist(), model.grids)

    def stand_in(self, batch):
        """A black picture, for a batch without one, so that every rank calls the same layers."""
        on = batch["ids"].device
        vision_tower = self.model.vision
        if any(p.requires_grad for p in vision_tower.parameters()):
            return torch.zeros(1, 3, vision_tower.size, vision_tower.size, device=on)
        return torch.zeros(1, vision_tower.count, vision_tower.width, device=on)


def total(*values):
    """Numbers, each summed over all ranks."""
    if not dist.is_initialized():
        return list(values)
    x = torch.tensor(values, dtype=torch.float64, device=ranks.device())
    dist.all_reduce(x)
    return x.tolist()


def train(engine, batches, cfg, on, start=0):
    """Steps `start` to cfg.train.steps; yields the loss of each: the mean over the supervised tokens
    of all ranks.

    batches: for each step the parts of this rank, A pairs of a batch and its features or pixels.
    """
    rank, _ = ranks.rank_and_world_size()
    for step, parts in enumerate(batches, start):
        # learning rate of each parameter group
        factors = lr_multipliers(cfg.train, step)
        for group in engine.optimizer.param_groups:
            group["lr"] = group["top"] * factors[group["old"]]
        # dropout: what a resumed run draws, too
        torch.manual_seed(cfg.train.seed + 1000003 * step + rank)
        # supervised tokens of all parts on all ranks
        (tokens,) = total(sum(count_supervised(batch) for batch, _ in parts))
        summed = 0.0
        for number, (batch, features) in enumerate(parts, 1):
            batch = {k: v.to(on) for k, v in batch.items()}
            features = None if features is None else features.to(on)
            with engine.part(last=number == len(parts)):
                # forward pass
                value = engine.loss(batch, features)
                summed += value.item()
                # backward pass, of the mean over all tokens of all ranks
                engine.backward(value / tokens)
        # gradients of all ranks, clipping, a step of the optimizer
        engine.step()
        yield total(summed)[0] / tokens


def prepare(cfg, on):
    """-> tokenizer, model with its trainable parameters, its data: in memory, or lazy."""
    tokenizer, model = build_model(cfg, on)
    room = packing.positions_of(model.language)
    longest = cfg.data.model_max_length or room
    fits = room is None or longest <= room
    check(
        fits, f"--model_max_length {longest}: the language model has {room} positions, take no more"
    )
    read = Lazy if cfg.data.is_lazy else InMemory
    return tokenizer, model, read(cfg, tokenizer, model, longest, *ranks.rank_and_world_size())


def worker(cfg):
    """Training on one rank -> its numbers; rank 0 writes the weights and evaluates them."""
    rank, n = ranks.rank_and_world_size()
    on = ranks.device() if n > 1 else run.device(cfg.train.device)
    folder = Path(cfg.out)
    first = rank == 0
    # model, data, engine, and the state of an earlier run
    tokenizer, model, source = prepare(cfg, on)
    cfg = with_steps(cfg, len(source), n)
    adapters = llama2_lora.tree(model)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    learner = Learner(model).train()
    model.vision.train(cfg.train.train_type == "none")
    engine = engines.build(learner, cfg, on)
    losses = checkpoints.load(cfg, engine) if cfg.resume else []
    if first and not cfg.resume:
        run.output(folder, cfg)
    if first:
        report_lengths(source.counts(), cfg)
        print(adapters or f"no adapters; what learns: {cfg.train.train_type}", flush=True)
    # training, with checkpoints and metric loggers
    save = partial(checkpoints.save, cfg, engine, losses)
    start = len(losses)
    clock = time.perf_counter()
    cpu_clock = time.process_time()
    loggers = metric_loggers.metric_loggers(cfg, folder) if first else []
    counter = Throughput(model, cfg)
    batches = counter.watch(source.batches(cfg, start))
    steps = train(engine, batches, cfg, on, start)
    for value in run.progress(steps, cfg.train.steps, start, cfg.train.save_steps, save):
        losses.append(value)
        if len(losses) % cfg.train.log_steps == 0:
            for log in loggers:
                log(len(losses), value)
    seconds = time.perf_counter() - clock
    cpu_seconds = time.process_time() - cpu_clock
    if cfg.train.save_steps:
        save()
    # numbers; weights and evaluation on the first rank
    numbers = {"losses": losses, "train_seconds": seconds, "train_cpu_seconds": cpu_seconds}
    numbers |= {"process_MiB": llama2_full.process_peak() / 2**20}
    numbers |= source.counts()
    tokens, flops = total(counter.tokens, counter.flops or 0)
    if first and tokens:
        numbers |= throughput_metrics(tokens, flops, seconds, on, cfg.train.precision)
    weights = checkpoints.tensors(model)  # of a sharded model all ranks gather them
    if first:
        path = folder / "model.safetensors"
        checkpoint.write(path, weights, checkpoints.about(cfg, tokenizer))
        peft_files.write(cfg, weights, model, tokenizer)
        numbers["learned"] = learned
        numbers |= after_training(cfg, tokenizer, model.eval(), path)
    return numbers


def after_training(cfg, tokenizer, model, path):
    """The whole model as a folder, if it is wanted, and scores on held-out photos -> metrics.

    A sharded model is read from the file that was written, and so is what becomes a folder.
    """
    if cfg.data.paths and not cfg.save_model:
        return {}
    if cfg.save_model or checkpoints.sharded(cfg):
        tokenizer, model = llava.load(path)
    if cfg.save_model:
        llava_io.save(model, tokenizer, path.with_name("model"))
    if cfg.data.paths:
        return {}
    return train_evaluation.evaluate_run(cfg, tokenizer, model, path.parent)


def main(cfg: Config) -> dict:
    """Train on one process or several, write the weights, evaluate them on held-out photos."""
    check_flags(cfg)
    cfg = peft_files.with_adapter(cfg)
    if cfg.train.lr_pretrained == 0 and cfg.train.train_type != "lora_frozen_projector":
        # parameters that may not move need no gradient, no fp32, no optimizer
        cfg = changed(cfg, train_type="projector")
    target = Path(cfg.out) / "model"
    check(
        not (cfg.save_model and target.exists()),
        f"{target} is there already: choose another place with --out",
    )
    alone = cfg.train.ranks == 1 and engine_name(cfg) in ("plain", "ddp")
    alone = alone and "RANK" not in os.environ
    found = [worker(cfg)] if alone else ranks.launch(worker, cfg, cfg.train.ranks)
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
    question = "QUESTION" if cfg.data.paths else "What fruit is this?"
    then = f'python vlm/llava.py --model {weights} --image PHOTO --prompt "{question}"'
    return run.report(folder, metrics, then) | {"losses": losses}


if __name__ == "__main__":
    run.cli(main, Config, expand=with_file)
