"""Peak memory of a training step, by the profiler, and of the whole process.

Tensors are counted one by one: what is there before a step, and the largest sum of allocations and
releases in it. The process counts Python and the libraries, too, and what the allocator has not
given back.
"""

import os
import resource
import sys
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile


def storage_bytes(tensors):
    """Bytes of the storages behind these tensors, shared ones counted once."""
    sizes = {}
    for x in tensors:
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


@contextmanager
def silent_stderr():
    """Nothing reaches stderr, not even from C++: the profiler announces itself there."""
    # descriptor 2 leads nowhere for a while
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak(model, optimizer, step):
    """Bytes of tensors at the highest moment of a training step: what is there before it, and what
    it allocates.

    `step` is a function that makes one step. On a CPU the profiler reports every allocation and
    release in order.
    """
    optimizer.zero_grad()
    # CUDA keeps the maximum itself
    if next(model.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    # before the step: weights, buffers and the state of the optimizer
    there = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values():
        there += [x for x in state.values() if isinstance(x, torch.Tensor)]
    before = storage_bytes(there)
    # in the step: the running sum of allocations (positive) and releases (negative)
    with silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    results: Any = trace.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    allocated = np.cumsum([e.nbytes() for e in events])
    return before + max(0, int(allocated.max()))


def process_peak():
    """The largest resident size of this process so far, in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size
