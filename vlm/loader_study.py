"""What workers of the DataLoader buy: wall and CPU seconds of the same batches with 0, 1 and 2 of them.

A worker tokenises conversations about photos of fruit, decodes their JPEG files and cuts a random
view of each. It is timed alone, and beside a training step (here a forward pass of EfficientNet, on
one thread), which is what hides it: workers save at most the time that the step waits for data.

    python vlm/loader_study.py                          # 2 CPU minutes
    python vlm/loader_study.py --workers 0 1 2 4 --size 336
"""

import resource
import statistics
import time
from dataclasses import dataclass

import torch

from utils import data as datasets
from utils import pretrained, run
from utils.run import check
from vlm import anyres, conversations, data, tower
from vlm.collator import Collator
from vlm.image_store import ImageStore
from vlm.loader import LazySamples, Loader
from vlm.resumable_sampler import BatchSampler, Shuffled
from vlm.views import random_crop


@dataclass(frozen=True)
class Config:
    """Time a loader with several numbers of workers, in turns."""

    workers: tuple[int, ...] = (
        0,
        1,
        2,
    )  # processes; the first is what the others are compared with
    batch: int = 16  # photos
    steps: int = 12  # batches that are timed, after a first one
    size: int = 224  # of a view, in pixels
    rounds: int = 3  # all numbers of workers in turn, so often
    seed: int = 0
    out: str = "outputs/loader_study"


def cpu_seconds():
    """Of this process and of all workers that have ended."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        found = resource.getrusage(who)
        total += found.ru_utime + found.ru_stime
    return total


def loader_of(tokenizer, rows, cfg, workers):
    """The loader of a training run on photos, with random views."""
    store = ImageStore(data.photos())

    def tokenise(one):
        return conversations.sample(tokenizer, one, 49, one.get("image"))

    def view(name, random):
        image = datasets.square(datasets.open_image(store.where / name), 3 * cfg.size // 2)
        return anyres.resize(random_crop(image, random), (cfg.size, cfg.size))

    samples = LazySamples(rows, tokenise)
    collate = Collator(view, samples, tokenizer.pad_token_id, views=True)
    order = Shuffled(len(rows), cfg.batch, cfg.seed)
    return Loader(samples, BatchSampler(order, cfg.seed, stop=cfg.steps + 1), collate, workers)


def timed(loader, step):
    """One pass over the batches, `step` after each -> wall seconds after the first batch, those that
    the step waited for data, CPU seconds of all processes."""
    # the first batch is not timed: workers start, caches are cold
    before = cpu_seconds()
    batches = iter(loader)
    step(next(batches))
    start = time.perf_counter()
    waited = 0.0
    while True:
        # waiting for data is what the step cannot hide
        asked = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - asked
        if batch is None:
            break
        step(batch)
    wall = time.perf_counter() - start
    # workers count when they have ended
    del batches
    return {"wall_seconds": wall, "waited_seconds": waited, "cpu_seconds": cpu_seconds() - before}


def summary(rounds, first):
    """Medians over the rounds of one number of workers, and of the ratios to the first number in the
    same round."""
    # medians: other work on the machine comes in bursts
    found = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    # ratios within a round, where both met the same load
    ratios = [theirs["wall_seconds"] / ours["wall_seconds"] for ours, theirs in zip(rounds, first)]
    found["times as fast"] = statistics.median(ratios)
    ratios = [ours["cpu_seconds"] / theirs["cpu_seconds"] for ours, theirs in zip(rounds, first)]
    found["times the CPU seconds"] = statistics.median(ratios)
    return found


def main(cfg: Config) -> dict:
    """The same batches with each number of workers: loading alone, and beside a step."""
    few = min(cfg.batch, cfg.steps, cfg.rounds) > 0 and min(cfg.workers, default=-1) >= 0
    check(few, "--batch, --steps and --rounds must be above 0, --workers 0 or more")
    check(cfg.size >= 32, "--size must be at least 32")
    folder = run.output(cfg.out, cfg)
    # one thread for the step, so that a core is free for a worker
    torch.set_num_threads(1)
    tokenizer, _ = pretrained.smollm2()
    vision_tower = tower.load("efficientnet")
    rows = data.fruit("train", cfg.seed)

    @torch.no_grad()
    def forward(batch):
        vision_tower(vision_tower.pixels(batch["images"][:, :, :224, :224]))

    ways = {"loading alone": lambda batch: None, "beside a step": forward}
    turns = []
    for _ in range(cfg.rounds):
        turns += [(way, workers) for way in ways for workers in cfg.workers]
    # rounds in turn
    found = {turn: [] for turn in turns}
    for way, workers in run.bar(turns, len(turns), name="rounds"):
        loader = loader_of(tokenizer, rows, cfg, workers)
        found[way, workers].append(timed(loader, ways[way]))
    metrics = {}
    for way, workers in found:
        name = f"{way}, workers {workers}"
        metrics[name] = summary(found[way, workers], found[way, cfg.workers[0]])
    return run.report(folder, metrics, then="python vlm/train.py")


if __name__ == "__main__":
    run.cli(main, Config)
