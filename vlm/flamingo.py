"""Flamingo: gated cross-attention, with zero-initialised tanh gates, between the layers of a frozen language model.

Alayrac et al. 2022, arXiv:2204.14198; sections and figures are those of its second version. A
perceiver resampler makes a few visual tokens (latents) out of each photo; the new layers
(gated_cross_attention.py) attend to them. At zero the gates change nothing: training begins with
exactly the old language model. It is trained on interleaved image-text chains, photos and their
names, and evaluated by chains that lack their last name (few_shot.py).

Shapes: features (B,N,D) of a photo, latents (B,J,M,V) of J photos in a text, M each; text (B,T),
its states (B,T,E).
Differences from the paper: 1.9 M new parameters, not 10 000 M; 732 photos of fruit, not 2300 M
pictures; the resampler is one layer deep, with ReLU as in transformers' Idefics, and a photo has no
time that would need an embedding.

    python vlm/flamingo.py                     # 5 minutes on two cores
    python vlm/flamingo.py --pretrained        # weights of the book, no training
    python vlm/flamingo.py --every 10 --latents 4 --evaluate_shots 0 1 8
    python vlm/flamingo.py --image bus.jpg --prompt "<image>the color is"
    python vlm/flamingo.py --image bus.jpg --prompt "<image>" --shots a.jpg:"a dax" b.jpg:"a wug"
    python vlm/flamingo.py --vision openai/clip-vit-base-patch32 --language gpt2
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from deploy import decode
from utils import checkpoint, data, figures, pretrained, run
from utils.run import check
from vlm import (
    few_shot,
    flamingo_figures,
    flamingo_generate,
    fruit_photos,
    open_flamingo,
    probe,
    tower,
)
from vlm.flamingo_model import Flamingo, load, written_here

WEIGHTS = Path(__file__).parent / "weights" / "flamingo.safetensors"
ANSWERS = WEIGHTS.with_name("flamingo_train.safetensors")


@dataclass(frozen=True)
class Config:
    """Teach a frozen language model to name fruit, and see what examples in the prompt are
    worth."""

    steps: int = 120  # training steps
    batch: int = 48  # photos a step, in chains that are all equally long
    longest: int = 5  # photos in the longest chain
    # photos in the shortest one; as many as in the longest: all chains are equally long
    shortest: int = 1
    lr: float = 2e-3  # of new layers; the gates' is ten times that
    every: int = 6  # a new layer before every so many-th layer of the language model
    latents: int = 16  # M, vectors that stand for a photo
    evaluate_shots: tuple[int, ...] = (0, 2, 4)  # few-shot examples in the prompt, to be compared
    judged: int = 300  # photos to be judged by; 0: all 1322
    language: str = "smollm2"  # the language model: smollm2, or a folder or hub id
    vision: str = "efficientnet"  # the vision encoder: efficientnet, or a folder or hub id
    layer: int = -2  # of its hidden states, the one that is read; -1 the last
    pretrained: bool = False  # start from the shipped weights and skip the training
    # weights that are loaded instead of training: model.safetensors of a run, or OpenFlamingo's file or folder
    weights: str = ""
    image: tuple[str, ...] = ()  # pictures to ask about, one for each <image> of the prompt
    # generate what follows it, such as "<image>the color is"; with shipped weights, or --weights
    prompt: str = ""
    shots: tuple[str, ...] = ()  # in-context examples before the prompt, each PICTURE:TEXT
    max_new_tokens: int = 20  # the longest answer
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/flamingo"


def build(cfg, vision_tower, language, tokenizer, shape, on):
    """The model with OpenFlamingo's weights, with shipped ones, or with untrained new layers; the
    tokenizer learns the new tokens."""
    if cfg.weights and not written_here(cfg.weights):
        return open_flamingo.load(cfg.weights, vision_tower, language, tokenizer, on=on)
    new_ids = few_shot.add_words(tokenizer, language)
    if cfg.weights:
        return load(cfg.weights, language, new_ids, on)
    if cfg.pretrained or cfg.prompt:
        return load(shipped_weights(cfg), language, new_ids, on)
    return Flamingo(language, new_ids, **shape).to(on)


def check_flags(cfg):
    """Raises UserError for flags out of range, or for another network than that of the shipped
    weights."""
    counts = (cfg.steps, cfg.batch, cfg.longest, cfg.latents)
    check(min(counts) > 0 and cfg.lr > 0, "all numbers must be above 0")
    check(1 <= cfg.shortest <= cfg.longest, "--shortest must be at least 1 and at most --longest")
    check(cfg.judged >= 0 and cfg.every > 0, "--judged must be 0 or more, --every at least 1")
    check(
        cfg.evaluate_shots and min(cfg.evaluate_shots) >= 0,
        "--evaluate_shots takes one number or more, none below 0",
    )
    if cfg.weights:
        check(not cfg.pretrained, "--weights and --pretrained: one of them at a time")
        shape = (cfg.every, cfg.latents)
        from_file = "--every and --latents are those of the file: leave them out beside --weights"
        check(shape == (Config.every, Config.latents), from_file)
    flamingo_generate.check_flags(cfg)
    if cfg.weights or not (cfg.pretrained or cfg.prompt):
        return
    # shipped weights: of the same network, before the same models
    path = shipped_weights(cfg)
    flag = "--pretrained" if cfg.pretrained else "--prompt, or name --weights"
    check(path.is_file(), f"there are no weights at {path}: leave out {flag}")
    shipped = checkpoint.read(path)[1]
    for name, asked in (("every", cfg.every), ("latents", cfg.latents)):
        has = f"the weights have {shipped[name]}; leave out --{name} or {flag}"
        check(shipped[name] == asked, f"--{name} {asked}: {has}")
    learned = "the weights were learned"
    check(
        cfg.language == "smollm2", f"{learned} in front of smollm2: leave out --language or {flag}"
    )
    check(
        cfg.vision == "efficientnet", f"{learned} behind efficientnet: leave out --vision or {flag}"
    )


def shipped_weights(cfg):
    """Of vlm/flamingo_train.py to answer a prompt, else those of this script."""
    return ANSWERS if cfg.prompt else WEIGHTS


def main(cfg: Config) -> dict:
    """Train (or load) the new layers, few-shot evaluation, figures of gates and image attention
    maps."""
    check_flags(cfg)
    run.seed(cfg.seed)
    on = run.device(cfg.device)
    clock = run.Clock()
    # frozen parts: language model, vision encoder
    if cfg.language == "smollm2":
        tokenizer, language = pretrained.smollm2(on)
    else:
        tokenizer, language = pretrained.language_model(cfg.language, on)
    language.set_attn_implementation("eager")  # faster for short texts on a CPU
    vision_tower = tower.load(cfg.vision, cfg.layer, on=on)
    # model, with two new tokens
    shape = {"dim_in": vision_tower.width, "every": cfg.every, "latents": cfg.latents}
    model = build(cfg, vision_tower, language, tokenizer, shape, on)
    start_id = few_shot.start_token(tokenizer)
    # a prompt: generate what follows it, no more
    if cfg.prompt:
        return flamingo_generate.speak(cfg, tokenizer, model.eval(), vision_tower, start_id)
    # photos, and their names as ids
    fruit = data.groceries(vision_tower.size)
    learn, chosen = fruit_photos.split(fruit, cfg.judged, cfg.seed)
    names = [fruit_photos.NAMES[kind] for kind in fruit.fine_names]
    chunks = [few_shot.chunk(tokenizer, name) for name in names]
    most_chunks = max(cfg.longest, 1 + max(cfg.evaluate_shots))
    decode.check_length(language, 1 + max(map(len, chunks)) * most_chunks, 0)
    folder = run.output(cfg.out, cfg)
    together = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in language.parameters())
    metrics = {
        "parameters, frozen": frozen,
        "parameters, new": together - frozen,
        "new layers before layers": ", ".join(map(str, model.cross_layer_ids)),
    }
    # vision features, once
    features = tower.vision_features(vision_tower, fruit.images[learn])
    kinds = fruit.fine[learn]
    heldout = tower.vision_features(vision_tower, fruit.images[chosen])
    # training
    gates = [model.gates().cpu()]
    if not cfg.pretrained and not cfg.weights:
        losses = []
        steps = few_shot.train(model, features, kinds, start_id, chunks, cfg, on)
        for value in run.progress(steps, cfg.steps):
            losses.append(value)
            gates.append(model.gates().cpu())
        metrics |= {"loss": sum(losses[-20:]) / len(losses[-20:]), "train_seconds": clock()}
        figures.curves(folder / "loss.png", {"loss": losses}, "step", "-log p of a word", smooth=10)
        checkpoint.write(folder / "model.safetensors", model.trainable_parameters(), shape)
    model.eval()
    # few-shot evaluation on held-out photos
    answers = {}
    for shots in cfg.evaluate_shots:
        log_p = few_shot.evaluate(model, heldout, start_id, chunks, features, kinds, shots, cfg, on)
        answers[shots] = log_p
        metrics[f"{shots} examples"] = {
            "14 kinds": probe.share(log_p.argmax(-1) == fruit.fine[chosen]),
            "5 groups": probe.share(fruit_photos.grouped(log_p, fruit) == fruit.coarse[chosen]),
        }
    metrics |= probe.yardsticks(vision_tower, fruit, learn, chosen)
    # figure: gates, attention maps of some photos
    for name, line in zip(("gates of attention", "gates of feed-forward"), gates[-1]):
        metrics[name] = " ".join(f"{g:+.2f}" for g in line.tolist())
    some = fruit_photos.spread(torch.arange(len(chosen)))
    shown = heldout[some].float().to(on)
    maps = flamingo_figures.image_attention_map(model, shown, start_id).cpu()
    truths = [fruit_photos.name_of(fruit, i) for i in chosen[some]]
    photos = data.groceries(348).images[chosen[some]]
    log_p = answers[cfg.evaluate_shots[0]][some]
    flamingo_figures.draw(
        folder / "flamingo.png", torch.stack(gates), photos, maps, names, truths, log_p
    )
    return run.report(folder, metrics, "python vlm/flamingo.py --evaluate_shots 0 1 8 --pretrained")


if __name__ == "__main__":
    run.cli(main, Config)
