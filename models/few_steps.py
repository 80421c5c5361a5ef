"""Few sampling steps: DDPM, DDIM, DPM-Solver++(2M), Heun, flow matching and a distilled student at equal network calls.

Nearly all of the time of a sampler is spent in its network, so calls of the network are compared: 1, 2, 4, 8. All
samplers begin at the same noises; DDPM (ancestral sampling, eta = 1 of DDIM), DDIM, DPM-Solver++ and Heun use the same
weights, too; flow and reflow are told which digit to draw. The solvers are in `dpm_solver.py`, the student is made by
`distill.py`.

Shapes: B images, C channels, H x W pixels. Equations and papers: `dpm_solver.py`, `ddim.py`, `flow.py`, `distill.py`.

    python models/few_steps.py --pretrained                # shipped weights
    python models/few_steps.py                             # weights of models/ddpm.py; trains them if there are none
    python models/few_steps.py --pretrained --calls 16 32 --grids time log-snr karras
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from models import ddim, ddpm, distill, dpm_solver, flow, gaussian_ode, quality
from models.ddim import last
from models.dit import classifier_free_guidance
from models.dpm_solver import Grid
from utils import figures, run


@dataclass(frozen=True)
class Config:
    """Sample the same noises with every sampler in few calls of the network, and measure the samples."""

    calls: tuple[int, ...] = (1, 2, 4, 8)  # numbers of network calls to compare
    reference: int = 50  # DDIM steps of the row to compare with
    grids: tuple[Grid, ...] = ("time", "karras")  # noise levels of DPM-Solver++, a row each
    heun_grid: Grid = "log-snr"  # noise levels of Heun's method
    only: tuple[str, ...] = ()  # labels of the rows to sample, such as DDIM; all without it
    samples: int = 256  # digits of a round, for each sampler and number of calls
    rounds: int = 3  # other noises; the intervals are over rounds
    weights: str = "outputs/ddpm/model.safetensors"  # what models/ddpm.py wrote
    pretrained: bool = False  # use the shipped weights instead
    student: str = "outputs/distill/model.safetensors"  # what models/distill.py wrote, or no row
    reflow: str = "outputs/reflow/model.safetensors"  # what models/reflow.py wrote, or no row
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/few_steps"  # where the results go


class Meter:
    """Counts calls of networks, and the CPU seconds inside them."""

    def __init__(self):
        self.calls = 0
        self.seconds = 0.0

    def watch(self, model):
        """The same network, counted."""

        def watched(xt, t):
            begin = time.process_time()
            output = model(xt, t)
            self.seconds += time.process_time() - begin
            self.calls += 1
            return output

        return watched


def heun_steps(calls):
    """How many steps of Heun's method that many calls allow: two each, and one for the last."""
    return (calls + 1) // 2


def samplers(cfg, meter, device):
    """{label: function (noise, calls) -> chain}: what is compared; students and reflow if their files are there."""
    model, schedule, predict = ddpm.load(ddim.find_weights(cfg), device)
    network = meter.watch(model)

    def ancestral(noise, calls):
        return ddim.sample(network, schedule, noise, calls, predict, eta=1.0)

    def deterministic(noise, calls):
        return ddim.sample(network, schedule, noise, calls, predict)

    def dpm(grid):
        def draw(noise, calls):
            return dpm_solver.sample(network, schedule, noise, calls, predict, "dpm++", grid)

        return draw

    def heun(noise, calls):
        n = heun_steps(calls)
        return dpm_solver.sample(network, schedule, noise, n, predict, "heun", cfg.heun_grid)

    def euler(path, guidance_scale):
        velocity = flow.load(path, device)[0]

        def draw(noise, calls):
            # the ten digits in turn; both halves of guidance are one call
            y = torch.arange(len(noise), device=noise.device) % 10
            guided = classifier_free_guidance(velocity, y, guidance_scale)
            return flow.sample(meter.watch(guided), noise, calls)

        return draw

    def student(path):
        learned, levels, kind = ddpm.load(path, device)
        counted = meter.watch(learned)

        def draw(noise, calls):
            return distill.sample(counted, levels, noise, calls, kind)

        return draw

    found = {"DDPM, ancestral": ancestral, "DDIM": deterministic}
    found |= {f"DPM-Solver++(2M), {grid}": dpm(grid) for grid in cfg.grids}
    found["Heun"] = heun
    found["flow, Euler"] = euler(flow.WEIGHTS, flow.Config.guidance_scale)
    if Path(cfg.reflow).is_file():
        found["reflow, Euler"] = euler(cfg.reflow, 1.0)
    if Path(cfg.student).is_file():
        found["consistency student"] = student(cfg.student)
    names = ", ".join(f"'{label}'" for label in found)
    run.check(set(cfg.only) <= set(found), f"--only takes labels of rows: {names}")
    return {label: draw for label, draw in found.items() if not cfg.only or label in cfg.only}


