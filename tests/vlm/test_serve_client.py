"""vlm/serve/client.py and content.py: messages, errors as one line, photos through the gateway with the tiny model."""

from types import SimpleNamespace

import openai
import pytest
import torch
from PIL import Image

from tests import eyes
from tests.deploy import servers
from tests.vlm.chats import loud, picture
from tests.vlm.fake_workers import FakeWorker, closed_worker, running
from utils.run import UserError
from vlm import llava
from vlm.serve import client, content, worker

ASK = [{"role": "user", "content": "What is it?"}]


def test_messages_of_turns():
    turns = [("data:x", "What?", "a fig"), ("", "Why?", "so")]
    found = client.messages_of(turns, "And this?", "data:y")
    assert [m["role"] for m in found] == ["user", "assistant"] * 2 + ["user"]
    assert found[0]["content"] == content.question("data:x", "What?")
    assert [m["content"] for m in found[1:4]] == ["a fig", "Why?", "so"]
    assert found[4]["content"][0]["image_url"]["url"] == "data:y"


def test_photos_through_the_gateway_are_those_of_the_worker(tmp_path, monkeypatch, parity):
    """The tiny model: a chat of two turns with a photo, asked for directly and through the gateway."""
    tokenizer, model = eyes.talker(tmp_path)
    monkeypatch.setattr(llava, "load", lambda *about: (tokenizer, loud(model)))
    tokenizer, language, about = worker.load(worker.Config(device="cpu"))
    photo = torch.nn.functional.interpolate(picture(1)[None].float(), 60)[0].byte()
    url = content.data_url(Image.fromarray(photo.permute(1, 2, 0).numpy()))
    messages = client.messages_of([(url, "What?", "a fig")], "And now?")
    with servers.running(language, tokenizer, **about) as direct:
        about = {"url": direct.root, "shutdown": int, "server_close": int}
        with running([SimpleNamespace(**about)]) as made:
            said = ["".join(client.stream_chat(one.address, messages)) for one in (direct, made)]
            with openai.OpenAI(base_url=made.address, api_key="x", max_retries=0) as asking:
                about = {"model": "model", "temperature": 0, "max_tokens": 64}
                whole = asking.chat.completions.create(messages=messages, **about)
    assert whole.choices[0].message.content == said[1] and said[0]
    rows = [torch.tensor(list(text.encode())) for text in said]
    parity("Server", "gateway.forward, chat with a photo", "the worker, openai client", *rows, 0)


def test_what_is_no_answer_is_one_line():
    for raw, line in (
        (b'{"error": {"message": "so so"}}', "so so"),
        (b"<html>\n502 </html>", "<html> 502 </html>"),
        (b"", "no reason"),
        (b"\xff", "\ufffd"),
    ):
        assert line in client.error_line(raw)
    one = closed_worker()
    with pytest.raises(UserError, match="ConnectError"):
        list(client.stream_chat(f"{one.url}/v1", ASK))
    with running([FakeWorker("one", 418)]) as made, pytest.raises(UserError, match="^no$"):
        list(client.stream_chat(made.address, ASK))
