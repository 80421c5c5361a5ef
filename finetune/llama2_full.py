"""Full fine-tuning, and training the head alone: the yardstick, and the training loop that all
methods share.

Nothing is frozen, so each weight costs its gradient and two numbers of AdamW besides itself: 16
bytes each in single precision. Head-only training moves the last layer alone and shows the other
end: little memory, and little said.

The loop (`train`, `fit`) knows no task: it takes batches and a loss function. `experiment` gives it
the tweets.

Shapes: as in sentiment.py; B texts, L tokens, V words of the vocabulary.
Precision: trained weights are fp32, matrix products bf16 (autocast); a bf16 weight cannot take a
small step: next to 1 its neighbours are 0.008 away.

    python finetune/llama2_full.py
    python finetune/llama2_full.py --part head
    python finetune/llama2_full.py --model meta-llama/Llama-2-7b-hf --lr 1e-5 --batch 32 --steps 1000    # for GPUs
"""

import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from finetune import adapters, sentiment, task_setup
from finetune.peak_memory import peak, process_peak
from finetune.sentiment import IGNORE
from utils import checkpoint, figures, pretrained, run


@dataclass(frozen=True)
class Config(task_setup.Training):
    """Fine-tune a whole language model, or its head alone, and score it."""

    lr: float = 5e-5  # peak learning rate
    steps: int = 60  # training steps; each costs nearly twice what one of LoRA costs
    part: Literal["all", "head"] = "all"  # what moves: every weight, or the last layer
    # steps between checkpoints; one has weights and the optimizer's two numbers for each: 1.6 GB
    save_every: int = 0
    out: str = "outputs/llama2_full"  # where the results go


def loss(network, ids, mask, labels):
    """Mean of -log p(token | all before it) over the supervised tokens: ids, mask, labels (B, L) ->
    ().

    Logits at position i speak of token i + 1. Answers are at the end, so logits are made for the
    end alone.
    """
    # where the longest answer begins
    supervised = (labels != IGNORE).any(0)
    first = int(supervised.int().argmax())
    last = labels.shape[1] - first
    # one position earlier, for its logits are those of the first token of the answer
    logits = network(ids, mask, last + 1)[:, :-1]  # (B, last, V)
    targets = labels[:, -last:]
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)


