"""Supervised fine-tuning whatever the engine: model with LoRA, loss, held-out loss, report.

The scripts that drive DeepSpeed (llama2_clm_sft_lora_with_zero.py) and accelerate
(accelerate_train.py) share it. LoRA: Hu et al. 2021, arXiv:2106.09685, here by the PEFT library.

Shapes: B texts that a rank reads at a time, L tokens, V words of the vocabulary.
"""

import math
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from training import faq, manifest, ranks
from utils import checkpoint, figures, pretrained, run

# The model


def prepare(cfg):
    """-> tokenizer, model in the precision asked for: frozen with adapters, or trained whole."""
    smollm2 = cfg.model == "smollm2"
    tokenizer, model = pretrained.smollm2() if smollm2 else pretrained.language_model(cfg.model)
    # Refuse what it cannot read
    known = getattr(model.config, "max_position_embeddings", None) or cfg.length
    positions = f"--length {cfg.length}: --model knows {known} positions, and no more"
    run.check(cfg.length <= known, positions)
    no_end = "the tokenizer of --model has no end token: name one made for chat"
    run.check(tokenizer.eos_token_id is not None, no_end)
    model = model.to(torch.float32 if cfg.precision == "fp32" else torch.bfloat16)
    if not torch.cuda.is_available():
        # On texts as short as these faster than the fused kernel
        model.set_attn_implementation("eager")
    run.seed(cfg.seed)
    # Adapters beside frozen weights, or all weights
    if cfg.method == "lora":
        model = add_lora(model, cfg.lora_rank)
    else:
        model.requires_grad_(True)
    if cfg.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return tokenizer, model.train()


def add_lora(model, r):
    """PEFT's adapters of rank r at every matrix of every layer, not at the head; alpha is 2 r."""
    from peft import LoraConfig, get_peft_model

    # PEFT still uses that name
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")
    lora = LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, target_modules="all-linear")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    model.peft_config["default"].base_model_name_or_path = base_name(model)
    return model


def base_name(model):
    """The name under which the base of an adapter loads again: a hub id, or an absolute path."""
    name = model.config.name_or_path
    return str(Path(name).resolve()) if Path(name).is_dir() else name


# The loss


def loss(model, ids, mask, labels):
    """Sum of -log p(token | all before it) over the supervised tokens: (B, L) -> ().

    The sum: of a mean for each part, a token of a short part would weigh more than one of a long
    part.
    """
    on = next(model.parameters()).device
    # Position j predicts token j + 1: labels are shifted by one
    labels = labels[:, 1:].to(on)
    output = model(input_ids=ids.to(on), attention_mask=mask.to(on), use_cache=False)
    logits = output.logits[:, :-1]  # (B, L-1, V)
    supervised = labels != faq.IGNORE
    return F.cross_entropy(logits[supervised].float(), labels[supervised], reduction="sum")


def add(*values):
    """Numbers, each summed over all ranks."""
    total = torch.tensor(values, dtype=torch.float64, device=ranks.device())
    dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def score(model, rows, batch, ending):
    """Mean of -log p over the tokens of held-out answers.

    Every rank takes as many turns: in ZeRO-3 all must join in a forward pass.
    """
    rank, n = ranks.rank_and_world_size()
    rows = sorted(rows, key=lambda row: len(row[0]))  # alike ones together: less padding
    parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    turns = math.ceil(len(parts) / n)
    total = 0.0
    tokens = 0.0
    model.eval()
    for i in range(rank, n * turns, n):
        value = loss(model, *faq.pad(parts[i % len(parts)], ending)).item()
        # The last turn may have less parts than ranks: the others repeat one, and it does not count
        if i < len(parts):
            total += value
            tokens += sum(faq.count_supervised(labels) for _, labels in parts[i])
    model.train()
    total, tokens = add(total, tokens)
    return total / tokens


# The run


def check_flags(cfg):
    """Raises UserError for flags that make no sense, before anything is loaded."""
    numbers = (cfg.batch, cfg.accumulation, cfg.steps, cfg.lora_rank, cfg.lr, cfg.length - 1)
    said = "--batch, --accumulation, --steps, --lora-rank and --lr must be above 0"
    run.check(min(numbers) > 0, f"{said}, --length above 1")
    run.check(cfg.seed >= 0 and cfg.save_every >= 0, "--seed and --save-every must be 0 or more")
    said = "--precision fp16 is refused: its range is too small for training; take bf16"
    run.check(cfg.precision != "fp16", said)
    board = getattr(cfg, "tensorboard", False)
    run.check(find_spec("tensorboard") or not board, "--tensorboard: pip install tensorboard")


def last_checkpoint(cfg, config=None):
    """-> folder of the last whole checkpoint, its losses and its score before training.

    Sets the random state. Raises UserError: there is none, it is damaged, it was made with other
    flags or by more or fewer ranks.
    """
    rank, n = ranks.rank_and_world_size()
    folder = manifest.load(Path(cfg.out) / "checkpoints")
    # As many ranks with the same flags go on
    wrote = len(list(folder.glob("rank*.safetensors")))
    run.check(wrote == n, f"--resume: {folder} was written by {wrote} ranks, here are {n}")
    state = checkpoint.load_state(folder / f"rank{rank}.safetensors")
    run.same_flags(replace(cfg, ranks=n), state["config"], folder)
    other = f"--resume: {folder} was made with another configuration of DeepSpeed"
    run.check(state["deepspeed"] == config, other)
    return folder, {"losses": state["losses"], "before": state["before"]}


def usage(cfg):
    """Three lines of Python that load what the run has written."""
    kind = "AutoModelForCausalLM"
    load = f"from transformers import {kind}"
    target = str(Path(cfg.out).resolve() / "model")
    if cfg.method == "lora":
        kind = "AutoPeftModelForCausalLM"
        load = f"from peft import {kind}"
        target = str(Path(cfg.out).resolve() / "adapter")
    return (
        f"{load}; from transformers import AutoTokenizer\n"
        f"model = {kind}.from_pretrained({target!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({target!r})"
    )


def summary(cfg, found, then):
    """What the ranks found -> the metrics of the run, written and printed; losses in their file."""
    first = found[0]
    losses = first["losses"]
    scores = {"before": first["before"], "after": first["after"]}
    # Numbers of the first rank, memory of all
    metrics: dict[str, Any] = {
        "trained": first["trained"],
        "texts_per_step": cfg.batch * cfg.accumulation * len(found),
        "seconds_per_step": first["seconds_per_step"],
        "final_loss": float(np.mean(losses[-10:])),
        "held-out loss": scores,
        "held-out perplexity": {k: math.exp(v) for k, v in scores.items()},
    }
    for i, r in enumerate(found):
        metrics[f"MiB on rank {i}"] = r["held"]
    folder = Path(cfg.out)
    run.write_json(folder / "losses.json", losses)
    figures.curves(folder / "loss.png", {"loss": losses}, "step", "-log p(token of an answer)")
    result = run.report(folder, metrics, then) | {"losses": losses}
    print(f"use it:\n{usage(cfg)}")
    return result
