"""Memory trace of a training step on fake tensors: allocations and releases, and the peak.

FakeTensorMode is PyTorch's: fake tensors have shapes and types but no numbers, so the real step of
a 7B model takes seconds and no memory. ZeRO is that of zero.py, on ranks that are fake as well.
`measured` makes the same step with numbers, for comparison.
"""

import os
from contextlib import contextmanager, nullcontext
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from training import ranks, zero
from training.memory_model import Linear4bit, LoRALinear, build, inputs
from training.presets import configuration
from training.tracker import Tracker
from utils import run


class PlainEngine:
    """One device and a plain optimizer, with the interface of the engines in zero.py."""

    def __init__(self, model, optimizer):
        self.optimizer = optimizer([p for p in model.parameters() if p.requires_grad])

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def build_engine(cfg, model):
    """Plain AdamW or SGD, or a stage of ZeRO with an fp32 copy of bf16 weights."""
    if cfg.zero == 0 and cfg.precision != "bf16-mixed":
        return PlainEngine(
            model, torch.optim.AdamW if cfg.optimizer == "adamw" else torch.optim.SGD
        )
    engine = zero.STAGES[cfg.zero](model, 1e-3)
    if cfg.optimizer == "sgd":
        engine.adams = [torch.optim.SGD([flat.master]) for flat in engine.trained]
    return engine


@contextmanager
def fake_ranks(n):
    """A process group of n ranks, this one the first: collectives have shapes and do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
    try:
        yield
    finally:
        dist.destroy_process_group()


# What the tensors of an engine are for


def optimizer_states(engine):
    """Optimizer states of this rank: fp32 master copies, means and variances, no step counts."""
    if isinstance(engine, PlainEngine):
        optimizers = [engine.optimizer]
        masters = []
    else:
        optimizers = engine.adams
        # A master of the type of the weights is the shard itself.
        masters = [f.master for f in engine.trained if f.master.dtype != f.full.dtype]
    # Mean and variance of each weight
    moments = []
    for optimizer in optimizers:
        for state in optimizer.state.values():
            moments += [x for x in state.values() if x.dim()]
    return masters + moments


def parameter_shards(engine):
    """The weights that this rank owns under ZeRO-3; the gathered ones are only borrowed."""
    if not isinstance(engine, zero.ZeRO3):
        return []
    return [flat.shard for flat in engine.flat_params]


def gradients(engine, model):
    """Gradients of parameters, and under ZeRO-2 and 3 those of shards."""
    whole = [p.grad for p in model.parameters() if p.grad is not None]
    flats = getattr(engine, "trained", ())
    return whole + [flat.grad_shard for flat in flats if flat.grad_shard is not None]


def drop_gradients(engine, model):
    """Forget the gradients on the device: they have gone to the host."""
    model.zero_grad()
    for flat in getattr(engine, "trained", ()):
        flat.grad_shard = None


def initial_tensors(model, batch, engine):
    """All tensors that are there before the first step."""
    weights = [*model.parameters(), *model.buffers(), *parameter_shards(engine)]
    return [*weights, *optimizer_states(engine), *batch.values()]


# The step


def set_up(cfg):
    """-> model, batch, engine. Within FakeTensorMode they are fake, and what they make, too."""
    run.seed(0)
    # It would count the tokens of a picture: look at numbers
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"
    config = configuration(cfg.model)
    model = build(cfg, config)
    return model, inputs(cfg, config), build_engine(cfg, model)


def training_steps(model, batch, engine, cfg, tracker=None, steps=2):
    """Two training steps: the first makes the optimizer states, the second is like all that follow.

    With a tracker, what was allocated gets its tag, and the moments between the phases are written
    down.
    """
    tracker = tracker or Tracker()
    weights_tag = "offloaded" if cfg.offload == "parameters" else "weights"
    gradients_tag = "offloaded" if cfg.offload != "none" and cfg.zero >= 2 else "gradients"
    tracker.mark(optimizer_states(engine), "optimizer")
    tracker.mark(parameter_shards(engine), weights_tag)
    for _ in range(steps):
        # Forward pass: what outlives its operators is an activation.
        tracker.at["start"] = len(tracker.events) - 1
        tracker.tag = "activations"
        device = batch["input_ids"].device
        context = run.autocast(device) if cfg.precision == "autocast" else nullcontext()
        with context:
            loss = model(**batch, use_cache=False).loss
        # Backward pass: activations go, gradients come.
        tracker.at["forward"] = len(tracker.events) - 1
        tracker.tag = "temporary"
        engine.backward(loss)
        del loss
        tracker.mark(gradients(engine, model), gradients_tag)
        # Optimizer: on the device, or on the host once gradients have gone there.
        tracker.at["backward"] = len(tracker.events) - 1
        if cfg.offload == "none":
            engine.step()
            tracker.mark(optimizer_states(engine), "optimizer")
        else:
            drop_gradients(engine, model)
        tracker.at["step"] = len(tracker.events) - 1


def count_parameters(model):
    """-> (parameters of the base model, trained ones). A 4-bit matrix counts as a whole one."""
    base = sum(p.numel() for p in model.parameters())
    # Adapters do not belong to the base model; a 4-bit matrix is no parameter
    for m in model.modules():
        if isinstance(m, LoRALinear):
            base -= m.lora_A.numel() + m.lora_B.numel()
        if isinstance(m, Linear4bit):
            base += m.in_features * m.out_features
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return base, trained


@lru_cache(maxsize=256)
def exact(cfg):
    """The step on fake tensors -> {"parameters", "trained", "weights", "gradients", ...}.

    Bytes on one device, each at its largest; "at_peak" has what was there at the highest moment, of
    which "temporary" is what an operator, the backward pass or the optimizer holds for a while.
    Raises UserError for an unknown model.
    """
    # Make the steps, and write down what it allocates and releases.
    with fake_ranks(cfg.world_size), FakeTensorMode():
        model, batch, engine = set_up(cfg)
        parameters, trained = count_parameters(model)
        tracker = Tracker(*initial_tensors(model, batch, engine))
        with tracker:
            training_steps(model, batch, engine, cfg, tracker)
    # Bytes of the device after each event: what the host holds does not count.
    on_host = ("offloaded", "optimizer") if cfg.offload != "none" else ()
    sizes = [0 if tracker.entries[entry] in on_host else size for entry, size in tracker.events]
    curve = np.cumsum(sizes)
    # The peak, and what is there at the end of each phase.
    top = int(curve.argmax())
    at_peak = {tag: size for tag, size in tracker.alive(top).items() if tag not in on_host}
    after = {phase: tracker.alive(event) for phase, event in tracker.at.items()}
    return {
        "parameters": parameters,
        "trained": trained,
        "weights": after["start"]["weights"],
        "gradients": after["backward"].get("gradients", 0),
        "optimizer": 0 if on_host else after["step"].get("optimizer", 0),
        "activations": after["forward"]["activations"],
        "peak": int(curve[top]),
        "at_peak": at_peak,
    }


def measured(cfg):
    """Peak of the same step with numbers on this machine, in bytes, by the profiler or CUDA."""
    with fake_ranks(cfg.world_size), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model, batch, engine = set_up(cfg)
        before = Tracker(*initial_tensors(model, batch, engine)).peak()
        return before + ranks.allocated(lambda: training_steps(model, batch, engine, cfg))
