"""Milliseconds on a GPU of each kernel, of torch's own operation, and of its formula through torch.compile.

Without a GPU nothing is timed: the interpreter says what a kernel computes, never how quickly.
"""

from functools import partial
from typing import Any

import torch

from deploy import triton_offline
from deploy.triton_cases import CASES
from deploy.triton_traffic import least_bytes


def times(case, sizes, device, compiler=torch.compile, dtype=torch.float16):
    """{way: median ms} of one case, and the bytes a second that the kernel moves at least, in GB."""
    given = case.inputs(sizes, dtype, device)
    ways = {"Triton": case.fused, "torch": case.library, "torch.compile": compiler(case.eager)}
    found: dict[str, Any] = {
        f"{name} ms": triton_offline.milliseconds(partial(call, *given))
        for name, call in ways.items()
    }
    found["Triton GB/s"] = least_bytes(case, sizes, dtype) / found["Triton ms"] / 1e6
    return found


def rows(sizes, device):
    """{kernel: numbers}; of each "not measured" where the device is no GPU."""
    if torch.device(device).type != "cuda":
        return dict.fromkeys(CASES, triton_offline.NOT_MEASURED)
    return {name: times(case, sizes, device) for name, case in CASES.items()}
