"""vlm/serve/gateway.py: least busy worker, retries before the first byte, broken streams, limits, rates, metrics."""

import base64
import json
import threading
import time

import httpx
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.vlm.fake_workers import WORDS, FakeWorker, closed_worker, running, until
from utils.run import UserError
from vlm.serve import client, gateway, workers

TEXT = "".join(WORDS)
ASK = [{"role": "user", "content": "What is it?"}]


def post(made, body=None, **headers):
    body = {"model": "m", "messages": ASK} if body is None else body
    return httpx.post(f"{made.address}/chat/completions", json=body, headers=headers, timeout=30)


def stream(made, **about):
    return list(client.stream_chat(made.address, ASK, **about))


def test_the_least_busy_healthy_worker():
    pool = [workers.Worker("a", running=2), workers.Worker("b", running=1), workers.Worker("c")]
    assert workers.least_busy(pool, []) is pool[2]
    assert workers.least_busy(pool, [pool[2]]) is pool[1]
    pool[2].healthy = False
    assert workers.least_busy(pool, []) is pool[1]
    assert workers.least_busy(pool, pool) is None


def test_the_rate_is_a_sliding_window():
    """Against a count of all times that were let in."""
    random = np.random.default_rng(0)
    limit = workers.RateLimit(3, span=10.0)
    now = 0.0
    let_in = {"a": [], "b": []}
    for _ in range(400):
        now += float(random.exponential(1.5))
        name = "ab"[int(random.integers(2))]
        recent = [t for t in let_in[name] if t > now - 10]
        wait = limit.seconds_to_wait(name, now)
        if len(recent) < 3:
            assert wait == 0
            let_in[name].append(now)
        else:
            assert wait == pytest.approx(recent[-3] + 10 - now)
    assert min(map(len, let_in.values())) > 50
    # clients are forgotten: those of long ago, and the oldest if there are too many
    limit = workers.RateLimit(1, span=10.0, clients=5)
    for i in range(20):
        limit.seconds_to_wait(str(i), float(i))
    assert len(limit.times) <= 5
    assert limit.seconds_to_wait("19", 20.0) > 0 and limit.seconds_to_wait("19", 29.5) == 0


def test_requests_go_to_the_least_busy_worker():
    pool = [FakeWorker("one", pause=0.6), FakeWorker("two", pause=0.6)]
    with running(pool) as made:
        threads = [threading.Thread(target=stream, args=(made,)) for _ in range(4)]
        for count, thread in enumerate(threads, 1):
            thread.start()
            assert until(lambda n=count: sum(one.running for one in made.workers) == n)
        assert [one.running for one in made.workers] == [2, 2]
        for thread in threads:
            thread.join()
        assert [len(one.bodies) for one in pool] == [2, 2]
        assert until(lambda: all(one.running == 0 for one in made.workers))


@pytest.mark.parametrize("how", [503, 429, "gone", "dies"])
def test_a_refused_request_goes_to_another_worker(how):
    """Before the first byte the client hears nothing of it."""
    first = closed_worker() if how == "gone" else FakeWorker("one", how)
    with running([first, FakeWorker("two")], watched=False) as made:
        found = post(made)
        assert found.status_code == 200 and f"two: {TEXT}" in found.text
        one, two = made.workers
        assert (one.refused, two.refused, two.answered) == (1, 0, 1)
        # who is full has not failed
        assert one.healthy == (how == 429) and one.running == two.running == 0


def test_nobody_takes_it():
    with running([FakeWorker("one", 429), closed_worker()]) as made:
        found = post(made)
        assert found.status_code == 429 and found.headers["retry-after"] == "1"
        assert found.json()["error"]["code"] == "queue_full"
    with running([closed_worker(), closed_worker()]) as made:
        found = post(made)
        assert found.status_code == 503 and "no worker takes requests" in found.text
        assert until(lambda: httpx.get(f"{made.root}/health").status_code == 503)
        assert httpx.get(f"{made.address}/models").status_code == 503


def test_a_worker_comes_back():
    one = FakeWorker("one", 503)
    with running([one]) as made:
        assert until(lambda: httpx.get(f"{made.root}/health").status_code == 503)
        one.how = "ok"
        assert until(lambda: httpx.get(f"{made.root}/health").status_code == 200)
        assert post(made).status_code == 200


def test_a_worker_that_dies_in_a_stream_is_an_error_and_the_other_goes_on():
    with running([FakeWorker("one", "dies"), FakeWorker("two")], watched=False) as made:
        pieces = []
        with pytest.raises(UserError, match="broke off in the middle"):
            for piece in client.stream_chat(made.address, ASK):
                pieces.append(piece)
        assert pieces == WORDS[:2]
        assert made.workers[0].broken == 1 and not made.workers[0].healthy
        assert "".join(stream(made)) == TEXT
        made.workers[0].healthy = True
        with (
            openai.OpenAI(base_url=made.address, api_key="x", max_retries=0) as asking,
            pytest.raises(openai.APIError, match="broke off in the middle"),
        ):
            list(asking.chat.completions.create(model="m", messages=ASK, stream=True))
        assert until(lambda: made.workers[0].running == 0)


