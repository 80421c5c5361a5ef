"""Triton without a GPU: is it there, run kernels in its interpreter, compile them ahead of time for a GPU.

Triton (Tillet et al. 2019, MAPL) is not among the requirements: it is 1 GB, and only the topics whose
modules begin with `triton_` use it. A kernel module imports it at its top; a script with a command calls
`prepare` in `main` and imports kernel modules after that, so that `--help` works without it.

On a CPU a kernel runs in Triton's interpreter: NumPy, program after program, slow and exact. Arithmetic in
bfloat16 is wrong there: cast to float32 after the load. Compiling needs no GPU either: `compile_for` gives
PTX for an architecture, and `ptxas`, the assembler that comes with Triton, reports what a thread needs.
"""

# pyright: reportMissingImports=false

import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import torch

from utils.run import check

ROOT = Path(__file__).parents[1]
MISSING = "this needs Triton, which is not installed: pip install 'triton>=3.6' (Linux, 1 GB)"
LATE = "Triton was imported before its interpreter was asked for: set TRITON_INTERPRET=1 and start again"
NOT_MEASURED = "not measured"
# What a reader has: an A100 is sm_80, an H100 sm_90
ARCHITECTURES = (80, 90)
# Compile, whatever lies in Triton's cache, and print the report of ptxas
COMPILER = {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}


def available():
    """Whether Triton is installed; it is not imported."""
    return find_spec("triton") is not None


def prepare(device="cpu"):
    """Call it before the first kernel module is imported. Raises UserError if there is no Triton.

    Kernels whose tensors lie on a CPU run in the interpreter. Triton chooses it when it is imported.
    """
    check(available(), MISSING)
    if torch.device(device).type == "cpu":
        chosen = os.environ.get("TRITON_INTERPRET") == "1"
        check(chosen or "triton" not in sys.modules, LATE)
        os.environ["TRITON_INTERPRET"] = "1"


def milliseconds(call):
    """Median time of call() on the GPU, caches emptied before each; None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    from triton.testing import do_bench

    return do_bench(call, return_mode="median")


def request(kernel, signature, constants, arch=80, warps=4, stages=3):
    """What `compile_all` wants to know of one kernel.

    signature: {argument: type} in Triton's own words: "*fp32:16" is a pointer, and "i32:16" a number, that
    is divisible by 16. Without that the compiler must not load 16 bytes at once: say it wherever it holds.
    constants: {argument: value} of the `tl.constexpr`; a stride that is 1 is best said here, too.
    arch: 80 for sm_80, 90 for sm_90. warps of 32 threads; stages of the software pipeline.
    """
    return {
        "module": kernel.fn.__module__,
        "kernel": kernel.fn.__name__,
        "signature": signature,
        "constants": constants,
        "arch": arch,
        "warps": warps,
        "stages": stages,
    }


def compile_for(kernel, signature, constants, arch=80, warps=4, stages=3):
    """Compile one kernel as `request` describes it -> the dict of `compile_here`. No GPU is needed."""
    return compile_all([request(kernel, signature, constants, arch, warps, stages)])[0]


def compile_all(requests):
    """Compile kernels for GPUs that need not be here -> a dict for each, as `compile_here` makes it.

    In a process of its own: where kernels are interpreted, the functions they call are so, too.
    Raises RuntimeError with the compiler's words if one does not compile.
    """
    code = "from deploy import triton_offline; triton_offline.answer()"
    environment = os.environ | COMPILER
    environment.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as folder:
        environment["ANSWER"] = str(Path(folder, "answer.json"))
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(requests),
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"a kernel does not compile:\n{done.stderr[-3000:]}")
        return json.loads(Path(environment["ANSWER"]).read_text("utf-8"))


def answer():
    """What the process of `compile_all` does: requests come in on stdin, the answer goes into a file."""
    found = [compile_here(about) for about in json.load(sys.stdin)]
    Path(os.environ["ANSWER"]).write_text(json.dumps(found), "utf-8")


def compile_here(about):
    """Compile what `request` describes in this process, whose kernels are not interpreted.

    -> registers of a thread, bytes of shared memory of a block, bytes of a thread that were spilled from
    registers to memory; in the PTX: tensor-core instructions (mma), accesses to global memory of 16 bytes
    at once (wide) and of fewer (narrow); the PTX itself.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(about["module"]), about["kernel"])
    # Types, and what is known of an argument by its place
    types = dict.fromkeys(about["constants"], "constexpr")
    known = {}
    for name, written in about["signature"].items():
        types[name], _, divisor = written.partition(":")
        if divisor:
            known[(kernel.arg_names.index(name),)] = [["tt.divisibility", int(divisor)]]
    types = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(kernel, types, about["constants"], known)
    target = GPUTarget("cuda", about["arch"], 32)
    options = {"num_warps": about["warps"], "num_stages": about["stages"]}
    # Triton hands the PTX to ptxas, and prints what that reports
    said = io.StringIO()
    with redirect_stdout(said):
        compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    registers, spills = resources(said.getvalue())
    wide, narrow = memory_instructions(ptx)
    return {
        "registers": registers,
        "shared": compiled.metadata.shared,
        "spills": spills,
        "mma": tensor_core_instructions(ptx),
        "wide": wide,
        "narrow": narrow,
        "ptx": ptx,
    }


def tensor_core_instructions(ptx):
    """How many matrix instructions of a warp (mma) or of four warps (wgmma) the PTX has."""
    return len(re.findall(r"^\s*(?:mma|wgmma\.mma_async)\.sync", ptx, re.M))


def memory_instructions(ptx):
    """How many accesses to global memory the PTX has -> those of 16 bytes a thread, and those of fewer."""
    # cp.async.cg copies 16 bytes to shared memory, always; cp.async.ca may copy 4 or 8
    wide = re.findall(
        r"(?:ld|st)\.global\S*\.v4\.b32|cp\.async\.cg\.|(?:ld|st)\.global\S*\.v2\.b64", ptx
    )
    every = re.findall(r"(?:ld|st)\.global|cp\.async\.c[ag]\.", ptx)
    return len(wide), len(every) - len(wide)


def resources(report):
    """What ptxas -v reports of a kernel -> registers, and bytes that were spilled, stores and loads together."""
    (registers,) = re.findall(r"Used (\d+) registers", report)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    return int(registers), sum(int(count) for count in spilled)
