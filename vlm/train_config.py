"""Flags of vlm/train.py, under the names that LLaVA's own training script and transformers give them."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Literal

import tyro

from utils.run import check


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


def check_flags(cfg):
    """Raises UserError for flags that make no sense, before anything is loaded."""
    check(
        min(cfg.max_steps, cfg.per_device_train_batch_size, cfg.gradient_accumulation_steps) > 0
        and min(cfg.views, cfg.lora_rank) > 0,
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
    for package, asked in (("tensorboard", cfg.enable_tensorboard), ("wandb", cfg.enable_wandb)):
        check(not asked or find_spec(package), f"--enable_{package}: pip install {package}")
