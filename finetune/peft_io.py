"""LoRA and IA3 adapters in PEFT's files: written here and loaded there, and the reverse.

`save` names and shapes each parameter as PEFT does; `load` injects what a folder describes, ours or
PEFT's, and fills it. The folder itself, its keys and its hash are read and checked in adapters.py.
"""

import re

import torch

from finetune import adapters
from finetune.lora_inject import biases, inject_at, linear_layers, names
from finetune.lora_layers import FEEDFORWARD, DoRALinear, IA3Linear
from utils import run
from utils.text import printable


def peft_tensors(name, adapter):
    """The parameters of one adapter as PEFT's files name and shape them: {name: tensor}, views of
    what is trained.
    """
    if isinstance(adapter, IA3Linear):
        shaped = adapter.ia3_l[None] if adapter.feedforward else adapter.ia3_l[:, None]
        return {f"{name}.ia3_l": shaped}
    tensors = {f"{name}.lora_A.weight": adapter.lora_A, f"{name}.lora_B.weight": adapter.lora_B}
    if isinstance(adapter, DoRALinear):
        tensors[f"{name}.lora_magnitude_vector"] = adapter.magnitude
    return tensors


def bias_tensors(model, bias):
    """The trained biases as PEFT's files name them: {name: tensor}."""
    tensors = {}
    for name in biases(model, bias):
        tensors[name.replace(".base.bias", ".base_layer.bias")] = model.get_parameter(name)
    return tensors


def without_copies(tensors, also):
    """With bias = "all" PEFT writes the biases of its modules_to_save three times: as trained, once
    more so, and as they were. The first is kept."""
    copies = tuple(
        f"{adapters.PREFIX}{name}.{kind}."
        for name in also
        for kind in ("modules_to_save.default", "original_module")
    )
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(copies)}


def save(model, folder, cfg, base="", also=(), bias="none", task_type="CAUSAL_LM"):
    """Write the adapter as PEFT writes it: adapter_config.json and adapter_model.safetensors.

    base: what `from_pretrained` finds the model by that it belongs to, a folder or a hub id;
    `also`: names of modules that were trained whole (PEFT's modules_to_save); bias: which biases
    were; task_type: None for a model that is no model of transformers.
    """
    # what was trained, under PEFT's names
    tensors = {}
    for name in names(model):
        tensors |= peft_tensors(name, model.get_submodule(name))
    for name in also:
        tensors |= {f"{name}.{k}": v for k, v in model.get_submodule(name).state_dict().items()}
    tensors |= bias_tensors(model, bias)
    # what PEFT needs to inject the same adapters
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": names(model),
        "modules_to_save": list(also) or None,
    }
    if cfg.variant == "ia3":
        config["peft_type"] = "IA3"
        config["feedforward_modules"] = [n for n in names(model) if n.endswith(FEEDFORWARD)]
    else:
        config |= {
            "r": cfg.rank,
            "lora_alpha": cfg.alpha,
            "lora_dropout": cfg.dropout,
            "bias": bias,
            "use_rslora": cfg.variant == "rslora",
            "use_dora": cfg.variant == "dora",
        }
    adapters.write(folder, config, {adapters.PREFIX + k: v for k, v in tensors.items()})


def variant_of(config):
    """Which variant a configuration of PEFT is for."""
    if config["peft_type"] == "IA3":
        return "ia3"
    if config.get("use_dora"):
        return "dora"
    return "rslora" if config.get("use_rslora") else "lora"


def target_modules(model, config, tensors):
    """Names of the layers that an adapter of PEFT is for.

    A list holds ends of names. A string is a regular expression; the file of the weights says as
    well where they belong, and unlike a stranger's expression it cannot take for ever.
    """
    targets = config["target_modules"]
    linear = linear_layers(model)
    if isinstance(targets, str):
        ending = r"\.(lora_[AB]\.weight|lora_magnitude_vector|ia3_l)$"
        owners = {re.sub(ending, "", key) for key in tensors}
        return [name for name in linear if adapters.PREFIX + name in owners]
    return [name for name in linear if any(f".{name}".endswith(f".{t}") for t in targets)]


def check_feedforward(found, config, where):
    """Raises UserError if the IA3 layers whose inputs PEFT scales are others than ours."""
    ends = config.get("feedforward_modules") or []
    theirs = [name for name in found if any(f".{name}".endswith(f".{end}") for end in ends)]
    ours = [name for name in found if name.endswith(FEEDFORWARD)]
    run.check(
        theirs == ours,
        f"{where}: feedforward_modules are not the {', '.join(FEEDFORWARD)}; load it with PEFT",
    )


def check_tensors(wanted, tensors, where):
    """Raises UserError for a weight that is missing, has no place, or has another shape."""
    # the same names
    missing = sorted(wanted.keys() - tensors.keys())
    strange = sorted(tensors.keys() - wanted.keys())
    lost = printable(f"missing {missing[:2]}, without a place {strange[:2]}")
    run.check(not missing and not strange, f"{where}: {lost}")
    # and the same shapes
    for key, weight in wanted.items():
        name = key.removeprefix(adapters.PREFIX)
        shape = tuple(tensors[key].shape)
        place = tuple(weight.shape)
        fits = shape == place
        run.check(fits, f"{where}: {name} has the shape {shape}, this model needs {place}")


def load(model, folder):
    """Inject what an adapter folder describes, ours or PEFT's, and load it, in place -> names of
    the layers.

    Raises UserError for another kind of adapter, for a setting that is not known here, for a weight
    that is missing, and for one that has no place.
    """
    config, tensors = adapters.read(folder, ("LORA", "IA3"))
    where = printable(folder)
    variant = variant_of(config)
    rank = 1
    alpha = 1
    if variant != "ia3":
        rank = config["r"]
        alpha = config["lora_alpha"]
    # Which layers it is for, and whether they can be.
    found = target_modules(model, config, tensors)
    run.check(found, f"{where}: its target_modules name no linear layer of this model")
    if variant == "ia3":
        check_feedforward(found, config, where)
    # Before anything is made: a rank of a billion is a typing error.
    for name in found:
        layer = model.get_submodule(name)
        width = min(layer.in_features, layer.out_features)
        possible = rank <= 64 * width
        run.check(possible, f"{where}: rank {rank} is far above the width of {name}, {width}")
    # Fresh adapters in their places.
    also = config.get("modules_to_save") or ()
    bias = config.get("bias") or "none"
    inject_at(model, found, rank, alpha, variant=variant, also=also, bias=bias)
    # Every parameter of theirs, under its name in the file.
    wanted = {}
    for name in found:
        wanted |= peft_tensors(name, model.get_submodule(name))
    for name in also:
        wanted |= {f"{name}.{k}": v for k, v in model.get_submodule(name).named_parameters()}
    wanted |= bias_tensors(model, bias)
    wanted = {adapters.PREFIX + name: weight for name, weight in wanted.items()}
    tensors = without_copies(tensors, also)
    # The file must hold all of them and nothing else; then its numbers take their places.
    check_tensors(wanted, tensors, where)
    with torch.no_grad():
        for key, weight in wanted.items():
            weight.copy_(tensors[key])
    return found
