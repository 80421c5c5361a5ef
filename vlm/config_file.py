"""Configuration from a file: `--config run.yaml` (or .json) becomes arguments before those of the command line.

So flags win: of two values the last one counts. A key that there is not is refused by its name, as an unknown flag is.
Sections whose flags have no prefix (`model`, `train`, `data`) may be named in the file all the same:

    model: {connector: perceiver, perceiver: {depth: 3}}     # --connector perceiver --perceiver.depth 3
    lora: {r: 16}                                            # --lora.r 16
"""

from collections.abc import Iterator
from pathlib import Path

from utils.run import UserError, check
from utils.text import printable, read_text

# Sections of vlm/train_config.py and build.py whose flags have no prefix
PLAIN = ("model", "train", "data")


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

    True and False become --flag and --no-flag, a list becomes several words, null is left out. Raises UserError for a
    key that is no word, or a list of lists.
    """
    for key, value in values.items():
        plain = isinstance(key, str) and key.replace("-", "_").isidentifier()
        check(plain, f"a key of the file is no name of a flag: {printable(key)}")
        flag = f"{prefix}{key}"
        if isinstance(value, dict):
            plain_section = prefix == "--" and key in PLAIN
            yield from arguments(value, prefix if plain_section else f"{flag}.")
        elif value is None:
            continue
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
