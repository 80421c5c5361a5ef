"""rag/answer.py: the prompt, the citations, poisoned passages, and models in this process and behind an address."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from rag import answer
from rag.poison import ORDERS
from tests.passages import dense, document, documents
from utils.run import UserError


@pytest.fixture(scope="module")
def llm():
    return answer.Local("smollm2", tokens=12)


def test_passages_are_marked_off_and_attributed():
    text = answer.fence(documents()[:2])
    assert text.startswith('<passage number="1" source="file.md">\nthe cat sat on the mat\n</passage>')
    chat = answer.messages("Who sat?", documents()[:2])
    assert [m["role"] for m in chat] == ["system", "user"] and chat[1]["content"].endswith("Question: Who sat?")
    assert answer.messages("Who sat?")[1]["content"] == "Who sat?"


@pytest.mark.parametrize("poison", ORDERS.values(), ids=ORDERS)
def test_a_passage_cannot_leave_its_marks(poison):
    text = answer.fence([document(poison, "a/0"), document("fine", "b/0")])
    assert text.count("<passage ") == 2 and text.count("</passage>") == 2
    assert text.index('<passage number="2"') > text.index("HACKED")
    quote = document("x", "c/0")
    quote.metadata["source"] = 'a"> <b'
    assert answer.fence([quote]).splitlines()[0].count('"') == 4


@pytest.mark.parametrize("poison", ORDERS.values(), ids=ORDERS)
def test_a_passage_cannot_speak_for_the_system(poison, llm):
    """Special tokens in a passage are letters: the prompt has as many beginnings of a message as it has messages."""
    ids = llm.prompt(answer.messages("Who?", [document(poison, "a/0")]))[0].tolist()
    start = llm.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids.count(start) == 3  # system, user, and the answer to come


def test_citations_are_checked():
    passages = documents()[:3]
    assert answer.citations("It sat [1], as in [3] and [1]; see [7] and [0].", passages) == ([1, 3], [7, 0])
    assert answer.citations("No source. x[12345] [a]", passages) == ([], [])


def test_the_words_come_one_by_one_and_are_those_of_generate(llm):
    chat = answer.messages("Name a colour.")
    pieces = list(llm.stream(chat))
    ids = llm.prompt(chat)
    whole = llm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                               repetition_penalty=1.1)  # fmt: skip
    assert len(pieces) > 3 and "".join(pieces) == llm.tokenizer.decode(
        whole[0, ids.shape[1] :], skip_special_tokens=True
    )


def test_a_reader_that_leaves_stops_the_model(llm, monkeypatch):
    steps = []
    forward = llm.model.forward
    monkeypatch.setattr(llm.model, "forward", lambda *a, **k: steps.append(1) or forward(*a, **k))
    words = llm.stream(answer.messages("Count to a hundred."))
    next(words)
    words.close()  # returns when the thread has ended
    made = len(steps)
    assert made < 12 and [t.name for t in threading.enumerate() if "generate" in t.name] == []
    time.sleep(0.5)
    assert len(steps) == made


def test_an_error_of_the_model_reaches_the_reader(llm, monkeypatch):
    def fail(*args, **rest):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(llm.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):  # and does not keep the reader waiting
        list(llm.stream(answer.messages("x")))


def test_the_loss_is_that_of_transformers(llm, parity):
    chat, told = answer.messages("What is the sky?"), "The sky is blue."
    before = llm.prompt(chat)
    ids = torch.cat([before, llm.tokenizer(told, return_tensors="pt", add_special_tokens=False)["input_ids"]], 1)
    labels = ids.clone()
    labels[:, : before.shape[1]] = -100
    theirs = llm.model(ids, labels=labels).loss.float()
    parity(
        "RAG",
        "answer.Local.loss",
        "LlamaForCausalLM loss with a masked prompt",
        llm.loss(chat, told),
        theirs,
        atol=2e-3,
    )


def test_the_chain_retrieves_writes_and_streams():
    seen = []

    class Fake:
        def stream(self, chat):
            seen.append(chat)
            yield from ("It ", "sat ", "[1].")

    assert list(answer.chain(Fake(), dense(), k=2).stream("the cat on the mat")) == ["It ", "sat ", "[1]."]
    assert seen[0][1]["content"].count("<passage ") == 2 and "the cat sat" in seen[0][1]["content"]
    assert "".join(answer.chain(Fake()).stream("x")) == "It sat [1]." and "<passage" not in seen[1][1]["content"]


class Server(BaseHTTPRequestHandler):
    """Two routes of OpenAI's protocol: the list of models, and a chat that is streamed."""

    def do_GET(self):
        self.reply({"data": [{"id": "tiny", "object": "model"}], "object": "list"})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "tiny" and asked["messages"][0]["role"] == "system"
        if "fail" in asked["messages"][1]["content"]:
            return self.send_error(400, "bad")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in ("So ", "it ", "is."):
            choice = {"index": 0, "delta": {"role": "assistant", "content": word}, "finish_reason": None}
            part = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(part)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def reply(self, content):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: Any):
        pass


def test_a_model_behind_an_address(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    for name in (url, f"{url}#tiny"):
        llm = answer.language_model(name, 5)
        assert [w for w in llm.stream(answer.messages("x")) if w] == ["So ", "it ", "is."]
    with pytest.raises(UserError, match="the server of --llm failed"):
        list(answer.language_model(url, 5).stream(answer.messages("fail")))
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="--llm http://127.0.0.1"):
        answer.language_model(url, 5)


def test_flags_that_cannot_be():
    with pytest.raises(UserError, match="--tokens"):
        answer.language_model("smollm2", 0)


def test_an_answer_as_long_as_the_model_reads_is_refused():
    with pytest.raises(UserError, match="no room"):
        answer.Local("smollm2", tokens=9000)
