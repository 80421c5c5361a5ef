"""Two processes of deploy/serve.py behind nginx, by its file in deploy/compose/: one is killed, one drains."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.load import free_port
from tests import llamas
from tests.deploy import client_checks
from tests.deploy.test_compose import FOLDER

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed (apt: nginx-light)"),
]


class Replicas:
    """Processes by name, started with their ports; all of them end with the test."""

    def __init__(self, folder, model):
        self.folder = folder
        self.model = model
        self.ports = {name: free_port() for name in ("nginx", "one", "two")}
        self.processes = {}

    def start(self, name):
        """A replica, when it answers."""
        command = [sys.executable, "deploy/serve.py", "--model", self.model, "--name", "tiny"]
        command += ["--port", str(self.ports[name]), "--out", str(self.folder / name)]
        environment = os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
        self.processes[name] = subprocess.Popen(command, env=environment)
        self.wait(name)

    def start_nginx(self):
        """With the file of the book, but for its ports."""
        text = (FOLDER / "nginx.conf").read_text("utf-8")
        for number, name in ((8000, "nginx"), (8001, "one"), (8002, "two")):
            assert text.count(f"127.0.0.1:{number}") == 1
            text = text.replace(f"127.0.0.1:{number}", f"127.0.0.1:{self.ports[name]}")
        file = self.folder / "nginx.conf"
        file.write_text(text)
        command = [NGINX, "-p", str(self.folder), "-e", "error.log", "-c", str(file)]
        self.processes["nginx"] = subprocess.Popen(command)
        self.wait("nginx")

    def address(self, name):
        return f"http://127.0.0.1:{self.ports[name]}"

    def wait(self, name):
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.address(name)}/health", timeout=5).close()
                return
            except OSError:
                assert self.processes[name].poll() is None and time.monotonic() < until, name
                time.sleep(0.1)

    def answered(self, name):
        """Chats that a replica has answered, and tokens that it has generated."""
        text = httpx.get(f"{self.address(name)}/metrics").text
        found = {"chats": 0, "tokens": 0}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.endswith("generation_tokens_total"):
                    found["tokens"] = sample.value
                if sample.labels.get("path") == "/v1/chat/completions":
                    found["chats"] += sample.value
        return found

    def end(self):
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nginx")
    found = Replicas(folder, llamas.folder(folder / "model"))
    try:
        for name in ("one", "two"):
            found.start(name)
        found.start_nginx()
        yield found
    finally:
        found.end()


@pytest.fixture(scope="module")
def client(replicas):
    address = f"{replicas.address('nginx')}/v1"
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as found:
        yield found


@pytest.mark.parametrize("check", client_checks.CHECKS, ids=lambda check: check.__name__)
def test_the_client_of_openai_through_nginx(client, check):
    check(client, "tiny")


def test_both_replicas_work(replicas, client):
    before = {name: replicas.answered(name)["chats"] for name in ("one", "two")}
    client_checks.many_at_once(client, "tiny")
    after = {name: replicas.answered(name)["chats"] for name in ("one", "two")}
    found = [after[name] - before[name] for name in ("one", "two")]
    assert sum(found) == 8 and min(found) >= 2


def test_chunks_come_as_they_are_made(client):
    """Without buffering: the first token long before the last one."""
    start = time.perf_counter()
    times = []
    for chunk in client_checks.chat(client, "tiny", max_tokens=60, stream=True):
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.perf_counter() - start)
    assert len(times) > 10 and times[0] < 0.5 * times[-1]


def test_what_is_not_for_all_stays_inside(replicas):
    """Metrics are not passed on, nor bodies larger than the servers take."""
    assert httpx.get(f"{replicas.address('nginx')}/metrics").status_code == 404
    large = httpx.post(f"{replicas.address('nginx')}/v1/completions", content=b" " * (17 * 2**20))
    assert large.status_code == 413


def running_on(replicas, before):
    """The replica that has begun to generate."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for name in ("one", "two"):
            if replicas.answered(name)["tokens"] > before[name]["tokens"]:
                return name
        time.sleep(0.01)
    raise AssertionError("nobody answers")


def test_a_replica_that_is_killed_and_one_that_drains(replicas, client):
    """A stream on it is cut, and that is seen; the next requests go to the other one; when it is back, the other one
    can drain, and what runs there finishes."""
    before = {name: replicas.answered(name) for name in ("one", "two")}
    stream = client_checks.chat(client, "tiny", max_tokens=90, n=8, stream=True)
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        for number, _ in enumerate(stream):
            if number == 3:
                killed = running_on(replicas, before)
                replicas.processes[killed].kill()
                replicas.processes[killed].wait()
    other = {"one": "two", "two": "one"}[killed]
    count = replicas.answered(other)["chats"]
    for _ in range(6):
        assert client_checks.chat(client, "tiny", max_tokens=2).choices
    assert replicas.answered(other)["chats"] == count + 6
    # a new process at the old port is asked again after fail_timeout
    replicas.start(killed)
    until = time.monotonic() + 30
    while not replicas.answered(killed)["chats"] and time.monotonic() < until:
        client_checks.chat(client, "tiny", max_tokens=1)
        time.sleep(0.2)
    assert replicas.answered(killed)["chats"]
    # a rolling update: the other one drains
    found = []
    address = f"{replicas.address(other)}/v1"
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as direct:
        before = {name: replicas.answered(name) for name in ("one", "two")}
        asking = threading.Thread(
            target=lambda: found.append(client_checks.chat(direct, "tiny", max_tokens=90, n=8))
        )
        asking.start()
        assert running_on(replicas, before) == other
        replicas.processes[other].send_signal(signal.SIGTERM)
        for _ in range(4):
            assert client_checks.chat(client, "tiny", max_tokens=2).choices
        asking.join()
    assert found[0].usage.completion_tokens == 8 * 90
    assert replicas.processes[other].wait(60) == 0
    assert client_checks.chat(client, "tiny", max_tokens=2).choices
    assert replicas.answered(killed)["chats"] >= 6
