"""U-Nets of models/ as ONNX files: one denoising step is exported, the sampler stays in Python.

A sampler asks its network for the noise once a step and does all else in a few lines: exchange the
network, and `ddim.sample` and `stable_diffuser.sample` draw with onnxruntime. So the file holds no loop.

Shapes: B pictures (B,C,H,W) or latents, time steps (B,), L words of text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from deploy import export_onnx
from deploy.export_times import measure
from models import autoencoder, ddim, ddpm, stable_diffuser
from utils import figures

# what the latent U-Net is asked for: the first column of the figure, the second ...
PROMPTS = (
    "red apple",
    "blue heart",
    "green heart",
    "yellow face",
    "red book",
    "tree",
    "sun",
    "cat",
)


@dataclass
class Denoiser:
    """A U-Net, examples of its inputs, and the sampler that calls it."""

    model: nn.Module
    inputs: tuple[str, ...]  # names
    args: Callable  # a number of pictures -> inputs
    draw: Callable  # a network -> pictures (N,C,H,W) in [-1,1]


def digits(count, steps, weights=ddpm.WEIGHTS):
    """The U-Net of ddpm.py, which draws digits of 28 x 28 pixels by DDIM in so many steps."""
    model, schedule, predict = ddpm.load(weights)
    noise = torch.randn(count, 1, 28, 28)

    def args(batch):
        return torch.randn(batch, 1, 28, 28), torch.randint(schedule.steps, (batch,))

    def draw(network):
        return ddim.last(ddim.sample(network, schedule, noise, steps, predict))

    return Denoiser(model, ("xt", "t"), args, draw)


@torch.no_grad()
def emoji(count, steps, guidance_scale=3.0):
    """The U-Net of stable_diffuser.py, which draws prompts as latents with classifier-free guidance."""
    model = stable_diffuser.load(stable_diffuser.WEIGHTS)
    coder, scale = autoencoder.load(autoencoder.WEIGHTS)
    text = stable_diffuser.TextEncoder("cpu")
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    words, mask = text(prompts)
    empty, empty_mask = text([""])
    schedule = ddpm.Schedule(kind="cosine")
    shape = stable_diffuser.latent_shape(coder, model.channels, "cpu")
    noise = torch.randn(count, *shape)

    def args(batch):
        # one caption for all: its words and their mask
        t = torch.randint(schedule.steps, (batch,))
        captions = words[:1].expand(batch, -1, -1)
        return torch.randn(batch, *shape), t, captions.clone(), mask[:1].expand(batch, -1).clone()

    @torch.no_grad()
    def draw(network):
        conditions = (words, mask, empty, empty_mask)
        chain = stable_diffuser.sample(network, schedule, noise, *conditions, guidance_scale, steps)
        # float32 all the way: bf16 of the decoder would hide how near the two are
        return coder.decode(ddim.last(chain) / scale).clamp(-1, 1)

    return Denoiser(model, ("xt", "t", "words", "mask"), args, draw)


@torch.no_grad()
def compare(denoiser, path, batches, rounds):
    """Export, sample with both -> rows {"batch 1": {...}}, {"eager": pictures, "onnxruntime": pictures}."""
    args = denoiser.args(3)
    export_onnx.write_batched(denoiser.model, args, path, denoiser.inputs, ["output"])
    network = export_onnx.OnnxModule(path)
    rows = {}
    for batch in batches:
        args = denoiser.args(batch)
        off = (network(*args) - denoiser.model(*args)).abs().max()
        ways = {"eager": partial(denoiser.model, *args), "onnx": partial(network, *args)}
        ms = {name: row["ms"] / batch for name, row in measure(ways, rounds).items()}
        rows[f"batch {batch}"] = {
            "eager, ms a picture": ms["eager"],
            "onnxruntime, ms a picture": ms["onnx"],
            "times as quick": ms["eager"] / ms["onnx"],
            "largest difference": float(off),
        }
    pictures = {"eager": denoiser.draw(denoiser.model), "onnxruntime": denoiser.draw(network)}
    return rows, pictures


def run_unet(what, cfg, folder):
    """digits or emoji: export, compare, draw -> metrics; writes WHAT.onnx and WHAT.png."""
    made = {"digits": digits, "emoji": emoji}[what]
    denoiser = made(cfg.samples, cfg.sampling_steps)
    metrics, pictures = compare(denoiser, folder / f"{what}.onnx", cfg.batches, cfg.rounds)
    off = (pictures["eager"] - pictures["onnxruntime"]).abs()
    metrics["MB"] = (folder / f"{what}.onnx").stat().st_size / 1e6
    metrics["pictures, largest difference"] = float(off.max())
    titles = PROMPTS[: cfg.samples] if what == "emoji" else ()
    figures.rows(folder / f"{what}.png", pictures, titles)
    return metrics
