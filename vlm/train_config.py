"""Flags of vlm/train.py: the sections of flags.py side by side, and the checks that need more than one of them."""

import math
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from utils.run import check
from vlm.flags import (
    DataConfig,
    DeepSpeedConfig,
    FSDPConfig,
    LoraConfig,
    ModelFlags,
    QuantConfig,
    TrainConfig,
    WandbConfig,
)

OUT_NAMES = ["--save-path", "--work-dir", "--output-dir"]


@dataclass(frozen=True)
class Config:
    """Train a LLaVA on conversations about photos."""

    model: Annotated[ModelFlags, arg(name="")] = ModelFlags()
    train: Annotated[TrainConfig, arg(name="")] = TrainConfig()
    data: Annotated[DataConfig, arg(name="")] = DataConfig()
    lora: LoraConfig = LoraConfig()
    quant: QuantConfig = QuantConfig()
    fsdp: FSDPConfig = FSDPConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    wandb: WandbConfig = WandbConfig()
    # who adds up the gradients of several ranks, if neither --fsdp nor --zero_stage: one all-reduce
    # behind the backward pass, PyTorch's DDP, or accelerate
    engine: Literal["plain", "ddp", "accelerate"] = "plain"
    enable_tensorboard: bool = False  # write the losses for TensorBoard
    save_model: bool = False  # also write the whole model, as a folder: OUT/model
    # where the results go
    out: Annotated[str, arg(aliases=OUT_NAMES)] = "outputs/vlm_train"

    @property
    def resume(self) -> bool:
        """Go on from the last checkpoint?"""
        return self.train.resume


def changed(cfg: Config, **values: Any) -> Config:
    """The configuration with other values, each in the section that has a field of its name.

    Raises TypeError for a name that no section has.
    """
    top = {name: values.pop(name) for name in [f.name for f in fields(cfg)] if name in values}
    cfg = replace(cfg, **top)
    for section in ("model", "train", "data", "lora"):
        old = getattr(cfg, section)
        names = [f.name for f in fields(old)]
        mine = {name: values.pop(name) for name in names if name in values}
        if mine:
            cfg = replace(cfg, **{section: replace(old, **mine)})
    if values:
        raise TypeError(f"no section has {', '.join(values)}")
    return cfg


def engine_name(cfg: Config) -> str:
    """fsdp, deepspeed, or what --engine says. Raises UserError for two at once."""
    asked = []
    if cfg.fsdp.enable:
        asked.append("fsdp")
    if cfg.deepspeed.stage >= 0:
        asked.append("deepspeed")
    if cfg.engine != "plain":
        asked.append(cfg.engine)
    check(len(asked) < 2, f"one engine at a time: {' or '.join(asked)}")
    return asked[0] if asked else "plain"


def with_steps(cfg: Config, samples: int, ranks: int) -> Config:
    """--epochs and --warmup_ratio become numbers of steps, now that the number of samples is known."""
    a_step = cfg.train.batch_size * cfg.train.gradient_accumulation_steps * ranks
    if cfg.train.epochs:
        cfg = changed(cfg, steps=math.ceil(cfg.train.epochs * samples / a_step))
    if cfg.train.warmup_ratio:
        cfg = changed(cfg, warmup_steps=math.ceil(cfg.train.warmup_ratio * cfg.train.steps))
    return cfg


def check_flags(cfg: Config) -> None:
    """Raises UserError for flags that make no sense, before anything is loaded."""
    train = cfg.train
    data = cfg.data
    check(
        min(train.steps, train.batch_size, train.gradient_accumulation_steps) > 0
        and min(data.views, cfg.lora.r) > 0,
        "--steps, --batch_size, --gradient_accumulation_steps, --views, --lora.r: above 0",
    )
    # rates
    check(train.lr > 0, "--lr must be above 0")
    check(train.lr_pretrained >= 0, "--lr_pretrained must be 0 or more")
    check(0 <= train.min_lr <= train.lr, "--min_lr must be 0 or more, and at most --lr")
    betas = all(0 <= beta < 1 for beta in train.betas)
    check(betas, "--betas must be at least 0 and below 1")
    check(0 <= cfg.lora.lora_dropout < 1, "--lora.lora_dropout must be at least 0 and below 1")
    check(cfg.lora.lora_alpha >= 0, "--lora.lora_alpha must be 0 or more; 0: twice the rank")
    # stages and lengths
    stages = 0 <= train.align_steps < train.steps or train.epochs > 0
    check(stages, "--align_steps must be 0 or more and below --steps")
    low = min(train.judged, train.save_steps, train.warmup_steps, data.emoji, train.weight_decay)
    check(min(low, train.grad_clip, train.epochs) >= 0, "a flag is below 0")
    check(train.log_steps > 0, "--log_steps must be above 0")
    check(train.save_total_limit >= 0, "--save_total_limit must be 0 or more; 0: one checkpoint")
    check(
        train.save_steps or not train.save_total_limit, "--save_total_limit goes with --save_steps"
    )
    check(0 <= train.warmup_ratio < 1, "--warmup_ratio must be at least 0 and below 1")
    check(data.model_max_length >= 0, "--model_max_length must be 0 or more")
    # data
    check(0 <= data.text_share < 1, "--text_share must be at least 0 and below 1")
    check(not data.image_folder or data.paths, "--image_folder goes with --data")
    check(
        data.paths or not data.is_lazy, "--lazy, --weights, --download and workers go with --data"
    )
    check(data.dataloader_num_workers >= 0, "--dataloader_num_workers must be 0 or more")
    check(data.dataloader_prefetch_factor > 0, "--dataloader_prefetch_factor must be above 0")
    # another model to go on with
    if train.ckpt_path:
        check_going_on(cfg)
    # engines
    name = engine_name(cfg)
    half = train.precision == "fp16"
    check(not half or name in ("plain", "ddp"), f"--precision fp16 is not done under {name}: bf16")
    quantised = cfg.quant.bits > 0
    lora = train.train_type in ("use_lora", "lora_frozen_projector", "projector")
    check(not quantised or lora, "--quant.bits: what is stored in few bits cannot learn; use LoRA")
    # packages that are not required
    asked = (("tensorboard", cfg.enable_tensorboard), ("wandb", cfg.wandb.enable))
    for package, wanted in asked:
        check(not wanted or find_spec(package), f"--enable_{package}: pip install {package}")


def check_going_on(cfg: Config) -> None:
    """Raises UserError if --model goes with flags of its parts, or would be overwritten."""
    named = cfg.model
    usual = ModelFlags()
    parts = ("vision_name_or_path", "text_name_or_path", "connector", "perceiver", "select")
    parts += ("vision_layer", "img_size", "sparsity_plugins", "tiles", "image_grid_pinpoints")
    other = [name for name in parts if getattr(named, name) != getattr(usual, name)]
    flags = ", ".join(f"--{name}" for name in other)
    check(not other, f"{flags}: the parts are those of --model; leave out one or the other")
    target = Path(cfg.out)
    source = Path(cfg.train.ckpt_path).resolve()
    written = {(target / "model.safetensors").resolve(), (target / "model").resolve()}
    check(source not in written, f"--out {target} holds --model: choose another place with --out")
