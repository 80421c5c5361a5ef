"""Speed of the training loop of vlm/train.py against transformers' Trainer: real tokens a CPU second, and why.

Five ways to train one model on the same samples in the same steps. They differ in the loop (ours, or
that of the library), in the batches (packed rows, or padded ones, which Trainer's users have), and in
the loss (logits at supervised tokens, or at all of them, as the model's own loss with `labels` has).
From one way to the next one thing changes, so the ratio of the first to the last is a product of
three: packing, loop, logits. Packing: Krell et al. 2021, arXiv:2107.02027.

LoRA in the language model and the connector learn, vision features are cached. One thread and CPU
time, all ways in turns in one process. Rates are next to zero, so that all ways have the same losses:
the largest difference is printed.

    python vlm/trainer_speed.py                          # 4 CPU minutes
    python vlm/trainer_speed.py --batch 32 --rounds 9
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch

from utils import run
from utils.run import check
from vlm import engines, train, train_config, train_trainer
from vlm.train_config import changed
from vlm.train_data import count_supervised


@dataclass(frozen=True)
class Config:
    """Train in five ways in turns, and compare tokens a CPU second."""

    batch: int = 16  # conversations a step
    steps: int = 1  # steps of a way before the next one has its turn
    rounds: int = 7  # all ways in turn, so often
    rank: int = 8  # of LoRA
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    out: str = "outputs/trainer_speed"


class AllLogits(train.Learner):
    """The loss of transformers: logits (B,T,V) of every token, padding and questions too, labels shifted inside."""

    def forward(self, batch, features):
        image_tokens = None if features is None else self.image_tokens(features)
        return self.model.language(
            inputs_embeds=self.model.embed(batch["ids"], image_tokens),
            attention_mask=batch["mask"],
            position_ids=batch["positions"],
            labels=batch["labels"],
            # divided by one: the sum over tokens, as Learner gives it
            num_items_in_batch=1,
            use_cache=False,
        ).loss


# Name: loop, packed rows?, loss
WAYS: dict[str, tuple[str, bool, Any]] = {
    "ours, packed": ("ours", True, train.Learner),
    "ours, padded": ("ours", False, train.Learner),
    "Trainer, packed": ("Trainer", True, train.Learner),
    "Trainer, padded": ("Trainer", False, train.Learner),
    "Trainer, padded, all logits": ("Trainer", False, AllLogits),
}
FIRST = "ours, packed"
USUAL = "Trainer, padded, all logits"
# What changes between two ways
CAUSES = {
    "packing": (FIRST, "ours, padded"),
    "loop": ("ours, padded", "Trainer, padded"),
    "logits at supervised tokens only": ("Trainer, padded", USUAL),
    "all of them": (FIRST, USUAL),
    "loop, packed": (FIRST, "Trainer, packed"),
}


def real_tokens(batch):
    """Tokens of a padded or packed batch that are no padding."""
    real = batch["segments"] > 0 if "segments" in batch else batch["mask"] > 0
    return int(real.sum())


def our_steps(learner, source, cfg, start):
    """Steps `start` to cfg.train.steps by the loop of train.py -> CPU seconds, losses."""
    on = torch.device("cpu")
    engine = engines.build(learner, cfg, on)
    then = time.process_time()
    losses = list(train.train(engine, source.batches(cfg, start), cfg, on, start))
    return time.process_time() - then, losses


def trainer_steps(learner, source, cfg, start):
    """The same steps by transformers' Trainer -> CPU seconds from its first batch to its last step, losses."""
    from transformers import ProgressCallback, TrainerCallback

    class Clock(TrainerCallback):
        """Leaves out what Trainer does before and behind its loop."""

        def on_train_begin(self, *args, **more):
            self.then = time.process_time()

        def on_train_end(self, *args, **more):
            self.seconds = time.process_time() - self.then

    trainer = train_trainer.build_trainer(learner, source, cfg, start)
    trainer.remove_callback(ProgressCallback)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds, trainer.losses


