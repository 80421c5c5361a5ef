"""A warm Python: one helper process that has imported the common libraries and forks for every command of a page.

A fresh process spends most of its time on imports. `run(argv)` gives the command the same argv, working folder, exit
code and output as `python argv[0] argv[1:]` would, and no network: opening a socket fails. One helper per test worker,
started at the first command. Threads: one, or a fork would wait for those that its parent left behind.

Jupyter's kernels start from it, too (`Kernel`, for tests/notebooks.py); those may open sockets, they talk through them.

    python tests/warm.py         the helper itself: requests come in on stdin, a line of JSON each
"""

import json
import os
import signal
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
    transformers.models.llama.modeling_llama transformers.models.bert.modeling_bert ipykernel.kernelapp
    matplotlib_inline.backend_inline
"""
LOOPBACK = "TESTS_ALLOW_LOOPBACK"  # in the environment of a command that serves, and asks itself
REFUSE = f"""
import os, socket
connect = socket.socket.connect
find = socket.getaddrinfo
here = ("127.0.0.1", "localhost") if os.environ.get("{LOOPBACK}") else ()
def refuse(self, address, *rest):
    # processes of one machine: a fork server, for one
    if self is not None and (self.family == socket.AF_UNIX or address[0] in here):
        return connect(self, address)
    raise OSError(f"a socket was opened to {{address}}")
def look_up(host, *rest, **more):
    return find(host, *rest, **more) if host in here else refuse(None, (host, *rest))
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = look_up
"""
OFFLINE = f"{REFUSE}\nimport runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"

helper: "subprocess.Popen[str] | None" = None


def ask(request: dict) -> int:
    """Send the helper a request, starting it at the first -> its answer: an exit code, or a process id of a kernel."""
    global helper
    if helper is None or helper.poll() is not None:
        # peft imports Triton, which chooses its interpreter then or never
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        command = [sys.executable, str(Path(__file__).resolve())]
        helper = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    assert helper.stdin and helper.stdout
    helper.stdin.write(json.dumps(request) + "\n")
    helper.stdin.flush()
    return json.loads(helper.stdout.readline())


def run(
    argv: list[str], cwd: Path = ROOT, env: dict[str, str] | None = None, network: bool = False
) -> subprocess.CompletedProcess:
    """Run a script in a fork of the helper; as subprocess.run(..., capture_output=True, text=True)."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        about = {
            "cwd": str(cwd),
            "env": env or {},
            "out": str(out),
            "err": str(err),
            "network": network,
        }
        code = ask({"argv": argv} | about)
        texts = [path.read_text("utf-8", "replace") for path in (out, err)]
    return subprocess.CompletedProcess(argv, code, *texts)


class Kernel:
    """A Jupyter kernel that was forked from the helper; what jupyter_client asks of a subprocess.Popen."""

    stdin = None

    def __init__(self, connection_file: str, cwd: str) -> None:
        words = ["ipykernel_launcher", "-f", connection_file]
        self.pid = ask(
            {
                "argv": words,
                "cwd": cwd,
                "env": {},
                "out": os.devnull,
                "err": os.devnull,
                "kernel": True,
            }
        )

    def poll(self) -> int | None:
        """None while it runs. An ended one may wait for its parent to take note of it: state Z."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return 0
        return 0 if state == "Z" else None

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return 0

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


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
        answers.write(json.dumps(pid if "kernel" in request else wait(pid)) + "\n")
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

    import matplotlib

    code = 1
    try:
        os.setsid()
        for path, descriptor in ((os.devnull, 0), (request["out"], 1), (request["err"], 2)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
        sys.argv = request["argv"]
        if "kernel" in request:
            start_kernel()
            os._exit(0)
        sys.path[0] = str(Path(request["argv"][0]).resolve().parent)
        if not request["network"]:
            exec(REFUSE, {})
        matplotlib.use("Agg")
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


def start_kernel() -> None:
    """What `python -m ipykernel_launcher` does."""
    import matplotlib
    from ipykernel import kernelapp

    sys.path[0] = ""
    matplotlib.use("module://matplotlib_inline.backend_inline")
    kernelapp.launch_new_instance()


if __name__ == "__main__":
    serve()
