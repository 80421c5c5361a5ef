"""LoRA, low-rank adaptation: freeze the model, train an update of low rank beside its matrices. Hu
et al. 2021, arXiv:2106.09685.

A matrix W of a trained model has millions of numbers, and a new task moves it little, in few
directions. So leave W as it is and learn W + s B A, where A (r x in) and B (out x r) are thin; B
starts at zero, so step 0 is the base model. After training s B A can be merged into W once, and
nothing is slower than before. Sections are the paper's.

The layers are in lora_layers.py, with rsLoRA, DoRA and IA3; lora_inject.py puts them into a model
and merges them, peft_io.py reads and writes PEFT's files. Here they are trained, plain or as LoRA+
(Hayou et al. 2024, arXiv:2402.12354).

Shapes: W (out, in), rank r.
Differences from the paper: every linear layer of attention by default, not query and value alone.

    python finetune/llama2_lora.py
    python finetune/llama2_lora.py --variant dora --rank 4
    python finetune/llama2_lora.py --backend peft                       # the same through the PEFT library
    python finetune/llama2_lora.py --model meta-llama/Llama-2-7b-hf     # larger, for a GPU: any hub id or local folder
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch

from finetune import adapters, llama2_full, peft_io, sentiment, task_setup
from finetune.lora_inject import check_rank, find, inject, merge, names, refuse_tied
from finetune.lora_layers import ADAPTERS, FEEDFORWARD, Variant
from utils import checkpoint, figures, pretrained, run


@dataclass(frozen=True)
class Config(task_setup.Training):
    """Adapt a language model by low-rank updates of its weights and score it."""

    lr: float = 2e-3  # peak learning rate
    variant: Variant = "lora"  # lora, or rslora, dora, ia3
    rank: int = 8  # r, the rank of the updates
    alpha: float = 16.0  # updates are multiplied by alpha / r
    dropout: float = 0.0  # dropout rate of an update's inputs in training
    plus: float = 1.0  # LoRA+: B learns so many times faster than A; its authors take 16
    # ends of names, or regular expressions
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    within: str = ""  # the part of the model that may change; a target outside of it is an error
    # modules to train whole besides, such as model.norm (PEFT: modules_to_save)
    also: tuple[str, ...] = ()
    merge: bool = False  # also write the merged model, an ordinary folder for from_pretrained
    backend: Literal["ours", "peft"] = "ours"  # who injects
    out: str = "outputs/llama2_lora"  # where the results go


def lora_plus_groups(model, ratio=1.0):
    """LoRA+: parameter groups; the learning rate of B is `ratio` times that of all else."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    lora_b = [p for name, p in trained if "lora_B" in name]
    others = [p for name, p in trained if "lora_B" not in name]
    groups = [llama2_full.param_group(others, 1.0)]
    if lora_b:
        groups.append(llama2_full.param_group(lora_b, ratio))
    return groups


def tree(model):
    """Where the adapters sit: the module tree, equal layers drawn once."""
    # equal layers counted together: the number of the layer is a star
    lines = {}
    for name, module in model.named_modules():
        if isinstance(module, ADAPTERS):
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
            key = re.sub(r"\.\d+\.", ".*.", name)
            count, _, _ = lines.get(key, (0, 0, 0))
            lines[key] = (count + 1, trained, tuple(module.base.weight.shape))
    # a line for each kind
    rows = []
    for key, (count, trained, shape) in lines.items():
        rows.append(f"{key:45} {count:3} x {trained:7,} trained beside {shape[0]} x {shape[1]}")
    return "\n".join(rows)


@torch.no_grad()
def changes(model):
    """How far each kind of target moved, by layer: {target: [|W' - W| / |W|, ...]}, lengths as of
    one long vector.
    """
    found = {}
    for name in names(model):
        # what merging would change, against what is there
        adapter = model.get_submodule(name)
        weight = adapter.base.weight.float()
        change = (adapter.merged_weight() - weight).norm() / weight.norm()
        target = name.rpartition(".")[2]
        found.setdefault(target, []).append(float(change))
    return found


def allow(model, cfg):
    """The names of the targets. Raises UserError for flags that cannot be meant."""
    check_rank(cfg.rank, cfg.dropout)
    run.check(cfg.plus > 0, "--plus must be above 0")
    layers = find(model, cfg.targets, cfg.within)
    refuse_tied(model, [*layers, *cfg.also])
    return layers


def through_peft(model, cfg):
    """The same adapters by the PEFT library -> its model; what it holds is ours, number by number
    (see the tests).
    """
    from peft import IA3Config, LoraConfig, get_peft_model

    layers = allow(model, cfg)
    shared = {"task_type": "CAUSAL_LM", "target_modules": layers}
    shared["modules_to_save"] = list(cfg.also) or None
    if cfg.variant == "ia3":
        feedforward = [name for name in layers if name.endswith(FEEDFORWARD)]
        config = IA3Config(feedforward_modules=feedforward, **shared)
    else:
        config = LoraConfig(
            r=cfg.rank,
            lora_alpha=cfg.alpha,
            lora_dropout=cfg.dropout,
            use_rslora=cfg.variant == "rslora",
            use_dora=cfg.variant == "dora",
            **shared,
        )
    made = get_peft_model(model, config)
    made.peft_config["default"].base_model_name_or_path = adapters.base_of(model)
    return made


def main(cfg: Config) -> dict:
    """Inject, train, score; write the adapter in PEFT's layout."""
    bench = task_setup.start(cfg, lambda model: allow(model, cfg))
    model = bench.model
    folder = bench.folder
    base = adapters.base_of(model)
    # freeze the model, and put adapters beside its targets
    if cfg.backend == "peft":
        model = through_peft(model, cfg)
    else:
        inject(
            model, cfg.targets, cfg.rank, cfg.alpha, cfg.dropout, cfg.variant, cfg.within, cfg.also
        )
        print(tree(model))
    # train them, B faster than A with --plus, and score
    groups = lora_plus_groups(model, cfg.plus)
    metrics = llama2_full.experiment(cfg, bench, sentiment.network(model), model, groups)
    # the adapter alone, in PEFT's files
    if cfg.backend == "peft":
        model.save_pretrained(folder / "adapter")
        checkpoint.shared_mode(folder / "adapter")
    else:
        peft_io.save(model, folder / "adapter", cfg, base, cfg.also)
        how_far = "relative change of the weight"
        figures.curves(folder / "changes.png", changes(model), "layer", how_far)
    metrics["checkpoint_MiB"] = llama2_full.size(folder / "adapter")
    # and the merged model, an ordinary folder
    if cfg.merge:
        whole = model.merge_and_unload() if cfg.backend == "peft" else merge(model)
        pretrained.save(whole, bench.tokenizer, folder / "merged")
    print(adapters.usage(folder / "adapter", base))
    return run.report(folder, metrics, then="python finetune/compare.py")


if __name__ == "__main__":
    run.cli(main, Config)
