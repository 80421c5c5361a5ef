"""Trainable parameters of a LLaVA, and the learning rate of each: new parts, pretrained parts, two stages.

Liu et al. 2023, arXiv:2304.08485, Sec. 4.2: the connector alone first (feature alignment), then it
and the language model. LoRA in the language model: Hu et al. 2021, arXiv:2106.09685.
"""

import math

from finetune import llama2_lora
from vlm import checkpoints


def set_trainable(model, cfg):
    """Trainable parameters by --train_type: the connector, and nothing else, LoRA in the language
    model, all of that, or everything.

    What learns is kept in fp32: a bf16 number next to 1 cannot move by less than 0.008.
    """
    # the connector always learns
    model.requires_grad_(False)
    model.connector.float().requires_grad_(True)
    if model.newline is not None:
        model.newline.requires_grad_(True)
    # the language model: by LoRA, or whole
    if cfg.train_type == "use_lora":
        alpha = checkpoints.LORA_SCALE * cfg.lora_rank
        llama2_lora.inject(model.language, cfg.lora_targets, cfg.lora_rank, alpha)
    if cfg.train_type in ("freeze_vision", "none"):
        model.language.float().requires_grad_(True)
    # the vision tower
    if cfg.train_type == "none":
        model.vision.float().requires_grad_(True)


def lr_multipliers(cfg, step):
    """Learning-rate multipliers at a step -> (of new parts, of pretrained parts).

    The first stage moves new parts only; each stage warms up and comes down by itself.
    """
    # the stage, and the step in it
    align = step < cfg.align_steps
    if align:
        i = step
        n = cfg.align_steps
    else:
        i = step - cfg.align_steps
        n = cfg.max_steps - cfg.align_steps
    # linear warm-up times the schedule
    warmup = min(1.0, (i + 1) / max(1, min(cfg.num_warmup_steps, n)))
    done = i / n
    if cfg.lr_scheduler_type == "cosine":
        decay = (1 + math.cos(math.pi * done)) / 2
    elif cfg.lr_scheduler_type == "linear":
        decay = 1 - done
    else:
        decay = 1.0
    factor = warmup * decay
    return factor, 0.0 if align else factor


def param_groups(model, cfg):
    """Parameter groups for the optimizer: new parts, and pretrained ones or their LoRA, each with a
    rate of its own."""
    new_ids = {id(p) for p in model.connector.parameters()} | {id(model.newline)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    new = [p for p in trainable if id(p) in new_ids]
    old = [p for p in trainable if id(p) not in new_ids]
    groups = [{"params": new, "lr": cfg.learning_rate, "top": cfg.learning_rate, "old": 0}]
    if old:
        top = cfg.learning_rate_pretraining_components
        groups.append({"params": old, "lr": top, "top": top, "old": 1})
    return groups
