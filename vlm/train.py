"""Visual instruction tuning: LLaVA's two stages, with any part frozen, trained or adapted with LoRA.

Liu et al. 2023, arXiv:2304.08485, Sec. 4.2. First the connector alone learns to speak the language model's language
(align), then it and the language model learn to answer (instruct). What the tower says of a photo is computed once and
kept, unless the tower learns, too. Of an answer every token is learned, and the word that ends it; of a question none.

Shapes: B conversations that a rank reads at a time, T tokens; A such parts make a step; features (B,N,D).
Differences from the paper: 732 photos instead of 595 000 pictures and 158 000 conversations; by default LoRA instead of
all weights, and both stages on the same photos.

    python vlm/train.py                                                     # two cores: 5.4 minutes, 3 to judge
    python vlm/train.py --train_type projector                              # the connector alone
    torchrun --nproc_per_node 2 vlm/train.py
    deepspeed --num_gpus 1 vlm/train.py --zero_stage 2
    deepspeed vlm/train.py --vision openai/clip-vit-large-patch14-336 --language meta-llama/Llama-2-7b-chat-hf \\
        --connector mlp2x_gelu --data chat.json --image_folder pictures --zero_stage 2 --gradient_checkpointing
"""

import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn

from finetune import llama2_full, llama2_lora
from training import ranks
from utils import checkpoint, figures, run
from utils.data import read_image
from utils.run import check
from utils.text import plain
from vlm import (
    checkpoints,
    data,
    evaluate,
    fruit_photos,
    llava,
    llava_io,
    packing,
    probe,
    samplers,
    tower,
)
from vlm.prompts import IGNORE

# Pages of manuals by which it is judged what the language model has forgotten: none is learned
JUDGED_PAGES = 40


@dataclass(frozen=True)
class Config:
    """Train a LLaVA on conversations about photos."""

    # none: nothing is frozen
    train_type: Literal["use_lora", "projector", "freeze_vision", "none"] = "use_lora"
    vision: str = "efficientnet"  # the tower: efficientnet, or a folder or hub id
    language: str = "smollm2"  # the language model: smollm2, or a folder or hub id
    connector: str = "pool3"  # see vlm/connector.py
    layer: int = -2  # of the tower's states
    select: Literal["patch", "all"] = "patch"  # of the tower's tokens
    data: str = ""  # a chat.json; empty: photos of fruit
    image_folder: str = ""  # where its pictures are
    emoji: int = 0  # pictures of emoji besides the photos of fruit
    views: int = 4  # of each picture: its middle, and random pieces
    align_steps: int = 0  # steps of the first stage, in which the connector learns alone
    max_steps: int = 120  # steps of both stages
    per_device_train_batch_size: int = 16  # B
    gradient_accumulation_steps: int = 1  # A
    learning_rate: float = 1e-3  # of new parts: the connector
    # of what was trained before, or is added to it by LoRA
    learning_rate_pretraining_components: float = 1e-3
    weight_decay: float = 0.0
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    num_warmup_steps: int = 12  # the rates go up in a line
    lora_rank: int = 8
    lora_targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    # of samples: paragraphs of manuals, so that it does not forget how to read
    text_share: float = 0.05
    # tokens of the longest conversation; 0: as many as the language model has positions
    model_max_length: int = 0
    packing: bool = True  # several conversations in one row, none sees another
    # all of a step with pictures or all without, about equally long
    group_by_modality_length: bool = False
    precision: Literal["bf16", "fp32"] = "bf16"  # of matrix products and of what is frozen
    gradient_checkpointing: bool = False  # keep no activations, compute them again
    zero_stage: Literal[-1, 0, 1, 2] = -1  # train by DeepSpeed; -1: without
    judged: int = 300  # photos to be judged by; 0: all 1322
    save_every: int = 0  # steps between checkpoints; 0: none
    resume: bool = False  # go on from the last checkpoint in --out
    enable_tensorboard: bool = False
    enable_wandb: bool = False  # Weights & Biases, offline: nothing leaves the machine
    ranks: int = 1  # processes, where neither torchrun nor deepspeed starts them
    local_rank: int = -1  # launchers give it; the environment says the same
    seed: int = 0
    device: str = "auto"
    out: Annotated[str, tyro.conf.arg(aliases=["--work-dir"])] = "outputs/vlm_train"


