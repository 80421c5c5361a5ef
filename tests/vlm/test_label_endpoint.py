"""vlm/label_endpoint.py: requests to a server of our own and the book's, retries, keys, cost, at most N at once."""

import base64
import http.server
import io
import json
import threading
import time

import pytest
from PIL import Image

from deploy.engine import Engine
from tests import eyes
from tests.deploy import servers
from tests.vlm.test_label_files import photo
from utils.run import UserError
from vlm import label_endpoint, label_files, llava, pseudo_label
from vlm.serve import worker

NAMES = ["fog", "Sun"]


class Fake:
    """A server whose answers are in a list: a text, a status, or a function of the body."""

    def __init__(self):
        self.answers = []
        self.bodies = []
        self.headers = []
        self.retry_after = None
        self.at_once = 0
        self.most = 0
        lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                with lock:
                    outer.at_once += 1
                    outer.most = max(outer.most, outer.at_once)
                    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers))
                    answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                time.sleep(0.02)
                with lock:
                    outer.at_once -= 1
                self.reply(answer)

            def reply(self, answer):
                status = answer if isinstance(answer, int) else 200
                message = {"message": {"content": answer}}
                usage = {"prompt_tokens": 100, "completion_tokens": 7}
                found = {"choices": [message], "usage": usage}
                content = json.dumps(found if status == 200 else {"error": "no"}).encode()
                self.send_response(status)
                missing = 9 if answer == "cut off" else 0
                self.send_header("Content-Length", str(len(content) + missing))
                if status in (301, 302, 307):
                    self.send_header("Location", f"{outer.address}/elsewhere")
                if outer.retry_after:
                    self.send_header("Retry-After", outer.retry_after)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *about):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def fake(monkeypatch):
    for name in label_endpoint.KEYS:
        monkeypatch.delenv(name, raising=False)
    found = Fake()
    yield found
    found.server.shutdown()
    found.server.server_close()


def config(fake, **more):
    more = {"model": "m", "retries": 2, "prompts": ("What?", "And {classes}?")} | more
    return pseudo_label.Config(endpoint=fake.address, **more)


def answer(label):
    return json.dumps({"label": label})


@pytest.fixture
def folder(tmp_path):
    for n in range(6):
        photo(tmp_path / f"photos/{n}.png", n, (900, 300))
    return label_files.read_folder(tmp_path / "photos", tuple(NAMES))[0]


def test_a_photo_is_asked_about_by_every_prompt(fake, folder):
    fake.answers = [answer("sun"), answer("unsure")]
    row = label_endpoint.label_photo(config(fake), folder[0], NAMES)
    assert row["answers"] == [1, -1] and row["photo"] == "0.png"
    assert row["tokens_in"] == 200 and row["tokens_out"] == 14
    assert row["sha256"] == label_files.digest(folder[0].path)
    # the photo, then the question with the class list
    first, second = fake.bodies
    picture, text = first["messages"][0]["content"]
    assert text["text"].startswith("What? One of: fog, Sun;") and first["temperature"] == 0
    assert second["messages"][0]["content"][1]["text"] == "And fog, Sun?"
    assert picture == second["messages"][0]["content"][0]
    # at most `side` pixels
    packed = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
    assert Image.open(io.BytesIO(packed)).size == (448, 149)
    # JSON with a name of the list or "unsure"
    schema = first["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["label"]["enum"] == [*NAMES, "unsure"]
    assert schema["required"] == ["label"] and schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ('{"label": "fog"}', 0),
        ('{"label": "SUN"}', 1),
        ("Sun.", 1),
        ('"fog"', 0),
        ('{"label": "unsure"}', -1),
        ('{"label": "foggy"}', -1),
        ('{"name": "fog"}', -1),
        ("[]", -1),
        ("null", -1),
        ("", -1),
        (None, -1),
        ("It is fog or sun", -1),
    ],
)
def test_answers(said, expected):
    assert label_endpoint.parse_answer(said, NAMES) == expected


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_can_help_is_tried_again_after_longer_and_longer_waits(fake, status):
    fake.answers = [status, status, status, answer("fog")]
    waits = []
    found = label_endpoint.post(fake.address, {}, retries=3, sleep=waits.append)
    assert found["choices"] and len(fake.bodies) == 4 and len(waits) == 3
    for attempt, wait in enumerate(waits):
        assert 2**attempt <= wait <= 2 * 2**attempt
    # or as long as the server says
    fake.answers = [status, answer("fog")]
    fake.retry_after = "7"
    waits.clear()
    label_endpoint.post(fake.address, {}, sleep=waits.append)
    assert waits == [7]
    fake.retry_after = "100000"
    fake.answers = [status, answer("fog")]
    label_endpoint.post(fake.address, {}, sleep=waits.append)
    assert waits[1] == label_endpoint.LONGEST_WAIT


