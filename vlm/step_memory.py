"""Memory of a training step of a vision-language model: the real step on fake tensors, and by formula.

training/memory_trace.py runs a step on tensors that have shapes and no numbers, and writes down what is allocated and
released; here that is done with vision encoder, connector and language model. By formula (Rajbhandari et al. 2020,
arXiv:1910.02054, Sec. 3.1): 2 bytes of a frozen number, 16 of a learned one, shared by ZeRO.

    python vlm/step_cost.py    # a table of them, with the FLOPs
"""

import os
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from training import memory_trace, ranks
from training.memory_model import Linear4bit
from training.tracker import Tracker
from vlm.config import VLMConfig
from vlm.step_model import Step, build, check_step, inputs


def set_up(config: VLMConfig, step: Step) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """-> model, batch, engine; within FakeTensorMode they are fake."""
    # transformers would count image tokens: look at numbers
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"
    model = build(config, step)
    return model, inputs(model, step), memory_trace.build_engine(step, model)


def predict(config: VLMConfig, step: Step) -> dict[str, Any]:
    """Bytes of the step on one device -> {"parameters", "inputs", "weights", "gradients", "optimizer", "activations",
    "peak", "at_peak"}.

    config: with vision_config and text_config, as by vlm.build.configurations. Each part at its largest; "at_peak" has
    what is there at the highest moment, of which "temporary" is what an operator holds for a while. Weights: buffers,
    too. Not seen: what a kernel allocates inside itself. Raises UserError for a step that makes no sense.
    """
    check_step(step)
    with memory_trace.fake_ranks(step.world_size), FakeTensorMode():
        model, batch, engine = set_up(config, step)
        counted = {
            name: numbers(getattr(model, name)) for name in ("vision", "connector", "language")
        }
        if model.newline is not None:  # learns with the connector
            counted["connector"]["trained"] += model.newline.numel()
        # Weights, and what the engine holds, are there before the step; the rest is seen as it comes and goes
        tracker = Tracker(*memory_trace.initial_tensors(model, batch, engine))
        tracker.mark(batch.values(), "inputs")
        with tracker:
            memory_trace.training_steps(model, batch, engine, step, tracker)
    # The highest moment, and the end of each phase
    curve = np.cumsum([size for _, size in tracker.events])
    top = int(curve.argmax())
    after = {phase: tracker.alive(event) for phase, event in tracker.at.items()}
    return {
        "parameters": counted,
        "inputs": after["start"]["inputs"],
        "weights": after["start"]["weights"],
        "gradients": after["backward"].get("gradients", 0),
        "optimizer": after["step"].get("optimizer", 0),
        "activations": after["forward"].get("activations", 0),
        "peak": int(curve[top]),
        "at_peak": tracker.alive(top),
    }


def measured(config: VLMConfig, step: Step) -> int:
    """Peak of the same step with numbers on this machine, in bytes, by the profiler."""
    with memory_trace.fake_ranks(step.world_size):
        model, batch, engine = set_up(config, step)
        # What is there, and what the profiler sees on top of it
        before = Tracker(*memory_trace.initial_tensors(model, batch, engine)).peak()
        return before + ranks.allocated(
            lambda: memory_trace.training_steps(model, batch, engine, step)
        )


def numbers(part: Any) -> dict[str, int]:
    """-> {"frozen", "trained", "4 bits"}: how many numbers of each kind a part has."""
    found = {"frozen": 0, "trained": 0, "4 bits": 0}
    for p in part.parameters():
        found["trained" if p.requires_grad else "frozen"] += p.numel()
    for m in part.modules():
        if isinstance(m, Linear4bit):
            found["4 bits"] += m.in_features * m.out_features
    return found


def model_states(counted: dict[str, dict[str, int]], zero: int = 0, n: int = 1) -> dict[str, float]:
    """By formula: {"weights", "gradients", "optimizer"} in bytes on one of n devices, counted as `predict` tells.

    Without ZeRO what learns is in fp32, 4 + 4 + 8 bytes; with it 2 + 2 + 12: weight and gradient in bf16, master copy,
    mean and variance in fp32. A frozen number has 2 bytes, one of 4 bits has a half and a 64th of a scale's 4.
    """
    # Numbers of each kind, over all parts
    frozen = sum(part["frozen"] for part in counted.values())
    trained = sum(part["trained"] for part in counted.values())
    quantized = sum(part["4 bits"] for part in counted.values())
    # Bytes of a learned weight and of its gradient: fp32, or bf16 with a copy in the optimizer
    e = 2 if zero else 4
    weights = 2 * frozen + e * trained + (0.5 + 4 / 64) * quantized
    gradients = e * trained
    optimizer = (12 if zero else 8) * trained
    # What a stage shards is divided by the devices; frozen weights, too
    if zero >= 1:
        optimizer /= n
    if zero >= 2:
        gradients /= n
    if zero == 3:
        weights /= n
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}
