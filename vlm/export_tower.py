"""Export of a vision tower to ONNX: equal features, static int8, the same answers; of U-Nets, too.

The tower of a LLaVA is a function of pixels alone, without a cache: torch.export follows it once, for any
number of pictures, and onnxruntime runs the file. Convolutions are quantised statically (Jacob et al.
2017, arXiv:1712.05877): ranges are measured on training photos, and each output channel of a weight has a
scale of its own, for those of depthwise convolutions differ much. The language model then looks at
held-out photos through each file. What exports decode steps is in deploy/export.py.

Shapes: pixels (B,3,S,S) -> features (B,N,D).

    python vlm/export_tower.py                     # EfficientNet-lite0 of the LLaVA of this book
    python vlm/export_tower.py --compile           # torch.compile, too: minutes
    python vlm/export_tower.py --what digits       # the U-Net of models/ddpm.py, sampled with onnxruntime
    python vlm/export_tower.py --what emoji        # that of models/stable_diffuser.py
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from deploy import export_compile, export_int8, export_onnx
from deploy.export_times import measure
from utils import data, run
from utils.run import check
from vlm import answer_metrics, export_unet, fruit_photos, generation, llava
from vlm.fruit_photos import QUESTION


@dataclass(frozen=True)
class Config:
    """Export a vision tower or a U-Net to ONNX, and compare with eager PyTorch."""

    what: Literal["tower", "digits", "emoji"] = "tower"  # of a LLaVA; of ddpm; of stable_diffuser
    model: str = str(llava.WEIGHTS)  # the LLaVA: weights of vlm/train.py, a folder, or a hub id
    judged: int = 24  # held-out photos that the LLaVA is asked about, through each tower
    calibration: int = 32  # training photos on which the ranges of static int8 are measured
    samples: int = 8  # pictures that a U-Net draws
    sampling_steps: int = 50  # DDIM steps of each
    batches: tuple[int, ...] = (1, 4)  # pictures a pass that is timed
    rounds: int = 12  # each way once a round, the quickest counts
    compile: bool = False  # time torch.compile, too
    seed: int = 0
    out: str = "outputs/export_tower"


class OnnxTower(nn.Module):
    """The same tower out of a file: pixels (B,3,S,S) -> features (B,N,D), float32. Pictures become pixels in torch."""

    def __init__(self, path, vision_tower, threads=1):
        super().__init__()
        self.path = path
        self.module = export_onnx.OnnxModule(path, threads)
        self.size = vision_tower.size
        self.count = vision_tower.count
        self.pixels = vision_tower.pixels

    def forward(self, pixels):
        return self.module(pixels.float())


def write_formats(vision_tower, folder, calibration):
    """Export the tower, quantise it in three ways -> {format: path}. calibration: pixels (n,3,S,S)."""
    source = folder / "tower.onnx"
    pixels = torch.randn(2, 3, vision_tower.size, vision_tower.size)
    export_onnx.write_batched(vision_tower, (pixels,), source, ["pixels"], ["features"])
    paths = {"onnx, fp32": source}
    for name in ("dynamic int8", "static int8 per tensor", "static int8 per channel"):
        paths[name] = folder / f"{name.replace(' ', '_')}.onnx"
    export_int8.write_dynamic(source, paths["dynamic int8"])
    batches = [{"pixels": part} for part in calibration.split(4)]
    for kind in ("tensor", "channel"):
        target = paths[f"static int8 per {kind}"]
        export_int8.write_static(source, target, batches, per_channel=kind == "channel")
    return paths


def trace(vision_tower, pixels):
    """torch.jit.trace of a tower, then freeze: weights become constants, and batch norms part of convolutions."""
    with export_onnx.quiet(), torch.no_grad():
        traced: Any = torch.jit.trace(vision_tower, pixels, check_trace=False)
        return torch.jit.freeze(traced.eval())


@contextmanager
def looking_through(model, vision_tower):
    """A LLaVA with another tower, for a while."""
    own = model.vision
    model.vision = vision_tower
    try:
        yield model
    finally:
        model.vision = own


def answers(tokenizer, model, vision_tower, photos, prompt=QUESTION):
    """Generated answers about photos, uint8 (n,3,S,S), seen through this tower -> texts."""
    with looking_through(model, vision_tower):
        return [generation.answer(tokenizer, model, photo, prompt) for photo in photos]


def similarity(features, eager):
    """Features (n,N,D) against those of eager -> largest difference, mean and least cosine of a token."""
    cosine = F.cosine_similarity(features, eager, dim=-1)
    return {
        "largest difference": float((features - eager).abs().max()),
        "cosine": float(cosine.mean()),
        "least cosine": float(cosine.min()),
    }


@torch.no_grad()
def encode(vision_tower, pixels, batch=4):
    """Features of pixels (n,3,S,S), float32 (n,N,D)."""
    return torch.cat([vision_tower(part) for part in pixels.split(batch)]).float()


@torch.no_grad()
def times(ways, size, batches, rounds):
    """{way: {"ms a picture, batch 1": least CPU ms, ...}}, and of eager."""
    rows = {name: {} for name in ways}
    for batch in batches:
        pixels = torch.randn(batch, 3, size, size)
        found = measure({name: partial(way, pixels) for name, way in ways.items()}, rounds)
        for name, row in found.items():
            rows[name][f"ms a picture, batch {batch}"] = row["ms"] / batch
            rows[name][f"of eager, batch {batch}"] = row["ms"] / found["eager"]["ms"]
    return rows


def right(said, names):
    """Answers that are the name, word for word."""
    same = [answer_metrics.normalise(a) == answer_metrics.normalise(b) for a, b in zip(said, names)]
    return sum(same)


def run_tower(cfg, folder):
    """Export the tower of a LLaVA, quantise, compare, ask -> metrics; writes the files and answers.png."""
    tokenizer, model = llava.load(cfg.model, "cpu")
    vision_tower = model.vision.float()
    # photos to calibrate on, others to ask about
    fruit = data.groceries(vision_tower.size)
    learn, chosen = fruit_photos.split(fruit, cfg.judged, cfg.seed)
    some = learn[torch.randperm(len(learn))[: cfg.calibration]]
    paths = write_formats(vision_tower, folder, vision_tower.pixels(fruit.images[some]))
    towers = {"eager": vision_tower}
    for name, path in paths.items():
        towers[name] = OnnxTower(path, vision_tower)
    # time of all ways, those without a file, too
    example = torch.randn(cfg.batches[0], 3, vision_tower.size, vision_tower.size)
    ways = towers | {"jit.trace, frozen": trace(vision_tower, example)}
    if cfg.compile:
        compiled, seconds = export_compile.compile_module(vision_tower, (example,))
        ways["torch.compile"] = compiled
    rows = times(ways, vision_tower.size, cfg.batches, cfg.rounds)
    # features and answers, against those of eager
    photos = fruit.images[chosen]
    names = [fruit_photos.name_of(fruit, i) for i in chosen]
    pixels = vision_tower.pixels(photos)
    wanted = encode(vision_tower, pixels)
    said = {name: answers(tokenizer, model, tower, photos) for name, tower in towers.items()}
    for name, way in ways.items():
        rows[name] |= similarity(encode(way, pixels), wanted)
        if name in towers:
            same = sum(a == b for a, b in zip(said[name], said["eager"]))
            rows[name] |= {"answers as eager": same, "right": right(said[name], names)}
    for name, path in paths.items():
        rows[name]["MB"] = path.stat().st_size / 1e6
    best = said["static int8 per channel"]
    shown = fruit_photos.spread(torch.arange(len(chosen)))
    texts = [best[i] for i in shown]
    truths = [names[i] for i in shown]
    fruit_photos.draw(folder / "answers.png", photos[shown], texts, truths, QUESTION)
    rows["photos"] = len(chosen)
    if cfg.compile:
        rows["CPU seconds to compile"] = seconds
    return rows


def main(cfg: Config) -> dict:
    """Export, compare with eager, draw; writes .onnx files, a figure and the numbers."""
    numbers = (cfg.judged, cfg.calibration, cfg.samples, cfg.rounds)
    check(
        min(numbers) > 0,
        "--judged, --calibration, --samples, --rounds: at least 1",
    )
    check(cfg.batches and min(cfg.batches) > 0, "--batches: one or more numbers from 1 on")
    check(1 <= cfg.sampling_steps <= 1000, "--sampling-steps: 1 to 1000")
    run.seed(cfg.seed)
    torch.set_num_threads(1)  # CPU time of several threads is no latency
    folder = run.output(cfg.out, cfg)
    if cfg.what == "tower":
        metrics = run_tower(cfg, folder)
        return run.report(folder, metrics, "python vlm/export_tower.py --what digits")
    metrics = export_unet.run_unet(cfg.what, cfg, folder)
    return run.report(folder, metrics, f"open {folder}/{cfg.what}.png")


if __name__ == "__main__":
    run.cli(main, Config)
