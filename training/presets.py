"""Model configurations by name: a preset, a config.json, a folder or a hub id; all of them checked.

Only sizes and types are read, no weights. memory_model.py builds the models.
"""

import difflib
import json
import logging
from contextlib import contextmanager
from pathlib import Path

from training.config_checks import KNOWN, SIZES, check_keys, check_sizes
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

    # A preset, or a file
    if name in PRESETS:
        kind, values = PRESETS[name]
        return AutoConfig.for_model(kind, **values)
    if name.endswith(".json"):
        return from_file(Path(name))
    if Path(name).is_dir():
        return from_file(Path(name) / "config.json")
    # A hub id has an owner: without one nobody need be asked
    near = difflib.get_close_matches(name, PRESETS, 1)
    hint = f"do you mean {near[0]}?" if near else f"presets are {', '.join(PRESETS)}"
    whole = f"--model {printable(name)}"
    run.check("/" in name, f"{whole} is no preset, no folder and no hub id OWNER/NAME; {hint}")
    # Only the configuration is downloaded
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

    # JSON, each key once
    name = printable(path)
    text = read_text(path)
    try:
        values = json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise run.UserError(f"{name} is no readable JSON file: {printable(error)}") from None
    # A model type that transformers knows
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
    # What transformers makes of it, with sizes that fit each other
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
