"""vlm/demo.py: worker, gateway, page as processes; they end together; a worker dies, the others go on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest

from deploy.load import free_port
from tests import eyes
from tests.conftest import ROOT
from tests.vlm.fake_workers import until
from utils.run import UserError
from vlm import demo, llava_io
from vlm.serve import client

ASK = [{"role": "user", "content": "What is it?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a tiny LLaVA."""
    folder = tmp_path_factory.mktemp("talker")
    tokenizer, made = eyes.talker(folder / "parts")
    llava_io.save(made, tokenizer, folder / "model")
    return str(folder / "model")


class Demo:
    """The command as a process; what it says is in `said`."""

    def __init__(self, folder, model, *flags):
        self.folder = folder
        self.port = free_port()
        command = [sys.executable, "vlm/demo.py", "--model", model, "--out", str(folder)]
        command += ["--port", str(self.port), *flags]
        environment = os.environ | {demo.KEY: "secret", "OMP_NUM_THREADS": "1"}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipe)

    def line(self):
        return self.process.stdout.readline()

    def parts(self):
        """{name of the script: processes}"""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            name = next(os.path.basename(w) for w in child.cmdline() if w.endswith(".py"))
            found.setdefault(name, []).append(child)
        return found

    def gateway(self):
        return re.search(r"http://\S+/v1", (self.folder / "gateway.log").read_text())[0]

    def end(self, seconds=60):
        said, _ = self.process.communicate(timeout=seconds)
        return said, self.process.returncode


def gone(parts):
    """All of these processes have ended."""
    everyone = [one for some in parts.values() for one in some]
    return until(lambda: not any(one.is_running() for one in everyone), 60)


@pytest.mark.long
def test_a_worker_dies_and_the_others_go_on_until_all_end_together(model, tmp_path):
    made = Demo(tmp_path, model, "--workers", "2")
    try:
        assert made.line() == f"open http://127.0.0.1:{made.port} in a browser; Ctrl-C ends it\n"
        parts = made.parts()
        assert {name: len(some) for name, some in parts.items()} == {
            "worker.py": 2,
            "gateway.py": 1,
            "page.py": 1,
        }
        assert httpx.get(f"http://127.0.0.1:{made.port}").status_code == 200
        # others on this machine have no key
        with pytest.raises(UserError, match="API key"):
            list(client.stream_chat(made.gateway(), ASK))
        before = "".join(client.stream_chat(made.gateway(), ASK, "secret", max_tokens=8))
        first = next(one for one in parts["worker.py"] if f"{tmp_path}/worker-1" in one.cmdline())
        first.kill()
        assert made.line() == f"the worker-1 has ended; see {tmp_path}/worker-1.log\n"
        for _ in range(3):
            said = "".join(client.stream_chat(made.gateway(), ASK, "secret", max_tokens=8))
            assert said == before and said
        made.process.send_signal(signal.SIGTERM)
        said, code = made.end()
        assert code == 0 and "ending ..." in said and gone(parts)
        assert json.loads((tmp_path / "metrics.json").read_text())["parts"] == 4
    finally:
        made.process.kill()


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is of Linux")
def test_a_parent_that_is_killed_leaves_no_children(model, tmp_path):
    made = Demo(tmp_path, model)
    try:
        made.line()
        parts = made.parts()
        assert len(parts) == 3
    finally:
        made.process.kill()
    assert gone(parts)


@pytest.mark.long
def test_without_its_gateway_it_ends_in_one_line(model, tmp_path):
    made = Demo(tmp_path, model)
    try:
        made.line()
        parts = made.parts()
        parts["gateway.py"][0].kill()
        said, code = made.end()
        assert code == 2 and "error: the demo cannot go on without it\n" in said
        assert "Traceback" not in said and gone(parts)
    finally:
        made.process.kill()


@pytest.mark.long
def test_once(model, tmp_path):
    made = Demo(tmp_path, model, "--once", "--max-tokens", "4", "--prompt", "Which?")
    said, code = made.end(120)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert code == 0 and found["parts"] == 3 and f"Which?\n{found['answer']}" in said


def test_a_part_that_does_not_start_says_why(tmp_path):
    parts = demo.Parts(tmp_path)
    with pytest.raises(UserError, match="^the worker-1 has ended: no LLaVA at '/no/such'"):
        parts.start("worker-1", "worker.py", "--port", 0, "--model", "/no/such")
    assert parts.ended() == ["worker-1"]
    parts.stop()


def test_flags_reach_the_parts(monkeypatch):
    """Which part gets what, without starting any."""
    started = {}

    class Parts:
        def start(self, name, script, *flags):
            started[name] = (script, list(map(str, flags)))
            return f"http://{name}" + ("" if name == "page" else "/v1")

    cfg = demo.Config(workers=2, model="m", int8=True, port=7, rate=5, max_tokens=9)
    assert demo.start_all(cfg, Parts()) == ("http://gateway/v1", "http://page")
    worker = ("worker.py", ["--port", "0", "--model", "m", "--int8"])
    assert started["worker-1"] == started["worker-2"] == worker
    script, flags = started["gateway"]
    assert script == "gateway.py" and flags[flags.index("--rate") + 1] == "5"
    assert flags[-3:] == ["--workers", "http://worker-1", "http://worker-2"]
    assert "--trust-visitor" in flags
    assert started["page"][1] == "--port 7 --gateway http://gateway/v1 --max-tokens 9".split()


def test_seconds_to_start_end_with_the_start(monkeypatch, tmp_path):
    def watch(parts, workers):
        time.sleep(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "watch", watch)
    monkeypatch.setattr(demo.signal, "signal", lambda *about: None)
    monkeypatch.setattr(
        demo.urllib.request, "urlopen", lambda *a, **b: nullcontext(SimpleNamespace(status=200))
    )
    monkeypatch.setattr(demo, "start_all", lambda cfg, parts: ("http://g", "http://p"))
    found = demo.main(demo.Config(port=free_port(), out=str(tmp_path)))
    assert found["seconds to start"] < 0.5


def test_nothing_is_left_to_answer():
    class Parts:
        folder = Path("x")
        left = ["worker-1"]

        def ended(self):
            self.left = [*self.left, "worker-2"]
            return self.left

    with pytest.raises(UserError, match="no worker is left"):
        demo.watch(Parts(), 2)


@pytest.mark.parametrize(
    "about, line",
    [
        ({"workers": 0}, "at least 1"),
        ({"port": 0}, "1 to 65535"),
        ({"int8": True, "int4": True}, "one of them"),
        ({"once": True, "image": "none.png"}, "not a readable image"),
        ({"prompt": " "}, "empty"),
    ],
)
def test_bad_flags(about, line, tmp_path):
    with pytest.raises(UserError, match=line):
        demo.main(demo.Config(out=str(tmp_path / "out"), **about))
    assert not (tmp_path / "out").exists()


def test_a_taken_port_is_said_before_anything_is_started(tmp_path):
    listening = demo.bind("127.0.0.1", 0)
    listening.listen()
    port = listening.getsockname()[1]
    with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1, port {port}"):
        demo.main(demo.Config(port=port, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    listening.close()
