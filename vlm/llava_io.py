"""LLaVA checkpoints: weights of our own, ordinary folders, and transformers' LLaVA, which holds the same numbers.

`load` takes any of them apart into what llava.py puts together, `save` writes a folder:
transformers' own format (llava_transformers.py) if it has these parts (a transformer as vision
encoder, a connector mlp2x_gelu), else that of modeling.py, which build.py writes, too. Folders of
parts, an older format of ours, are still read.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch

from utils import checkpoint, pretrained, run
from utils.run import UserError, check
from utils.text import printable, read_text
from vlm import book_encoders, peft_files, tower
from vlm.connector import joins_tiles
from vlm.flags import RESAMPLERS, PerceiverConfig
from vlm.llava_parts import Parts, build, first_line, language_model, merge_lora
from vlm.llava_transformers import (
    from_pretrained,
    from_transformers,
    has_llava_parts,
    image_processor,
    processor,
    to_transformers,
    transformers_config,
)
from vlm.prompts import use_template

# Keys of config.json of a folder of parts
OURS = {"model_type", "vision", "connector", "layer", "select"}


def save(model, tokenizer, folder):
    """Write an ordinary folder, whole or not at all: transformers' own LLaVA if it knows the parts,
    else a model of vlm/modeling.py."""
    folder = Path(folder)
    check(not folder.exists(), f"{folder} is there already: name another")
    book_encoders.check_saved(model.vision)
    if has_llava_parts(model):
        pretrained.save(to_transformers(model), processor(model, tokenizer), folder)
    else:
        pretrained.save(*as_vlm(model, tokenizer), folder)


def as_vlm(model, tokenizer):
    """Any other pair of encoder and language model -> VLM of modeling.py, as build.py writes it, processor."""
    from vlm.config import VLMConfig
    from vlm.modeling import assemble
    from vlm.processor import VLMProcessor

    vision_tower = model.vision
    name, options = model.connector.built_as
    config = VLMConfig(
        connector=name,
        perceiver=PerceiverConfig.of(options) if name in RESAMPLERS else None,
        sparsity_plugins=list(options.get("sparsity_plugins", ())) or None,
        image_grid_pinpoints=[list(size) for size in model.grids] or None,
        vision_layer=vision_tower.layer,
        select=vision_tower.select,
    )
    # copies in the precision of the language model
    dtype = model.language.dtype
    join = copy.deepcopy(model.connector).to(dtype)
    if hasattr(vision_tower.network, "config"):
        vision_tower = copy.deepcopy(vision_tower).to(dtype)
    whole = assemble(config, vision_tower, join, model.language, model.image_id, model.newline)
    shown = image_processor(vision_tower, model.grids)
    fixed = joins_tiles(join)
    return whole, VLMProcessor(shown, tokenizer, image_tokens=model.count, fixed_tokens=fixed)


def load(name, on="cpu"):
    """A file of weights, a folder that `save` wrote, or a folder or hub id of transformers' LLaVA
    -> tokenizer, Parts.

    Raises UserError for anything else.
    """
    # weights of ours
    path = Path(name)
    if path.suffix == ".safetensors":
        return restore(path, on)
    check(
        not path.is_file(),
        f"{path} holds no weights: name a .safetensors file, a folder or a hub id",
    )
    check(
        path.exists() or not path.is_absolute(),
        f"no LLaVA at '{printable(path)}': there is no such file or folder",
    )
    # an adapter of PEFT, merged into the model that it names
    if peft_files.is_adapter(path):
        return load_adapter(path, on)
    # a folder of ours
    about = read_config(path) if path.is_dir() else {}
    if about.get("model_type") == "llava-of-parts":
        return load_parts(path, about, on)
    # a folder of build.py
    if about.get("model_type") == "vlm_action":
        return load_vlm(path, on)
    # transformers' LLaVA
    from transformers import AutoModelForImageTextToText, AutoProcessor

    transformers_config(name)  # before the weights: they may be large
    more = {"dtype": torch.bfloat16, "output_loading_info": True}
    theirs, info = from_pretrained(AutoModelForImageTextToText, name, **more)
    lost = sorted(info["missing_keys"])
    check(
        not lost,
        f"'{name}' lacks {len(lost)} weights, {printable(lost[:1])} first: fetch or write it again",
    )
    # tokenizer, and the normalisation of pixels
    shown: Any = from_pretrained(AutoProcessor, name)
    model = from_transformers(pretrained.frozen(theirs, on), name)
    model.vision.mean = shown.image_processor.image_mean
    model.vision.std = shown.image_processor.image_std
    return shown.tokenizer, model


def read_config(path):
    """config.json of a folder. Raises UserError: none, no JSON object, one of ours with keys
    missing or unknown."""
    check(
        (path / "config.json").is_file(), f"{path} is no folder of a model: it has no config.json"
    )
    try:
        about = json.loads(read_text(path / "config.json"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no folder of a model: {first_line(error)}") from None
    check(isinstance(about, dict), f"{path} is no folder of a model: its config.json is no object")
    # the folder of a training run, which holds a file of weights
    weights = path / "model.safetensors"
    check(
        "model_type" in about or "train" not in about or not weights.is_file(),
        f"{path} is the folder of a training run: name {weights}",
    )
    # one of ours: its keys, and the kinds of their values
    if about.get("model_type") == "llava-of-parts":
        odd = sorted(about.keys() ^ OURS)
        check(not odd, f"{path}/config.json: {printable(', '.join(odd))} is unknown or missing")
        texts = all(isinstance(about[k], str) for k in ("vision", "connector", "select"))
        whole = isinstance(about["layer"], int) and not isinstance(about["layer"], bool)
        fine = texts and whole and about["vision"] in ("efficientnet", "vision")
        check(
            fine, f"{path}/config.json: vision, connector, layer or select is not what save writes"
        )
    return about


def restore(path, on="cpu"):
    """A file that vlm/train.py wrote: trained weights, and the names of frozen parts -> tokenizer,
    Parts."""
    tensors, meta = checkpoint.read(path)
    try:
        tokenizer, model = start_of(meta, on)
        # the chat template of training, a Jinja text; older files have none
        if "chat_template" in meta:
            tokenizer.chat_template = meta["chat_template"]
            use_template(tokenizer)

        def part(name):
            return {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}

        # trained weights: the connector, LoRA
        model.connector.load_state_dict({k: v.float() for k, v in part("connector.").items()})
        if "newline" in tensors:
            model.newline.data = tensors["newline"].float().to(on)
        merge_lora(model.language, {k: v.to(on) for k, v in part("lora.").items()}, meta["scale"])
        # parts that were trained whole; a frozen one is not in the file
        for name, parts in (("vision.", model.vision), ("language.", model.language)):
            if part(name):
                unknown = parts.load_state_dict(part(name), strict=False).unexpected_keys
                check(
                    not unknown,
                    f"{path} holds weights that its {name[:-1]} model lacks: {printable(unknown)}",
                )
    except (TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} holds no LLaVA of this kind ({first_line(error)})") from None
    return tokenizer, model


def start_of(meta, on):
    """What a training run began with -> tokenizer, Parts: another model, or parts by their names."""
    if "base" in meta:
        base = Path(meta["base"])
        there = not base.is_absolute() or base.exists()
        check(there, f"the model that it was trained from is gone: {printable(base)}")
        if "base_sha256" in meta:
            same = checkpoint.digest(checkpoint.read(base)[0], "") == meta["base_sha256"]
            check(same, f"the model that it was trained from has changed since: {printable(base)}")
        return load(meta["base"], on)
    tokenizer, language = language_model(meta["language"], on)
    vision_tower = tower.load(
        meta["vision"], meta["layer"], meta["select"], meta.get("img_size"), on
    )
    from vlm.config import VLMConfig

    named = {k: meta[k] for k in ("perceiver", "sparsity_plugins") if k in meta}
    options = VLMConfig(**named).connector_options()
    # the row of <image> in the vocabulary is drawn as training drew it
    run.seed(meta.get("seed", 0))
    about = (meta["connector"], language, tokenizer)
    tiles = meta.get("tiles", ())
    return tokenizer, build(vision_tower, *about, on=on, options=options, tiles=tiles)


def load_adapter(path, on="cpu"):
    """A folder with LoRA in PEFT's files -> tokenizer, Parts: the model that it names, LoRA merged into it."""
    found = peft_files.read(path)
    base = printable(found.base)
    lost = Path(found.base).is_absolute() and not Path(found.base).exists()
    check(found.base and not lost, f"{path} is for a model that is not there: {base or 'unnamed'}")
    chained = peft_files.is_adapter(found.base)
    check(not chained, f"{path} is for another adapter, {base}: merge that one first")
    tokenizer, model = load(found.base, on)
    # its chat template, if it has one
    if found.chat_template:
        tokenizer.chat_template = found.chat_template
        use_template(tokenizer)
    # W + s B A, and the connector that was trained beside
    merge_lora(model.language, {k: x.to(on) for k, x in found.lora.items()}, found.scale)
    peft_files.fill_connector(model.connector, found)
    return tokenizer, model