class Learner(nn.Module):
    """A Llava whose forward pass is the loss: the form that DeepSpeed and we need."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, features):
        """Sum of -log p(token | photo, all before it) over the tokens to learn. Eq. 3 of LLaVA, Sec. 4.2.

        features: what the tower said (photos,N,D), or pixels (photos,3,S,S) if it learns; None: words alone.
        """
        model, seen = self.model, None
        if features is not None:
            seen = (
                model.image_features(features)
                if features.dim() == 4 and features.shape[1] == 3
                else None
            )
            seen = model.project(features) if seen is None else seen
        embeds = model.embed(batch["ids"], seen)
        states = model.language.base_model(
            inputs_embeds=embeds,
            attention_mask=batch["mask"],
            position_ids=batch["positions"],
            use_cache=False,
        ).last_hidden_state
        labels = batch["labels"][:, 1:]
        learned = labels != IGNORE  # the head is asked there only: it has 49 152 words
        logits = model.language.get_output_embeddings()(states[:, :-1][learned])
        value = F.cross_entropy(logits.float(), labels[learned], reduction="sum")
        # The connector has gradients of zero, not none: it may be all that learns
        if features is None:
            value = value + 0 * sum(p.sum() for p in model.connector.parameters())
        return value


def freeze(model, cfg):
    """Who learns: the connector, and by --train_type nothing else, LoRA in the language model, all of that, everything.

    What learns is kept in fp32: a bf16 number next to 1 cannot move by less than 0.008.
    """
    model.requires_grad_(False)
    model.connector.float().requires_grad_(True)
    if model.newline is not None:
        model.newline.requires_grad_(True)
    if cfg.train_type == "use_lora":
        llama2_lora.inject(
            model.language, cfg.lora_targets, cfg.lora_rank, checkpoints.LORA_SCALE * cfg.lora_rank
        )
    if cfg.train_type in ("freeze_vision", "none"):
        model.language.float().requires_grad_(True)
    if cfg.train_type == "none":
        model.vision.float().requires_grad_(True)


def rates(cfg, step):
    """-> what the rates of (new parts, parts trained before) are multiplied by at a step.

    The first stage moves new parts only; each stage warms up and comes down by itself.
    """
    align = step < cfg.align_steps
    i, n = (
        (step, cfg.align_steps)
        if align
        else (step - cfg.align_steps, cfg.max_steps - cfg.align_steps)
    )
    warm, share = min(1.0, (i + 1) / max(1, min(cfg.num_warmup_steps, n))), i / n
    way = {"cosine": (1 + math.cos(math.pi * share)) / 2, "linear": 1 - share, "constant": 1.0}[
        cfg.lr_scheduler_type
    ]
    return warm * way, 0.0 if align else warm * way


def groups(model, cfg):
    """For the optimizer: new parts, and what was trained before or corrects it, each with a rate of its own."""
    new = {id(p) for part in (model.connector,) for p in part.parameters()} | {id(model.newline)}
    moving = [p for p in model.parameters() if p.requires_grad]
    fresh, old = [p for p in moving if id(p) in new], [p for p in moving if id(p) not in new]
    every = [{"params": fresh, "lr": cfg.learning_rate, "top": cfg.learning_rate, "old": 0}]
    if old:
        top = cfg.learning_rate_pretraining_components
        every.append({"params": old, "lr": top, "top": top, "old": 1})
    return every


@dataclass
class Photos:
    """Pictures by number: what the tower said of each (views,N,T,D), or how to look, if the tower learns."""

    paths: list
    said: Any = None
    vision_tower: Any = None

    def __call__(self, numbers, random):
        """-> features (len,N,D) or pixels (len,3,S,S) of these pictures, a view of each drawn by `random`."""
        if self.said is not None:
            views = random.integers(len(self.said), size=len(numbers))
            return self.said[torch.from_numpy(views), torch.tensor(numbers)].float()
        images = [read_image(self.paths[i], self.vision_tower.size) for i in numbers]
        return self.vision_tower.pixels(torch.stack(images))


def rows_of(cfg):
    """-> rows to learn from, and the folder of their pictures."""
    if cfg.data:
        folder = Path(cfg.image_folder or Path(cfg.data).parent)
        return data.read(cfg.data, folder), folder
    rows, folder = data.fruit("train", cfg.seed), data.photos()
    if cfg.emoji:
        rows += data.emoji(folder, cfg.emoji, cfg.seed)
    return rows, folder


def draw(samples, cfg, step, rank, n):
    """The conversations of a step on this rank: A parts of B. Every epoch has its own order, the same on all ranks."""
    if cfg.group_by_modality_length:
        return grouped(samples, cfg, step, rank, n)
    a_step = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps
    first = (step * n + rank) * a_step
    chosen = []
    for k in range(first, first + a_step):
        epoch, place = divmod(k, len(samples))
        chosen.append(
            samples[np.random.default_rng([cfg.seed, 3, epoch]).permutation(len(samples))[place]]
        )
    size = cfg.per_device_train_batch_size
    return [chosen[i : i + size] for i in range(0, a_step, size)]


def grouped(samples, cfg, step, rank, n):
    """The same, but no part mixes pictures with words alone, on no rank of a step."""
    parts, size = [], cfg.per_device_train_batch_size
    for k in range(
        step * cfg.gradient_accumulation_steps, (step + 1) * cfg.gradient_accumulation_steps
    ):
        count = len(samplers.by_modality(samples, size, cfg.seed, 0, n)[rank])
        epoch, place = divmod(k, count)
        numbers = samplers.by_modality(samples, size, cfg.seed, epoch, n)[rank][place]
        parts.append([samples[i] for i in numbers])
    return parts


def collate(part, cfg, model, pad, photos, random):
    """Conversations -> a batch as `Learner` takes it, and what was seen in their pictures, in order."""
    if cfg.packing:
        rows = packing.pack(part, max(256, max(len(s["ids"]) for s in part)))
        batch = packing.packed(rows, pad)
        batch["mask"] = packing.attention_mask(model.language, batch)
        part = [sample for row in rows for sample in row]
    else:
        batch = packing.pad(part, pad)
        packing.check_positions(model.language, batch)
    numbers = [i for sample in part for i in sample["images"]]
    return batch, photos(numbers, random) if numbers else None


def learned(samples):
    return sum(label != IGNORE for s in samples for label in s["labels"][1:])


def world():
    """-> which rank this is, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(*values):
    """Numbers, each summed over all ranks."""
    if not dist.is_initialized():
        return list(values)
    x = torch.tensor(values, dtype=torch.float64, device=ranks.device())
    dist.all_reduce(x)
    return x.tolist()


