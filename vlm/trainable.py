"""Trainable parameters of a LLaVA, and the learning rate of each: new parts, pretrained parts, two stages.

Liu et al. 2023, arXiv:2304.08485, Sec. 4.2: the connector alone first (feature alignment), then it
and the language model. LoRA in the language model: Hu et al. 2021, arXiv:2106.09685; beside matrices
of 4 or 8 bits: QLoRA, Dettmers et al. 2023, arXiv:2305.14314.
"""

import math
import re

from finetune import llama2_lora, llama2_qlora
from finetune.quantization import QuantLinear
from utils.run import UserError, check
from utils.text import printable
from vlm import peft_files

LORA_TYPES = ("use_lora", "lora_frozen_projector")


def quantize(language, cfg):
    """QLoRA: the matrices of the frozen language model in 8 or 4 bits, by our layer or by bitsandbytes."""
    quant = cfg.quant
    if not quant.bits:
        return
    make = llama2_qlora.by_bitsandbytes if quant.backend == "bitsandbytes" else QuantLinear
    llama2_qlora.store(language, quant.bits, quant.codebook, double=quant.double_quant, make=make)


def freeze(model, patterns):
    """--freeze: parameters whose names begin with a part or match a regular expression do not learn.

    Raises UserError for what is no regular expression, fits nothing that learns, or leaves nothing.
    """
    for pattern in patterns:
        try:
            fits = re.compile(pattern).match
        except re.error as error:
            wrong = f"--freeze {printable(pattern)}: no regular expression: {error}"
            raise UserError(wrong) from None
        found = [p for name, p in model.named_parameters() if p.requires_grad and fits(name)]
        check(found, f"--freeze {printable(pattern)}: nothing that learns has such a name")
        for p in found:
            p.requires_grad_(False)
    left = any(p.requires_grad for p in model.parameters())
    check(left, "--freeze leaves nothing to learn")


def set_trainable(model, cfg):
    """Trainable parameters by --train_type: the connector, and nothing else, LoRA in the language
    model, all of that, LoRA and not the connector, or everything.

    What learns is kept in fp32: a bf16 number next to 1 cannot move by less than 0.008.
    """
    kind = cfg.train.train_type
    model.requires_grad_(False)
    quantize(model.language, cfg)
    # the connector, but for the experiment that leaves it random
    model.connector.float().requires_grad_(kind != "lora_frozen_projector")
    if model.newline is not None:
        model.newline.data = model.newline.data.float()
        model.newline.requires_grad_(kind != "lora_frozen_projector")
    # the language model: by LoRA, or whole
    if kind in LORA_TYPES:
        lora = cfg.lora
        llama2_lora.inject(
            model.language, lora.target_modules, lora.r, lora.alpha, lora.lora_dropout
        )
        # from zero, or where an adapter of PEFT stopped
        if cfg.train.adapter:
            peft_files.fill(model, cfg.train.adapter)
    if kind in ("freeze_vision", "none"):
        model.language.float().requires_grad_(True)
    # the vision tower
    if kind == "none":
        model.vision.float().requires_grad_(True)
    # and of all that what is to stay
    freeze(model, cfg.train.freeze)
    sees = any(p.requires_grad for p in model.vision.parameters())
    check(
        sees or kind != "none",
        "--freeze leaves nothing of the vision tower to learn: take --train_type freeze_vision",
    )


def lr_multipliers(train, step):
    """Learning-rate multipliers at a step -> (of new parts, of pretrained parts).

    The first stage moves new parts only; each stage warms up and comes down by itself, to min_lr.
    """
    # the stage, and the step in it
    align = step < train.align_steps
    if align:
        i = step
        n = train.align_steps
    else:
        i = step - train.align_steps
        n = train.steps - train.align_steps
    # linear warm-up times the schedule
    warmup = min(1.0, (i + 1) / max(1, min(train.warmup_steps, n)))
    done = i / n
    if train.lr_scheduler_type == "cosine":
        decay = (1 + math.cos(math.pi * done)) / 2
    elif train.lr_scheduler_type == "linear":
        decay = 1 - done
    else:
        decay = 1.0
    lowest = train.min_lr / train.lr
    factor = warmup * (lowest + (1 - lowest) * decay)
    return factor, 0.0 if align else factor


def param_groups(model, cfg):
    """Parameter groups for the optimizer: new parts, and pretrained ones or their LoRA, each with a
    rate of its own."""
    new_ids = {id(p) for p in model.connector.parameters()} | {id(model.newline)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    new = [p for p in trainable if id(p) in new_ids]
    old = [p for p in trainable if id(p) not in new_ids]
    groups = []
    if new:
        top = cfg.train.lr
        groups.append({"params": new, "lr": top, "top": top, "old": 0})
    if old:
        top = cfg.train.lr_pretrained
        groups.append({"params": old, "lr": top, "top": top, "old": 1})
    return groups
