"""rag/app.py: the limits hold, texts stay texts, nothing leaves the machine; by hand, by HTTP and in a browser."""

import json
import random
import re
import shutil
import socket
import sys
import time
from dataclasses import replace
from typing import Any
from urllib.parse import urlparse

import gradio as gr
import httpx
import pytest
from bs4 import BeautifulSoup
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from rag import answer, app, question_service, raw_rag
from tests.passages import TEXTS, dense, fuzz
from utils import run
from utils.run import UserError

POISON = (
    "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'> [a link](javascript:window.hit=3) "
    "![image](http://203.0.113.1/x.png) ${window.hit = 4} {{value}} </pre></div><iframe src='http://203.0.113.1/'>"
    '" onclick="window.hit = 5" <svg onload=alert(1)> &lt;b&gt; <b>bold</b> [1] [77]'
)


class Model:
    """A language model that always says the same, and counts."""

    def __init__(self, said, pause=0.0):
        self.words, self.pause = re.findall(r"\S+\s*", said), pause
        self.chats, self.ended = [], 0

    def stream(self, chat):
        self.chats.append(chat)
        try:
            for word in self.words:
                time.sleep(self.pause)
                yield word
        finally:
            self.ended += 1


class Broken:
    def stream(self, chat):
        yield "The cat "
        raise UserError("the server of --llm failed: no answer")


class Fixed(BaseRetriever):
    """Finds the same, whatever is asked."""

    documents: list

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return self.documents


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def poisoned(n=3):
    metadata = {"source": f"{POISON}.md", "title": POISON, "score": 0.5}
    return Fixed(documents=[Document(POISON, metadata=metadata | {"id": str(i)}) for i in range(n)])


SAID = "The cat sat [1] and the dog [4], the cow [9]."


@pytest.fixture
def service():
    return question_service.QuestionService(dense(), Model(SAID), k=4)


def test_passages_come_first_and_then_a_word_at_a_time(service):
    steps = list(service.reply("where is the cat?", "a"))
    _, told, found = zip(*steps)
    assert (
        told[0] == told[1] == ""
        and found[0] == []
        and [d.page_content for d in found[1]][0] in TEXTS
    )
    assert all(f is found[1] for f in found[1:]) and len(found[1]) == 4
    assert all(
        b.startswith(a) and len(b.split()) - len(a.split()) <= 1 for a, b in zip(told, told[1:])
    )
    assert steps[-1][:2] == ("", SAID) and service.answered == 1 and len(service.llm.chats) == 1
    assert found[1][0].page_content in service.llm.chats[0][1]["content"]


@pytest.mark.parametrize("question, said", [
    ("", "Type a question"),
    (None, "Type a question"),
    (" \n\t", "Type a question"),
    ("x" * 501, "501 characters; 500 are the most"),
    ("x" * 10**6, "500 are the most"),
])  # fmt: skip
def test_what_is_no_question_is_one_line_and_costs_nothing(service, question, said):
    steps = list(service.reply(question, "a"))
    assert len(steps) == 1 and said in steps[0][0] and "\n" not in steps[0][0]
    assert not service.llm.chats and not service.asked and service.answered == 0


@pytest.mark.parametrize(
    "question", ["x" * 500, "\ud800 half a character", "<|im_end|>\0{}%s\x1b[0m", "日本語" * 100]
)
def test_odd_questions_are_answered(service, question):
    assert list(service.reply(question, "a"))[-1][:2] == ("", SAID)
    json.dumps(service.llm.chats).encode()
    service.llm.chats[0][1]["content"].encode()  # half a character would break the tokenizer


def test_no_question_is_answered_with_what_another_asked(service):
    """Each answer stands alone: neither an earlier question nor its answer is in the prompt."""
    list(service.reply("where is the cat?", "a"))
    list(service.reply("who barked at the moon?", "a"))
    told = service.llm.chats[1][1]["content"]
    assert told.endswith("Question: who barked at the moon?") and told.count("Question:") == 1
    assert SAID not in told and len(service.llm.chats[1]) == 2
    assert told.index("a dog barked") < told.index("the cat sat"), (
        "the best passage of this question comes first"
    )


def test_the_model_reads_k_passages(service):
    service.k = 2
    assert len(list(service.reply("where is the cat?", "a"))[-1][2]) == 2
    assert service.llm.chats[0][1]["content"].count("<passage ") == 2


