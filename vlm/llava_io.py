"""LLaVA checkpoints: weights of our own, ordinary folders, and transformers' LLaVA, which holds the same numbers.

`load` takes any of them apart into what llava.py puts together, `save` writes a folder: transformers' own format if it
has these parts (a transformer that sees, a connector mlp2x_gelu), else one of ours, in which every part is an ordinary
folder of its library.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from utils import checkpoint, pretrained, run
from utils.run import UserError, check
from utils.text import printable, read_text
from vlm import connector, tower
from vlm.prompts import IMAGE, add_words

# Model types of transformers that are read here; others only look alike
KINDS = ("llava", "llava_next")
# Keys of config.json of a folder of parts
OURS = {"model_type", "vision", "connector", "layer", "select"}


class Parts(NamedTuple):
    """What a LLaVA is put together from (llava.py)."""

    vision: Any
    connector: Any
    language: Any
    image_id: int  # of <image> in the vocabulary
    newline: Any = None  # LLaVA-1.6: the vector that ends a row of tiles
    grids: tuple = ()  # LLaVA-1.6: the sizes that a picture is tiled to


def build(vision, join, language, tokenizer, layer=-2, select="patch", words=(IMAGE,), on="cpu"):
    """Names of a tower and a connector, and a language model -> Parts; the words are added to its vocabulary."""
    vision_tower = tower.load(vision, layer, select, on=on) if isinstance(vision, str) else vision
    width = language.config.get_text_config().hidden_size
    image_id = add_words(tokenizer, language, words)
    return Parts(
        vision_tower, connector.build(join, vision_tower.width, width).to(on), language, image_id
    )


def speaker(name, on="cpu"):
    """-> tokenizer, language model: smollm2, or a folder or hub id."""
    return pretrained.smollm2(on) if name == "smollm2" else pretrained.language_model(name, on)


@torch.no_grad()
def correct(language, tensors, scale):
    """Add corrections of low rank to the matrices they were learned beside, in place: W + scale B A (LoRA)."""
    for name in [k.removesuffix(".A") for k in tensors if k.endswith(".A")]:
        try:
            weight = language.get_parameter(f"{name}.weight")
            weight.add_(
                (scale * tensors[f"{name}.B"].float() @ tensors[f"{name}.A"].float()).to(weight)
            )
        except (AttributeError, KeyError, RuntimeError):
            raise UserError(
                f"the corrections are for another language model: {name} does not fit"
            ) from None


def restore(path, on="cpu"):
    """A file that vlm/train.py wrote: what it learned, and the names of what it did not -> tokenizer, Parts."""
    tensors, meta = checkpoint.read(path)
    try:
        tokenizer, language = speaker(meta["language"], on)
        run.seed(0)
        model = build(
            meta["vision"],
            meta["connector"],
            language,
            tokenizer,
            meta["layer"],
            meta["select"],
            on=on,
        )

        def part(name):
            return {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}

        model.connector.load_state_dict({k: v.float() for k, v in part("connector.").items()})
        correct(language, {k: v.to(on) for k, v in part("lora.").items()}, meta["scale"])
        for name, parts in (("vision.", model.vision), ("language.", language)):  # trained whole
            if part(name):  # what did not learn is not in the file
                unknown = parts.load_state_dict(part(name), strict=False).unexpected_keys
                check(
                    not unknown,
                    f"{path} holds weights that its {name[:-1]} model lacks: {printable(unknown)}",
                )
    except (TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} holds no LLaVA of this kind ({first_line(error)})") from None
    return tokenizer, model


def first_line(error):
    """Of an error of whatever kind, at most 200 characters."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0])


def check_supported(config, name):
    """Raises UserError, naming the key, for what a configuration of transformers asks and this project does not do."""
    kind = getattr(config, "model_type", None)
    check(
        kind in KINDS,
        f"'{name}' is a {printable(kind)}: only {', '.join(KINDS)} and folders of --save are read",
    )
    from transformers import LlavaConfig, LlavaNextConfig

    usual = set((LlavaConfig if kind == "llava" else LlavaNextConfig)().to_dict())
    usual |= {
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "_name_or_path",
        "ignore_index",
    }
    usual |= {
        "image_token_index",
        "vocab_size",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "hidden_size",
    }
    usual |= {
        "use_image_newline_parameter",
        "use_cache",
        "initializer_range",
        "text_config",
        "vision_config",
    }
    unknown = sorted(set(config.to_dict()) - usual)
    check(
        not unknown,
        f"'{name}' has {printable(', '.join(unknown))} in its config.json, which is not known here",
    )
    one_layer = isinstance(config.vision_feature_layer, int) and not isinstance(
        config.vision_feature_layer, bool
    )
    wanted = {
        "projector_hidden_act": config.projector_hidden_act == "gelu",
        "vision_feature_layer": one_layer,  # a list: several layers side by side
        "vision_feature_select_strategy": config.vision_feature_select_strategy
        in ("default", "full"),
        "use_image_newline_parameter": getattr(config, "use_image_newline_parameter", True) is True,
    }
    for key, fine in wanted.items():
        check(fine, f"'{name}': {key} {printable(getattr(config, key, None))} is not supported")


