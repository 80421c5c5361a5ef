"""Load on a server of OpenAI's protocol: time to the first token, time per token, tokens a second, p50 and p95.

Users send chats one after the other, several users at once, as streams (a closed loop: the next request when the
last one is answered). The server is one that this script starts, and then its CPU seconds are read as well, or
whatever answers at --base-url. Percentiles are those of numpy.

    python deploy/load.py                              # serve.py, in float32, int8 and int4
    python deploy/load.py --transformers               # beside `transformers serve --continuous-batching`
    python deploy/load.py --llama-cpp PYTHON           # beside llama.cpp's server
    python deploy/load.py --base-url http://127.0.0.1:8000/v1 --model smollm2
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy import llama_cpp_times
from utils import assets, data, run
from utils.run import UserError, check
from utils.text import clean, printable

KEY = "VLM_ACTION_API_KEY"


@dataclass(frozen=True)
class Config:
    """Measure servers under load."""

    requests: int = 32  # of each server
    users: int = 16  # at once
    max_new_tokens: int = 48  # of the longest answer; most are shorter
    base_url: str = ""  # a server that runs already; none: servers are started
    model: str = "smollm2"  # its name for the server
    transformers: bool = False  # `transformers serve` too
    llama_cpp: str = ""  # a Python that has llama-cpp-python: its server, too
    threads: int = 1  # of each server that is started
    seconds: float = 600.0  # that a request may take
    seed: int = 0
    out: str = "outputs/load"


def questions(count, most, seed):
    """Openings of paragraphs of the manuals, and lengths of answers of which most are short -> [(text, n)]."""
    random = np.random.default_rng([seed, 5])
    paragraphs = [p for _, page in data.docs() for p in page.split("\n\n") if len(p) > 600]
    found = []
    for i in random.permutation(len(paragraphs))[:count]:
        text = paragraphs[i][: int(random.integers(60, 600))]
        new = int(np.clip(random.exponential(most / 2), min(4, most), most))
        found.append((clean(f"Explain in short: {text}"), new))
    return found


def ask(cfg, base_url, model, question, new):
    """One chat as a stream -> {"first": s, "last": s, "pieces": chunks with text, "tokens": of usage or None}."""
    # greedy, as a stream, with the number of tokens at its end
    body = {"model": model, "messages": [{"role": "user", "content": question}]}
    body |= {"max_tokens": new, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    headers = {"Content-Type": "application/json"}
    headers["Authorization"] = f"Bearer {os.environ.get(KEY, 'none')}"
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{base_url}/chat/completions", data, headers)
    # time of the first and of the last chunk with text
    found = {"first": 0.0, "last": 0.0, "pieces": 0, "tokens": None}
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=cfg.seconds) as response:
        for line in response:
            if not line.startswith(b"data:") or b"[DONE]" in line:
                continue
            chunk = json.loads(line[5:])
            check("error" not in chunk, f"the server says {printable(chunk.get('error'))}")
            if chunk.get("usage"):
                found["tokens"] = chunk["usage"]["completion_tokens"]
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                found["last"] = time.perf_counter() - start
                found["first"] = found["first"] or found["last"]
                found["pieces"] += 1
    return found


def load(cfg, base_url, model, asked):
    """All questions, by so many users at once -> [what `ask` found], seconds of all together.

    Raises UserError if a request fails.
    """
    left = list(reversed(asked))
    found = []
    failed = []

    # a user takes the next question when the last one is answered
    def user():
        while not failed:
            try:
                question, new = left.pop()
            except IndexError:
                return
            try:
                found.append(ask(cfg, base_url, model, question, new))
            except (OSError, ValueError, LookupError, UserError) as error:
                failed.append(error)

    # all users at once
    start = time.perf_counter()
    users = [threading.Thread(target=user) for _ in range(cfg.users)]
    for one in users:
        one.start()
    for one in users:
        one.join()
    seconds = time.perf_counter() - start
    where = f"a request to {printable(base_url)} failed"
    check(not failed, f"{where}: {printable(failed[0] if failed else '')}")
    return found, seconds


def summary(found, seconds, cpu):
    """A row of the table. cpu: seconds of the server, or None."""
    # answers without text have no first token
    told = [one for one in found if one["pieces"]]
    check(told, "no answer had any text")
    # a server that counts no tokens: a chunk is one
    tokens = sum(one["tokens"] or one["pieces"] for one in found)
    first = [one["first"] for one in told]
    later = [(x["last"] - x["first"]) / (x["pieces"] - 1) for x in told if x["pieces"] > 1]
    row = {
        "first token p50, s": np.percentile(first, 50),
        "p95": np.percentile(first, 95),
        "a token p50, ms": 1000 * np.percentile(later or [0], 50),
        "a token p95, ms": 1000 * np.percentile(later or [0], 95),
        "tokens": tokens,
        "tokens a second": tokens / seconds,
    }
    if cpu is not None:
        row["CPU seconds"] = cpu
    return {name: float(value) for name, value in row.items()}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu_seconds(process):
    """CPU seconds of a process and of those that it has started."""
    import psutil

    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            total += times.user + times.system
    return total


@contextlib.contextmanager
def started(command, port, threads, log):
    """A server in a process of its own -> its psutil.Process, when it answers. Raises UserError."""
    import psutil

    # a process of its own, whose threads are counted alone
    root = Path(__file__).parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(root)}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        # reading weights takes its time: ask until it answers
        until = time.monotonic() + 600
        while True:
            with contextlib.suppress(OSError):
                # any answer will do: llama.cpp's server has no such address
                with contextlib.suppress(urllib.error.HTTPError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            alive = process.poll() is None and time.monotonic() < until
            check(alive, f"the server did not start; {printable(log)} says why")
            time.sleep(0.2)
        yield psutil.Process(process.pid)
    finally:
        # drain, and end it if that takes too long
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(40)
        process.kill()
        process.wait()


def commands(cfg, folder):
    """{name: (command, port, name of the model)} of the servers that are started."""
    made = {}
    for flags in ([], ["--int8"], ["--int4"]):
        name = " ".join(["serve.py", *flags])
        port = free_port()
        script = str(Path(__file__).parent / "serve.py")
        out = str(folder / name.replace(" ", ""))
        command = [sys.executable, script, "--port", str(port), *flags, "--out", out]
        command += ["--max-batch", str(cfg.users)]
        made[name] = (command, port, "smollm2")
    # as many blocks as serve.py has
    if cfg.transformers:
        port = free_port()
        model = str(assets.fetch("smollm2") / "bf16")
        program = str(Path(sys.executable).parent / "transformers")
        command = [program, "serve", model, "--continuous-batching", "--port", str(port)]
        command += ["--dtype", "float32", "--device", "cpu"]
        command += ["--cb-num-blocks", "512", "--cb-block-size", "8"]
        made["transformers serve"] = (command, port, model)
    if cfg.llama_cpp:
        port = free_port()
        command = llama_cpp_times.server(cfg.llama_cpp, port, cfg.threads)
        made["llama_cpp.server"] = (command, port, "smollm2")
    return made


def main(cfg: Config) -> dict:
    """Load on one server or on several, one after the other; writes the table."""
    numbers = (cfg.requests, cfg.users, cfg.max_new_tokens, cfg.threads)
    check(min(numbers) > 0, "--requests, --users, --max-new-tokens, --threads: at least 1")
    asked = questions(cfg.requests, cfg.max_new_tokens, cfg.seed)
    folder = run.output(cfg.out, cfg)
    # a server that runs already: its CPU time is not ours to read
    if cfg.base_url:
        found, seconds = load(cfg, cfg.base_url.rstrip("/"), cfg.model, asked)
        return run.report(folder, {cfg.model: summary(found, seconds, None)})
    rows = {}
    for name, (command, port, model) in commands(cfg, folder).items():
        base_url = f"http://127.0.0.1:{port}/v1"
        with started(command, port, cfg.threads, folder / "server.log") as process:
            # the first request may still read weights
            ask(cfg, base_url, model, "Hello.", 2)
            before = cpu_seconds(process)
            found, seconds = load(cfg, base_url, model, asked)
            rows[name] = summary(found, seconds, cpu_seconds(process) - before)
    return run.report(folder, rows)


if __name__ == "__main__":
    run.cli(main, Config)
