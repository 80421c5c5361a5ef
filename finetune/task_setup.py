"""Flags, model, data and batches that all trained methods of this chapter share.

`start` checks everything before anything is written: flags, texts, and whether the model can be
asked as this chapter asks. `draw` makes the batch of a step. Shapes: as in sentiment.py; B texts, L
tokens.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune import sentiment, sentiment_data
from utils import pretrained, run


@dataclass(frozen=True)
class Training(sentiment_data.Task):
    """The flags that all trained methods share, after those of the task."""

    model: str = "smollm2"  # smollm2, a local folder, or a hub id such as meta-llama/Llama-2-7b-hf
    steps: int = 100  # training steps
    batch: int = 16  # texts per step
    lr: float = 1e-3  # peak learning rate: up in a line over a tenth of the steps, down to zero
    resume: bool = False  # go on from the last checkpoint in --out, bit for bit
    save_every: int = 50  # steps between checkpoints; 0: none are written
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/llama2"  # where the results go


@dataclass
class Bench:
    """What a run works with."""

    folder: Path
    device: torch.device
    tokenizer: Any
    model: Any
    parts: dict  # of the data: {"train", "valid", "test": [(text, label)]}


def draw(tokenizer, pairs, cfg, i):
    """The texts of step i, the same in every run with this seed -> ids, mask, labels (B, L).

    `pairs` are sorted by length: texts of one neighbourhood need little padding, and padding costs
    what texts cost.
    """
    random = np.random.default_rng([cfg.seed, i])
    # a text at random, the texts nearest to it in length, and of these a batch
    centre = random.integers(len(pairs))
    distance = np.abs(np.arange(len(pairs)) - centre)
    near = distance.argsort()[: 8 * cfg.batch]
    pick = random.choice(near, cfg.batch, replace=len(near) < cfg.batch)
    return sentiment.batch(tokenizer, cfg, [pairs[j] for j in pick])


def check_model(model, tokenizer, cfg, before=0):
    """Raises UserError for a model that cannot be asked as this chapter asks, or has too few
    positions for the texts.

    before: positions that stand before every text, soft words or a prefix.
    """
    # what `sentiment.network` and the soft prompts pass to the model
    kind = model.config.model_type
    accepted = inspect.signature(model.forward).parameters
    needed = ("position_ids", "inputs_embeds", "logits_to_keep")
    lacking = ", ".join(name for name in needed if name not in accepted)
    run.check(
        not lacking,
        f"models of the kind {kind} take no {lacking}; choose a Llama, GPT-2, OPT or Qwen",
    )
    # an end token, which closes an answer and fills up shorter texts
    end = tokenizer.eos_token_id
    words = model.get_input_embeddings().num_embeddings
    run.check(
        end is not None,
        "the tokenizer of this model has no end token; set eos_token in tokenizer_config.json",
    )
    run.check(end < words, f"the end token has the number {end}, and the model knows {words} words")
    # the longest question there can be: a text is cut to MAX_TOKENS, its answer and the end token follow
    pattern = len(tokenizer(cfg.pattern.replace("{text}", ""))["input_ids"])
    answer = max(map(len, sentiment.answers(tokenizer, cfg))) + 1
    sentiment.check_positions(model, before + pattern + sentiment.MAX_TOKENS + answer)


def start(cfg, allow=None, before=0):
    """Check the flags, load data and model, make the folder, fix the seed -> Bench. Raises
    UserError.

    allow: a function that refuses a model by a UserError, before anything is written; before:
    positions that stand before every text.
    """
    # flags
    if isinstance(cfg, Training):
        positive = min(cfg.steps, cfg.batch) > 0 and cfg.lr > 0
        run.check(positive, "--steps, --batch and --lr must be above 0")
    # data and model
    parts = sentiment_data.load(cfg)
    device = run.device(cfg.device)
    load = partial(pretrained.language_model, cfg.model)
    if cfg.model == "smollm2":
        load = pretrained.smollm2
    tokenizer, model = load(device)
    if device.type == "cpu":
        # on texts as short as these a fifth faster than the fused kernel
        model.set_attn_implementation("eager")
    check_model(model, tokenizer, cfg, before)
    if allow:
        allow(model)
    # from here on all is well: the seed, and the folder of the results
    run.seed(cfg.seed)
    return Bench(run.output(cfg.out, cfg), device, tokenizer, model, parts)
