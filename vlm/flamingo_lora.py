"""LoRA in a trained Flamingo: new words for what it sees, by all of its new layers, LoRA in them, or their gates.

The Flamingo of vlm/flamingo.py names fruit in English; here it learns to do so in French. Whatever is trained sits
between the layers of the language model, which stays as it is. LoRA (Hu et al. 2021, arXiv:2106.09685) in the gated
cross-attention layers (Alayrac et al. 2022, arXiv:2204.14198, Sec. 2.2) can be taken out again, and the English that
training overwrote comes back bit for bit.

Shapes: features (B,N,D), scores (photos, names).
Difference from both papers: neither of them does it; adapters in vision-language models usually sit in self-attention.

    python vlm/flamingo_lora.py                   # four ways to learn: 14 CPU minutes
    python vlm/flamingo_lora.py --ways lora --rank 32 --steps 100
"""

import time
from dataclasses import dataclass, replace
from typing import Literal

from finetune import llama2_lora
from utils import data, figures, pretrained, run
from utils.run import check
from vlm import flamingo, fruit_photos, probe, tower

FRENCH = {
    "Anjou": "poire d'Anjou", "Cantaloupe": "melon cantaloup", "Conference": "poire Conférence", "Satsumas": "satsuma",
    "Kaiser": "poire Kaiser", "Galia-Melon": "melon Galia", "Golden-Delicious": "pomme jaune", "Orange": "orange",
    "Granny-Smith": "pomme verte", "Honeydew-Melon": "melon d'Espagne", "Pink-Lady": "pomme rose",
    "Red-Delicious": "pomme rouge", "Royal-Gala": "pomme Gala", "Watermelon": "pastèque",
}  # fmt: skip
WAYS = ("gates", "lora", "layers", "from nothing")
Way = Literal["gates", "lora", "layers", "from nothing"]


@dataclass(frozen=True)
class Config:
    """Teach the Flamingo of the book French, in several ways, and see how much English it knows afterwards."""

    # what learns: gates, LoRA, all new layers; or all of them, not trained before
    ways: tuple[Way, ...] = WAYS
    steps: int = 80  # of training, each way
    batch: int = 48  # pictures a step
    longest: int = 5  # pictures in the longest chain
    lr: float = 2e-3  # of new layers; the gates' is ten times that
    lora_lr: float = 1e-2  # of LoRA
    rank: int = 16  # of LoRA
    # what LoRA corrects
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    judged: int = 200  # photos to be judged by; 0: all 1322
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/flamingo_lora"


def choose(model, way, cfg):
    """Who learns; the rest is frozen."""
    if way == "lora":
        llama2_lora.inject(model.cross, cfg.targets, cfg.rank, 2 * cfg.rank)
    model.requires_grad_(False)
    for name, p in model.named_parameters():
        part = name.startswith(("cross.", "resampler.")) or name == "new_embeddings"
        by_way = {"gates": ".gate_" in name, "lora": ".lora_" in name}
        p.requires_grad_(by_way.get(way, part) and ".gate_proj" not in name)
    return model


def unplug(model):
    """Take LoRA out, in place: what was there before."""
    for name in llama2_lora.names(model.cross):
        parent, _, child = name.rpartition(".")
        setattr(model.cross.get_submodule(parent), child, model.cross.get_submodule(name).base)
    return model


def draw(path, rows, losses):
    """The loss of each way while it learns, and what is known of both languages before and afterwards."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(rows)}
    for name, line in losses.items():
        left.plot(range(1, len(line) + 1), line, color=colours[name], label=name)
    left.set(xlabel="step", ylabel="-log p of a word", yscale="log")
    left.legend(fontsize=8)
    for name, r in rows.items():
        side, ha = ((-8, -3), "right") if name in ("before", "lora") else ((8, -3), "left")
        if name == "LoRA taken out":  # where it was before
            side, ha = (0, -16), "center"
        right.scatter(r["English"], r["French"], s=60, color=colours[name])
        right.annotate(
            name, (r["English"], r["French"]), side, textcoords="offset points", ha=ha, fontsize=8
        )
    right.set(xlabel="right of 14 kinds, named in English", ylabel="... in French")
    right.margins(0.3)
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Learn in each way from the same start, with the same photos in the same order."""
    check(
        min(cfg.steps, cfg.batch, cfg.longest, cfg.rank) > 0 and min(cfg.lr, cfg.lora_lr) > 0,
        "all numbers must be above 0",
    )
    check(cfg.ways and cfg.judged >= 0, "--ways needs one at least, --judged must be 0 or more")
    llama2_lora.find(flamingo.GatedCrossAttention(4, 4), cfg.targets)  # a wrong target ends it here
    run.seed(cfg.seed)
    on = run.device(cfg.device)
    tokenizer, language = pretrained.smollm2(on)
    new, first = flamingo.add_words(tokenizer, language), flamingo.start(tokenizer)
    language.set_attn_implementation("eager")
    eye, fruit = tower.load("efficientnet", on=on), data.groceries(224)
    names = {"English": fruit_photos.NAMES, "French": FRENCH}
    chunks = {
        k: [flamingo.chunk(tokenizer, of[kind]) for kind in fruit.fine_names]
        for k, of in names.items()
    }
    learn, chosen = fruit_photos.split(fruit, cfg.judged, cfg.seed)
    folder = run.output(cfg.out, cfg)
    said, unseen, kinds = (
        tower.said(eye, fruit.images[learn]),
        tower.said(eye, fruit.images[chosen]),
        fruit.fine[learn],
    )

    def score(model, language):
        return flamingo.judge(
            model.eval(), unseen, first, chunks[language], said, kinds, 0, cfg, on
        )

    def known(model):
        return {k: probe.share(score(model, k).argmax(-1) == fruit.fine[chosen]) for k in names}

    start = lambda: flamingo.load(flamingo.WEIGHTS, language, new, on)  # noqa: E731
    rows, losses = {"before": known(start())}, {}
    for way in cfg.ways:
        run.seed(cfg.seed)
        model = choose(
            flamingo.Flamingo(language, new).to(on) if way == "from nothing" else start(), way, cfg
        )
        if way == "lora":
            print(llama2_lora.tree(model))
        clock = time.process_time()
        rated = replace(cfg, lr=cfg.lora_lr) if way == "lora" else cfg
        steps = flamingo.train(model, said, kinds, first, chunks["French"], rated, on)
        losses[way] = list(run.progress(steps, cfg.steps))
        seconds = (time.process_time() - clock) / cfg.steps
        learned = sum(p.numel() for p in model.trainable_parameters().values())
        rows[way] = known(model) | {"learned": learned, "CPU s a step": seconds}
        if way == "lora":
            rows["LoRA taken out"] = known(unplug(model))
    draw(folder / "flamingo_lora.png", rows, losses)
    return run.report(folder, rows, "python vlm/flamingo.py --pretrained")


if __name__ == "__main__":
    run.cli(main, Config)
