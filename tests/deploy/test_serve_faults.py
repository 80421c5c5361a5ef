"""The server of deploy/serve.py under faults: malformed requests, clients that leave, full queues, SIGTERM."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import httpx
import pytest

from deploy.engine import Engine
from tests import fuzz, llamas
from tests.deploy import servers
from tests.deploy.test_serve import ASK, SCHEMA, big_talker

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


def body_of(**about):
    about = {"model": "tiny", "messages": ASK, "max_tokens": 8, "temperature": 0} | about
    return json.dumps(about).encode()


@pytest.fixture(scope="module")
def model():
    return big_talker()


@pytest.fixture(scope="module")
def server(model):
    with servers.running(model, llamas.tokenizer(), name="tiny") as found:
        yield found


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.root, timeout=30) as found:
        yield found


def send(http, path, body, kind="application/json", **headers):
    about = {"Content-Type": kind} | headers
    return http.post(path, content=body, headers=about, timeout=120)


REFUSED = {
    "messages": [None, [], "x", [1], [{"role": "user"}], [{"role": "cat", "content": "x"}],
                 [{"role": ["user"], "content": "x"}], [{"role": "user", "content": []}],
                 [{"role": "user", "content": [{"type": "audio"}]}],
                 [{"role": "user", "content": [IMAGE]}],
                 [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]],
    "max_tokens": [0, -1, 1.5, "8", True, 513, [8]],
    "temperature": [-0.1, 2.1, "hot", True, [1]],
    "top_p": [0, 1.1, "x"],
    "top_k": [-1, 1.5],
    "n": [0, 17, "2", True],
    "stop": ["", ["a", ""], 5, ["a"] * 5, [None], {"a": 1}],
    "seed": [1.5, 2**63, "x"],
    "stream": ["yes", 1],
    "stream_options": [5, "x"],
    "logprobs": [2, "x"],
    "top_logprobs": [3, -1],
    "model": [5, ["tiny"]],
    "tools": [[{"type": "function"}]],
    "frequency_penalty": [0.5, True],
    "logit_bias": [{"5": 1}],
    "unheard_of": [1],
    "response_format": [
        5, {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": {}}},
        {"type": "json_schema", "json_schema": {"schema": SCHEMA | {"minProperties": 1}}},
        {"type": "json_schema", "json_schema": {"schema": SCHEMA | {"required": ["other"]}}},
        {"type": "json_schema", "json_schema": {"schema": SCHEMA | {"properties": {"a": {"type": "array"}}}}},
        {"type": "json_schema", "json_schema": {"schema": SCHEMA | {"properties": {"a": {"enum": []}}}}},
        {"type": "json_schema",
         "json_schema": {"schema": SCHEMA | {"properties": {"a": {"type": "string", "enum": [1]}}}}},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_make_no_sense_are_refused_by_their_name(http, name):
    for value in REFUSED[name]:
        found = send(http, "/v1/chat/completions", body_of(**{name: value}))
        assert found.status_code == 400, (value, found.text)
        error = found.json()["error"]
        assert error["param"] == name and error["type"] == "invalid_request_error"
        assert "\n" not in error["message"]


def test_too_much_is_refused(server, http, monkeypatch):
    long = [{"role": "user", "content": "sea " * 3000}]
    found = send(http, "/v1/chat/completions", body_of(messages=long))
    assert found.status_code == 400 and found.json()["error"]["code"] == "context_length_exceeded"
    found = send(http, "/v1/embeddings", json.dumps({"input": "sea " * 3000}).encode())
    assert found.json()["error"]["code"] == "context_length_exceeded"
    found = send(http, "/v1/completions", json.dumps({"prompt": [49152]}).encode())
    assert found.status_code == 400
    small = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    found = send(http, "/v1/chat/completions", body_of(response_format=small, max_tokens=5))
    assert found.status_code == 400 and "ask for more tokens" in found.text
    pictures = [{"role": "user", "content": [IMAGE] * 9}]
    found = send(http, "/v1/chat/completions", body_of(messages=pictures))
    assert found.status_code == 400 and "at most 8" in found.text
    # bodies, said to be large or large
    monkeypatch.setattr(server.service, "body_bytes", 1000)
    found = send(http, "/v1/chat/completions", body_of(user="x" * 1000))
    assert found.status_code == 413
    found = http.post(
        "/v1/completions",
        content=(b" " * 500 for _ in range(9)),
        headers={"Content-Type": "application/json"},
    )
    assert found.status_code == 413
    assert servers.becomes_idle(server.service)


def test_a_picture_that_is_too_large_is_refused(http):
    url = "data:image/png;base64," + "A" * (12 * 2**20)
    part = {"type": "image_url", "image_url": {"url": url}}
    found = send(
        http, "/v1/chat/completions", body_of(messages=[{"role": "user", "content": [part]}])
    )
    assert found.status_code == 413


def test_addresses_methods_and_types(http):
    for method, path, status in [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v2/models", 404),
    ]:
        found = http.request(method, path)
        assert found.status_code == status and found.json()["error"]["message"]
    # what a page of a browser can send to another site without asking first
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert send(http, "/v1/chat/completions", body_of(), kind).status_code == 415
    assert http.get("/health").status_code == 200


@pytest.mark.long
def test_a_thousand_malformed_requests(server, http):
    """Damaged bytes and values of wrong types: refused or answered, never an error of the server."""
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    bodies = {
        "/v1/chat/completions": json.loads(
            body_of(max_tokens=2, n=1, stop=["x"], seed=1, top_p=0.5)
        ),
        "/v1/completions": {"prompt": "Once", "max_tokens": 1, "logprobs": 1, "stream": True},
        "/v1/embeddings": {"input": ["Once"], "encoding_format": "base64", "model": "tiny"},
    }
    constrained = json.loads(body_of(max_tokens=40, response_format=format))
    statuses = []
    cases = []
    for path, body in bodies.items():
        cases += [(path, bad) for bad in fuzz.damaged(json.dumps(body).encode(), 170)]
        cases += [(path, dumped(bad)) for bad in fuzz.retyped(body, 150)]
    retyped = fuzz.retyped(constrained["response_format"], 40)
    cases += [(cases[0][0], dumped(constrained | {"response_format": bad})) for bad in retyped]
    assert len(cases) == 1000
    random.Random(0).shuffle(cases)
    for path, body in cases:
        found = send(http, path, body)
        statuses.append(found.status_code)
        assert found.status_code < 500, (path, body, found.text)
        if found.status_code >= 400:
            error = found.json()["error"]
            assert error["message"] and "\n" not in error["message"]
    assert sum(status >= 400 for status in statuses) > 600
    assert servers.becomes_idle(server.service)
    assert send(http, "/v1/chat/completions", body_of()).status_code == 200


def dumped(value):
    """JSON as clients write it that know nothing of surrogates and NaN."""
    return json.dumps(value).encode()


def test_broken_http(server):
    for data in (b"\0\xff\r\n\r\n", b"GET\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\n\r\n"):
        with servers.send_raw(server.port, data, shut=True) as connection:
            assert b" 400 " in connection.recv(10000).partition(b"\r\n")[0]
    # half of a body, then nothing
    whole = servers.post("/v1/chat/completions", body_of())
    servers.send_raw(server.port, whole[:-5], shut=True).close()
    assert servers.becomes_idle(server.service)


def test_another_host_name_is_refused(model):
    """A page of another site, whose name was made to point to this machine."""
    hosts = ("127.0.0.1",)
    with servers.running(model, llamas.tokenizer(), hosts=hosts) as server:
        found = [
            httpx.get(f"{server.root}/health", headers={"Host": name}).status_code
            for name in ("127.0.0.1:8000", "evil.example")
        ]
    assert found == [200, 400]


def test_a_key_is_asked_for(model):
    with servers.running(model, llamas.tokenizer(), name="tiny", key="s3cret") as server:
        for header, status in {
            "": 401,
            "Basic s3cret": 401,
            "Bearer s3cre": 401,
            "Bearer s3cretx": 401,
            "Bearer \xe9": 401,
            "Bearer s3cret": 200,
        }.items():
            headers = {"Authorization": header.encode("latin-1")} if header else {}
            found = httpx.get(f"{server.address}/models", headers=headers, timeout=60)
            assert found.status_code == status, header
        assert send(httpx, f"{server.address}/chat/completions", body_of()).status_code == 401
        assert httpx.get(f"{server.root}/health", timeout=60).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_cancelled(server, stream, monkeypatch):
    """In the middle of an answer of 500 tokens: its blocks are free long before it would be over."""
    step = server.service.engine.step

    def slow(*about):
        # a tiny model on an idle machine is done before anybody can leave
        time.sleep(0.01)
        return step(*about)

    monkeypatch.setattr(server.service.engine, "step", slow)
    before = server.service.metrics.generated_tokens
    left = server.service.metrics.cancelled
    data = servers.post("/v1/chat/completions", body_of(max_tokens=500, stream=stream, n=2))
    with servers.send_raw(server.port, data) as connection:
        if stream:
            assert b"200 OK" in connection.recv(10000)
        until = time.monotonic() + 10
        while server.service.metrics.generated_tokens < before + 4 and time.monotonic() < until:
            time.sleep(0.01)
        assert not servers.is_idle(server.service)
    assert servers.becomes_idle(server.service, 3)
    assert 4 <= server.service.metrics.generated_tokens - before < 900
    assert server.service.metrics.cancelled == left + 1


def test_a_client_that_leaves_at_any_moment(server, http):
    random_ = random.Random(1)
    for _ in range(25):
        about = {"max_tokens": 50, "stream": random_.random() < 0.5}
        data = servers.post("/v1/chat/completions", body_of(**about))
        connection = servers.send_raw(server.port, data[: random_.randrange(1, len(data) + 1)])
        time.sleep(0.05 * random_.random())
        connection.close()
    assert servers.becomes_idle(server.service)
    assert send(http, "/v1/chat/completions", body_of()).status_code == 200


def test_a_reader_that_does_not_read_loses_its_place(model, caplog):
    """Its buffers are full, the answer waits for it; others are answered; then its time is over."""
    about = {"name": "tiny", "request_seconds": 3.0, "buffer": 4096}
    with servers.running(model, llamas.tokenizer(), **about) as server:
        body = body_of(max_tokens=400, n=4, logprobs=True, top_logprobs=20, stream=True)
        data = servers.post("/v1/chat/completions", body)
        with servers.send_raw(server.port, data, buffer=4096):
            time.sleep(0.3)
            url = f"{server.address}/chat/completions"
            assert send(httpx, url, body_of(max_tokens=2)).status_code == 200
            assert servers.becomes_idle(server.service, 10)
    assert "does not read" in caplog.text


def test_an_answer_that_takes_too_long(model):
    with servers.running(model, llamas.tokenizer(), name="tiny", request_seconds=0.3) as server:
        url = f"{server.address}/chat/completions"
        found = send(httpx, url, body_of(max_tokens=500))
        assert found.status_code == 504 and found.json()["error"]["code"] == "timeout"
        found = send(httpx, url, body_of(max_tokens=500, stream=True))
        last = found.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert servers.becomes_idle(server.service, 3)


def test_a_full_queue_is_429(model):
    """Two places, both taken: refused at once, with the time to come back; and taken again afterwards."""
    engine = Engine(model, blocks=200, max_batch=1)
    about = {"name": "tiny", "engine": engine, "waiting": 1}
    with servers.running(model, llamas.tokenizer(), **about) as server:
        data = servers.post("/v1/chat/completions", body_of(max_tokens=300, n=2, stream=True))
        url = f"{server.address}/chat/completions"
        with servers.send_raw(server.port, data) as connection:
            assert b"200 OK" in connection.recv(10000)
            found = send(httpx, url, body_of())
            assert found.status_code == 429 and found.headers["Retry-After"] == "1"
            assert found.json()["error"]["code"] == "queue_full"
            assert send(httpx, f"{server.address}/embeddings", b'{"input": "x"}').status_code == 429
        assert servers.becomes_idle(server.service, 3)
        assert send(httpx, url, body_of()).status_code == 200


def test_a_step_that_fails_ends_its_answers_and_not_the_server(model, monkeypatch):
    """Blocks that were promised in that step are not found by later requests."""
    with servers.running(model, llamas.tokenizer(), name="tiny") as server:
        url = f"{server.address}/chat/completions"
        llama = server.service.engine.llama
        forward = llama.forward

        def broken(*arguments, **about):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(llama, "forward", broken)
        assert send(httpx, url, body_of()).status_code == 503
        assert servers.becomes_idle(server.service)
        monkeypatch.setattr(llama, "forward", forward)
        text = send(httpx, url, body_of()).json()["choices"][0]["message"]["content"]
    with servers.running(model, llamas.tokenizer(), name="tiny") as server:
        url = f"{server.address}/chat/completions"
        assert send(httpx, url, body_of()).json()["choices"][0]["message"]["content"] == text


def test_draining(model):
    """Running answers finish, new requests and health are 503; then the server ends."""
    with servers.running(model, llamas.tokenizer(), name="tiny", drain_seconds=200) as server:
        url = f"{server.address}/chat/completions"
        found = []

        def ask():
            found.append(send(httpx, url, body_of(max_tokens=250)))

        asking = threading.Thread(target=ask)
        asking.start()
        while server.service.metrics.generated_tokens < 2:
            time.sleep(0.01)
        server.handle_exit(signal.SIGTERM, None)
        assert send(httpx, url, body_of()).status_code == 503
        assert httpx.get(f"{server.root}/health", timeout=60).status_code == 503
        asking.join()
        assert found[0].status_code == 200
        assert found[0].json()["usage"]["completion_tokens"] == 250


def test_draining_has_an_end(model):
    with servers.running(model, llamas.tokenizer(), name="tiny", drain_seconds=0.3) as server:
        data = servers.post("/v1/chat/completions", body_of(max_tokens=500, n=8, stream=True))
        with servers.send_raw(server.port, data) as connection:
            assert b"200 OK" in connection.recv(10000)
            server.handle_exit(signal.SIGTERM, None)
            said = b""
            while part := connection.recv(10**6):
                said += part
    assert b"shutting down" in said
    assert servers.is_idle(server.service)


@pytest.mark.long
def test_sigterm_drains_and_the_exit_code_is_0(tmp_path):
    folder = llamas.folder(tmp_path / "model")
    command = [sys.executable, "deploy/serve.py", "--port", "0", "--model", folder]
    command += ["--out", str(tmp_path / "out"), "--name", "tiny"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."}
    )
    address = process.stdout.readline().split()[2].rstrip(",")
    body = body_of(max_tokens=60, messages=[{"role": "user", "content": "x"}])
    request = urllib.request.Request(
        f"{address}/chat/completions", body, {"Content-Type": "application/json"}
    )
    found = []

    def ask():
        with urllib.request.urlopen(request, timeout=60) as response:
            found.append(json.load(response))

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.15)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    asking.join()
    assert process.returncode == 0
    assert found[0]["usage"]["completion_tokens"] == 60
    assert "requests  1" in printed
