"""The row of Triton's kernels in vlm/gpu_bench.py: every kernel on the device, in the sizes of the flags."""

import torch

from deploy import triton_cases, triton_speed
from vlm import gpu_bench


def test_every_kernel_is_timed_on_the_gpu(monkeypatch):
    seen = []

    def rows(sizes, on):
        seen.append((sizes, on))
        return {"softmax": {"Triton ms": 1.0}}

    monkeypatch.setattr(triton_speed, "rows", rows)
    gpu = torch.device("cuda")
    for tiny, size, parameters in ((True, 64, 1024), (False, 4096, 2**26)):
        found = gpu_bench.kernel_rows(gpu_bench.Config(tiny=tiny), gpu)
        assert found == {"Triton, softmax": {"Triton ms": 1.0}}
        sizes = triton_cases.Sizes(size, size, parameters, size, size, 1, 64)
        assert seen.pop() == (sizes, gpu)
