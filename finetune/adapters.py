"""Adapter folders in PEFT's layout: adapter_config.json and adapter_model.safetensors.

A folder is read key by key. A key that would change what the weights mean and that this chapter
does not know is refused by its name: an adapter that was started as PiSSA, say, is the difference
to another base model than the one it names, and would load without a word and answer nonsense.

Folders that this book writes hold a hash of their weights and a copy of their settings, so that
damage is seen; PEFT passes over both.
"""

import json
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from utils import checkpoint, run
from utils.text import printable, read_text

PREFIX = "base_model.model."  # PEFT wraps a model twice, and its files say so

# Keys that say where an adapter comes from or how it was trained: they change nothing of what it computes.
NOTES = {"peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode"}
NOTES |= {"base_model_name_or_path", "revision"}
NOTES |= {"lora_dropout", "megatron_core", "qalora_group_size"}
# How the numbers of a soft prompt were made; the file holds what came out.
NOTES |= {"prompt_tuning_init", "prompt_tuning_init_text"}
NOTES |= {"tokenizer_name_or_path", "tokenizer_kwargs"}
NOTES |= {"encoder_reparameterization_type", "encoder_hidden_size"}
NOTES |= {"encoder_num_layers", "encoder_dropout"}
NOTES |= {"prefix_projection", "init_weights"}
# What is used, by the kind of adapter.
LORA = {"r", "lora_alpha", "target_modules", "modules_to_save"}
LORA |= {"use_rslora", "use_dora", "bias", "init_lora_weights"}
PROMPT = {"num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads"}
PROMPT |= {"num_transformer_submodules"}
USED = {
    "LORA": LORA,
    "IA3": {"target_modules", "feedforward_modules", "modules_to_save", "init_ia3_weights"},
    "PROMPT_TUNING": PROMPT,
    "P_TUNING": PROMPT,
    "PREFIX_TUNING": PROMPT,
}
NEEDED = {
    "LORA": ("r", "lora_alpha", "target_modules"),
    "IA3": ("target_modules",),
    "PROMPT_TUNING": ("num_virtual_tokens",),
    "P_TUNING": ("num_virtual_tokens",),
    "PREFIX_TUNING": ("num_virtual_tokens",),
}


def base_of(model):
    """Where the weights of a model came from: a folder, as an absolute path, or a hub id."""
    name = str(getattr(model.config, "_name_or_path", ""))
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def write(folder, config, tensors):
    """Write an adapter as PEFT does, and beside its weights a hash and a copy of the settings."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write(folder / "adapter_model.safetensors", tensors, meta=config)
    run.write_json(folder / "adapter_config.json", config)


def read(folder, kinds):
    """What PEFT's two files hold, ours or PEFT's: (config, {name: tensor}).

    kinds: the kinds of adapter that may be there. Raises UserError, one line: no adapter, another
    kind, a key that is not known, damage.
    """
    folder = Path(folder)
    name = printable(folder)
    try:
        config = json.loads(read_text(folder / "adapter_config.json"))
        tensors, header = read_tensors(folder / "adapter_model.safetensors")
    except run.UserError as error:
        raise run.UserError(f"no adapter in {name}: {error}") from None
    except (ValueError, RecursionError) as error:
        what = f"adapter_config.json is no JSON ({printable(error)})"
        raise run.UserError(f"no adapter in {name}: {what}") from None
    # every key is one that is known here
    check_config(config, kinds, name)
    # ours: of PEFT's own files the header says the format only
    if set(header) - {"format"}:
        check_hash(config, tensors, header, name)
    # every weight is a number
    for key, tensor in tensors.items():
        finite = tensor.is_floating_point() and bool(tensor.isfinite().all())
        run.check(finite, f"{name}: {printable(key)} holds something else than finite numbers")
    return config, tensors


def read_tensors(path):
    """A safetensors file -> ({name: tensor}, metadata). Raises UserError if it is not whole."""
    run.check(path.is_file(), f"there is no {path.name}; pickled weights (.bin) are not read")
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is no dict)
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        what = printable(error)[:80]
        raise run.UserError(f"{path.name} is not a whole safetensors file ({what})") from None


def check_config(config, kinds, name):
    """Raises UserError for another kind of adapter, and for unknown keys and values."""
    # the kind
    kind = config.get("peft_type") if isinstance(config, dict) else None
    known = isinstance(kind, str) and kind in kinds
    run.check(known, f"{name} holds an adapter of kind {printable(kind)}, not {' or '.join(kinds)}")
    where = f"{name}/adapter_config.json"
    # keys that are not known; one that is empty asks for nothing, whatever it is called
    beyond = sorted(key for key, value in config.items() if value and key not in NOTES | USED[kind])
    # values that are not known
    values = {
        "bias": ("none", "lora_only", "all"),
        "init_lora_weights": (True, False, "gaussian"),
        "num_transformer_submodules": (1,),
    }
    for key, allowed in values.items():
        value = config.get(key)
        if value is not None and not any(value == x and type(value) is type(x) for x in allowed):
            beyond.append(f"{key} = {value!r}")
    if config.get("use_dora") and config.get("use_rslora"):
        beyond.append("use_dora with use_rslora")
    listed = printable(", ".join(beyond))
    run.check(
        not beyond, f"{where} has {listed}, which this script does not know; load it with PEFT"
    )
    # keys that are missing
    lacking = [key for key in NEEDED[kind] if config.get(key) is None]
    run.check(not lacking, f"{where} lacks {', '.join(lacking)}")
    # numbers, lists of names, and flags are what they should be
    numbers = {"r": int, "num_virtual_tokens": int, "lora_alpha": (int, float)}
    for key, types in numbers.items():
        value = config.get(key, 1)
        number = isinstance(value, types) and not isinstance(value, bool)
        good = number and math.isfinite(value) and value > 0
        run.check(good, f"{where}: {key} is {printable(value)}; it must be a number above 0")
    for key in ("target_modules", "modules_to_save", "feedforward_modules"):
        value = config.get(key)
        words = [value] if isinstance(value, str) else value or []
        good = isinstance(words, list) and all(isinstance(word, str) and word for word in words)
        run.check(good, f"{where}: {key} must be a list of names")
    for key in ("use_rslora", "use_dora"):
        run.check(config.get(key) in (None, True, False), f"{where}: {key} must be true or false")


def check_hash(config, tensors, header, name):
    """Raises UserError if a folder of ours is not as it was written. The place of the base model
    may have changed.
    """
    # the weights
    text = header.get("meta", "")
    whole = header.get("sha256") == checkpoint.digest(tensors, text)
    run.check(
        whole,
        f"{name}/adapter_model.safetensors is damaged: its weights are not those that were written",
    )
    # the settings
    written = json.loads(text) or config
    keys = (written.keys() | config.keys()) - NOTES
    changed = [key for key in keys if written.get(key) != config.get(key)]
    listed = printable(", ".join(sorted(changed)))
    run.check(not changed, f"{name}/adapter_config.json is not as it was written: {listed}")


def usage(folder, base):
    """Three lines of Python that use an adapter folder."""
    return (
        "from peft import AutoPeftModelForCausalLM; from transformers import AutoTokenizer\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(Path(folder).resolve())!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({base!r})"
    )
