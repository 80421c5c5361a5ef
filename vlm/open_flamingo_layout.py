"""The layout of OpenFlamingo's files: which weight belongs to which part, and what it is called here.

Awadalla et al. 2023, arXiv:2308.01390. vlm/open_flamingo.py reads such files by these names.
"""

import re

NORM = ("weight", "bias")
# Their names of the parts of a layer -> ours
RESAMPLER_LAYER = {
    "0.norm_media": "norm_context",
    "0.norm_latents": "norm_latents",
    "0.to_q": "q_proj",
    "0.to_kv": ("k_proj", "v_proj"),
    "0.to_out": "o_proj",
    "1.0": "norm_mlp",
    "1.1": "mlp.0",
    "1.3": "mlp.2",
}
GATED_LAYER = {
    "attn.norm": "norm_attention",
    "attn.to_q": "q_proj",
    "attn.to_kv": ("k_proj", "v_proj"),
    "attn.to_out": "o_proj",
    "ff.0": "norm_mlp",
    "ff.1": "up_proj",
    "ff.3": "down_proj",
}
# Ends of names: their number of rows and columns is read
MATRICES = ("latents", "to_q.weight", "to_kv.weight", ".1.weight")
GATES = {"attn_gate": "gate_attention.alpha", "ff_gate": "gate_mlp.alpha"}


def part_of(key, layers):
    """Which part a weight belongs to: ("perceiver", name), ("gated", N, name), ("language", name) or
    None.

    layers: the name of the decoder layers. OpenFlamingo wraps each in a module that holds the gated
    layer and the decoder layer, and lists both a second time.
    """
    part, _, name = key.partition(".")
    if part == "perceiver":
        return "perceiver", name
    if part != "lang_encoder":
        return None
    # a gated layer, by either of its two names
    number = r"(\d{1,4})"
    wrapped = rf"{re.escape(layers)}\.{number}"
    gated = rf"(?:gated_cross_attn_layers\.{number}|{wrapped}\.gated_cross_attn_layer)\.(.+)"
    if found := re.fullmatch(gated, name):
        return "gated", int(found[1] or found[2]), found[3]
    # a decoder layer, by either of its two names
    decoder = rf"(?:old_decoder_blocks\.{number}|{wrapped}\.decoder_layer)\.(.+)"
    if found := re.fullmatch(decoder, name):
        return "language", f"{layers}.{found[1] or found[2]}.{found[3]}"
    # anything else of the language model
    return "language", name


def layer_names(table):
    """Their names of one layer: norms have a weight and a bias, matrices a weight only."""
    names = []
    for theirs, ours in table.items():
        is_norm = isinstance(ours, str) and ours.startswith("norm")
        names += [f"{theirs}.{leaf}" for leaf in (NORM if is_norm else ("weight",))]
    return names


def layer_numbers(perceiver):
    """The numbers of the resampler's layers, as they stand in its names."""
    matches = [re.match(r"layers\.(\d{1,4})\.", name) for name in perceiver]
    return [found[1] for found in matches if found]


def renamed(table, prefix, name, tensor):
    """A weight of a layer under our names: {name: tensor}, two for `to_kv`, keys above values."""
    if name in GATES:
        return {f"{prefix}.{GATES[name]}": tensor}
    theirs, _, leaf = name.rpartition(".")
    ours = table[theirs]
    if isinstance(ours, str):
        return {f"{prefix}.{ours}.{leaf}": tensor}
    # keys and values are one matrix there, keys above
    halves = tensor.chunk(2, dim=0)
    return {f"{prefix}.{half}.{leaf}": x for half, x in zip(ours, halves)}


def our_names(perceiver, gated, every):
    """The weights of resampler and gated layers under the names of `Flamingo`."""
    weights = {}
    for name, tensor in perceiver.items():
        if found := re.fullmatch(r"layers\.(\d{1,4})\.(.+)", name):
            prefix = f"resampler.layers.{found[1]}"
            weights |= renamed(RESAMPLER_LAYER, prefix, found[2], tensor)
        else:
            weights[f"resampler.{name}"] = tensor
    # gated layers stand before every n-th layer: numbered by the layer there, in a row here
    for (n, name), tensor in gated.items():
        weights |= renamed(GATED_LAYER, f"cross.{n // every}", name, tensor)
    return weights
