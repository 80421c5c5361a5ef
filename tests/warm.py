"""A warm Python: one helper process that has imported the common libraries and forks for every command of a page.

A fresh process spends most of its time on imports. `run(argv)` gives the command the same argv, working folder, exit
code and output as `python argv[0] argv[1:]` would, and no network: opening a socket fails. One helper per test worker,
started at the first command. Threads: one, or a fork would wait for those that its parent left behind.

    python tests/warm.py         the helper itself: requests come in on stdin, a line of JSON each
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 300  # more than any command of a page with its tiny flags
LIBRARIES = """
    einops matplotlib.pyplot numpy peft PIL.Image safetensors.torch sentence_transformers tqdm transformers tyro
    faiss langchain_core.runnables langchain_core.vectorstores langchain_text_splitters torch.distributed
    transformers.models.llama.modeling_llama transformers.models.bert.modeling_bert
"""
REFUSE = """
import socket
def refuse(self, address, *rest):
    raise OSError(f"a socket was opened to {address}")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *a, **k: refuse(None, a)
"""
OFFLINE = f"{REFUSE}\nimport runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"

helper: "subprocess.Popen[str] | None" = None


def run(argv: list[str], cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run a script in a fork of the helper; as subprocess.run(..., capture_output=True, text=True)."""
    global helper
    if helper is None or helper.poll() is not None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        command = [sys.executable, str(Path(__file__).resolve())]
        helper = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert helper.stdin and helper.stdout
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        request = {"argv": argv, "cwd": str(cwd), "env": env or {}, "out": str(out), "err": str(err)}
        helper.stdin.write(json.dumps(request) + "\n")
        helper.stdin.flush()
        code = json.loads(helper.stdout.readline())
        texts = [path.read_text("utf-8", "replace") for path in (out, err)]
    return subprocess.CompletedProcess(argv, code, *texts)


def stop() -> None:
    """End the helper, if there is one."""
    global helper
    if helper is not None and helper.stdin:
        helper.stdin.close()
        helper.wait()
    helper = None


def serve() -> None:
    """Import what is slow, then fork for every line on stdin; the exit code goes back on stdout."""
    import importlib

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints while it is imported is no answer
    for name in LIBRARIES.split():
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(request)
        answers.write(json.dumps(wait(pid)) + "\n")
        answers.flush()


def wait(pid: int) -> int:
    """Exit code of the child, as subprocess gives it; one that takes too long is killed with all that it started."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, 9)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def child(request: dict) -> None:
    """In the fork: become the command, and never come back."""
    import runpy
    import traceback

    code = 1
    try:
        os.setsid()
        for path, descriptor in ((os.devnull, 0), (request["out"], 1), (request["err"], 2)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
        sys.argv = request["argv"]
        sys.path[0] = str(Path(request["argv"][0]).resolve().parent)
        exec(REFUSE, {})
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