def from_transformers(theirs, name="the model"):
    """transformers' LlavaForConditionalGeneration or LlavaNext... -> Parts, with the very same weights, not copied.

    Raises UserError for a model of another kind, or with a setting that is not done here.
    """
    check_supported(theirs.config, name)
    from transformers import AutoModelForCausalLM

    config, inner = theirs.config, theirs.model
    with torch.device("meta"):
        language: Any = AutoModelForCausalLM.from_config(config.text_config)
    language.model, language.lm_head = inner.language_model, theirs.lm_head
    language.generation_config = theirs.generation_config
    vision_tower = getattr(inner.vision_tower, "vision_model", inner.vision_tower)
    select = "patch" if config.vision_feature_select_strategy == "default" else "all"
    vision_tower = tower.VisionTower(vision_tower, config.vision_feature_layer, select)
    join: Any = connector.build("mlp2x_gelu", vision_tower.width, config.text_config.hidden_size)
    join[0], join[2] = inner.multi_modal_projector.linear_1, inner.multi_modal_projector.linear_2
    newline = getattr(inner, "image_newline", None)
    grids = () if newline is None else tuple(tuple(size) for size in config.image_grid_pinpoints)
    return Parts(vision_tower, join, language, config.image_token_id, newline, grids)


def to_transformers(model):
    """Ours -> transformers' LlavaForConditionalGeneration or LlavaNext... Raises UserError if it has no such parts."""
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    vision_tower, join = model.vision, model.connector
    known = hasattr(getattr(vision_tower.network, "config", None), "patch_size") and [
        type(m) for m in join.children()
    ] == [
        nn.Linear,
        nn.GELU,
        nn.Linear,
    ]
    check(
        known and vision_tower.lead < 2,
        "transformers' LLaVA has an encoder of its own kind and a connector mlp2x_gelu",
    )
    next_one = model.newline is not None
    kind = LlavaNextConfig if next_one else LlavaConfig
    config = kind(
        vision_config=vision_tower.network.config, text_config=model.language.config,
        image_token_index=model.image_id, vision_feature_layer=vision_tower.layer,
        vision_feature_select_strategy="default" if vision_tower.lead else "full",
        image_seq_length=vision_tower.count, tie_word_embeddings=model.language.config.tie_word_embeddings,
        multimodal_projector_bias=join[0].bias is not None,
    )  # fmt: skip
    if next_one and model.grids:
        config.image_grid_pinpoints = [list(size) for size in model.grids]
    theirs: Any = (
        LlavaNextForConditionalGeneration if next_one else LlavaForConditionalGeneration
    )(config)
    theirs.to(model.language.dtype)  # before anything is copied: a configuration may ask for bf16
    inner = theirs.model
    inner.vision_tower.load_state_dict(vision_tower.network.state_dict())
    inner.language_model.load_state_dict(model.language.model.state_dict())
    theirs.lm_head.load_state_dict(model.language.lm_head.state_dict())
    inner.multi_modal_projector.linear_1.load_state_dict(join[0].state_dict())
    inner.multi_modal_projector.linear_2.load_state_dict(join[2].state_dict())
    if next_one:
        inner.image_newline.data.copy_(model.newline)
    return theirs