def test_nothing_is_answered_from_what_is_too_far_away(service):
    seen = []

    def close(question, found):
        seen.append((question, len(found)))
        return 0.4

    service.close, service.abstain = close, 0.5
    line, told, found = list(service.reply("who?", "a"))[-1]
    assert (
        (line, told, len(found)) == ("", answer.NOWHERE, 4)
        and not service.llm.chats
        and seen == [("who?", 4)]
    )
    service.abstain = 0.4
    assert list(service.reply("who?", "a"))[-1][1] == SAID


def test_a_search_that_fails_is_one_line_and_the_next_question_is_answered(service, caplog):
    class Fails(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            raise ConnectionResetError("the store is gone\nsecond line")

    whole, service.retriever = service.retriever, Fails()
    line, told, _ = list(service.reply("who?", "a"))[-1]
    assert line == "This could not be answered (ConnectionResetError)." and not told
    assert "the store is gone" in caplog.text, "the owner of the page sees why"
    service.retriever = whole
    assert list(service.reply("who?", "a"))[-1][1] == SAID and service.answered == 1


def test_fuzz_of_questions():
    """500 texts as questions, passages and answers: one line or an answer, in HTML that is ours and can be sent."""
    slowest = 0.0
    for text in fuzz(500):
        start = time.process_time()
        metadata = {"source": text[:80], "title": text[:80], "score": 0.5, "id": "0"}
        found = Fixed(documents=[Document(text[:2000], metadata=metadata)])
        line, told, documents = list(
            question_service.QuestionService(found, Model(text[:2000]), rate=1000).reply(text, "a")
        )[-1]
        assert "\n" not in line and (told or line or not text.strip() or not Model(text).words), (
            ascii(text[:80])
        )
        parts = app.show(line, told, documents)
        json.dumps(parts, ensure_ascii=False).encode()
        tags = {tag for part in parts for tag in re.findall(r"</?([a-zA-Z][^\s/>]*)", part)}
        assert tags <= {"div", "ul", "li", "a", "s", "b", "code", "small", "pre"}, ascii(text[:80])
        slowest = max(slowest, time.process_time() - start)
    assert slowest < 2


def test_rate_of_one_visitor():
    clock = Clock()
    service = question_service.QuestionService(dense(), Model("yes"), rate=3, clock=clock)

    def ask(visitor):
        return list(service.reply("who?", visitor))[-1][0]

    for clock.now in (0, 10, 20):
        assert ask("a") == ""
    clock.now = 30
    assert ask("a") == ask("a") == "More than 3 a minute: ask again in 30.0 s."
    assert ask("b") == ""  # another one is free to ask
    clock.now = 59.9
    assert "in 0.1 s" in ask("a")
    clock.now = 60
    assert ask("a") == "" and "in 10.0 s" in ask("a")
    clock.now = 200
    assert ask("c") == "" and service.asked.keys() == {"c"}, "who left is remembered"


@pytest.mark.parametrize("limit", [1, 4, 10])
def test_no_minute_holds_more_than_the_limit_and_none_is_refused_in_vain(limit):
    """Against counting: every moment of an hour of random questions."""
    dice, service_time, now = random.Random(limit), Clock(), 0.0
    service, let_in = (
        question_service.QuestionService(None, None, rate=limit, clock=service_time),
        [],
    )
    for _ in range(600):
        now += dice.choice([0.0, dice.uniform(0, 3), dice.uniform(0, 30)])
        service_time.now = now
        before = [t for t in let_in if t > now - 60]
        line = service.refuse("who?", "a")
        assert bool(line) == (len(before) >= limit)
        if line:
            seconds = question_service.seconds_to_wait(let_in, now, limit)
            assert seconds > 0 and sum(t > now + seconds - 60 + 1e-6 for t in let_in) < limit
        else:
            let_in.append(now)
    assert max(sum(t - 60 < u <= t for u in let_in) for t in let_in) == limit
    assert len(service.asked["a"]) <= limit + 1


def test_a_server_that_fails_is_one_line(service):
    service.llm = Broken()
    assert list(service.reply("who?", "a"))[-1][0] == "the server of --llm failed: no answer."


def test_without_passages_the_model_is_not_asked(service):
    service.retriever = Fixed(documents=[])
    assert list(service.reply("who?", "a"))[-1][0].startswith("No passage was found")
    assert not service.llm.chats


def test_without_a_model_there_are_passages(service):
    service.llm = None
    line, told, found = list(service.reply("who?", "a"))[-1]
    assert (line, told, len(found)) == ("", "", 4)


def test_citations_lead_to_passages_or_are_named():
    found = dense().invoke("cat")
    _, told, cited, passages = (
        BeautifulSoup(x, "html.parser") for x in app.show("", SAID + " [004] [1]", found)
    )
    ids = [x["id"] for x in passages.select(".passage")]
    assert ids == [f"passage-{i}" for i in range(1, 5)]
    assert [a["href"] for a in told.select("a")] == [
        "#passage-1",
        "#passage-4",
        "#passage-4",
        "#passage-1",
    ]
    assert [a["href"] for a in cited.select("a")] == ["#passage-1", "#passage-4"]
    assert [s.text for s in told.select("s")] == ["[9]"] and "[9] is invented" in cited.text
    assert (
        "cites no passage" in app.show("", "The cat.", found)[2]
        and "cites" not in app.show("...", "The", found)[2]
    )
    assert [x.text.split()[1] for x in passages.select(".passage")] == [
        f"{d.metadata['score']:.3f}" for d in found
    ]
    assert all(t in passages.text for t in TEXTS) and "file.md > Title" in passages.text


def test_texts_of_others_never_become_tags():
    """What a browser would build out of it: our own tags with our own attributes, and the texts as they are."""
    found = poisoned().invoke("x")
    parts = [BeautifulSoup(x, "html.parser") for x in app.show(POISON, POISON, found)]
    tags = [tag for part in parts for tag in part.find_all(True)]
    assert {t.name for t in tags} <= {"div", "ul", "li", "a", "s", "b", "code", "small", "pre"}
    assert {name for t in tags for name in t.attrs} <= {"class", "id", "href", "role"}
    assert {t["href"] for t in tags if t.name == "a"} == {"#passage-1"}
    assert [x.text for x in parts[3].select("pre")] == [POISON] * 3
    assert [x.text for x in parts[3].select("small")] == [POISON] * 3
    assert [x.text for x in parts[3].select("code")] == [f"{POISON}.md"] * 3
    assert parts[0].text == parts[1].text == POISON and f"[1] {POISON}.md" in parts[2].text


@pytest.mark.parametrize("name", app.SCRIPTS)
def test_a_retriever_is_chosen_by_name(name, monkeypatch):
    script, seen = app.SCRIPTS[name], []
    monkeypatch.setattr(script, "build_retriever", seen.append)
    cfg = app.Config(retriever=name, distractors=7, k=3, titles=True, out="somewhere")
    app.build_retriever(cfg)
    app.build_retriever(replace(cfg, chunk=123))
    assert (
        type(seen[0]) is script.Config
        and seen[0].distractors == 7
        and seen[0].k == 3
        and seen[0].titles
    )
    assert seen[0].chunk == script.Config().chunk and seen[1].chunk == 123, (
        "0 is what the script takes"
    )
    assert seen[0].out == f"somewhere/{name}"  # their indices differ


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("app")


def test_the_default_finds_the_answer(folder):
    found = app.build_retriever(app.Config(distractors=0, out=str(folder))).invoke(raw_rag.EXAMPLE)
    assert found[0].metadata["id"].startswith("django/faq/models.txt#")


def free_port():
    with socket.socket() as s:
        s.bind((app.HOST, 0))
        return s.getsockname()[1]


@pytest.fixture
def serve():
    """serve(service) -> address of its page."""
    pages = []

    def start(service, **rest):
        port = free_port()
        pages.append(app.page(service, "A page under test.", **rest))
        app.serve(pages[-1], port)
        return f"http://{app.HOST}:{port}"

    yield start
    for one in pages:
        one.close(verbose=False)


def stop(url):
    """What the button Stop sends: the ids of the functions that it cancels."""
    config = httpx.get(f"{url}/config").json()
    button = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == "stop")
    halts = [
        d for d in config["dependencies"] if [button, "click"] in [list(t) for t in d["targets"]]
    ]
    return {id for d in halts for id in d["cancels"]}, config


