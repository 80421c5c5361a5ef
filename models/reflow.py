"""Reflow: train a flow again on pairs that its own ODE has made, so that its paths get straight, and one step enough.

Liu, Gong & Liu 2022, arXiv:2209.03003, Sec. 2.2. `flow.py` draws straight lines between images and noises that know
nothing of each other. Such lines cross; the network can only answer with the mean of those that meet, and the paths
that follow its answers bend. The ODE pairs every noise with the one image in which it ends. Lines between these pairs
hardly cross: a network trained on them has straighter paths, and large steps miss less.

Shapes: B or N images, C channels, H x W pixels, n steps of the solver. t = 0 is the noise x0, t = 1 the image x1.

    python models/reflow.py                 # 4.6 CPU minutes; uses the weights of models/flow.py, or trains them first
    python models/reflow.py --pretrained    # uses the shipped weights
"""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from models import flow, guidance_study
from models.batches import shuffled
from models.ddim import last
from models.dit import classifier_free_guidance
from models.flow_flags import check_reflow
from utils import checkpoint, figures, run


@dataclass(frozen=True)
class Config:
    """Make pairs with a trained flow, train it on them, compare straightness and samples before and after."""

    pairs: int = 4096  # pairs (noise, image) that the trained flow makes
    pair_steps: int = 20  # Euler steps with which it makes them
    steps: int = 300  # training steps on the pairs
    batch: int = 64  # pairs per step
    lr: float = 1e-3  # peak learning rate: 100 steps of warm-up, then a cosine to zero
    times: flow.Times = "logit-normal"  # distribution of the training times
    dropout: float = 0.0  # share of labels replaced by "no class"; the pairs are guided already
    guidance_scale: float = 1.5  # classifier-free guidance of the flow that makes the pairs
    ema: float = 0.99  # EMA decay: samples come from an exponential moving average of the weights
    sampling_steps: tuple[int, ...] = (1, 2, 4, 10, 50)  # numbers of Euler steps to compare
    samples: int = 256  # digits to sample and measure at each number of steps
    weights: str = "outputs/flow/model.safetensors"  # what models/flow.py wrote
    pretrained: bool = False  # use the shipped weights instead
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/reflow"  # where the results go


def couple(model, x0, y, n, guidance_scale=1.0, batch=64):
    """The image in which each noise ends, by n Euler steps: (N, C, H, W), classes (N,) -> (N, C, H, W).

    With guidance the pairs are those of the guided flow: what is trained on them needs no second call for it.
    """
    images = []
    parts = zip(x0.split(batch), y.split(batch))
    for noise, classes in run.bar(parts, math.ceil(len(x0) / batch), name="pairs"):
        network = classifier_free_guidance(model, classes, guidance_scale)
        with run.autocast(x0.device):
            images.append(last(flow.sample(network, noise, n)))
    return torch.cat(images)


def coupled_pairs(x0, x1, y, batch, seed=0):
    """Shuffled batches of noises, images and classes, still together, for ever: (N, ...) -> (B, ...) each."""
    for pick in shuffled(torch.arange(len(x0)), batch, seed):
        yield x0[pick], x1[pick], y[pick]


@torch.no_grad()
def straightness(model, x0, n=50):
    """E |v_t - (x_1 - x_0)|^2 per pixel along the ODE's paths: (B, C, H, W) -> times (n,), values (n,). Sec. 2.2.

    v_t is the velocity on the way, x_1 - x_0 the line from the noise at the start to the image at the end. 0 at all t:
    the paths are straight, and one Euler step is exact.
    """
    with run.autocast(x0.device):
        path = list(flow.sample(model, x0, n))
    times = torch.linspace(0, 1, n + 1)
    # the velocity that each step took, and the straight line
    line = path[-1] - x0
    values = []
    for i in range(n):
        v = (path[i + 1] - path[i]) / (times[i + 1] - times[i])
        values.append((v - line).square().mean())
    return times[:-1], torch.stack(values).cpu()


def find_weights(cfg):
    """The flow to begin with: shipped, or trained before, or trained now."""
    if cfg.pretrained:
        return flow.WEIGHTS
    if not Path(cfg.weights).is_file() and cfg.weights == Config.weights:
        train = "training them first with models/flow.py; --pretrained takes shipped ones"
        print(f"no weights at {cfg.weights}: {train}")
        out = str(Path(cfg.weights).parent)
        flow.main(replace(flow.Config(), seed=cfg.seed, device=cfg.device, out=out))
    return cfg.weights


def main(cfg: Config) -> dict:
    """Pairs, training, and the same noises before and after; writes scores, straightness, digits, the weights."""
    check_reflow(cfg)
    folder = run.output(cfg.out, cfg)
    device = run.device(cfg.device)
    before, meta = flow.load(find_weights(cfg), device)
    digits = "--weights: that flow draws pictures in colour, and this script measures digits"
    run.check(before.in_channels == 1, digits)
    run.seed(cfg.seed)
    clock = run.Clock()
    metrics = {}

    # the pairs: noises, and the images in which they end
    x0 = torch.randn(cfg.pairs, 1, 28, 28).to(device)
    y = (torch.arange(cfg.pairs) % 10).to(device)
    x1 = couple(before, x0, y, cfg.pair_steps, cfg.guidance_scale)
    metrics["pair_seconds"] = clock()

    # train a copy on them, with the loss of flow.py
    clock = run.Clock()
    model = copy.deepcopy(before).requires_grad_(True).train()
    after = copy.deepcopy(before)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0.01)
    pairs = coupled_pairs(x0, x1, y, cfg.batch, cfg.seed)
    steps = flow.train(model, after, optimizer, pairs, cfg)
    losses = list(run.progress(steps, cfg.steps))
    metrics["final_loss"] = sum(losses[-100:]) / len(losses[-100:])
    metrics["train_seconds"] = clock()
    checkpoint.write(folder / "model.safetensors", after.state_dict(), meta)

    # other noises, the same for both: straightness, and samples in each number of steps; what is
    # trained on guided pairs is asked once
    noise = torch.randn(cfg.samples, 1, 28, 28).to(device)
    curves = {}
    shown = {}
    wanted = (torch.arange(cfg.samples) % 10).to(device)
    scores = guidance_study.scorer(wanted, device)
    for name, model, scale in (("flow", before, cfg.guidance_scale), ("reflow", after, 1.0)):
        first = classifier_free_guidance(model, wanted[:64], scale)
        times, values = straightness(first, noise[:64])
        curves[name] = (times, values)
        metrics[f"{name}: straightness"] = float(values.mean())
        network = classifier_free_guidance(model, wanted, scale)
        images, table = flow.compare_steps(network, noise, cfg.sampling_steps, "euler", scores)
        metrics |= {f"{name}, {n} steps": row for n, row in table.items()}
        shown |= {(n, name): x[:10] for n, x in images.items()}

    # draw: straightness by time; each number of steps, before and after
    label = "mean |v - (image - noise)|^2 per pixel"
    figures.curves(folder / "straightness.png", curves, "t (0: noise, 1: image)", label)
    rows = {f"{name}, {n}": shown[n, name] for n in cfg.sampling_steps for name in curves}
    figures.rows(folder / "steps.png", rows)
    figures.curves(folder / "loss.png", {"loss": losses}, "step", "squared error", smooth=50)
    return run.report(folder, metrics, then=f"open {folder}/steps.png")


if __name__ == "__main__":
    run.cli(main, Config)
