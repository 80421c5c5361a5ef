"""The base model of a run's LoRA, as a folder that PEFT can load: which one, and the command that writes it.

PEFT names it as `base_model_name_or_path`. A run that began with a folder or hub id has it; one of parts by their
names, or of a file of weights, gets it by one command.
"""

import json
import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from utils.text import read_text
from vlm import llava_transformers
from vlm.checkpoints import absolute
from vlm.config_file import arguments
from vlm.flags import ModelFlags

# The class of each kind of base model, for PEFT's AutoPeftModel
CLASSES = {
    "llava": ("LlavaForConditionalGeneration", "transformers.models.llava.modeling_llava"),
    "vlm_action": ("VLM", "vlm.modeling"),
}


def build_command(model: ModelFlags, seed: int, out: str) -> str:
    """The line that puts the parts of a run together, with what differs from the defaults."""
    usual = ModelFlags()
    given: dict[str, Any] = {}
    for field in fields(model):
        value = getattr(model, field.name)
        if value != getattr(usual, field.name):
            given[field.name] = list(value) if isinstance(value, tuple) else value
    for name in ("vision_name_or_path", "text_name_or_path"):
        if name in given:
            given[name] = absolute(given[name])
    if "perceiver" in given:
        default = asdict(usual.perceiver)
        options = asdict(given["perceiver"])
        given["perceiver"] = {k: x for k, x in options.items() if x != default[k]}
    if seed:
        given["seed"] = seed
    return shlex.join(["python", "vlm/build.py", *arguments(given), "--out", out])


def base_of(cfg, model) -> tuple[str, str, str]:
    """The base model of a run -> (folder or hub id, its model_type, the command that writes it or "").

    Parts by their names and files of weights are no folder that PEFT could read: one beside the results is named, with
    the command that writes it.
    """
    kind = "llava" if llava_transformers.has_llava_parts(model) else "vlm_action"
    out = str((Path(cfg.out) / "base").resolve())
    source = cfg.train.ckpt_path
    # parts by their names
    if not source:
        return f"{out}/model", "vlm_action", build_command(cfg.model, cfg.train.seed, out)
    # a folder or hub id that from_pretrained takes
    config = Path(source) / "config.json"
    model_type = json.loads(read_text(config)).get("model_type") if config.is_file() else ""
    if model_type in CLASSES:
        return absolute(source), model_type, ""
    if not Path(source).exists():
        return source, "llava", ""
    # a file of weights, a folder of parts, another adapter: llava.py writes its model as a folder
    words = ["python", "vlm/llava.py", "--model", absolute(source), "--save", f"{out}/model"]
    return f"{out}/model", kind, shlex.join(words)
