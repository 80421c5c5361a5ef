"""Configuration of a vision-language model, its training and its engines: nested dataclasses, flags, a file.

tyro makes flags of the dataclasses (`--model.connector mlp2x_gelu --optim.lr 1e-3`), and `--config run.yaml` (or .json)
fills them from a file. What the file says stands before the flags of the command line, so that flags win; a key that
there is not is refused by name. `VLMConfig` is also the configuration of a model of transformers (vlm/modeling.py).

    connector: mlp2x_gelu          # the same as --model.connector mlp2x_gelu if it stands below `model:`
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from tyro.conf import arg

from utils.run import UserError, check
from utils.text import printable, read_text


@dataclass(frozen=True)
class PerceiverConfig:
    """Perceiver resampler, the connector "perceiver". Alayrac et al. 2022, arXiv:2204.14198, Sec. 2.1."""

    depth: int = 2  # layers
    n_latents: int = 16  # learned queries: so many image tokens come out
    n_heads: int = 8  # of the queries
    n_query_groups: int = 8  # heads of keys and values; fewer: grouped-query attention
    head_dim: int = 32  # of each head
    concat_latents_kv: bool = True  # the latents are among keys and values, too

    def options(self) -> dict[str, Any]:
        """As `vlm.connector.PerceiverResampler` names them."""
        return {
            "depth": self.depth,
            "latents": self.n_latents,
            "heads": self.n_heads,
            "kv_heads": self.n_query_groups,
            "head_dim": self.head_dim,
            "concat_latents_kv": self.concat_latents_kv,
        }


@strict
class VLMConfig(PreTrainedConfig):
    """Vision encoder, connector, language model: what a vision-language model is put together from.

    Where the names lead to is read once, by `vlm.build.build`; then `vision_config` and `text_config` say what the
    parts are, and a folder that was saved needs no other. Raises an error of transformers for a value of a wrong type.
    """

    model_type = "vlm_action"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(AutoConfig, "clip_vision_model", optional=True),
        "text_config": SubConfigSpec(AutoConfig, "llama", optional=True),
    }

    vision_name_or_path: str = "efficientnet"
    text_name_or_path: str = "smollm2"
    connector: str = "pool3"
    perceiver: dict | None = None  # fields of PerceiverConfig
    vision_layer: int = -2
    select: Literal["patch", "all"] = "patch"
    img_size: int = 0
    attn_implementation: str | None = None
    image_token_id: int = -1  # of <image>, once the vocabulary has it
    vision_config: dict | PreTrainedConfig | None = None  # none: EfficientNet-lite0
    text_config: dict | PreTrainedConfig | None = None


def model_flags(
    vision_name_or_path: Annotated[str, arg(aliases=["--vision"])] = "efficientnet",
    text_name_or_path: Annotated[str, arg(aliases=["--language"])] = "smollm2",
    connector: str = "pool3",
    perceiver: PerceiverConfig = PerceiverConfig(),  # noqa: B008  (frozen)
    vision_layer: int = -2,
    select: Literal["patch", "all"] = "patch",
    img_size: int = 0,
    attn_implementation: str | None = None,
) -> VLMConfig:
    """The flags of a model -> its configuration.

    Args:
        vision_name_or_path: vision encoder: efficientnet, or a folder or hub id
        text_name_or_path: language model: smollm2, or a folder or hub id
        connector: see vlm/connector.py
        perceiver: if the connector is "perceiver"
        vision_layer: of the encoder's hidden states
        select: patches only, or the class token and others, too
        img_size: side of the pictures; 0: that of the encoder
        attn_implementation: eager, sdpa, flash_attention_2; None: what transformers chooses
    """
    given = dict(locals())
    given["perceiver"] = asdict(perceiver) if connector == "perceiver" else None
    return VLMConfig(**given)


def read_file(path: str | Path) -> dict:
    """A YAML or JSON file of nested values. Raises UserError: missing, not UTF-8, no mapping, damaged."""
    import yaml

    text = read_text(path)
    try:
        values = yaml.safe_load(text)  # JSON is YAML
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        line = printable(str(error)).partition(", in ")[0]
        raise UserError(f"{printable(path)} is no YAML or JSON: {line}") from None
    values = {} if values is None else values
    check(isinstance(values, dict), f"{printable(path)} must hold a mapping, flag: value")
    return values


def arguments(values: dict, prefix: str = "--") -> Iterator[str]:
    """Nested values as command-line arguments: {"perceiver": {"depth": 3}} -> --perceiver.depth 3.

    True and False become --flag and --no-flag, a list becomes several words. Raises UserError for a key that is no
    word, or a list of lists.
    """
    for key, value in values.items():
        plain = isinstance(key, str) and key.replace("-", "_").isidentifier()
        check(plain, f"a key of the file is no name of a flag: {printable(key)}")
        flag = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from arguments(value, f"{flag}.")
        elif isinstance(value, bool):
            yield flag if value else f"{prefix}no-{key}"
        elif isinstance(value, list):
            flat = not any(isinstance(x, (list, dict)) for x in value)
            check(flat, f"{key}: a list of words or numbers is expected")
            yield flag
            yield from (str(x) for x in value)
        else:
            yield flag
            yield str(value)


def with_file(args: list[str]) -> list[str]:
    """Command-line arguments with those of `--config FILE` before them, so that flags win: the last one counts.

    Raises UserError for `--config` without a file, or twice.
    """
    at = [i for i, word in enumerate(args) if word == "--config" or word.startswith("--config=")]
    if not at:
        return args
    check(len(at) == 1, "--config: one file only")
    place = at[0]
    name, equals, path = args[place].partition("=")
    rest = args[:place] + args[place + 1 :]
    if not equals:
        check(place < len(args) - 1, "--config: name a YAML or JSON file")
        path = rest.pop(place)
    return [*arguments(read_file(path)), *rest]
