"""The largest batch, text length or model whose training step fits in the memory of a device."""

from dataclasses import replace
from typing import Any

from training import formulas
from training.memory_trace import exact
from training.presets import PRESETS, configuration, image_tokens, sizes
from utils import run

LENGTH_STEP = 64  # tokens: lengths are asked for in multiples of it


def largest(peak, budget, start=1, step=1):
    """The largest multiple of `step` with peak(x) <= budget, 0 if there is none -> (x, its peak).

    Doubles until it does not fit, then draws a line between the two ends: memory is nearly one.
    """
    low = (0, 0)  # (x, peak) of the largest that is known to fit
    high = None  # of the smallest that does not
    x = start
    while high is None or high[0] - low[0] > step:
        # Ask, and move one of the ends
        size = peak(x)
        if size <= budget:
            low = (x, size)
        else:
            high = (x, size)
        # No end yet: double
        if high is None:
            x *= 2
            continue
        # Where the line meets the budget; strictly between the two ends.
        share = (budget - low[1]) / (high[1] - low[1]) if low[0] else 0.5
        x = int(low[0] + share * (high[0] - low[0])) // step * step
        x = min(max(x, low[0] + step), high[0] - step)
    return low


def largest_preset(cfg, budget):
    """The preset with the most parameters that fits -> {"largest", "name", "peak"}."""
    best: dict[str, Any] = {"largest": 0, "name": "none of the presets", "peak": 0}
    # From small to large, by the parameters of the language model.
    size_of = {name: formulas.parameters(*sizes(configuration(name))[:4]) for name in PRESETS}
    for name in sorted(PRESETS, key=size_of.__getitem__):
        tokens = cfg.seq_len
        if name.startswith("llava"):
            tokens = max(tokens, 578)  # a picture of 576 tokens and two words
        found = exact(replace(cfg, model=name, seq_len=tokens))
        if found["peak"] <= budget and found["parameters"] > best["largest"]:
            best = {"largest": found["parameters"], "name": name, "peak": found["peak"]}
    return best


def fit(cfg):
    """Answer --fit -> {"largest", "peak", "budget"}; for "model" also its name."""
    budget = cfg.budget * 1e9
    # Presets are tried one after the other
    if cfg.fit == "model":
        return largest_preset(cfg, budget) | {"budget": budget}
    # Batch and length are numbers, and memory grows with them
    field = "batch"
    step = start = 1
    if cfg.fit == "seq-len":
        field = "seq_len"
        step = start = LENGTH_STEP
        config = configuration(cfg.model)
        if hasattr(config, "vision_config"):  # a text is longer than its picture
            start = step * (image_tokens(config) // step + 1)

    def peak(x):
        return exact(replace(cfg, **{field: x}))["peak"]

    # The least must fit, else there is no answer
    least = peak(start)
    said = f"it takes {least / 1e9:.2f} GB of {cfg.budget:g}"
    run.check(least <= budget, f"not even --{cfg.fit} {start} fits: {said}")
    x, size = largest(peak, budget, start, step)
    return {"largest": x, "peak": size, "budget": budget}
