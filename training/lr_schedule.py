"""Learning-rate schedule: linear warm-up to a peak, then a cosine or a line down to zero."""

import math


def learning_rate(step, steps, peak, warmup, decay):
    """The learning rate of a step, from 0 to steps - 1; decay: "cosine" or "linear".

    The first step has peak / warmup and not zero, which would waste it; the peak is reached at the
    last step of the warm-up, zero after the last of all.
    """
    warmup = max(1, warmup)
    # Warm-up: a line up.
    if step < warmup:
        return peak * ((step + 1) / warmup)
    # Decay: half a cosine, or a line down.
    steps_down = max(1, steps - warmup)
    if decay == "cosine":
        done = (step - warmup) / steps_down
        return peak * ((1 + math.cos(math.pi * done)) / 2)
    return peak * ((steps - step) / steps_down)