def train(learner, optimizer, samples, photos, pad, cfg, on, engine=None, start=0):
    """Steps `start` to cfg.max_steps; yields the loss of each: a mean over all tokens that all ranks learned from."""
    rank, n = world()
    moving = [p for p in learner.parameters() if p.requires_grad]
    for step in range(start, cfg.max_steps):
        factors = rates(cfg, step)
        for group in optimizer.param_groups:
            group["lr"] = group["top"] * factors[group["old"]]
        parts = draw(samples, cfg, step, rank, n)
        random = np.random.default_rng([cfg.seed, 4, step, rank])
        (tokens,) = total(sum(learned(part) for part in parts))
        summed = 0.0
        for part in parts:
            batch, seen = collate(part, cfg, learner.model, pad, photos, random)
            batch = {k: v.to(on) for k, v in batch.items()}
            with run.autocast(on) if cfg.precision == "bf16" else nullcontext():
                value = (engine or learner)(batch, None if seen is None else seen.to(on))
            summed += value.item()
            if engine:  # it divides by A and by n
                engine.backward(value * cfg.gradient_accumulation_steps * n / tokens)
                engine.step()
            else:
                (value / tokens).backward()
        if not engine:
            for p in moving:
                # a rank without pictures, one with
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                if n > 1:
                    dist.all_reduce(p.grad)
            torch.nn.utils.clip_grad_norm_(moving, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        yield total(summed)[0] / tokens


def prepare(cfg, on):
    """-> tokenizer, model of which the right parts learn, samples, their pictures, how many rows were mended."""
    tokenizer, language = llava_io.speaker(cfg.language, on)
    room = packing.positions_of(language)
    longest = cfg.model_max_length or room
    fits = room is None or longest <= room
    check(
        fits, f"--model_max_length {longest}: the language model has {room} positions, take no more"
    )
    if on.type == "cpu":
        # On rows as short as these faster than the fused kernel
        language.set_attn_implementation("eager")
    vision_tower = tower.load(cfg.vision, cfg.layer, cfg.select, on=on)
    run.seed(cfg.seed)
    model = llava.build(vision_tower, cfg.connector, language, tokenizer, on=on)
    freeze(model, cfg)
    if cfg.gradient_checkpointing:
        language.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    rows, folder = rows_of(cfg)
    rows, broken = data.mend(rows, folder) if cfg.data else (rows, 0)
    names = sorted({row["image"] for row in rows if row.get("image")})
    paths = [folder / name for name in names]
    photos = Photos(paths, vision_tower=vision_tower)
    if cfg.train_type != "none":
        photos.said = data.features(vision_tower, paths, cfg.views, cfg.seed) if paths else None
    number = {name: i for i, name in enumerate(names)}
    samples, shortened, left_out = data.samples(tokenizer, rows, model.count, number, longest)
    if cfg.text_share:
        count = round(len(samples) * cfg.text_share / (1 - cfg.text_share))
        # Others than those it is judged by
        pages = evaluate.paragraphs(JUDGED_PAGES + count)[JUDGED_PAGES:]
        samples += [words_alone(tokenizer, text, longest) for text in pages]
    counts = {
        "broken pictures": broken,
        "conversations shortened": shortened,
        "conversations left out": left_out,
    }
    return tokenizer, model, samples, photos, counts


def words_alone(tokenizer, text, longest=None):
    """A paragraph as a sample: all of it is learned, so that the language model stays what it was."""
    ids = tokenizer(
        plain(text, tokenizer), truncation=True, max_length=min(128, longest or 128)
    ).input_ids
    return {"ids": ids, "labels": list(ids), "images": []}


def worker(cfg):
    """What every rank does -> its numbers."""
    rank, n = world()
    on = ranks.device() if n > 1 else run.device(cfg.device)
    folder, first = Path(cfg.out), rank == 0
    tokenizer, model, samples, photos, counts = prepare(cfg, on)
    learner = Learner(model).train()
    model.vision.train(cfg.train_type == "none")
    every = groups(model, cfg)
    engine = checkpoints.engine_of(learner, every, cfg) if cfg.zero_stage >= 0 else None
    optimizer = (
        engine.optimizer if engine else torch.optim.AdamW(every, weight_decay=cfg.weight_decay)
    )
    losses = checkpoints.load(cfg, model, optimizer, engine) if cfg.resume else []
    if first and not cfg.resume:
        run.output(folder, cfg)
    if first:
        report_length(counts, cfg)
        print(llama2_lora.tree(model) or f"no adapters; what learns: {cfg.train_type}", flush=True)
    save = partial(checkpoints.save, cfg, model, optimizer, losses, engine)
    start, clock, cpu = len(losses), time.perf_counter(), time.process_time()
    listeners = checkpoints.speak_up(cfg, folder) if first else []
    steps = train(
        learner, optimizer, samples, photos, tokenizer.pad_token_id, cfg, on, engine, start
    )
    for value in run.progress(steps, cfg.max_steps, start, cfg.save_every, save):
        losses.append(value)
        for tell in listeners:
            tell(len(losses), value)
    seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
    if cfg.save_every:
        save()
    numbers = {"losses": losses, "train_seconds": seconds, "train_cpu_seconds": cpu}
    numbers |= {"process_MiB": llama2_full.process_peak() / 2**20} | counts
    if first:
        made = checkpoints.tensors(model)
        checkpoint.write(folder / "model.safetensors", made, checkpoints.about(cfg))
        numbers["learned"] = sum(x.numel() for x in made.values())
        if not cfg.data:
            numbers |= scored(cfg, tokenizer, model.eval(), folder)
    return numbers


def report_length(counts, cfg):
    """One line, if there were conversations longer than the model can read."""
    shortened, left_out = counts["conversations shortened"], counts["conversations left out"]
    if shortened or left_out:
        most = (
            f"--model_max_length {cfg.model_max_length}"
            if cfg.model_max_length
            else "the model's positions"
        )
        print(
            f"longer than {most}: {shortened} conversations lost turns at their end, {left_out} are left out"
        )


def scored(cfg, tokenizer, model, folder):
    """Photos that no training saw, and pages of words alone, before and after: the corrections can be taken away."""
    fruit, on = data.data.groceries(model.vision.size), next(model.language.parameters()).device
    learn, chosen = fruit_photos.split(fruit, cfg.judged, cfg.seed)
    if cfg.train_type == "none":  # a tower that learns is like no other: its features are not kept
        parts = fruit.images[chosen].split(8)
        with torch.no_grad():
            features = torch.cat([model.vision(model.vision.pixels(x.to(on))).cpu() for x in parts])
    else:
        features = tower.vision_features(model.vision, fruit.images[chosen])
    found, texts, _ = evaluate.evaluate_photos(tokenizer, model, features.float(), fruit, chosen)
    truth = [fruit_photos.name_of(fruit, i) for i in chosen]
    shown = fruit_photos.spread(torch.arange(len(chosen)))
    said, are = ([x[i] for i in shown] for x in (texts, truth))
    fruit_photos.draw(
        folder / "answers.png", fruit.images[chosen[shown]], said, are, fruit_photos.QUESTION
    )
    metrics = {"photos": len(chosen), "LLaVA": found}
    if cfg.train_type != "none":
        metrics |= probe.yardsticks(model.vision, fruit, learn, chosen)
    # a small trial needs few of them
    pages = evaluate.paragraphs(min(JUDGED_PAGES, cfg.judged or JUDGED_PAGES))
    metrics["text loss"] = {"after": evaluate.text_loss(tokenizer, model.language, pages)}
    before, language = llava_io.speaker(cfg.language, on)
    metrics["text loss"]["before"] = evaluate.text_loss(before, language, pages)
    return metrics


def sane(cfg):
    """Raises UserError for flags that make no sense, before anything is loaded."""
    above = (
        cfg.max_steps,
        cfg.per_device_train_batch_size,
        cfg.gradient_accumulation_steps,
        cfg.views,
        cfg.lora_rank,
    )
    check(
        min(above) > 0,
        "--max_steps, --per_device_train_batch_size, ..accumulation.., --views, --lora_rank: above 0",
    )
    check(cfg.learning_rate > 0, "--learning_rate must be above 0")
    check(
        cfg.learning_rate_pretraining_components >= 0,
        "--learning_rate_pretraining_components must be 0 or more",
    )
    check(
        0 <= cfg.align_steps < cfg.max_steps,
        "--align_steps must be 0 or more and below --max_steps",
    )
    check(
        min(cfg.judged, cfg.save_every, cfg.num_warmup_steps, cfg.emoji, cfg.weight_decay) >= 0,
        "a flag is below 0",
    )
    check(cfg.model_max_length >= 0, "--model_max_length must be 0 or more")
    check(0 <= cfg.text_share < 1, "--text_share must be at least 0 and below 1")
    check(not cfg.image_folder or cfg.data, "--image_folder goes with --data")
    for flag, module in (("tensorboard", cfg.enable_tensorboard), ("wandb", cfg.enable_wandb)):
        check(not module or find_spec(flag), f"--enable_{flag}: pip install {flag}")


def main(cfg: Config) -> dict:
    """Train, write what was learned, score it on photos that no training saw."""
    sane(cfg)
    if cfg.learning_rate_pretraining_components == 0:
        # What may not move needs no gradient, no fp32, no optimizer
        cfg = replace(cfg, train_type="projector")
    alone = cfg.ranks == 1 and cfg.zero_stage < 0 and "RANK" not in os.environ
    found = [worker(cfg)] if alone else ranks.launch(worker, cfg, cfg.ranks)
    if found is None:
        return {}
    r, folder = found[0], Path(cfg.out)
    losses = r.pop("losses")
    run.write_json(folder / "losses.json", losses)
    figures.curves(
        folder / "loss.png", {"loss": losses}, "step", "-log p(token of an answer)", smooth=5
    )
    metrics: dict[str, Any] = {"final_loss": float(np.mean(losses[-10:]))} | r
    then = f'python vlm/llava.py --model {folder}/model.safetensors --image PHOTO --prompt "What fruit is this?"'
    return run.report(folder, metrics, then) | {"losses": losses}


if __name__ == "__main__":
    run.cli(main, Config)