def test_words_pass_through_as_they_come():
    with running([FakeWorker("one", pause=0.3)]) as made:
        begin = time.monotonic()
        seen = [time.monotonic() - begin for _ in client.stream_chat(made.address, ASK)]
    assert seen[-1] - seen[0] > 0.9


def test_a_client_that_leaves_ends_the_work():
    for pause, wants_stream in ((0.5, True), (3.0, False)):
        one = FakeWorker("one", pause=pause)
        with running([one]) as made:
            if wants_stream:
                pieces = client.stream_chat(made.address, ASK)
                next(pieces)
                assert made.workers[0].running == 1
                pieces.close()
            else:
                with pytest.raises(httpx.TimeoutException):
                    httpx.post(
                        f"{made.address}/chat/completions", json={"messages": ASK}, timeout=0.5
                    )
            assert until(lambda: made.workers[0].running == 0)
            assert one.sent < len(WORDS)


def part(data):
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def test_limits_are_checked_before_a_worker_hears_of_it():
    one = FakeWorker()
    about = {"body_bytes": 5000, "image_bytes": 1000, "images": 2}
    with running([one], key="secret", **about) as made:
        key = {"authorization": "Bearer secret"}

        def ask(parts, **more):
            return post(made, {"messages": [{"role": "user", "content": parts}]}, **key, **more)

        for found, status, said in (
            (post(made), 401, "API key"),
            (post(made, authorization="Bearer secreT"), 401, "API key"),
            (ask("x" * 6000), 413, "5000 bytes"),
            (ask([part(b"x" * 1001)]), 413, "at most 1000 bytes"),
            (ask([part(b"x")] * 3), 400, "at most 2 pictures"),
            (ask([{"type": "image_url", "image_url": {"url": "http://x/y"}}]), 400, "no address"),
            (post(made, [1], **key), 400, "JSON object"),
            (ask("x", host="evil.example"), 400, "Invalid host"),
        ):
            assert found.status_code == status and said in found.text
        raw = httpx.post(f"{made.address}/chat/completions", content=b"{}", headers=key)
        assert raw.status_code == 415
        assert not one.bodies
        assert ask([part(b"x" * 999)]).status_code == 200
        # the worker has the same key
        assert one.headers[0]["Authorization"] == "Bearer secret"
        assert httpx.get(f"{made.address}/models", headers=key).json()["data"][0]["id"] == "one"
        assert httpx.get(f"{made.address}/models").status_code == 401


@pytest.mark.parametrize("trusted", [True, False])
def test_the_rate_of_each_client(trusted):
    with running([FakeWorker()], rate=2, trust_visitor=trusted) as made:
        found = [post(made, **{client.VISITOR: name}).status_code for name in "aabab"]
        assert found == ([200, 200, 200, 429, 200] if trusted else [200, 200, 429, 429, 429])
        refused = post(made, **{client.VISITOR: "a"})
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        with pytest.raises(UserError, match="more than 2 requests a minute: ask again in"):
            stream(made, visitor="a")


def test_metrics():
    with running([FakeWorker("one", 503), FakeWorker("two")], watched=False) as made:
        post(made)
        post(made, {})
        found = {}
        text = httpx.get(f"{made.root}/metrics").text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name.removeprefix("vlm_action_gateway_"), *sample.labels.values()] = (
                    sample.value
                )
        one, two = (worker.url for worker in made.workers)
        path = "/v1/chat/completions"
        assert found["requests_total", path, "200"] == found["requests_total", path, "400"] == 1
        assert found["worker_refused_total", one] == found["worker_answered_total", two] == 1
        assert (found["worker_healthy", one], found["worker_healthy", two]) == (0, 1)
        assert found["worker_running", two] == found["worker_broken_total", one] == 0


@pytest.mark.parametrize(
    "about, line",
    [
        ({"workers": ()}, "at least one"),
        ({"workers": ("127.0.0.1:1",)}, "http://host:port"),
        ({"rate": 0}, "at least 1"),
        ({"every": 0.0}, "above 0"),
        ({"port": 70000}, "0 to 65535"),
        ({"host": "0.0.0.0"}, "serves others"),
    ],
)
def test_bad_flags(about, line, tmp_path, monkeypatch):
    monkeypatch.delenv(gateway.KEY, raising=False)
    with pytest.raises(UserError, match=line):
        gateway.main(gateway.Config(out=str(tmp_path / "out"), **about))
    assert not (tmp_path / "out").exists() and json.dumps(about)
