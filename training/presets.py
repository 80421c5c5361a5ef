"""Model configurations by name: a preset, a config.json, a folder or a hub id; all of them checked.

Only sizes and types are read, no weights. memory_model.py builds the models.
"""

import difflib
import json
import logging
from contextlib import contextmanager
from pathlib import Path

from utils import run
from utils.text import printable, read_text


def llama_sizes(V, d, f, L, heads, kv_heads, **more):
    """Sizes of a language model under the names of its configuration."""
    return {
        "vocab_size": V,
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": L,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    } | more


CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "image_size": 336,
    "patch_size": 14,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "projection_dim": 768,
}
LLAVA = {
    "image_token_index": 32000,
    "tie_word_embeddings": False,
    "vision_config": CLIP,
    "text_config": llama_sizes(32064, 4096, 11008, 32, 32, 32, model_type="llama"),
}
PRESETS = {  # model type, and what its configuration says
    "smollm2-135m": ("llama", llama_sizes(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True)),
    "llama2-7b": ("llama", llama_sizes(32000, 4096, 11008, 32, 32, 32)),
    "llama2-13b": ("llama", llama_sizes(32000, 5120, 13824, 40, 40, 40)),
    "llama2-70b": ("llama", llama_sizes(32000, 8192, 28672, 80, 64, 8)),
    "llama3-8b": ("llama", llama_sizes(128256, 4096, 14336, 32, 32, 8)),
    "qwen2.5-7b": ("qwen2", llama_sizes(152064, 3584, 18944, 28, 28, 4, tie_word_embeddings=False)),
    "llava-1.5-7b": ("llava", LLAVA),
}
# Language models whose sizes and projections have these names
KNOWN = ("llama", "qwen2", "mistral")
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
)
# The largest of each size that makes sense
LARGEST = {
    "vocab_size": 10**7,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_hidden_layers": 500,
    "num_attention_heads": 10**4,
    "num_key_value_heads": 10**4,
}
# of config.json files, but no attributes of a configuration in transformers 5
OTHER_KEYS = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "partial_rotary_factor",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
}
# what transformers raises over a configuration that makes no sense
ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    ZeroDivisionError,
    RecursionError,
)


def configuration(name):
    """The transformers configuration behind a preset, a config.json, a folder or a hub id.

    What decides the memory must be in the file: a default of transformers would count without a
    word.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if name in PRESETS:
        kind, values = PRESETS[name]
        return AutoConfig.for_model(kind, **values)
    if name.endswith(".json"):
        return from_file(Path(name))
    if Path(name).is_dir():
        return from_file(Path(name) / "config.json")
    # a hub id has an owner: without one nobody need be asked
    near = difflib.get_close_matches(name, PRESETS, 1)
    hint = f"do you mean {near[0]}?" if near else f"presets are {', '.join(PRESETS)}"
    whole = f"--model {printable(name)}"
    run.check("/" in name, f"{whole} is no preset, no folder and no hub id OWNER/NAME; {hint}")
    try:
        with only_errors_logged():
            config = AutoConfig.from_pretrained(name)
    except (*ERRORS, StrictDataclassError) as error:
        raise run.UserError(f"{whole}: {printable(error)}") from None
    check_sizes(config, name)
    return config


def from_file(path):
    """config.json -> the configuration. Raises UserError for what is wrong in it or missing."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # JSON with a model type that transformers knows
    name = printable(path)
    text = read_text(path)
    try:
        values = json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise run.UserError(f"{name} is no readable JSON file: {printable(error)}") from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    run.check(isinstance(kind, str) and kind in CONFIG_MAPPING, f"{name}: no known model_type")
    language = values.get("text_config", values)
    said = printable(language)
    run.check(isinstance(language, dict), f"{name}: text_config is {{...}}, not {said}")
    # No key is misspelt, and none that counts is missing
    for part, made_by in ((values, kind), (language, language.get("model_type", kind))):
        check_keys(name, part, made_by)
    if kind in KNOWN:
        for key in SIZES:
            run.check(key in values, f"{name}: {key} is missing")
    try:
        with only_errors_logged():
            config = AutoConfig.for_model(**values)
    except (*ERRORS, StrictDataclassError) as error:
        raise run.UserError(f"{name}: {printable(error)}") from None
    check_sizes(config, name)
    return config


