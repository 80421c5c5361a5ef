"""Demo: model workers, a gateway and a Gradio page, started by one command, ended together.

The three parts are those of vlm/serve/; docker-compose.yml there starts the same three as containers. Each
part is a process of its own that listens on loopback: workers and gateway at free ports, the page at --port.
A worker that dies leaves the others at work; without gateway, page or any worker everything ends.

    python vlm/demo.py                         # one address: http://127.0.0.1:7860
    python vlm/demo.py --workers 2 --int8      # two copies of the model
    python vlm/demo.py --once                  # start all, ask one question, end all
"""

import ctypes
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deploy.http_server import bind
from deploy.serve import KEY
from utils import images, run
from utils.run import UserError, check
from utils.text import clean, printable
from vlm.serve.client import messages_of, stream_chat
from vlm.serve.content import data_url

FOLDER = Path(__file__).parent / "serve"
PHOTO = Path(__file__).parent / "figures" / "photo.jpg"
STARTS_IN = 300.0  # seconds, at most: weights are read
ENDS_IN = 40.0  # what is running may finish
PARENT_DIES = 1  # PR_SET_PDEATHSIG of Linux


@dataclass(frozen=True)
class Config:
    """Model workers, gateway and page by one command."""

    workers: int = 1  # copies of the model, a process each
    # weights of vlm/train.py, a folder, a hub id of LLaVA; empty: those of the book
    model: str = ""
    int8: bool = False  # linear layers in int8
    int4: bool = False  # int4 for decoding, int8 for prefill
    port: int = 7860  # of the page, on this machine
    rate: int = 20  # questions a minute of a visitor
    max_tokens: int = 64  # of an answer
    once: bool = False  # ask one question, and end
    image: str = str(PHOTO)  # of --once
    prompt: str = "What fruit is this?"  # of --once
    out: str = "outputs/demo"


def die_with_parent():
    """In a child: end if the parent is killed and can no longer say so. On Linux; elsewhere nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PARENT_DIES, signal.SIGTERM)


class Parts:
    """Processes by name, in the order of their start."""

    def __init__(self, folder):
        self.folder = folder
        self.processes: dict[str, subprocess.Popen] = {}
        # on loopback, too: other users of this machine have no key
        self.key = os.environ.get(KEY) or secrets.token_urlsafe(24)

    def start(self, name, script, *flags):
        """Start a part -> the address at which it listens. Raises UserError, with its last words, if it ends."""
        path = self.folder / f"{name}.log"
        out = self.folder / name
        command = [sys.executable, str(FOLDER / script), "--out", str(out), *map(str, flags)]
        with open(path, "wb") as log:
            self.processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {KEY: self.key},
                preexec_fn=die_with_parent,
                # Ctrl-C reaches the parent, which ends them in order
                start_new_session=True,
            )
        until = time.monotonic() + STARTS_IN
        while time.monotonic() < until:
            text = path.read_text("utf-8", "replace")
            if found := re.search(r"^(?:listening at|open) (http://[^\s,]+)", text, re.M):
                return found[1]
            last = printable((text.strip().splitlines() or ["no word"])[-1])
            alive = self.processes[name].poll() is None
            check(alive, f"the {name} has ended: {last.removeprefix('error: ')}")
            time.sleep(0.1)
        raise UserError(f"the {name} did not start within {STARTS_IN:.0f} s; see {path}")

    def ended(self):
        """Names of those that are no longer there."""
        return [name for name, one in self.processes.items() if one.poll() is not None]

    def stop(self):
        """End all, the page first: who is in front asks nothing more."""
        running = list(reversed(self.processes.values()))
        for process in running:
            process.terminate()
        until = time.monotonic() + ENDS_IN
        for process in running:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start_all(cfg, parts):
    """-> addresses of gateway and page, when they answer."""
    # 1. the workers
    flags = ["--port", 0]
    flags += ["--model", cfg.model] if cfg.model else []
    flags += ["--int8"] if cfg.int8 else []
    flags += ["--int4"] if cfg.int4 else []
    addresses = []
    for number in range(1, cfg.workers + 1):
        address = parts.start(f"worker-{number}", "worker.py", *flags)
        addresses.append(address.removesuffix("/v1"))
    # 2. the gateway
    flags = ["--port", 0, "--trust-visitor", "--rate", cfg.rate, "--workers", *addresses]
    gateway = parts.start("gateway", "gateway.py", *flags)
    # 3. the page
    flags = ["--port", cfg.port, "--gateway", gateway, "--max-tokens", cfg.max_tokens]
    return gateway, parts.start("page", "page.py", *flags)


def watch(parts, workers):
    """Until Ctrl-C; say which worker has ended. Raises UserError if nothing can be answered any more."""
    told = set()
    while True:
        ended = set(parts.ended())
        for name in sorted(ended - told):
            print(f"the {name} has ended; see {parts.folder / name}.log", flush=True)
        told = ended
        gone = sum(name.startswith("worker") for name in ended)
        check(not ended & {"gateway", "page"}, "the demo cannot go on without it")
        check(gone < workers, "no worker is left")
        time.sleep(0.3)


def main(cfg: Config) -> dict:
    """Start worker, gateway and page; end them with this process."""
    check(min(cfg.workers, cfg.rate, cfg.max_tokens) > 0, "--workers and the like: at least 1")
    check(1 <= cfg.port < 2**16, "--port must be from 1 to 65535")
    check(not (cfg.int8 and cfg.int4), "--int8 or --int4: one of them")
    check(cfg.prompt.strip(), "--prompt is empty")
    photo = images.to_rgb(images.open_image(cfg.image)) if cfg.once else None
    # the page's port first: if it is taken, no weights are read in vain
    bind("127.0.0.1", cfg.port).close()
    folder = run.output(cfg.out, cfg)
    parts = Parts(folder)
    # SIGTERM ends it as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begin = time.monotonic()
    answer = ""
    times = {}
    try:
        gateway, page = start_all(cfg, parts)
        times["seconds to start"] = time.monotonic() - begin
        with urllib.request.urlopen(page, timeout=30) as response:
            check(response.status == 200, "the page does not answer")
        if photo:
            messages = messages_of([], cfg.prompt, data_url(photo))
            pieces = stream_chat(gateway, messages, parts.key, max_tokens=cfg.max_tokens)
            answer = "".join(pieces).strip()
            print(clean(f"{cfg.prompt}\n{answer}"))
        else:
            print(f"open {page} in a browser; Ctrl-C ends it", flush=True)
            watch(parts, cfg.workers)
    except KeyboardInterrupt:
        print("ending ...", flush=True)
    finally:
        # a second Ctrl-C must not leave children behind
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        parts.stop()
    metrics = {"answer": answer, "parts": len(parts.processes)} | times
    return run.report(folder, metrics, then="vlm/demo.md")


if __name__ == "__main__":
    run.cli(main, Config)