def save(model, tokenizer, folder, join="mlp2x_gelu"):
    """Write an ordinary folder, whole or not at all: transformers' own LLaVA if it knows the parts, else ours.

    Ours: config.json, language/ (with the tokenizer), vision/ unless it is EfficientNet, connector.safetensors.
    """
    folder, vision_tower = Path(folder), model.vision
    check(not folder.exists(), f"{folder} is there already: name another")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            ready = Path(temporary) / "ready"
            try:
                theirs = to_transformers(model)
            except UserError:
                theirs = None
            if theirs is not None:
                theirs.save_pretrained(ready)
                processor(model, tokenizer).save_pretrained(ready)
            else:
                model.language.save_pretrained(ready / "language")
                tokenizer.save_pretrained(ready / "language")
                own = hasattr(vision_tower.network, "config")
                if own:
                    vision_tower.network.save_pretrained(ready / "vision")
                    image_processor(vision_tower).save_pretrained(ready / "vision")
                checkpoint.write(ready / "connector.safetensors", model.connector.state_dict())
                about = {
                    "model_type": "llava-of-parts",
                    "vision": "vision" if own else "efficientnet",
                }
                about |= {
                    "connector": join,
                    "layer": vision_tower.layer,
                    "select": vision_tower.select,
                }
                run.write_json(ready / "config.json", about)
            shutil.move(ready, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error


def image_processor(vision_tower):
    """transformers' image processor that does what `vision_tower.pixels` does."""
    from transformers import CLIPImageProcessorPil

    side = {"height": vision_tower.size, "width": vision_tower.size}
    return CLIPImageProcessorPil(
        size={"shortest_edge": vision_tower.size},
        crop_size=side,
        image_mean=list(vision_tower.mean),
        image_std=list(vision_tower.std),
    )


def processor(model, tokenizer):
    """transformers' LlavaProcessor of this model: it puts N words <image> for one, and makes pixels."""
    from transformers import LlavaProcessor

    vision_tower = model.vision
    return LlavaProcessor(
        image_processor(vision_tower), tokenizer, patch_size=vision_tower.network.config.patch_size,
        num_additional_image_tokens=vision_tower.lead,
        vision_feature_select_strategy="default" if vision_tower.lead else "full", image_token=IMAGE,
    )  # fmt: skip


def load(name, on="cpu"):
    """A file of weights, a folder that `save` wrote, or a folder or hub id of transformers' LLaVA -> tokenizer, Parts.

    Raises UserError for anything else.
    """
    path = Path(name)
    if path.suffix == ".safetensors":
        return restore(path, on)
    check(
        not path.is_file(),
        f"{path} holds no weights: name a .safetensors file, a folder or a hub id",
    )
    about = described(path) if path.is_dir() else {}
    if about.get("model_type") == "llava-of-parts":
        return of_parts(path, about, on)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    transformers_config(name)  # before the weights: they may be large
    more = {"dtype": torch.bfloat16, "output_loading_info": True}
    theirs, info = from_pretrained(AutoModelForImageTextToText, name, **more)
    lost = sorted(info["missing_keys"])
    check(
        not lost,
        f"'{name}' lacks {len(lost)} weights, {printable(lost[:1])} first: fetch or write it again",
    )
    shown: Any = from_pretrained(AutoProcessor, name)
    model = from_transformers(pretrained.frozen(theirs, on), name)
    model.vision.mean, model.vision.std = (
        shown.image_processor.image_mean,
        shown.image_processor.image_std,
    )
    return shown.tokenizer, model


def from_pretrained(what, name, **more) -> Any:
    """Whatever goes wrong in a folder that somebody else wrote, it is one line."""
    try:
        return what.from_pretrained(name, **more)
    except Exception as error:
        raise UserError(f"no LLaVA at '{name}': {first_line(error)}") from error


def transformers_config(name):
    """The configuration of a folder or hub id of transformers' LLaVA. Raises UserError for any other."""
    from transformers import AutoConfig

    config = from_pretrained(AutoConfig, name)
    check_supported(config, name)
    return config


def described(path):
    """config.json of a folder. Raises UserError: none, no JSON object, one of ours with keys missing or unknown."""
    check(
        (path / "config.json").is_file(), f"{path} is no folder of a model: it has no config.json"
    )
    try:
        about = json.loads(read_text(path / "config.json"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no folder of a model: {first_line(error)}") from None
    check(isinstance(about, dict), f"{path} is no folder of a model: its config.json is no object")
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


def of_parts(path, about, on="cpu"):
    """A folder of ours, in which every part is a folder of its own -> tokenizer, Parts."""
    tokenizer, language = speaker(path / "language", on)
    vision_tower = about["vision"] if about["vision"] == "efficientnet" else str(path / "vision")
    model = build(
        vision_tower,
        about["connector"],
        language,
        tokenizer,
        about["layer"],
        about["select"],
        on=on,
    )
    try:
        model.connector.load_state_dict(checkpoint.read(path / "connector.safetensors")[0])
    except RuntimeError as error:
        raise UserError(
            f"{path}/connector.safetensors is not a {about['connector']}: {first_line(error)}"
        ) from None
    return tokenizer, model
