"""Cost of a training step of a vision-language model before it is trained: FLOPs and memory, for each way to train it.

FLOPs by formula (vlm/flops.py), memory by running the real step on fake tensors (vlm/step_memory.py). Only
configurations are read, no weights. Names of training/presets.py need no network. With `--tflops`, the peak of a
device, also the seconds that a step takes at least; with `--seconds` of a measured step its MFU.

    python vlm/step_cost.py --vision clip-vit-large-patch14-336 --language llama2-7b --connector mlp2x_gelu
    python vlm/step_cost.py --vision clip-vit-large-patch14-336 --language llama2-7b --connector mlp2x_gelu \\
        --tiles 4 --picture 672 672 --only use_lora --checkpointing
"""

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from training.flops import mfu
from utils import run
from utils.run import check
from vlm.config import ModelFlags, VLMConfig, configuration
from vlm.config_file import with_file
from vlm.step_ways import WAYS, check_ways, memory_table


@dataclass(frozen=True)
class Config:
    """Predict FLOPs and memory of one training step."""

    model: Annotated[ModelFlags, tyro.conf.arg(name="")] = ModelFlags()
    only: tuple[str, ...] = ()  # of projector, use_lora, qlora, freeze_vision, none; empty: all
    batch: int = 1  # conversations a device and step
    images: int = 1  # pictures of a conversation
    picture: tuple[int, int] = (672, 672)  # height and width of each, with --tiles
    text_tokens: int = 128  # of a conversation, beside its image tokens
    checkpointing: bool = False  # keep the inputs of layers only
    cached: bool = False  # features of the encoder come from a file
    lora_rank: int = 8
    zero: int = 0  # stage of ZeRO; 3 is what FSDP does
    world_size: int = 1  # devices that share by ZeRO
    tflops: float = 0.0  # peak of a device, 1e12 FLOPs a second; 0: unknown
    seconds: float = 0.0  # of a measured step, for its MFU; 0: not measured
    out: str = "outputs/step_cost"


def row(cfg: Config, model: VLMConfig, name: str) -> dict[str, Any]:
    """FLOPs and bytes of one way to train. model: with the configurations of its parts."""
    from vlm import flops, step_memory
    from vlm.step_model import Step

    train_type, quantize = WAYS[name]
    shape = {"batch": cfg.batch, "text_tokens": cfg.text_tokens, "images": cfg.images}
    shape |= {"checkpointing": cfg.checkpointing, "cached": cfg.cached, "lora_rank": cfg.lora_rank}
    shape["picture"] = cfg.picture
    # FLOPs, by part
    parts = flops.step(model, train_type, **shape)
    found: dict[str, Any] = {}
    for part, counted in parts.items():
        found[f"{part}, forward"] = counted.forward
        found[f"{part}, backward"] = counted.backward + counted.recomputed
    found["flops"] = flops.total(parts)
    found["model_flops"] = sum(part.forward + part.backward for part in parts.values())
    # Bytes
    step = Step(train_type, quantize, zero=cfg.zero, world_size=cfg.world_size, **shape)
    return found | step_memory.predict(model, step)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """TFLOPs by part, then GB by kind, a line for each way."""
    # FLOPs of each part, forward and backward
    parts = ("vision", "connector", "language")
    names = [f"{part}, {way}" for part in parts for way in ("forward", "backward")]
    lines = [f"{'TFLOPs':>14}" + "".join(f"{name:>21}" for name in names) + f"{'step':>10}"]
    for way, found in rows.items():
        cells = "".join(f"{found[name] / 1e12:21.4f}" for name in names)
        lines.append(f"{way:>14}{cells}{found['flops'] / 1e12:10.3f}")
    return "\n".join([*lines, "", memory_table(rows)])


def main(cfg: Config) -> dict:
    """Predict, print."""
    from vlm.build import configurations

    check_ways(cfg.only)
    check(min(cfg.tflops, cfg.seconds) >= 0, "--tflops and --seconds must be 0 or more")
    check(not cfg.seconds or cfg.tflops, "MFU needs the peak of the device: --tflops")
    check(min(cfg.picture) > 0, "--picture: height and width, above 0")
    # Configurations only, then each way to train
    model = configurations(configuration(cfg.model))
    rows = {name: row(cfg, model, name) for name in cfg.only or WAYS}
    folder = run.output(cfg.out, cfg)
    print(f"{table(rows)}\n")
    found = {}
    for name, one in rows.items():
        found[f"{name}, TFLOPs"] = one["flops"] / 1e12
        found[f"{name}, peak GB"] = one["peak"] / 1e9
        # Against a device: the time that its peak would need, and what a measured step reached
        if cfg.tflops:
            found[f"{name}, seconds at least"] = one["flops"] / (1e12 * cfg.tflops)
        if cfg.seconds:
            found[f"{name}, MFU"] = mfu(one["model_flops"], cfg.seconds, 1e12 * cfg.tflops)
    run.write_json(folder / "rows.json", rows)
    return run.report(folder, found)


if __name__ == "__main__":
    run.cli(main, Config, expand=with_file)