def ask(url, question, session="s", headers=None):
    """What the page sends, and what it is sent -> the four pieces of HTML at the end."""
    with httpx.Client(base_url=f"{url}/gradio_api", timeout=30, headers=headers) as http:
        body = {"data": [question], "fn_index": 0, "session_hash": session}
        http.post("queue/join", json=body).raise_for_status()
        with http.stream("GET", "queue/data", params={"session_hash": session}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    return message["output"]["data"]
    raise AssertionError("the stream ended early")


def test_nothing_is_uploaded(serve, service):
    """Gradio has a door for files on every page, whether or not anything there takes one."""
    answered = httpx.post(
        f"{serve(service)}/gradio_api/upload", files={"files": ("big.bin", b"x" * 2000)}
    )
    assert answered.status_code == 413, answered.text


def test_by_http(serve, service):
    service.rate, service.clock = 2, Clock()
    url = serve(service)
    note, told, cited, passages = ask(url, "where is the cat?", "one")
    assert (
        "The cat sat" in told
        and "[9]</s> is invented" in cited
        and passages.count('class="passage"') == 4
    )
    assert "501 characters" in ask(url, "x" * 501, "two")[0]
    ask(url, "where is the dog?", "three", {"X-Forwarded-For": "203.0.113.7"})
    line = ask(url, "and the cow?", "four", {"X-Forwarded-For": "203.0.113.8"})[0]
    assert "More than 2 a minute" in line, (
        "a new session, or an address that the visitor names, is a new visitor"
    )
    assert len(service.llm.chats) == 2


def test_what_is_served_names_no_other_machine(serve, service):
    url = serve(service)
    got = {path: httpx.get(url + path).raise_for_status().text for path in ("/", "/theme.css")}
    names = re.findall(r"""(?:src|href)=["']?\s*((?:https?:)?//[^"'\s>]+)""", got["/"])
    names += re.findall(
        r"""(?:@import|url\()\s*["']?((?:https?:)?//[^"')\s]+)""", "".join(got.values())
    )
    names += json.loads(httpx.get(f"{url}/config").text).get("stylesheets", [])
    assert [n for n in names if urlparse(n).hostname not in (app.HOST, None)] == []
    assert "font" in got["/theme.css"] and "googleapis" not in got["/"] + got["/theme.css"]


def test_there_is_no_other_door(serve, service):
    service.rate, service.clock = 1, Clock()
    url = serve(service)
    info = httpx.get(f"{url}/gradio_api/info").json()
    assert info["named_endpoints"] == info["unnamed_endpoints"] == {}
    for path in ("run/predict", "run/ask", "api/ask"):
        assert (
            httpx.post(
                f"{url}/gradio_api/{path}", json={"data": ["who?"], "fn_index": 0}
            ).status_code
            >= 400
        )
    for path in ("rag/app.py", str(app.__file__), "/etc/passwd"):
        assert httpx.get(f"{url}/gradio_api/file={path}").status_code >= 400
    assert httpx.get(f"{url}/monitoring/summary").status_code >= 400
    assert not service.llm.chats
    for _ in "ab":  # Gradio's other name of the queue leads to the same service
        event = httpx.post(f"{url}/gradio_api/call/ask", json={"data": ["who?"]}).json()["event_id"]
        told = httpx.get(f"{url}/gradio_api/call/ask/{event}", timeout=30).text
    assert "More than 1 a minute" in told and len(service.llm.chats) == 1


def join(url, session, address="127.0.0.1", headers=None):
    """One more question into the queue, from another address of this machine -> the reply."""
    body = {"data": ["who?"], "fn_index": 0, "session_hash": session}
    with httpx.Client(
        transport=httpx.HTTPTransport(local_address=address), headers=headers
    ) as http:
        return http.post(f"{url}/gradio_api/queue/join", json=body)


def test_only_so_many_wait(serve, service):
    """Of one visitor two behind the one that is being answered, whatever he calls himself; of all of them eight."""
    service.llm, service.rate = Model("slow " * 20, pause=0.1), 1000
    url = serve(service)
    assert join(url, "first").status_code == 200
    deadline = time.monotonic() + 10
    while not service.llm.chats and time.monotonic() < deadline:
        time.sleep(0.02)
    mine = [
        join(url, str(i), headers={"X-Forwarded-For": f"203.0.113.{i}"})
        for i in range(app.WAITING + 2)
    ]
    assert [r.status_code for r in mine] == [200] * app.PLACES + [503] * (
        app.WAITING + 2 - app.PLACES
    )
    assert "of your questions wait already" in mine[-1].text
    others = [
        join(url, f"other {i}", f"127.0.0.{2 + i}") for i in range(app.WAITING - app.PLACES + 2)
    ]
    assert [r.status_code for r in others] == [200] * (app.WAITING - app.PLACES) + [503] * 2
    assert "full" in others[-1].text and len(service.llm.chats) == 1, "one is answered at a time"


def test_stop_ends_the_answer_and_the_model(serve, service):
    """The button cancels every way to ask; after that the model says nothing more, and the next one is answered."""
    service.llm = Model("word " * 400, pause=0.02)
    url = serve(service, examples=["Where is the moon?"])
    cancels, config = stop(url)
    asks = {
        d["id"] for d in config["dependencies"] if d["api_name"] and d["api_name"].startswith("ask")
    }
    assert len(asks) == 2 and asks <= cancels
    event = join(url, "one").json()["event_id"]
    with httpx.stream(
        "GET", f"{url}/gradio_api/queue/data", params={"session_hash": "one"}, timeout=20
    ) as lines:
        for line in lines.iter_lines():
            if "word word" in line:
                break
        stopped = {"session_hash": "one", "fn_index": 0, "event_id": event}
        httpx.post(f"{url}/gradio_api/cancel", json=stopped).raise_for_status()
    deadline = time.monotonic() + 10
    while not service.llm.ended and time.monotonic() < deadline:
        time.sleep(0.02)
    assert service.llm.ended == 1 and service.answered == 0, "the model goes on"
    service.llm = Model(SAID)
    assert "The cat sat" in ask(url, "where is the dog?", "two")[1]


def test_the_command_answers_once_without_any_connection(folder, tmp_path, monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a socket was opened to {address}")

    said = Model(SAID)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(app.language_models, "language_model", lambda name, tokens: said)
    monkeypatch.setattr(
        app,
        "build_retriever",
        lambda cfg, build=app.build_retriever: build(replace(cfg, out=folder)),
    )
    metrics = app.main(app.Config(once=True, distractors=0, out=str(tmp_path)))
    assert metrics["answer"] == SAID and metrics["cited"] == [1, 4] and metrics["invented"] == [9]
    assert metrics["passages"][0].startswith("django/faq/models.txt#")
    assert (
        json.loads((tmp_path / "metrics.json").read_text())["answer"] == SAID
        and len(said.chats) == 1
    )
    assert said.chats[0][1]["content"].endswith(f"Question: {raw_rag.EXAMPLE}")
    metrics = app.main(
        app.Config(once=True, distractors=0, out=str(tmp_path), question="How do I bake bread?")
    )
    assert metrics["answer"] == answer.NOWHERE and len(said.chats) == 1, (
        "--abstain reaches the service"
    )


def test_the_command_serves_and_loads_once(tmp_path, monkeypatch, capsys):
    """All but the waiting for Ctrl-C, in whose place two questions are asked."""
    port, loaded = free_port(), []

    def load(name, tokens):
        loaded.append(Model(SAID))
        return loaded[-1]

    def two_questions(page):
        url = f"http://{app.HOST}:{port}"
        assert url in capsys.readouterr().out
        assert all("The cat sat" in ask(url, "who?", session)[1] for session in "ab")
        with pytest.raises(OSError), socket.create_connection((other_address(), port), timeout=2):
            pass
        page.close(verbose=False)

    monkeypatch.setattr(app.language_models, "language_model", load)
    monkeypatch.setattr(app, "build_retriever", lambda cfg: dense())
    monkeypatch.setattr(gr.Blocks, "block_thread", two_questions)
    metrics = app.main(app.Config(port=port, abstain=-1, out=str(tmp_path)))
    assert metrics == {"questions answered": 2} and len(loaded) == 1 and len(loaded[0].chats) == 2
    assert "who?" not in "".join(p.read_text() for p in tmp_path.glob("*.json")), (
        "nothing that was asked is kept"
    )


def other_address():
    """Another address of this machine than 127.0.0.1: on Linux all of 127.0.0.0/8 is."""
    return "127.0.0.2"


@pytest.mark.parametrize("flags, said", [
    ("--port TAKEN", "address already in use; choose another one"),
    ("--port 0", "--port: 1 to 65535"),
    ("--port 70000", "--port: 1 to 65535"),
    ("--rate 0", "--rate: 1 or more"),
    ("--once --llm no/such-model", "no/such-model"),
    ("--once --tokens 0", "--tokens"),
    ("--once --llm none --docs nowhere --question x", "--docs nowhere is not a folder"),
    ("--once --llm none --docs rag", "ask one with --question"),
    ("--abstain 2", "--abstain is a cosine"),
    ("--once --llm none --distractors 0 --question " + "x" * 501, "501 characters"),
])  # fmt: skip
def test_bad_flags_are_one_line(flags, said, tmp_path, monkeypatch, capsys):
    with socket.socket() as other:
        other.bind((app.HOST, 0))
        other.listen()
        words = flags.replace("TAKEN", str(other.getsockname()[1])).split()
        monkeypatch.setattr(sys, "argv", ["rag/app.py", *words, "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as end:
            run.cli(app.main, app.Config)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "metrics.json").exists()


# In a browser: the package `chromium` of a Linux distribution, driven by the Python package `playwright`.


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install playwright"
    )
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no browser on this machine: install the package chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """A browser at our page, that writes down what it is told and where it goes."""

    def __init__(self, browser, url):
        self.tab, self.hosts, self.complaints = (
            browser.new_page(viewport={"width": 1200, "height": 800}),
            set(),
            [],
        )
        self.tab.set_default_timeout(20000)
        self.tab.on("request", lambda r: self.hosts.add(urlparse(r.url).hostname))
        self.tab.on(
            "console", lambda m: self.complaints.append(m.text) if m.type == "error" else None
        )
        self.tab.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.tab.goto(url)
        self.box = self.tab.locator("#question textarea, #question input").first
        self.box.wait_for()

    def ask(self, question):
        self.box.fill(question)
        self.tab.click("#ask")

    def see(self, selector, text, timeout=20000):
        self.tab.locator(selector).filter(has_text=text).first.wait_for(timeout=timeout)

    def clean(self):
        assert self.complaints == [] and self.hosts <= {app.HOST, None, ""}


def test_browser_asks_and_follows_a_citation(chromium, serve):
    service = question_service.QuestionService(dense(), Model(SAID, pause=0.05), k=4)
    who = Visitor(chromium, serve(service, examples=["Where is the moon?"]))
    who.ask("where is the cat?")
    who.see("#passages", TEXTS[0])
    who.see(".cited", "[9] is invented")
    assert (
        who.tab.inner_text(".told").split() == SAID.split()
        and who.tab.locator(".passage").count() == 4
    )
    who.tab.click(".cited a >> text=[4]")
    assert who.tab.evaluate("document.querySelector(':target').id") == "passage-4"
    assert who.tab.url.endswith("#passage-4") and who.tab.locator("#passage-4").is_visible()
    who.ask("x" * 501)
    who.see(".note", "501 characters")
    who.tab.click(".example")
    who.see(".cited", "[9] is invented")
    assert who.box.input_value() == "Where is the moon?" and len(service.llm.chats) == 2
    assert "API" not in who.tab.inner_text("body")
    who.clean()


def test_browser_runs_nothing_out_of_texts(chromium, serve):
    who = Visitor(chromium, serve(question_service.QuestionService(poisoned(), Model(POISON))))
    who.ask("<img src=x onerror='window.hit = 6'>")
    who.see(".cited", "[77] is invented")
    who.tab.wait_for_timeout(300)
    assert who.tab.evaluate("window.hit") is None
    assert who.tab.locator("#passages :is(script, img, iframe, svg, a, [onclick])").count() == 0
    assert who.tab.locator(".told :is(script, img, iframe, svg, b, [onclick])").count() == 0
    assert who.tab.locator("#passage-1 pre").evaluate("e => e.textContent") == POISON
    who.clean()


def test_browser_stops_an_answer(chromium, serve):
    service = question_service.QuestionService(dense(), Model("word " * 400, pause=0.05), k=4)
    who = Visitor(chromium, serve(service))
    who.ask("where is the cat?")
    who.see(".told", "word word")
    who.tab.click("#stop")
    who.see(".note", "Stopped.")
    who.tab.wait_for_timeout(300)
    before = who.tab.inner_text(".told")
    who.tab.wait_for_timeout(500)
    assert who.tab.inner_text(".told") == before and service.llm.ended == 1, "the model goes on"
    service.llm = Model(SAID)
    who.ask("where is the dog?")
    who.see(".cited", "[9] is invented")
    who.clean()