def measure(model, source, cfg, steps, rounds):
    """All ways in turns -> {way: [{"seconds", "losses", "tokens", "supervised", "places"} of a round, ...]}.

    cfg: flags of vlm/train.py. Every way sees the same samples in a round.
    """
    found = {name: [] for name in WAYS}
    names = list(WAYS)
    turns = []
    # another way begins in each round; the first step of a process is slower, and its round does not count
    for number in range(rounds + 1):
        first = number % len(names)
        turns += [(number, name) for name in names[first:] + names[:first]]
    for number, name in run.bar(turns, len(turns), name="turns"):
        loop, is_packed, loss = WAYS[name]
        start = number * steps
        flags = changed(cfg, packing=is_packed, steps=start + steps)
        # a learner of its own: Trainer changes the forward method of what it is given
        learner = loss(model).train()
        model.vision.eval()
        go = our_steps if loop == "ours" else trainer_steps
        seconds, losses = go(learner, source, flags, start)
        batches = [batch for parts in source.batches(flags, start) for batch, _ in parts]
        row = {"seconds": seconds, "losses": losses}
        row["tokens"] = sum(real_tokens(batch) for batch in batches)
        row["supervised"] = sum(count_supervised(batch) for batch in batches)
        row["places"] = sum(batch["ids"].numel() for batch in batches)
        if number:
            found[name].append(row)
    return found


def spread(values):
    """Median, least and greatest."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def summary(found):
    """-> {way: real and supervised tokens a CPU second}, {cause: ratio of seconds, by round}."""
    rates = {}
    for name, rows in found.items():
        total = {}
        for what in ("seconds", "tokens", "supervised", "places"):
            total[what] = sum(row[what] for row in rows)
        rates[name] = {
            "tokens a CPU second": total["tokens"] / total["seconds"],
            "supervised tokens a CPU second": total["supervised"] / total["seconds"],
            # of a batch: the rest is padding
            "real": total["tokens"] / total["places"],
            "supervised": total["supervised"] / total["places"],
        }
    ratios = {}
    for cause, (quick, slow) in CAUSES.items():
        pairs = zip(found[quick], found[slow], strict=True)
        ratios[cause] = spread([theirs["seconds"] / ours["seconds"] for ours, theirs in pairs])
    return rates, ratios


def difference(found):
    """Largest relative difference of a loss to that of the first way in the same step."""
    largest = 0.0
    for rows in found.values():
        for row, first in zip(rows, found[FIRST], strict=True):
            for value, usual in zip(row["losses"], first["losses"], strict=True):
                largest = max(largest, abs(value - usual) / usual)
    return largest


def main(cfg: Config) -> dict:
    """The same steps in five ways: tokens a CPU second, and what each difference buys."""
    positive = min(cfg.batch, cfg.steps, cfg.rounds, cfg.rank) > 0
    check(positive, "--batch, --steps, --rounds and --rank must be above 0")
    torch.set_num_threads(1)
    folder = run.output(cfg.out, cfg)
    flags = changed(train_config.Config(), batch_size=cfg.batch, r=cfg.rank, seed=cfg.seed)
    flags = changed(flags, precision=cfg.precision, views=1, out=cfg.out, device="cpu")
    flags = changed(flags, lr=1e-6, lr_pretrained=1e-6, log_steps=500, steps=1000)
    _, model, source = train.prepare(flags, torch.device("cpu"))
    found = measure(model, source, flags, cfg.steps, cfg.rounds)
    rates, ratios = summary(found)
    metrics = rates | {f"times as fast by {cause}": ratio for cause, ratio in ratios.items()}
    metrics["largest relative difference of losses"] = difference(found)
    return run.report(folder, metrics, then="python vlm/train.py")


if __name__ == "__main__":
    run.cli(main, Config)