def learning_rate(cfg, i):
    """Up in a line over the first tenth of the steps, then down in a line to zero."""
    warm = max(1, cfg.steps // 10)
    return cfg.lr * min((i + 1) / warm, (cfg.steps - i) / max(1, cfg.steps - warm))


def step(loss, optimizer, batch, device):
    """One optimizer step on loss(*batch), the gradient clipped to norm 1 -> loss ()."""
    # forward, matrix products in bf16
    with run.autocast(device):
        value = loss(*(x.to(device) for x in batch))
    # backward, and gradient clipping over all groups together
    value.backward()
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    # update
    optimizer.step()
    optimizer.zero_grad()  # here, so that gradients are gone before the next text is read
    return value.detach()


def train(loss, batches, optimizer, cfg, device, start=0):
    """Steps `start`, start + 1, ... of any task, one for each batch; yields the loss of each.

    loss: a function (*batch) -> (); batches: tuples of tensors, from step `start` on. Learning
    rates of the groups keep their proportion.
    """
    for i, batch in enumerate(batches, start):
        # warm-up and decay
        for group in optimizer.param_groups:
            group["lr"] = group["times"] * learning_rate(cfg, i)
        # one update
        yield step(loss, optimizer, batch, device).item()


class Trained:
    """The weights of a model that are trained, as one part of a checkpoint."""

    def __init__(self, model):
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def state_dict(self):
        return {name: p.detach() for name, p in self.weights.items()}

    @torch.no_grad()
    def load_state_dict(self, state):
        if state.keys() != self.weights.keys():
            raise KeyError("other weights are trained")
        for name, p in self.weights.items():
            p.copy_(state[name])


def trainable_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def param_group(weights, multiplier):
    """A parameter group whose learning rate is `multiplier` times that of the run."""
    return {"params": list(weights), "times": multiplier}


def fit(cfg, folder, device, model, loss, make_batch, groups=None, label="loss"):
    """Train what is trainable in `model` on any task -> metrics. Writes the loss curve and, on the
    way, checkpoints.

    loss: a function (*batch) -> (); make_batch: a function (step) -> tuple of tensors; groups: of
    `param_group`, if not all weights have one learning rate; label: of the loss, in the figure.
    """
    groups = groups or [param_group(trainable_parameters(model), 1.0)]
    optimizer = torch.optim.AdamW(groups, cfg.lr, weight_decay=0.0)
    losses = []
    seconds = []
    # what a checkpoint holds, and where a run that was broken off goes on
    state = folder / "state.safetensors"
    kept = {"weights": Trained(model), "optimizer": optimizer}
    if cfg.resume:
        before = checkpoint.load_state(state, cfg, **kept)
        losses = before["losses"]
        seconds = before["seconds"]
    numbers = {"config": asdict(cfg), "losses": losses, "seconds": seconds}
    save = partial(checkpoint.save_state, state, **kept, **numbers)
    # the steps that are left; only their own time counts, and on a CPU neighbours cost none
    model.train()
    done = len(losses)
    batches = map(make_batch, range(done, cfg.steps))
    steps = train(loss, batches, optimizer, cfg, device, done)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    then = clock()
    for value in run.progress(steps, cfg.steps, done, cfg.save_every, save):
        seconds.append(clock() - then)
        losses.append(value)
        then = clock()
    if cfg.save_every:
        save()
    figures.curves(folder / "loss.png", {"loss": losses}, "step", label, smooth=5)
    metrics = {
        "trained": sum(p.numel() for p in trainable_parameters(model)),
        "final_loss": float(np.mean(losses[-10:])),
        "train_seconds": sum(seconds),  # of all cores together
        "seconds_per_step": float(np.median(seconds)),
        "process_MiB": process_peak() / 2**20,
    }
    # peak memory of one more step, which moves nothing
    for group in optimizer.param_groups:
        group["lr"] = 0.0

    def again():
        return step(loss, optimizer, make_batch(0), device)

    metrics["tensor_MiB"] = peak(model, optimizer, again) / 2**20
    return metrics


def experiment(cfg, bench, network, model, groups=None):
    """Train what is trainable in `model` on the tweets, score the held-out ones -> metrics.

    network: the function (ids, mask, last) -> logits that asks the model; groups: as in `fit`.
    """
    texts = sorted(bench.parts["train"], key=lambda pair: len(pair[0]))
    make_batch = partial(task_setup.draw, bench.tokenizer, texts, cfg)
    answer_loss = partial(loss, network)
    label = "-log p(answer)"
    metrics = fit(cfg, bench.folder, bench.device, model, answer_loss, make_batch, groups, label)
    # score without dropout
    model.eval()
    held_out = bench.parts["scored"]
    return metrics | sentiment.evaluate(network, bench.tokenizer, cfg, held_out, bench.device)


def choose(model, part):
    """Make every weight trainable, or the last layer only; what is trained is fp32. -> the model.

    Llama-class models may share the last layer with the embedding: then it gets a copy of its own
    to train.
    """
    if part == "all":
        return model.float().requires_grad_(True)
    head = model.get_output_embeddings()
    linear = isinstance(head, torch.nn.Linear)
    run.check(linear, "--part head: this model has no linear layer as its head")
    # a new head with the same weights, in fp32, which shares nothing with the embedding
    bias = head.bias is not None
    own = torch.nn.Linear(head.in_features, head.out_features, bias=bias, device=head.weight.device)
    own.load_state_dict(head.state_dict())
    model.set_output_embeddings(own)
    model.config.tie_word_embeddings = False
    return model


def by_peft(cfg, bench, model, network):
    """Train and score a PEFT model, and let PEFT write its files -> metrics."""
    base = adapters.base_of(bench.model)
    model.peft_config["default"].base_model_name_or_path = base
    metrics = experiment(cfg, bench, network, model)
    model.save_pretrained(bench.folder / "adapter")
    checkpoint.shared_mode(bench.folder / "adapter")
    print(adapters.usage(bench.folder / "adapter", base))
    return metrics | {"checkpoint_MiB": size(bench.folder / "adapter")}


def size(folder):
    """MiB of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20


def main(cfg: Config) -> dict:
    """Fine-tune, score, save an ordinary model folder."""
    bench = task_setup.start(cfg)
    # what is trained: all of it, or the head
    model = choose(bench.model, cfg.part)
    metrics = experiment(cfg, bench, sentiment.network(model), model)
    # bf16 is enough to keep and to answer
    pretrained.save(model.to(torch.bfloat16), bench.tokenizer, bench.folder / "model")
    metrics["checkpoint_MiB"] = size(bench.folder / "model")
    return run.report(bench.folder, metrics, then="python finetune/llama2_lora.py")


if __name__ == "__main__":
    run.cli(main, Config)
