"""LoRA in a trained Flamingo: other names for the same photos, learned by all new layers, LoRA in them, or their gates.

The Flamingo of vlm/flamingo.py names fruit in English; here it learns to do so in French. By default
what is trained sits between the layers of the language model, which stays as it is. LoRA (Hu et al.
2021, arXiv:2106.09685) in the gated cross-attention layers (Alayrac et al. 2022, arXiv:2204.14198,
Sec. 2.2), or with --lora_in both in the language model, too, can be taken out again, and the English
that training overwrote comes back bit for bit. The adapter is written in PEFT's files.

Shapes: features (B,N,D), scores (photos, names).
Difference from both papers: neither of them does it; adapters in vision-language models usually sit
in self-attention.

    python vlm/flamingo_lora.py                   # four ways to learn: 14 CPU minutes
    python vlm/flamingo_lora.py --ways lora --rank 32 --lora_alpha 64 --steps 100
    python vlm/flamingo_lora.py --ways lora --lora_in both --targets q_proj v_proj --modules_to_save resampler
"""

import time
from dataclasses import dataclass
from typing import Literal

from finetune import llama2_lora
from utils import data, figures, pretrained, run
from utils.run import check
from vlm import few_shot, flamingo, flamingo_adapters, fruit_photos, probe, tower
from vlm.flamingo_adapters import Bias, LoraIn

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
    """Teach the Flamingo of the book French, in several ways, and see how much English it knows
    afterwards."""

    # what learns: gates, LoRA, all new layers; or all of them, not trained before
    ways: tuple[Way, ...] = WAYS
    steps: int = 80  # of training, each way
    batch: int = 48  # pictures a step
    longest: int = 5  # pictures in the longest chain
    lr: float = 2e-3  # of new layers; the gates' is ten times that
    lora_lr: float = 1e-2  # of LoRA
    rank: int = 16  # of LoRA
    lora_alpha: float = 32.0  # updates are multiplied by lora_alpha / rank
    lora_dropout: float = 0.0  # dropout rate of an update's inputs in training
    # linear layers that LoRA adapts: ends of names, or regular expressions
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    lora_in: LoraIn = "gated"  # where they are: the gated layers, the language model, or both
    bias: Bias = "none"  # biases that learn beside LoRA: none, those of adapted layers, all
    # modules trained whole beside LoRA: resampler, new_embeddings, gate_attention, gate_mlp ...
    modules_to_save: tuple[str, ...] = ()
    judged: int = 200  # photos to be judged by; 0: all 1322
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/flamingo_lora"


def set_trainable(model, way, cfg):
    """Trainable parameters of a way to learn; the rest is frozen."""
    if way == "lora":
        flamingo_adapters.add_lora(model, cfg)
        return model
    model.requires_grad_(False)
    for name, p in model.named_parameters():
        if way == "gates":
            p.requires_grad_(".gate_attention." in name or ".gate_mlp." in name)
        else:
            p.requires_grad_(name.startswith(("cross.", "resampler.", "new_embeddings.")))
    return model


def draw(path, rows, losses):
    """The loss of each way while it learns, and what is known of both languages before and
    afterwards."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(rows)}
    # losses
    for name, line in losses.items():
        left.plot(range(1, len(line) + 1), line, color=colours[name], label=name)
    left.set(xlabel="step", ylabel="-log p of a word", yscale="log")
    left.legend(fontsize=8)
    # accuracies: a point each, its name beside it
    for name, r in rows.items():
        offset = (8, -3)
        ha = "left"
        if name in ("before", "lora"):
            offset = (-8, -3)
            ha = "right"
        if name == "LoRA taken out":  # where it was before
            offset = (0, -16)
            ha = "center"
        point = (r["English"], r["French"])
        right.scatter(*point, s=60, color=colours[name])
        right.annotate(name, point, offset, textcoords="offset points", ha=ha, fontsize=8)
    right.set(xlabel="right of 14 kinds, named in English", ylabel="... in French")
    right.margins(0.3)
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Learn in each way from the same start, with the same photos in the same order."""
    positive = min(cfg.steps, cfg.batch, cfg.longest) > 0
    check(positive and min(cfg.lr, cfg.lora_lr) > 0, "all numbers must be above 0")
    check(cfg.ways and cfg.judged >= 0, "--ways needs one at least, --judged must be 0 or more")
    run.seed(cfg.seed)
    on = run.device(cfg.device)
    # frozen parts, photos, and their names in both languages as ids
    tokenizer, language = pretrained.smollm2(on)
    new_ids = few_shot.add_words(tokenizer, language)
    start_id = few_shot.start_token(tokenizer)
    language.set_attn_implementation("eager")

    def shipped():
        return flamingo.load(flamingo.WEIGHTS, language, new_ids, on)

    # wrong flags of LoRA end it here
    flamingo_adapters.check_lora(shipped(), cfg)
    vision_tower = tower.load("efficientnet", on=on)
    fruit = data.groceries(224)
    chunks = {}
    for name, names in (("English", fruit_photos.NAMES), ("French", FRENCH)):
        chunks[name] = [few_shot.chunk(tokenizer, names[kind]) for kind in fruit.fine_names]
    learn, chosen = fruit_photos.split(fruit, cfg.judged, cfg.seed)
    folder = run.output(cfg.out, cfg)
    # vision features, once
    features = tower.vision_features(vision_tower, fruit.images[learn])
    kinds = fruit.fine[learn]
    heldout = tower.vision_features(vision_tower, fruit.images[chosen])

    def accuracies(model):
        """Zero-shot accuracy on held-out photos, in each language."""
        found = {}
        for name, names in chunks.items():
            log_p = few_shot.evaluate(
                model.eval(), heldout, start_id, names, features, kinds, 0, cfg, on
            )
            found[name] = probe.share(log_p.argmax(-1) == fruit.fine[chosen])
        return found

    rows = {"before": accuracies(shipped())}
    losses = {}
    for way in cfg.ways:
        # the same start for each way
        run.seed(cfg.seed)
        model = flamingo.Flamingo(language, new_ids).to(on) if way == "from nothing" else shipped()
        set_trainable(model, way, cfg)
        before = flamingo_adapters.trained_whole(model)
        if way == "lora":
            print(llama2_lora.tree(model))
            flamingo_adapters.dropout_on(model)
        # training on French names
        clock = time.process_time()
        steps = few_shot.train(model, features, kinds, start_id, chunks["French"], cfg, on)
        losses[way] = list(run.progress(steps, cfg.steps))
        seconds = (time.process_time() - clock) / cfg.steps
        # accuracies, and those without LoRA
        learned = sum(p.numel() for p in model.trainable_parameters().values())
        rows[way] = accuracies(model) | {"learned": learned, "CPU s a step": seconds}
        if way == "lora":
            flamingo_adapters.save(model, folder / "adapter", cfg)
            model = flamingo_adapters.remove_lora(model, before)
            rows["LoRA taken out"] = accuracies(model)
    draw(folder / "flamingo_lora.png", rows, losses)
    return run.report(folder, rows, "python vlm/flamingo.py --pretrained")


if __name__ == "__main__":
    run.cli(main, Config)