def load_vlm(path, on="cpu"):
    """A folder of build.py, any encoder with any language model -> tokenizer, Parts."""
    from vlm.modeling import VLM
    from vlm.processor import VLMProcessor

    pretrained.check_weights(path)
    model, info = from_pretrained(VLM, path, output_loading_info=True)
    lost = sorted(info["missing_keys"])
    check(not lost, f"'{path}' lacks {len(lost)} weights, {printable(lost[:1])} first")
    model = pretrained.frozen(model, on)
    # tokenizer, and the normalisation of pixels; EfficientNet has its own
    shown: Any = from_pretrained(VLMProcessor, path)
    if model.config.vision_config is not None:
        model.vision.mean = shown.image_processor.image_mean
        model.vision.std = shown.image_processor.image_std
    model.connector.built_as = (model.config.connector, model.config.connector_options())
    parts = Parts(model.vision, model.connector, model.language, model.config.image_token_id)
    grids = tuple(model.config.grids(model.vision.size))
    return shown.tokenizer, parts._replace(newline=model.newline, grids=grids)


def load_parts(path, about, on="cpu"):
    """A folder of ours, in which every part is a folder of its own -> tokenizer, Parts."""
    tokenizer, language = language_model(path / "language", on)
    vision_tower = about["vision"] if about["vision"] == "efficientnet" else str(path / "vision")
    layer = (about["layer"], about["select"])
    model = build(vision_tower, about["connector"], language, tokenizer, *layer, on=on)
    try:
        model.connector.load_state_dict(checkpoint.read(path / "connector.safetensors")[0])
    except RuntimeError as error:
        raise UserError(
            f"{path}/connector.safetensors is not a {about['connector']}: {first_line(error)}"
        ) from None
    return tokenizer, model
