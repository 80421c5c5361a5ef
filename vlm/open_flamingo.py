"""OpenFlamingo's weights in the Flamingo of this book: another layout of names, the same function.

Awadalla et al. 2023, arXiv:2308.01390. Its released files hold a perceiver resampler of six layers
(`perceiver.*`), a gated cross-attention layer before every n-th layer of the language model
(`lang_encoder.gated_cross_attn_layers.N.*`, or under its other name `...N.gated_cross_attn_layer.*`
beside the decoder layer) and the embedding table with the new tokens. The frozen vision encoder is
not in them, nor is the rest of the language model: both are given. Keys and values are one matrix
there (`to_kv`) and two here.

Shapes: features (B,J,N,D), latents (B,J,M,D): the resampler keeps the width D of the vision encoder.
Differences from the paper of Flamingo: GELU, not squared ReLU; the first gated layer stands before
layer n of n, 2n, ..., not before the first.

    python vlm/flamingo.py --weights checkpoint.pt --vision openai/clip-vit-large-patch14 --layer -1
"""

from pathlib import Path
from typing import Any

import torch

from utils.run import UserError, check
from utils.text import printable
from vlm import open_flamingo_layout as layout
from vlm import prompts
from vlm.few_shot import END
from vlm.flamingo_model import Flamingo, decoder_layers
from vlm.prompts import IMAGE

HEAD_DIM = 64  # of all released models; shapes tell heads times width, not either


def read(path):
    """A file of weights, .safetensors or .pt, or the folder of one -> {name: tensor}.

    A .pt file is read with weights_only; a training checkpoint holds the weights under
    `model_state_dict`, and DistributedDataParallel writes `module.` before each name. Raises
    UserError for anything else.
    """
    from safetensors.torch import load_file

    # the one file of weights in a folder
    path = Path(path)
    if path.is_dir():
        found = sorted([*path.glob("*.safetensors"), *path.glob("*.pt")])
        one = f"{len(found)} files of weights (.safetensors, .pt) in {printable(path)}"
        check(len(found) == 1, f"{one}; one is needed: name it")
        path = found[0]
    name = printable(path)
    check(path.is_file(), f"there is no file {name}")
    try:
        # its tensors: no pickle but torch's own restricted one
        if path.suffix == ".safetensors":
            tensors: Any = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file: both libraries raise what comes
    except Exception as error:
        reason = printable(error)[:80] or type(error).__name__
        raise UserError(f"{name} is no whole file of weights alone: {reason}") from None
    # a training checkpoint holds them one level deeper
    if isinstance(tensors, dict):
        tensors = tensors.get("model_state_dict", tensors)
    good = isinstance(tensors, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in tensors.items()
    )
    check(good and tensors, f"{name} holds no weights by name")
    return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}


def layers_name(language):
    """What the list of decoder layers is called in a language model: model.layers, say."""
    layers = decoder_layers(language)
    return next(name for name, module in language.named_modules() if module is layers)


def by_part(tensors, layers, where):
    """Weights by part: the perceiver's {name: x}, gated layers' {(N, name): x}, the language
    model's {name: x}. Raises UserError for a weight of no part, or two of one name that differ."""
    parts = {"perceiver": {}, "gated": {}, "language": {}}
    strange = []
    for key, tensor in tensors.items():
        # openFlamingo lists gated layers and decoder layers twice: both must be the same
        found = layout.part_of(key, layers)
        if found is None:
            strange.append(key)
            continue
        part, *name = found
        name = name[0] if len(name) == 1 else tuple(name)
        same = torch.equal(parts[part].get(name, tensor), tensor)
        check(same, f"{where}: {printable(key)} is there twice, with other numbers")
        parts[part][name] = tensor
    check(not strange, f"{where}: {unexpected(strange)}")
    return parts["perceiver"], parts["gated"], parts["language"]


def unexpected(keys):
    return f"unexpected {printable(', '.join(sorted(keys)[:3]))} ({len(keys)} in all)"


def check_names(perceiver, gated, language, model, where):
    """Raises UserError, one line, for weights that are missing or that have no place."""
    # what must be there: resampler, and every gated layer that any weight names
    depth = 1 + max((int(n) for n in layout.layer_numbers(perceiver)), default=0)
    wanted = {"perceiver.latents", "perceiver.norm.weight", "perceiver.norm.bias"}
    for n in range(depth):
        wanted |= {
            f"perceiver.layers.{n}.{name}" for name in layout.layer_names(layout.RESAMPLER_LAYER)
        }
    for n in sorted({n for n, _ in gated}) or [0]:
        names = [*layout.layer_names(layout.GATED_LAYER), *layout.GATES]
        wanted |= {f"lang_encoder.gated_cross_attn_layers.{n}.{name}" for name in names}
    # of the language model: the tables that hold the new tokens, and whatever else it has
    tables = {table_name(model, model.get_input_embeddings())}
    if not tied(model):
        tables.add(table_name(model, model.get_output_embeddings()))
    wanted |= {f"lang_encoder.{name}" for name in tables}
    # what may be there: the rest of the language model, too
    allowed = wanted | {f"lang_encoder.{name}" for name in model.state_dict()}
    # what is there, under OpenFlamingo's names
    found = {f"perceiver.{name}" for name in perceiver}
    found |= {f"lang_encoder.gated_cross_attn_layers.{n}.{name}" for n, name in gated}
    found |= {f"lang_encoder.{name}" for name in language}
    missing = sorted(wanted - found)
    listed = f"missing {printable(', '.join(missing[:3]))} ({len(missing)} in all)"
    check(not missing, f"{where} is not in OpenFlamingo's layout: {listed}")
    strange = found - allowed
    check(not strange, f"{where} is not in OpenFlamingo's layout: {unexpected(strange)}")


