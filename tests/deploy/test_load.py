"""deploy/load.py: what is measured of a server whose times are known; failures are one line."""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

from deploy import load, serve
from utils.run import UserError

FIRST = 0.5
LATER = 0.05


class Metronome(BaseHTTPRequestHandler):
    """A server that says five tokens, at known times, the last two in one chunk."""

    running = 0
    most = 0
    status = 200
    asked = []

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        cls = type(self)
        cls.asked.append(body)
        cls.running += 1
        cls.most = max(cls.most, cls.running)
        self.send_response(cls.status)
        self.end_headers()
        chunks = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        chunks += [{"choices": [{"delta": {"content": "x"}}]} for _ in range(4)]
        chunks += [{"choices": [], "usage": {"completion_tokens": 5}}]
        for number, chunk in enumerate(chunks):
            time.sleep({1: FIRST, 2: LATER, 3: LATER, 4: LATER}.get(number, 0))
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")
        cls.running -= 1


@pytest.fixture
def address():
    class Server(Metronome):
        asked = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", Server
    server.shutdown()
    server.server_close()
    thread.join()


def test_times_are_those_of_the_server(address, tmp_path):
    base_url, server = address
    cfg = load.Config(requests=6, users=3, base_url=base_url, model="m", out=str(tmp_path))
    row = load.main(cfg)["m"]
    assert FIRST <= row["first token p50, s"] < FIRST + 0.15
    assert 1000 * LATER <= row["a token p50, ms"] < 1000 * LATER + 50
    assert row["first token p50, s"] <= row["p95"] and row["tokens"] == 30
    # two rounds of three users
    least = 2 * (FIRST + 3 * LATER)
    assert 30 / (least + 0.6) < row["tokens a second"] <= 30 / least
    assert server.most == 3 and len(server.asked) == 6
    assert all(body["stream"] and body["model"] == "m" for body in server.asked)
    asked = [(body["messages"][0]["content"], body["max_tokens"]) for body in server.asked]
    assert sorted(asked) == sorted(load.questions(6, 48, 0))
    assert "CPU seconds" not in row


def test_questions_are_the_same_for_the_same_seed():
    found = load.questions(20, 48, 0)
    assert found == load.questions(20, 48, 0) != load.questions(20, 48, 1)
    assert len({text for text, _ in found}) == 20
    assert min(n for _, n in found) >= 4 and max(n for _, n in found) <= 48


def test_a_server_that_refuses_is_one_line(address, tmp_path):
    base_url, server = address
    server.status = 429
    with pytest.raises(UserError, match="429"):
        load.main(load.Config(requests=2, base_url=base_url, out=str(tmp_path)))
    with pytest.raises(UserError, match="failed"):
        load.main(load.Config(requests=2, base_url="http://127.0.0.1:9/v1", out=str(tmp_path)))
    with pytest.raises(UserError, match="at least 1"):
        load.main(load.Config(users=0))


def test_a_server_that_does_not_start_is_one_line(tmp_path):
    log = tmp_path / "log"
    with (
        pytest.raises(UserError, match="did not start"),
        load.started([sys.executable, "-c", "print('no')"], load.free_port(), 1, log),
    ):
        pass
    assert log.read_text() == "no\n"


def test_servers_that_are_started_know_their_flags(tmp_path):
    known = {f"--{name.replace('_', '-')}" for name in serve.Config.__dataclass_fields__}
    found = load.commands(load.Config(transformers=True), tmp_path)
    for name in ("serve.py", "serve.py --int8", "serve.py --int4"):
        command, port, _ = found[name]
        assert {flag for flag in command if flag.startswith("--")} <= known
        bits = [flag for flag in command if flag in ("--int8", "--int4")]
        assert str(port) in command and bits == name.split()[1:]
    assert "--continuous-batching" in found["transformers serve"][0]


def test_cpu_seconds_count_children():
    busy = "import time\nwhile time.process_time() < 0.7: pass\n"
    code = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', '''{busy}time.sleep(9)'''])\n"
    process = psutil.Popen([sys.executable, "-c", f"{code}{busy}time.sleep(9)"])
    try:
        until = time.monotonic() + 30
        while load.cpu_seconds(process) < 1 and time.monotonic() < until:
            time.sleep(0.05)
        assert 1 <= load.cpu_seconds(process) < 3
    finally:
        for one in [*process.children(recursive=True), process]:
            one.kill()
        process.wait()
