"""LoRA of a vision-language model in PEFT's files: vlm/train.py writes them, `--adapter` and llava_io.py read them.

Hu et al. 2021, arXiv:2106.09685; the files are those of the PEFT library: adapter_config.json and
adapter_model.safetensors (finetune/adapters.py reads and writes them). LoRA sits in the language model, the connector
was trained whole (PEFT's modules_to_save), and all names are those of the base model on disk, a folder of build.py or
of transformers' LLaVA:

    model = AutoModelForImageTextToText.from_pretrained(base)    # import vlm.modeling first, for a folder of build.py
    model = PeftModel.from_pretrained(model, "outputs/vlm_train/adapter")

Shapes: lora_A (r,in), lora_B (out,r) beside a matrix (out,in); the update is alpha / r B A.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch

from finetune import adapters, llama2_lora
from utils.run import check
from utils.text import printable, read_text
from vlm.flags import LoraConfig
from vlm.peft_base import CLASSES, base_of
from vlm.train_config import changed

# Beginnings of names: in Llava and in a folder of build.py -> in transformers' LLaVA
TO_LLAVA = {
    "language.model.": "model.language_model.",
    "language.lm_head": "lm_head",
    "connector.0.": "model.multi_modal_projector.linear_1.",
    "connector.2.": "model.multi_modal_projector.linear_2.",
}
FROM_LLAVA = {theirs: ours for ours, theirs in TO_LLAVA.items()}
TEMPLATE = "chat_template.jinja"  # as transformers calls it

README = """---
base_model: {base}
library_name: peft
---
LoRA of a vision-language model, and its connector, for the base model `{base}`.
{make}
```python
import vlm.modeling, vlm.processor
from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, {folder!r})
```
"""


class Adapter(NamedTuple):
    """What an adapter folder holds, under the names of llava.Llava."""

    base: str  # folder or hub id of the model that it is for; may be empty
    rank: int
    alpha: float
    lora: dict[
        str, torch.Tensor
    ]  # "model.layers.0.self_attn.q_proj.A" and .B, in the language model
    connector: dict[str, torch.Tensor]  # its weights; empty: that of the base model
    chat_template: str  # of training; empty: that of the base model

    @property
    def scale(self) -> float:
        """s of W + s B A."""
        return self.alpha / self.rank


def renamed(name, beginnings):
    """A name with another beginning, if it has one of these."""
    for old, new in beginnings.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def write(cfg, weights, model, tokenizer):
    """LoRA and connector of a run as OUT/adapter, in PEFT's files, and a printed line about its base model.

    weights: of all ranks, as by checkpoints.tensors. A run without LoRA has none.
    """
    if not any(key.startswith("lora.") for key in weights):
        return
    # the base model, and what its class calls its parts
    base, kind, command = base_of(cfg, model)
    beginnings = TO_LLAVA if kind == "llava" else {}
    # every weight under PEFT's name in the base model
    tensors = {}
    layers = []
    for key, x in weights.items():
        if key.startswith("lora."):
            layer, _, matrix = key.removeprefix("lora.").rpartition(".")
            layer = renamed(f"language.{layer}", beginnings)
            layers.append(layer)
            tensors[f"{adapters.PREFIX}{layer}.lora_{matrix}.weight"] = x
        else:
            tensors[adapters.PREFIX + renamed(key, beginnings)] = x
    # what PEFT needs to make the same layers
    class_name, library = CLASSES[kind]
    projector = "model.multi_modal_projector" if kind == "llava" else "connector"
    has_weights = any(key.startswith("connector.") for key in weights)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": class_name, "parent_library": library},
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": cfg.lora.r,
        "lora_alpha": cfg.lora.alpha,
        "lora_dropout": cfg.lora.lora_dropout,
        "bias": "none",
        "target_modules": list(dict.fromkeys(layers)),
        "modules_to_save": [projector] if has_weights else None,
    }
    folder = Path(cfg.out) / "adapter"
    adapters.write(folder, config, tensors)
    # beside them: the chat template of training, and how to load all of it
    (folder / TEMPLATE).write_text(tokenizer.chat_template or "", "utf-8")
    make = f"\nIf it is not there, this writes it: `{command}`\n" if command else ""
    said = README.format(base=base, make=make, folder=str(folder.resolve()))
    (folder / "README.md").write_text(said, "utf-8")
    print(f"{folder} is an adapter of PEFT for {base}", flush=True)
    if command:
        print(f"which this writes: {command}", flush=True)


def is_adapter(path) -> bool:
    """Is it a folder of PEFT, and no model?"""
    path = Path(path)
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def read(folder) -> Adapter:
    """An adapter folder for a model of build.py or transformers' LLaVA, ours or PEFT's own.

    Raises UserError: no adapter, damage, no plain LoRA, or other parts than language model and connector.
    """
    where = printable(folder)
    config, tensors = adapters.read(folder, ("LORA",))
    merge = "merge it with PEFT (merge_and_unload, save_pretrained), and name that folder"
    plain = not config.get("use_dora") and not config.get("use_rslora")
    check(plain and config.get("bias") in (None, "none"), f"{where} is no plain LoRA: {merge}")
    # LoRA by layer and matrix, and what was trained whole, under our names
    lora = {}
    connector = {}
    for key, x in tensors.items():
        name = renamed(key.removeprefix(adapters.PREFIX), FROM_LLAVA)
        found = re.fullmatch(r"language\.(.+)\.lora_([AB])\.weight", name)
        if found:
            lora[f"{found[1]}.{found[2]}"] = x
        else:
            ours = name.startswith("connector.") and ".lora_" not in name
            check(ours, f"{where} adapts {printable(name)}, not the language model alone: {merge}")
            connector[name.removeprefix("connector.")] = x
    # A (r,in) and B (out,r) of the rank that the configuration says
    ranks = {x.shape[0] if name.endswith(".A") else x.shape[-1] for name, x in lora.items()}
    fits = ranks == {config["r"]}
    check(fits, f"{where}: its matrices are not of the rank {config['r']} that it says")
    template = Path(folder) / TEMPLATE
    text = read_text(template) if template.is_file() else ""
    base = config.get("base_model_name_or_path") or ""
    return Adapter(str(base), config["r"], config["lora_alpha"], lora, connector, text)


def with_adapter(cfg):
    """--adapter: rank, alpha and targets of a run are those of the adapter that it goes on with -> configuration.

    Raises UserError for flags that say otherwise.
    """
    source = cfg.train.adapter
    if not source:
        return cfg
    # LoRA in training, and results in another place
    flag = f"--adapter {printable(source)}"
    lora = cfg.train.train_type in ("use_lora", "lora_frozen_projector")
    check(lora, f"{flag}: goes with --train_type use_lora")
    overwritten = Path(source).resolve() == (Path(cfg.out) / "adapter").resolve()
    check(not overwritten, f"--out {cfg.out} holds --adapter: choose another place with --out")
    # ends of the names of its layers, as --lora.target_modules takes them
    found = read(source)
    layers = {name.rpartition(".")[0] for name in found.lora}
    ends = tuple(sorted({layer.rpartition(".")[2] for layer in layers}))
    theirs = {"r": found.rank, "lora_alpha": float(found.alpha), "target_modules": ends}
    # a flag may repeat what the adapter says, and nothing else
    usual = LoraConfig()
    for name, value in theirs.items():
        given = getattr(cfg.lora, name)
        said = printable(value)
        same = set(given) == set(value) if name == "target_modules" else given == value
        free = same or given == getattr(usual, name)
        check(free, f"{flag}: its {name} is {said}; leave out --lora.{name}")
    return changed(cfg, **theirs)


@torch.no_grad()
def fill(model, folder):
    """Weights of an adapter into the LoRA layers and the connector of a model in training, in place.

    Raises UserError if it is for other layers, or for other shapes.
    """
    found = read(folder)
    # every matrix of the model has its place in the file, and the other way round
    wanted = {}
    for name in llama2_lora.names(model.language):
        layer = model.language.get_submodule(name)
        wanted |= {f"{name}.A": layer.lora_A, f"{name}.B": layer.lora_B}
    odd = sorted(wanted.keys() ^ found.lora.keys())
    where = printable(folder)
    check(not odd, f"{where} is for other layers than this model has: {printable(odd[:2])}")
    for name, weight in wanted.items():
        shape = tuple(found.lora[name].shape)
        place = tuple(weight.shape)
        check(shape == place, f"{where}: {name} has the shape {shape}, this model needs {place}")
        weight.copy_(found.lora[name])
    fill_connector(model.connector, found)


def fill_connector(connector, found: Adapter):
    """Weights of an adapter's connector, if it has any, in place. Raises UserError for another connector's."""
    if not found.connector:
        return
    own = {name: tuple(x.shape) for name, x in connector.state_dict().items()}
    theirs = {name: tuple(x.shape) for name, x in found.connector.items()}
    odd = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
    check(not odd, f"the adapter has the weights of another connector: {printable(odd[:2])}")
    connector.load_state_dict(found.connector)