def table_name(language, module):
    """The name of an embedding table's weight in a language model."""
    return next(f"{name}.weight" for name, m in language.named_modules() if m is module)


def tied(language):
    table = language.get_input_embeddings().weight
    return language.get_output_embeddings().weight is table


def shape_of(perceiver, gated, layers, head_dim, where):
    """Arguments of `Flamingo` that the shapes of the weights tell. Raises UserError for layers that
    are not every n-th one."""
    # rows and columns are read below: they must be matrices
    matrices = {name: x for name, x in perceiver.items() if name.endswith(layout.MATRICES)}
    matrices |= {name: x for (_, name), x in gated.items() if name.endswith(layout.MATRICES)}
    for name, tensor in matrices.items():
        check(tensor.dim() == 2, f"{where}: {name} has {tensor.dim()} dimensions, not 2")
    # resampler
    inner = len(perceiver["layers.0.0.to_q.weight"])
    latents, width = perceiver["latents"].shape
    # gated layers
    numbers = sorted({n for n, _ in gated})
    every = numbers[0] + 1
    regular = numbers == list(range(every - 1, layers, every))
    listed = ", ".join(map(str, numbers[:6]))
    check(regular, f"{where}: gated layers {listed} are not every n-th of {layers} layers")
    cross_inner = len(gated[numbers[0], "attn.to_q.weight"])
    whole = inner % head_dim == 0 and cross_inner % head_dim == 0
    check(whole, f"{where}: {inner} and {cross_inner} are no multiples of {head_dim}, a head")
    return {
        "dim_in": width,
        "latent_width": width,
        "latents": latents,
        "every": every,
        "first": every - 1,
        "depth": 1 + max(int(n) for n in layout.layer_numbers(perceiver)),
        "heads": inner // head_dim,
        "cross_heads": cross_inner // head_dim,
        "head_dim": head_dim,
        "mlp_ratio": len(perceiver["layers.0.1.1.weight"]) // width,
        "hidden": len(gated[numbers[0], "ff.1.weight"]),
    }


@torch.no_grad()
def copy(weights, parameters, where):
    """Fill parameters, by name. Raises UserError for another shape, before any is filled."""
    # all shapes first, so that a model is never half filled
    for name, tensor in weights.items():
        shape, place = tuple(tensor.shape), tuple(parameters[name].shape)
        check(shape == place, f"{where}: {name} has the shape {shape}, this model needs {place}")
    for name, tensor in weights.items():
        parameters[name].copy_(tensor)


def load(path, vision, language, tokenizer, head_dim=HEAD_DIM, on="cpu"):
    """OpenFlamingo's weights around a vision tower and a language model -> Flamingo, frozen.

    path: a .safetensors or .pt file, or the folder of one; vision: a tower of vlm/tower.py that
    reads the last layer's patches; the tokenizer learns <|endofchunk|> and <image>, in this order.
    Raises UserError, one line, for another layout (what is missing, what has no place), and for
    another vision encoder or language model.
    """
    # 1. weights by part, under their names
    where = printable(path)
    perceiver, gated, words = by_part(read(path), layers_name(language), where)
    check_names(perceiver, gated, words, language, where)
    # 2. the sizes of the network, by their shapes
    count = len(decoder_layers(language))
    shape = shape_of(perceiver, gated, count, head_dim, where)
    width = shape["dim_in"]
    other = f"{where} reads features of {width} numbers, the vision encoder gives {vision.width}"
    check(vision.width == width, f"{other}: name another --vision")
    # new tokens, in OpenFlamingo's order: the rows of its table say so; a padding token may follow
    prompts.add_words(tokenizer, language, (END, IMAGE))
    new_ids = tokenizer.convert_tokens_to_ids([IMAGE, END])
    table = words[table_name(language, language.get_input_embeddings())]
    rows = table.shape[0] if table.dim() == 2 else 0
    enough = rows > max(new_ids)
    check(enough, f"{where}: {rows} rows of embeddings, too few for this tokenizer's new tokens")
    language.resize_token_embeddings(rows, mean_resizing=False)
    # the network, and the weights in it
    model = Flamingo(language, new_ids, **shape, activation="gelu", tokens_in_table=True)
    copy(words, language.state_dict(), where)
    weights = layout.our_names(perceiver, gated, shape["every"])
    copy(weights, dict(model.named_parameters()), where)
    return model.to(on).eval().requires_grad_(False)
