"""Parts of a LLaVA: vision tower, connector, language model, and the weights that vlm/train.py wrote.

LoRA (Hu et al. 2021, arXiv:2106.09685) is merged into the language model.
"""

from typing import Any, NamedTuple

import torch

from utils import checkpoint, pretrained, run
from utils.run import UserError, check
from utils.text import printable
from vlm import connector, tower
from vlm.prompts import IMAGE, add_words


class Parts(NamedTuple):
    """What a LLaVA is put together from (llava.py)."""

    vision: Any
    connector: Any
    language: Any
    image_id: int  # of <image> in the vocabulary
    newline: Any = None  # LLaVA-1.6: the vector that ends a row of tiles
    grids: tuple = ()  # LLaVA-1.6: the sizes that a picture is tiled to


def build(vision, join, language, tokenizer, layer=-2, select="patch", words=(IMAGE,), on="cpu"):
    """Names of a tower and a connector, and a language model -> Parts; the words are added to its
    vocabulary."""
    vision_tower = tower.load(vision, layer, select, on=on) if isinstance(vision, str) else vision
    # the connector, from the width of the tower to that of the language model
    width = language.config.get_text_config().hidden_size
    image_id = add_words(tokenizer, language, words)
    made = connector.build(join, vision_tower.width, width).to(on)
    return Parts(vision_tower, made, language, image_id)


def language_model(name, on="cpu"):
    """-> tokenizer, language model: smollm2, or a folder or hub id."""
    return pretrained.smollm2(on) if name == "smollm2" else pretrained.language_model(name, on)


@torch.no_grad()
def merge_lora(language, tensors, scale):
    """Merge LoRA into the matrices that it was trained beside, in place: W + scale B A."""
    for name in [k.removesuffix(".A") for k in tensors if k.endswith(".A")]:
        try:
            weight = language.get_parameter(f"{name}.weight")
            update = scale * tensors[f"{name}.B"].float() @ tensors[f"{name}.A"].float()
            weight.add_(update.to(weight))
        except (AttributeError, KeyError, RuntimeError):
            raise UserError(
                f"the corrections are for another language model: {name} does not fit"
            ) from None


def restore(path, on="cpu"):
    """A file that vlm/train.py wrote: trained weights, and the names of frozen parts -> tokenizer,
    Parts."""
    tensors, meta = checkpoint.read(path)
    try:
        # the parts by their names
        tokenizer, language = language_model(meta["language"], on)
        run.seed(0)
        names = (meta["vision"], meta["connector"])
        layer = (meta["layer"], meta["select"])
        model = build(*names, language, tokenizer, *layer, on=on)

        def part(name):
            return {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}

        # trained weights: the connector, LoRA
        model.connector.load_state_dict({k: v.float() for k, v in part("connector.").items()})
        merge_lora(language, {k: v.to(on) for k, v in part("lora.").items()}, meta["scale"])
        # parts that were trained whole; a frozen one is not in the file
        for name, parts in (("vision.", model.vision), ("language.", language)):
            if part(name):
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
