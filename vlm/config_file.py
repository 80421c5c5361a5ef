"""Configuration from a file: `--config run.yaml` (or .json) becomes arguments before those of the command line.

So flags win: of two values the last one counts. A key that there is not is refused by its name, as an unknown flag is;
so is a value of the wrong type, whether a flag wins over it or not.
Sections whose flags have no prefix (`model`, `train`, `data`) may be named in the file all the same:

    model: {connector: perceiver, perceiver: {depth: 3}}     # --connector perceiver --perceiver.depth 3
    lora: {r: 16}                                            # --lora.r 16
"""

import io
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import tyro

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


def arguments(values: dict) -> list[str]:
    """Nested values as command-line arguments: {"perceiver": {"depth": 3}} -> --perceiver.depth 3. Raises UserError."""
    return [word for _, words in by_key(values) for word in words]


def by_key(values: dict, prefix: str = "--") -> Iterator[tuple[str, list[str]]]:
    """Nested values -> for each its key and its arguments: ("perceiver.depth", ["--perceiver.depth", "3"]).

    True and False become --flag and --no-flag, a list becomes several words, null is left out. Raises UserError for a
    key that is no word, or a list of lists.
    """
    for key, value in values.items():
        plain = isinstance(key, str) and key.replace("-", "_").isidentifier()
        check(plain, f"a key of the file is no name of a flag: {printable(key)}")
        flag = f"{prefix}{key}"
        if isinstance(value, dict):
            # a section: its keys, with its name before them unless its flags have no prefix
            plain_section = prefix == "--" and key in PLAIN
            yield from by_key(value, prefix if plain_section else f"{flag}.")
            continue
        if value is None:
            continue
        # a flag and its words
        words = [flag, str(value)]
        if isinstance(value, bool):
            words = [flag if value else f"{prefix}no-{key}"]
        elif isinstance(value, list):
            flat = not any(isinstance(x, (list, dict)) for x in value)
            check(flat, f"{key}: a list of words or numbers is expected")
            words = [flag, *(str(x) for x in value)]
        yield flag.removeprefix("--"), words


def refusal(config: type, words: list[str]) -> str:
    """What tyro says against these arguments, as one line; "" if they are values of their flags."""
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            tyro.cli(config, args=words)
    except SystemExit:
        # a title, a ruler, the reason in lines of 80 characters, a ruler, where there is help
        reason, _, _ = said.getvalue().partition("For full helptext")
        lines = [line.strip(" \u2502") for line in reason.splitlines()[1:]]
        return " ".join(line for line in lines if line.strip("-\u2500\u256d\u256e\u2570\u256f"))
    return ""


def check_values(config: type, values: dict, path: str) -> None:
    """Every value of a file against the type of its flag. Raises UserError, one line with the key of the first bad one.

    A key that there is not is left to the command line, whose message names flags like it.
    """
    # all at once, which is quick; one by one only to find the bad one
    if not refusal(config, arguments(values)):
        return
    for key, words in by_key(values):
        reason = refusal(config, words)
        if not reason or (reason.startswith("Unrecognized") and words[0] in reason):
            continue
        if reason.startswith("Unrecognized"):
            reason = f"true or false is expected, not {' '.join(words[1:])}"
        raise UserError(f"{printable(path)}: {key}: {printable(reason)}")


def with_file(args: list[str], config: type | None = None) -> list[str]:
    """Command-line arguments with those of `--config FILE` before them, so that flags win: the last one counts.

    config: of the flags; with it the values of the file are checked first. Raises UserError for a value of the wrong
    type, and for `--config` without a file, or twice.
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
    # values are checked before any flag hides them
    values = read_file(path)
    if config is not None:
        check_values(config, values, path)
    return [*arguments(values), *rest]
