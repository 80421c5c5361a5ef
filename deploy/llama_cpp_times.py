"""Times of llama.cpp, by a Python of its own: llama-cpp-python compiles C++, and is no part of this environment.

One process reads the file and then answers requests, one line of JSON each, on its standard input: tokens of a
prompt, and how many to add. So another model can be measured between two requests, on the same machine in the same
state. CPU seconds are those of that process, one thread.

    python -m venv elsewhere && elsewhere/bin/pip install "llama-cpp-python[server]"    # 20 minutes of compiling
    python deploy/low_bit.py --llama-cpp elsewhere/bin/python
    python deploy/load.py --llama-cpp elsewhere/bin/python
    python deploy/gguf_write.py --llama-cpp elsewhere/bin/python
"""

import contextlib
import importlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

WORKER = """
import sys
from deploy.llama_cpp_times import answer_lines
answer_lines(sys.argv[1], int(sys.argv[2]), sys.stdin, sys.stdout)
"""


def answer(llm, ids, new):
    """Greedy decoding: tokens of a prompt -> {"seconds": [of each new token, the first with the prefill],
    "tokens": [...]}."""
    import numpy as np

    llama_cpp: Any = importlib.import_module("llama_cpp")
    vocabulary = llm.n_vocab()
    llm.reset()
    read = list(ids)
    seconds = []
    tokens = []
    for _ in range(new):
        start = time.process_time()
        llm.eval(read)
        logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        token = int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())
        seconds.append(time.process_time() - start)
        tokens.append(token)
        read = [token]
    return {"seconds": seconds, "tokens": tokens}


def answer_lines(path, positions, requests, answers):
    """Read a GGUF file, then a request a line: {"ids": [...], "new": n}; writes an answer a line."""
    llama_cpp: Any = importlib.import_module("llama_cpp")
    options = {"n_ctx": positions, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    llm = llama_cpp.Llama(str(path), **options)
    for line in requests:
        asked = json.loads(line)
        answers.write(json.dumps(answer(llm, asked["ids"], asked["new"])) + "\n")
        answers.flush()


def smollm2(python):
    """The path of SmolLM2's own file, in Q4_1. Raises UserError if there is no such Python to read it."""
    from deploy.low_bit_gguf import FILE
    from utils import assets
    from utils.run import check
    from utils.text import printable

    check(Path(python).is_file(), f"--llama-cpp {printable(python)}: there is no such Python")
    return str(assets.fetch("smollm2") / FILE)


def server(python, port, threads):
    """The command of llama.cpp's server of OpenAI's protocol."""
    command = [python, "-m", "llama_cpp.server", "--model", smollm2(python), "--port", str(port)]
    command += ["--n_ctx", "4096", "--chat_format", "chatml"]
    command += ["--n_threads", str(threads), "--n_threads_batch", str(threads)]
    # a new request would break off the answer that is being written
    return [*command, "--interrupt_requests", "False"]


@contextlib.contextmanager
def started(python, positions, path=""):
    """llama.cpp in a process of its own -> a function (ids, new) -> {"seconds", "tokens"}.

    path: of a GGUF file; empty: that of SmolLM2. Raises UserError if there is no such Python, and
    later if it does not answer.
    """
    from utils.run import check
    from utils.text import printable

    file = smollm2(python)
    command = [python, "-c", WORKER, str(path or file), str(positions)]
    # after the packages of the caller, if there are any
    paths = [os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }
    with subprocess.Popen(command, text=True, env=environment, **pipes) as opened:
        process: Any = opened  # its pipes are there

        def ask(ids, new):
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps({"ids": ids, "new": new}) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                said = process.stderr.read().strip().splitlines() or ["it ended"]
                check(False, f"--llama-cpp {printable(python)}: {printable(said[-1])}")
            return json.loads(line)

        try:
            yield ask
        finally:
            # the end of its input ends it
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
