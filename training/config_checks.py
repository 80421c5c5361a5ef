"""Checks of a model's configuration: no misspelt key, sizes that fit each other, a known model.

Each raises UserError, one line that names file or --model, key and value.
"""

import difflib

from utils import run
from utils.text import printable

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
