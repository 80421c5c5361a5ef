"""DeepSpeed's configuration, read strictly: a wrong key in the JSON file is an error.

DeepSpeed passes over unknown keys in silence: with `gradient_acumulation_steps` a run goes on, with
another batch size. What it knows, no list says; but it can be watched while it reads.
"""

import difflib
import json
import logging
import warnings
from pathlib import Path

from utils.run import UserError, check
from utils.text import read_text

CONFIGS = Path(__file__).parent / "configs"
# The script sees to these; a file that sets them, too, is refused.
OURS = {"fp16", "optimizer", "scheduler", "train_batch_size", "tensorboard"}


def quiet():
    """Import DeepSpeed without its news, and so that nothing is compiled -> the module.

    Raises UserError without it.
    """
    logging.disable(logging.WARNING)
    # Of old names that libraries use among themselves
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        import deepspeed
    except ImportError:
        raise UserError("DeepSpeed is missing: pip install deepspeed") from None
    # else the first start on a CPU compiles for a minute what gloo does, too
    deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
    deepspeed.utils.logger.setLevel(logging.ERROR)
    logging.disable(logging.NOTSET)
    return deepspeed


def read(cfg):
    """-> DeepSpeed's configuration, with "auto" replaced by what the flags say.

    It is read from the file of the stage, or from --config. Raises UserError, which names file and
    key: no JSON, a key that DeepSpeed does not know or that the script sets itself, a value that it
    does not take or that contradicts a flag.
    """
    deepspeed = quiet()
    # The file of the stage, with or without offloading, or one of the user's.
    offload = "" if cfg.offload == "none" else "_offload"
    path = Path(cfg.config or CONFIGS / f"zero{cfg.zero_stage}{offload}.json")
    check(cfg.config or path.is_file(), f"--offload {cfg.offload} goes with --zero-stage 2 or 3")
    check(
        cfg.config or cfg.offload != "parameters" or cfg.zero_stage == 3,
        "--offload parameters: --zero-stage 3",
    )
    try:
        config = json.loads(read_text(path))
        check(isinstance(config, dict), f"{path} holds no JSON object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON file: {error}") from None
    # What no file may say, and what flags say: they must agree.
    for key in sorted(OURS & config.keys()):
        raise UserError(f"{path}: leave out '{key}', the script sees to it")
    fill(config, path, "train_micro_batch_size_per_gpu", cfg.batch)
    fill(config, path, "gradient_accumulation_steps", cfg.accumulation)
    zero = config.setdefault("zero_optimization", {})
    for part in ("bf16", "zero_optimization"):
        check(
            isinstance(config.setdefault(part, {}), dict),
            f"{path}: {part} is {{...}}, not {config[part]!r}",
        )
    fill(config["bf16"], path, "enabled", cfg.precision == "bf16")
    # Offloading: the optimizer's states go with the parameters, not the other way round.
    offloads = [
        ("offload_optimizer", ("optimizer", "parameters")),
        ("offload_param", ("parameters",)),
    ]
    for part, when in offloads:
        if isinstance(zero.get(part), dict):
            fill(zero[part], path, "device", "cpu" if cfg.offload in when else "none")
    check_keys(deepspeed, config, path)
    return config


def fill(part, path, key, value):
    """Put the value of a flag where the file says "auto" or nothing."""
    there = part.get(key, "auto")
    check(
        there in ("auto", value),
        f'{path}: {key} is {there}, by the flags {value}; make them agree or write "auto"',
    )
    part[key] = value


def check_keys(deepspeed, config, path):
    """Let DeepSpeed read the configuration.

    Raises UserError where it fails, or did not look at a key.
    """
    from pydantic import ValidationError

    # Fields of the parts that DeepSpeed checks itself, in pydantic models.
    models = subclasses(deepspeed.runtime.config_utils.DeepSpeedConfigModel)
    fields = {field.alias or name for model in models for name, field in model.model_fields.items()}
    # DeepSpeed reads a dictionary that remembers what it was asked for.
    watched = RecordingDict(config)
    try:
        deepspeed.DeepSpeedConfig(watched)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][-1] if first["loc"] else "zero_optimization")
        if first["type"] == "extra_forbidden":
            raise unknown_key(path, key, fields) from None
        raise UserError(f"{path}: {key}: {first['msg']}") from None
    except (
        AssertionError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        deepspeed.DeepSpeedConfigError,
    ) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    # What it did not ask for it does not know: at the top, then in each part.
    for key in config.keys() - watched.asked:
        raise unknown_key(path, key, watched.asked)
    for part in (watched[key] for key in config):
        for key in part.keys() - part.asked - fields if isinstance(part, RecordingDict) else ():
            raise unknown_key(path, key, part.asked)


def unknown_key(path, key, known):
    """The error for a key that DeepSpeed never asked for, with the nearest that it knows."""
    near = difflib.get_close_matches(key, known, 1)
    hint = f", perhaps you mean '{near[0]}'" if near else ""
    return UserError(f"{path}: DeepSpeed knows no '{key}'{hint}")


def subclasses(kind):
    """A class and all that were made from it."""
    return {kind}.union(*(subclasses(x) for x in kind.__subclasses__()))


class RecordingDict(dict):
    """A dict that remembers for which keys it was asked: these DeepSpeed knows."""

    def __init__(self, content):
        super().__init__(
            {k: RecordingDict(v) if isinstance(v, dict) else v for k, v in content.items()}
        )
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)