@contextmanager
def only_errors_logged():
    """The hub client logs its retries, transformers its repairs; our error is one line."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def unique(pairs):
    """A JSON object as a dict. Raises ValueError for a key that is there twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is there twice")
    return values


def refuse_constant(word):
    """NaN and Infinity, which Python reads and JSON does not have. Raises ValueError."""
    raise ValueError(f"{word} is no JSON number")


def check_keys(name, values, kind):
    """Raises UserError for a misspelt key: its default would count instead."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return
    known = {key for key in dir(CONFIG_MAPPING[kind]()) if not key.startswith("__")} | OTHER_KEYS
    for key in values.keys() - known:
        near = difflib.get_close_matches(key, known, 1, 0.75)
        hint = f"perhaps you mean '{near and near[0]}'"
        run.check(not near, f"{name}: a {kind} knows no '{printable(key)}', {hint}")


def check_sizes(config, name):
    """Raises UserError unless the sizes of the language model are numbers that fit each other."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = getattr(config, "text_config", config)
    said = f"--model {name}"
    # Each size
    for key, most in LARGEST.items():
        size = getattr(text, key, None)
        if size is None:  # of another kind of model, or as many as heads of queries
            continue
        whole = isinstance(size, int) and not isinstance(size, bool)
        hint = f"1 to {most:,} make sense"
        run.check(whole and 0 < size <= most, f"{said}: {key} is {printable(size)}; {hint}")
    # Heads of keys and values: each belongs to as many of queries
    heads = getattr(text, "num_attention_heads", 1)
    kv = getattr(text, "num_key_value_heads", None)
    fit = heads % (kv or heads) == 0
    run.check(fit, f"{said}: {heads} heads cannot share {kv} of keys and values")
    # Names of functions
    act = getattr(text, "hidden_act", "silu")
    known = isinstance(act, str) and act in ACT2FN
    run.check(known, f"{said}: no known hidden_act: {printable(act)}")
    rope = getattr(text, "rope_parameters", None)
    rope = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
    known = isinstance(rope, str) and rope in {"default", *ROPE_INIT_FUNCTIONS}
    run.check(known, f"{said}: no known rope_type: {printable(rope)}")


def check_vision(config, name):
    """Raises UserError unless it is a LLaVA on CLIP, or a model without pictures."""
    if not hasattr(config, "vision_config"):
        return
    kind = config.model_type
    vision = config.vision_config
    tower = vision.model_type
    said = f"--model {name}"
    run.check(kind == "llava", f"{said} is a {kind}: of models that see only a llava is known")
    run.check(tower == "clip_vision_model", f"{said} sees by a {tower}, not by CLIP")
    layer = config.vision_feature_layer
    known = isinstance(layer, int)
    run.check(known, f"{said}: vision_feature_layer {printable(layer)}: one layer is known")
    sizes = (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers)
    whole = all(isinstance(size, int) and 0 < size <= 10**5 for size in sizes)
    fit = whole and sizes[0] % sizes[1] == 0
    run.check(fit, f"{said}: the sizes {sizes} of its tower make no sense")


def sizes(config):
    """V, d, L, f, H, K of the language model behind a configuration."""
    text = getattr(config, "text_config", config)
    found = [getattr(text, name) for name in SIZES]
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return *found, kv_heads


def image_tokens(config):
    """Tokens that a picture takes: a patch each, and with "full" CLIP's class token."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    if config.vision_feature_select_strategy == "default":
        return patches
    return patches + 1
