"""triton_offline: what the interpreter is chosen by, what a compiled kernel needs, and what is not measured."""

import os
import subprocess
import sys

import pytest
import torch

from deploy import triton_offline, triton_softmax
from tests.conftest import ROOT
from utils.run import UserError

ROW = {"x": "*fp32:16", "y": "*fp32:16", "columns": "i32:16"}


@pytest.fixture(scope="module")
def compiled():
    """A row in few values of a thread, in many, and where nothing is known of addresses."""
    kernel = triton_softmax.softmax_kernel
    plain = {name: kind.split(":")[0] for name, kind in ROW.items()}
    cases = [(ROW, 1024, 80, 4), (ROW, 1024, 90, 4), (ROW, 8192, 80, 1), (plain, 1024, 80, 4)]
    return triton_offline.compile_all(
        [
            triton_offline.request(kernel, signature, {"BLOCK": block}, arch, warps)
            for signature, block, arch, warps in cases
        ]
    )


def test_kernels_are_compiled_for_the_gpu_that_was_asked_for(compiled):
    assert ".target sm_80" in compiled[0]["ptx"] and ".target sm_90" in compiled[1]["ptx"]
    for found in compiled[:2]:
        # a sum over four warps goes through shared memory
        assert 0 < found["registers"] <= 255 and found["shared"] > 0
        assert found["spills"] == 0 and found["mma"] == 0


def test_a_row_that_does_not_fit_into_registers_is_spilled(compiled):
    assert compiled[2]["spills"] > 100


def test_addresses_that_are_divisible_are_loaded_sixteen_bytes_at_a_time(compiled):
    """1024 values of four bytes, 128 threads: two loads of four values and two stores, or eight of each."""
    assert (compiled[0]["wide"], compiled[0]["narrow"]) == (4, 0)
    assert (compiled[3]["wide"], compiled[3]["narrow"]) == (0, 16)


def test_warps_are_those_of_the_request(compiled):
    assert ".reqntid 128" in compiled[0]["ptx"] and ".reqntid 32\n" in compiled[2]["ptx"]


def test_one_kernel_is_compiled_like_many(compiled):
    found = triton_offline.compile_for(triton_softmax.softmax_kernel, ROW, {"BLOCK": 1024}, 80, 4)
    assert found == compiled[0]


def test_a_kernel_that_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match="does not compile(.|\n)*power of 2"):
        triton_offline.compile_for(triton_softmax.softmax_kernel, ROW, {"BLOCK": 1000})


def test_registers_and_spills_are_read_from_the_report_of_ptxas():
    report = (
        "ptxas info    : Compiling entry function 'k' for 'sm_80'\n"
        "    64 bytes stack frame, 804 bytes spill stores, 96 bytes spill loads\n"
        "ptxas info    : Used 128 registers, used 1 barriers, 388 bytes cmem[0]\n"
    )
    assert triton_offline.resources(report) == (128, 900)


def test_tensor_core_instructions_are_counted():
    ptx = "\tmma.sync.aligned.m16n8k16\n  wgmma.mma_async.sync.aligned\nwgmma.wait_group.sync\n"
    assert triton_offline.tensor_core_instructions(ptx) == 2


def test_accesses_to_memory_are_counted_by_their_width():
    ptx = "\tld.global.v4.b32 {\n@%p1 st.global.b16 [\nld.global.L1::evict_last.v4.b32\nld.shared.v4.b32\n"
    ptx += "cp.async.cg.shared.global [\ncp.async.ca.shared.global [\ncp.async.wait_group 1\n"
    assert triton_offline.memory_instructions(ptx) == (3, 2)


def test_the_interpreter_must_be_chosen_before_triton_is_imported(monkeypatch):
    code = "import triton; from deploy import triton_offline; triton_offline.prepare()"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "UserError: Triton was imported before" in done.stderr
    # what is on a GPU is compiled, and may be imported at any time
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match="set TRITON_INTERPRET=1"):
        triton_offline.prepare("cpu")
    triton_offline.prepare("cuda")
    assert "TRITON_INTERPRET" not in os.environ
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    triton_offline.prepare("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_timed():
    def call():
        raise AssertionError

    assert triton_offline.milliseconds(call) is None