def test_tries_end(fake):
    fake.answers = [503]
    with pytest.raises(UserError, match=r"tried 3 times; status 503"):
        label_endpoint.post(fake.address, {}, retries=2, sleep=lambda seconds: None)
    assert len(fake.bodies) == 3
    # an answer that ends too early, and one that never begins
    fake.answers = ["cut off", answer("fog")]
    found = label_endpoint.post(fake.address, {}, retries=1, sleep=lambda seconds: None)
    assert label_endpoint.read_answer(found, NAMES)[0] == 0
    with pytest.raises(UserError, match="tried 2 times"):
        label_endpoint.post("http://127.0.0.1:1/v1", {}, retries=1, sleep=lambda seconds: None)


@pytest.mark.parametrize("status", [400, 401, 404, 302, 307])
def test_what_cannot_help_is_refused_at_once(fake, status, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    fake.answers = [status]
    with pytest.raises(UserError, match=f"refuses, status {status}") as found:
        label_endpoint.post(fake.address, {}, sleep=lambda seconds: None)
    assert len(fake.bodies) == 1 and "secret-key" not in str(found.value)


def test_a_key_comes_from_the_environment_and_goes_over_https(fake, monkeypatch):
    fake.answers = [answer("fog")]
    label_endpoint.post(fake.address, {})
    assert "Authorization" not in fake.headers[0]
    monkeypatch.setenv("OPENAI_API_KEY", "two")
    monkeypatch.setenv("VLM_ACTION_API_KEY", "one")
    label_endpoint.post(fake.address, {})
    assert fake.headers[1]["Authorization"] == "Bearer one"
    with pytest.raises(UserError, match="https alone") as found:
        label_endpoint.headers_of("http://example.org/v1")
    assert "one" not in str(found.value).replace("alone", "")
    assert label_endpoint.headers_of("https://example.org/v1")["Authorization"]
    for address in ("ftp://x/v1", "example.org", "http://"):
        with pytest.raises(UserError, match="no address"):
            label_endpoint.headers_of(address)


def test_at_most_so_many_at_once_and_what_is_done_is_kept(fake, folder):
    fake.answers = [answer("fog")]
    rows = []
    cfg = config(fake, parallel=2, prompts=("What?",))
    label_endpoint.label(cfg, folder, NAMES, rows.append)
    assert sorted(row["photo"] for row in rows) == [p.name for p in folder]
    assert fake.most == 2
    # the third photo is refused: no more than those under way are asked about after it
    rows.clear()
    fake.bodies.clear()
    fake.answers = [answer("fog"), answer("fog"), 400]
    with pytest.raises(UserError, match="refuses"):
        label_endpoint.label(config(fake, parallel=1, prompts=("W",)), folder, NAMES, rows.append)
    assert [row["photo"] for row in rows] == ["0.png", "1.png"] and len(fake.bodies) <= 4


@pytest.mark.parametrize("found", [{}, {"choices": []}, {"choices": [{"message": None}]}])
def test_other_protocols_are_refused(found):
    with pytest.raises(UserError, match="OpenAI's protocol"):
        label_endpoint.read_answer(found, NAMES)
    # usage may be missing
    message = {"choices": [{"message": {"content": "fog"}}], "usage": None}
    assert label_endpoint.read_answer(message, NAMES) == (0, 0, 0)


def test_cost_is_counted_before_anything_is_sent(fake, folder):
    cfg = config(fake, prompts=("x" * 40 + "{classes}",), price_in=2.0, price_out=10.0)
    found = label_endpoint.estimate(cfg, folder, NAMES)
    # 40 letters and "fog, Sun": 12 tokens
    assert found["photos"] == found["requests"] == 6
    assert found["tokens in"] == 6 * (255 + 12) and found["tokens out"] == 6 * 12
    assert found["cost"] == pytest.approx((1602 * 2 + 72 * 10) / 1e6)
    assert not fake.bodies


def test_the_books_own_server_answers_with_a_class(tmp_path, folder, monkeypatch):
    talker = eyes.talker(tmp_path / "talker")
    monkeypatch.setattr(llava, "load", lambda *about: talker)
    tokenizer, language, about = worker.load(worker.Config(device="cpu"))
    about |= {"name": "llava", "engine": Engine(language, blocks=200, block_size=8)}
    with servers.running(language, tokenizer, **about) as server:
        cfg = config(server, model="llava", prompts=("What?",), parallel=3)
        rows = []
        label_endpoint.label(cfg, folder[:3], NAMES, rows.append)
    # random weights: any class, but one of the list, for the answer is constrained
    assert {row["photo"] for row in rows} == {"0.png", "1.png", "2.png"}
    assert all(row["answers"][0] in (-1, 0, 1) and row["tokens_in"] > 10 for row in rows)