def draw(meter, sampler, noise, calls):
    """Samples (B, C, H, W) of a sampler, its calls, and the share of its CPU time outside the network."""
    meter.calls = 0
    meter.seconds = 0.0
    begin = time.process_time()
    with run.autocast(noise.device):
        images = last(sampler(noise, calls)).cpu()
    seconds = time.process_time() - begin
    return images, meter.calls, 1 - meter.seconds / seconds


def summary(scores):
    """Rounds of scores -> their means; standard errors: of `frechet` over rounds, of `recognised` over samples."""
    mean = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}
    values = torch.tensor([s["frechet"] for s in scores])
    mean["frechet_error"] = float(values.std() / math.sqrt(len(scores)))
    mean["recognised_error"] /= math.sqrt(len(scores))
    return mean


def table(cfg, device):
    """All rows: ({"label, n calls": scores}, {label: {n: ten images}}), the noises of a round the same for all."""
    meter = Meter()
    rows = samplers(cfg, meter, device)
    scorer = quality.scorer(device)
    cells = [(label, n) for label in rows for n in cfg.calls]
    if "DDIM" in rows:
        cells.append(("DDIM", cfg.reference))
    found = {cell: [] for cell in cells}
    shown = {label: {} for label in rows}
    generator = torch.Generator().manual_seed(cfg.seed)
    jobs = [(i, cell) for i in range(cfg.rounds) for cell in cells]
    for i, (label, n) in run.bar(jobs, len(jobs), name="sample"):
        # new noises at the first cell of a round
        if (label, n) == cells[0]:
            noise = torch.randn(cfg.samples, 1, 28, 28, generator=generator).to(device)
        # a sampler's own draws do not depend on which rows there are
        torch.manual_seed(cfg.seed + i + 1)
        images, calls, outside = draw(meter, rows[label], noise, n)
        found[label, n].append(scorer(images) | {"calls": calls, "outside": outside})
        if i == 0:
            shown[label][n] = images[:10]
    return {f"{label}, {n} calls": summary(scores) for (label, n), scores in found.items()}, shown


def picture_rows(shown, calls, each=4):
    """{label: pictures}, `each` digits for every number of calls, a white picture between; with titles above them."""
    gap = torch.ones(1, 1, 28, 28)
    rows = {}
    for label, images in shown.items():
        parts = []
        for n in calls:
            parts += [images[n][:each], gap]
        name = label.replace(", ", "\n").replace("(2M)", "").replace("y s", "y\ns")
        rows[name] = torch.cat(parts[:-1])
    titles = []
    for n in calls:
        titles += [f"{n} call" if n == 1 else f"{n} calls", *[""] * each]
    return rows, titles[:-1]


def check_config(cfg):
    """Raises UserError for flags with which nothing can be sampled or measured."""
    run.check(cfg.calls and min(cfg.calls) > 0, "--calls must be one or more numbers from 1 on")
    run.check(len(set(cfg.calls)) == len(cfg.calls), "--calls names a number twice")
    run.check(max(*cfg.calls, cfg.reference) <= 1000, "--calls: the schedule has 1000 steps")
    run.check(cfg.reference > 0, "--reference must be at least 1")
    run.check(cfg.reference not in cfg.calls, "--reference is one of --calls already")
    run.check(cfg.samples >= 10, "--samples must be at least 10, as many as the figure shows")
    run.check(cfg.rounds >= 2, "--rounds must be at least 2: the intervals are over rounds")


def main(cfg: Config) -> dict:
    """The table of all samplers, their digits from the same noises, and the solvers' errors on a Gaussian."""
    check_config(cfg)
    folder = run.output(cfg.out, cfg)
    device = run.device(cfg.device)
    run.seed(cfg.seed)
    metrics, shown = table(cfg, device)
    metrics["outside_the_network"] = max(row["outside"] for row in metrics.values())

    # draw: digits; distances; order of the solvers
    figures.rows(folder / "samples.png", *picture_rows(shown, cfg.calls), scale=0.5)
    curves = {}
    for label in shown:
        values = [metrics[f"{label}, {n} calls"]["frechet"] for n in cfg.calls]
        curves[label] = (cfg.calls, values)
    figures.curves(
        folder / "frechet.png", curves, "calls of the network", "Frechet distance", log="y"
    )
    errors = gaussian_ode.convergence()
    for name, (_, values) in errors.items():
        metrics[f"order of {name}"] = math.log2(values[-2] / values[-1])
    figures.curves(folder / "order.png", errors, "calls of the denoiser", "mean error", log="xy")
    return run.report(folder, metrics, then=f"open {folder}/samples.png")


if __name__ == "__main__":
    run.cli(main, Config)
