"""A Flamingo that learns from examples in its prompt: contrastive pre-training, then episodes and captions.

Pictures are 1796 emoji in four views each, coloured shapes and seven kinds of fruit. First <image>
becomes a word that says what the picture is (flamingo_contrastive.py, no language model); then all
new layers learn from chains with few_shot.loss: half are episodes, whose names are drawn anew for each chain, so
that only the examples tell them (flamingo_episodes.py), half are true sentences (`the color is red`). The language
model stays frozen; its induction heads do the copying. Judged on classes never trained on.

Flamingo: Alayrac et al. 2022, arXiv:2204.14198; in-context learning on held-out classes: Sec. 2.5.
Difference: the paper's chains are web pages, which have no episodes in them.
Shapes: features (P,49,D), chains as in flamingo_episodes.py.

    python vlm/flamingo_train.py                           # both stages: the shipped weights
    python vlm/flamingo_train.py --pretrained              # shipped weights, judged
    python vlm/flamingo_train.py --contrastive_steps 0     # without the first stage
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from utils import checkpoint, figures, pretrained, run
from utils.run import check
from vlm import (
    few_shot,
    flamingo_contrastive,
    flamingo_data,
    flamingo_episodes,
    flamingo_figures,
    flamingo_judge,
    tower,
)
from vlm.flamingo_model import Flamingo, load

WEIGHTS = Path(__file__).parent / "weights" / "flamingo_train.safetensors"


@dataclass(frozen=True)
class Config:
    """Teach a Flamingo to learn names from examples in its prompt, and judge it on classes that it
    never saw."""

    contrastive_steps: int = 200  # of the first stage, without the language model; 0: leave it out
    contrastive_batch: int = 192  # emoji a step, two views each
    steps: int = 160  # of the second stage
    chains: int = 8  # episodes a step
    length: int = 8  # pictures in an episode
    ways: int = 4  # classes in an episode, at most; two at least
    captions: int = 32  # pictures with true sentences a step; 0: episodes only
    views: int = 4  # of each emoji, at least 3
    emoji: int = 0  # so many of those learned from, and of those held out; 0: 1796 and 117
    photos: int = 0  # so many of each kind of fruit; 0: all
    lr: float = 1.5e-3  # of new layers; the gates' is five times that, ten times in the first stage
    every: int = 6  # a new layer before every so many-th layer of the language model
    latents: int = 16  # M, vectors that stand for a picture
    # questions of each kind to be judged by; half as many with seven names or more
    trials: int = 200
    # weights of an earlier run to go on from: its model.safetensors; most often with --contrastive_steps 0
    weights: str = ""
    pretrained: bool = False  # start from the shipped weights and skip the training
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/flamingo_train"


def train(model, pictures, chunks, start_id, words, cfg, on):
    """The second stage; yields the loss of episodes and of captions at each step."""
    # parameter groups: gates learn five times as fast
    learns = model.trainable_parameters()
    gates = [p for name, p in learns.items() if name.endswith(".alpha")]
    rest = [p for name, p in learns.items() if not name.endswith(".alpha")]
    groups = [{"params": rest, "top": cfg.lr}, {"params": gates, "top": 5 * cfg.lr}]
    optimizer = torch.optim.AdamW(groups, cfg.lr, betas=(0.9, 0.98))
    random = np.random.default_rng([cfg.seed, 1])
    for step in range(cfg.steps):
        # learning rate of this step: warm-up times a cosine to zero
        rate = min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / cfg.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = group["top"] * rate
        # episodes, whose examples tell the names; captions, which are true
        about = (random, chunks, start_id, pictures.classes)
        batches = [flamingo_episodes.episode_batch(*about, words, cfg.chains, cfg.length, cfg.ways)]
        if cfg.captions:
            batches.append(flamingo_episodes.caption_batch(*about, cfg.captions))
        # the gradients of both add up
        optimizer.zero_grad()
        values = []
        for ids, supervised, photos in batches:
            seen = few_shot.patch_dropout(pictures.features[photos]).float()
            with run.autocast(on):
                value = few_shot.loss(model, ids.to(on), supervised.to(on), seen.to(on))
            value.backward()
            values.append(value.item())
        nn.utils.clip_grad_norm_([*rest, *gates], 1.0)
        optimizer.step()
        yield values


def check_flags(cfg):
    """Raises UserError for flags out of range, or for another network than that of the shipped weights."""
    counts = (cfg.contrastive_batch, cfg.steps, cfg.chains, cfg.latents, cfg.every, cfg.trials)
    check(min(counts) > 0 and cfg.lr > 0, "all numbers must be above 0")
    check(
        min(cfg.contrastive_steps, cfg.captions) >= 0, "--contrastive_steps, --captions: 0 or more"
    )
    check(not 0 < cfg.captions < 4, "--captions: 4 or more, or 0")
    check(2 <= cfg.ways <= 7, "--ways: from 2 to 7, the kinds of fruit in training")
    check(cfg.length > cfg.ways, "--length must be more than --ways: else no name is told before")
    check(not (cfg.weights and cfg.pretrained), "--weights and --pretrained: one of them at a time")
    few = "--emoji: at least 30, --photos: at least 4, or 0 for all"
    check(cfg.emoji == 0 or cfg.emoji >= 30, few)
    check(cfg.photos == 0 or cfg.photos >= 4, few)
    check(cfg.views >= 3, "--views must be at least 3: two examples, and the picture asked about")
    if not cfg.pretrained:
        return
    check(WEIGHTS.is_file(), f"there are no weights at {WEIGHTS}: leave out --pretrained")
    shipped = checkpoint.read(WEIGHTS)[1]
    for name, asked in (("every", cfg.every), ("latents", cfg.latents)):
        has = f"the weights have {shipped[name]}; leave out --{name} or --pretrained"
        check(shipped[name] == asked, f"--{name} {asked}: {has}")


def main(cfg: Config) -> dict:
    """Both stages of training, or the shipped weights; then few-shot accuracy on held-out classes."""
    check_flags(cfg)
    run.seed(cfg.seed)
    on = run.device(cfg.device)
    # frozen parts: language model, vision encoder; new tokens
    tokenizer, language = pretrained.smollm2(on)
    language.set_attn_implementation("eager")  # faster for short texts on a CPU
    vision_tower = tower.load("efficientnet", on=on)
    new_ids = few_shot.add_words(tokenizer, language)
    start_id = few_shot.start_token(tokenizer)
    chunks = flamingo_episodes.Chunks(tokenizer)
    folder = run.output(cfg.out, cfg)
    # vision features of classes that never learn, and of those that do
    heldout = flamingo_data.heldout_set(vision_tower, cfg)
    shape = {"dim_in": vision_tower.width, "every": cfg.every, "latents": cfg.latents}
    metrics = {}
    if cfg.pretrained:
        model = load(WEIGHTS, language, new_ids, on)
    else:
        if cfg.weights:
            model = load(cfg.weights, language, new_ids, on)
            # what is frozen in a loaded model learns again, all but the language model
            for name, p in model.named_parameters():
                p.requires_grad_(not name.startswith("language."))
        else:
            model = Flamingo(language, new_ids, **shape).to(on)
        pictures = flamingo_data.training_set(vision_tower, cfg)
        words = flamingo_episodes.nonsense_names(tokenizer)
        clock = run.Clock()
        # first stage: <image> becomes a word
        if cfg.contrastive_steps:
            space = flamingo_contrastive.WordSpace(language, tokenizer, words)
            names = space.names(tokenizer, [c.name for c in pictures.of("emoji")])
            stage = flamingo_contrastive.train(model, pictures, space, names, cfg, on)
            values = list(run.progress(stage, cfg.contrastive_steps))
            metrics["contrastive loss"] = float(np.mean(values[-20:]))
        # second stage: chains
        losses = []
        shown = run.bar(train(model, pictures, chunks, start_id, words, cfg, on), cfg.steps)
        for values in shown:
            check(math.isfinite(sum(values)), f"the loss is {values}: try a lower --lr")
            losses.append(values)
            recent = np.mean(losses[-20:], 0)
            shown.set_postfix_str("loss " + " ".join(f"{x:.3f}" for x in recent), refresh=False)
        curves = dict(zip(("episodes", "captions"), zip(*losses)))
        metrics |= {f"loss of {name}": float(np.mean(v[-20:])) for name, v in curves.items()}
        metrics["train_seconds"] = clock()
        curves = {name: list(values) for name, values in curves.items()}
        figures.curves(folder / "loss.png", curves, "step", "-log p of a name", smooth=10)
        checkpoint.write(folder / "model.safetensors", model.trainable_parameters(), shape)
    model.eval()
    # few-shot accuracy on held-out classes, with controls; similar examples; true sentences
    judged_names = flamingo_episodes.nonsense_names(tokenizer, heldout=True)
    about = (model, chunks, start_id, heldout)
    rows = flamingo_judge.shots_table(*about, judged_names, cfg, on)
    metrics |= flamingo_judge.numbers(rows)
    metrics |= flamingo_judge.rices(*about, vision_tower, judged_names, cfg, on)
    metrics |= flamingo_judge.facts(*about, flamingo_data.ends_of_sentences(), cfg, on)
    for name, line in zip(("gates of attention", "gates of feed-forward"), model.gates()):
        metrics[name] = " ".join(f"{g:+.2f}" for g in line.tolist())
    flamingo_figures.draw_shots(folder / "shots.png", rows)
    then = 'python vlm/flamingo.py --image PICTURE --prompt "<image>the color is"'
    return run.report(folder, metrics, then)


if __name__ == "__main__":
    run.cli(main, Config)
