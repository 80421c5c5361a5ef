"""Model worker with a tiny model: order of texts and photos, prefix keys, limits, no address is fetched."""

import base64
import hashlib
import io
import json
import socket

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from deploy.engine import Engine
from deploy.protocol import Limits
from tests import eyes
from tests.deploy import servers
from utils import data
from utils.run import UserError
from vlm import generation, llava, prompts
from vlm.serve import worker

SIZE = 8  # tokens of a block
LIMITS = Limits(room=512, image_bytes=200_000, max_images=3)


def photo(seed):
    """A picture of our own, wider than high: its middle square is another one."""
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 255, (40, 60, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """tokenizer, LLaVA of tiny parts, 16 tokens a photo, whose answers depend on the photo."""
    tokenizer, model = eyes.talker(tmp_path_factory.mktemp("talker"))
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.mul_(20)
    return tokenizer, model


@pytest.fixture(scope="module")
def server(talker):
    tokenizer, model = talker
    patch = pytest.MonkeyPatch()
    patch.setattr(llava, "load", lambda *about: talker)
    tokenizer, language, about = worker.load(worker.Config(device="cpu"))
    patch.undo()
    engine = Engine(language, blocks=120, block_size=SIZE)
    about |= {"name": "llava", "engine": engine, "limits": LIMITS}
    with servers.running(language, tokenizer, **about) as found:
        yield found
    assert servers.is_idle(found.service)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.address, api_key="none", max_retries=0) as found:
        yield found


def part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def text(words):
    return {"type": "text", "text": words}


def chat(client, messages, new=12, **about):
    if isinstance(messages[0], dict) and "type" in messages[0]:
        messages = [{"role": "user", "content": messages}]
    about = {"max_tokens": new, "temperature": 0} | about
    return client.chat.completions.create(model="llava", messages=messages, **about)


def said(talker, turns, photos, system="", new=12):
    """What the model says without a server: generate of transformers over merged embeddings."""
    tokenizer, model = talker
    ids = torch.tensor([prompts.chat(tokenizer, turns, model.count, system)[0]])
    seen = [
        generation.photo_embeddings(model, data.square(x, worker.SIDE), tiles=1) for x in photos
    ]
    ends = prompts.ends(tokenizer, model.language)
    about = {"attention_mask": torch.ones_like(ids), "eos_token_id": ends, "pad_token_id": 0}
    found = model.generate(ids, torch.cat(seen), max_new_tokens=new, **about)
    return tokenizer.decode(found[0], skip_special_tokens=True)


def test_texts_and_photos_keep_their_order(client, talker, parity):
    """A photo first, a photo last, two photos either way, two turns with a photo each."""
    one, two = photo(1), photo(2)
    urls = [worker.data_url(one), worker.data_url(two)]
    what = "What is it?"
    cases = [
        ([part(urls[0]), text(what)], [(f"<image>\n{what}", None)], [one]),
        ([text(what), part(urls[0])], [(f"{what}\n<image>", None)], [one]),
        ([part(urls[1]), text(what)], [(f"<image>\n{what}", None)], [two]),
        ([part(urls[0]), text("and"), part(urls[1])], [("<image>\nand\n<image>", None)], [one, two]),
        ([part(urls[1]), text("and"), part(urls[0])], [("<image>\nand\n<image>", None)], [two, one]),
    ]  # fmt: skip
    found = [chat(client, content).choices[0].message.content for content, _, _ in cases]
    wanted = [said(talker, turns, photos) for _, turns, photos in cases]
    assert found == wanted and len(set(wanted)) == 5
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [part(urls[0]), text(what)]},
        {"role": "assistant", "content": "A fig."},
        {"role": "user", "content": [text("And this?"), part(urls[1])]},
    ]
    pairs = [(f"<image>\n{what}", "A fig."), ("And this?\n<image>", None)]
    wanted.append(said(talker, pairs, [one, two], "Be brief."))
    found.append(chat(client, turns).choices[0].message.content)
    rows = [torch.tensor(list(" | ".join(x).encode())) for x in (found, wanted)]
    parity("Server", "vlm/serve/worker.py, order of photos", "transformers generate", *rows, 0)


def test_the_hash_of_a_photo_is_in_the_keys_of_its_blocks(server, client, talker):
    """A second question finds the blocks of a photo; another photo those before it alone."""
    scheduler = server.service.engine.scheduler
    tokenizer, model = talker
    urls = [worker.data_url(photo(seed)) for seed in (11, 12)]
    ids, embeds, names = server.service.chat([("user", [packed(photo(11)), "Why?"])])
    places = sorted(embeds)
    # where the image tokens stand, what they are called, and what they show
    first = prompts.chat(tokenizer, [("<image>\nWhy?", None)], model.count)[0]
    assert places == [i for i, token in enumerate(first) if token == model.image_id]
    assert [ids[i] for i in range(len(ids)) if i not in embeds] == [
        token for token in first if token != model.image_id
    ]
    name = hashlib.sha256(packed(photo(11))).hexdigest()
    assert [names[i] for i in places] == [(name, i) for i in range(model.count)]
    shown = generation.photo_embeddings(model, data.square(photo(11), worker.SIDE), tiles=1)[0]
    assert torch.equal(torch.stack([embeds[i] for i in places]), shown)
    # the rows of the table are not read where a photo stands: <image> may have none
    assert {ids[i] for i in places} == {0}

    def hits(url, words):
        before = scheduler.shared
        chat(client, [part(url), text(words)], 1)
        return scheduler.shared - before

    assert hits(urls[0], "A one") <= places[0]
    again = hits(urls[0], "Another one, please")
    assert again >= places[-1] + 1 - SIZE and again % SIZE == 0
    assert hits(urls[1], "A one") <= places[0]


def refused(server, url, count=1, before=()):
    """A message with so many photos, behind others -> status, message of the error."""
    messages = [*before, {"role": "user", "content": [part(url)] * count}]
    body = {"model": "llava", "messages": messages}
    url = f"{server.address}/chat/completions"
    found = httpx.post(url, json=body | {"max_tokens": 2}, timeout=60)
    return found.status_code, found.json().get("error", {}).get("message", "")


def as_url(content, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def packed(image, kind="PNG", **about):
    buffer = io.BytesIO()
    image.save(buffer, kind, **about)
    return buffer.getvalue()


def test_limits_on_bytes_pixels_and_photos(server):
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    large = packed(Image.fromarray(noise))
    fits = packed(Image.fromarray(noise[:250, :250]))
    # it is bytes that count, not the letters of base64
    assert len(fits) < LIMITS.image_bytes < min(len(large), len(as_url(fits)))
    assert refused(server, as_url(fits))[0] == 200
    status, line = refused(server, as_url(large))
    assert status == 413 and "at most 200000 bytes" in line
    # few bytes and many pixels: a decompression bomb
    bomb = packed(Image.new("1", (9000, 5000)))
    assert len(bomb) < LIMITS.image_bytes
    status, line = refused(server, as_url(bomb))
    assert status == 400 and "megapixels" in line
    small = worker.data_url(photo(3))
    status, line = refused(server, small, 4)
    assert status == 400 and "at most 3 pictures" in line
    before = [{"role": "user", "content": [part(small)]}, {"role": "assistant", "content": "A"}]
    assert refused(server, small, 3, before)[1] == line
    assert refused(server, small, 2, before)[0] == 200
    assert servers.becomes_idle(server.service)


def test_what_is_no_picture(server):
    whole = packed(photo(4))
    for url in (
        as_url(whole[:-20]),
        as_url(b"GIF89a"),
        as_url(b"%!PS-Adobe-3.0 EPSF-3.0", "jpeg"),
        "data:image/png;base64,????",
        as_url(whole) + "?===",
        "data:text/plain;base64,AAAA",
        "data:image/svg+xml;base64,AAAA",
        "",
    ):
        status, line = refused(server, url)
        assert status == 400 and line and "\n" not in line, url
    assert servers.becomes_idle(server.service)
    # what is damaged leaves nothing behind
    assert refused(server, as_url(whole))[0] == 200


def test_no_address_is_fetched(server, tmp_path):
    """Nobody calls the address of a message, whatever it looks like."""
    file = tmp_path / "photo.png"
    photo(5).save(file)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(0.3)
        host = f"127.0.0.1:{listening.getsockname()[1]}"
        for url in (
            f"http://{host}/x.png",
            f"HTTPS://{host}/data:image/png;base64,AAAA",
            f"//{host}/x.png",
            f"file://{file}",
            str(file),
            f" data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}",
        ):
            status, line = refused(server, url)
            assert status == 400 and "fetches no address" in line, url
        with pytest.raises(TimeoutError):
            listening.accept()


def test_once_asks_about_the_photo(talker, tmp_path, monkeypatch, capsys):
    """--image, --prompt: the answer is that of the model; without --image a held-out photo of fruit."""
    monkeypatch.setattr(llava, "load", lambda *about: talker)
    photo(6).save(tmp_path / "photo.png")
    about = {"once": True, "port": 0, "prompt": "Which?", "out": str(tmp_path / "out")}
    found = worker.main(worker.Config(image=str(tmp_path / "photo.png"), **about))
    wanted = said(talker, [("<image>\nWhich?", None)], [photo(6)], new=32)
    assert worker.serve.clean(wanted) in capsys.readouterr().out
    assert found["requests"] == 1 and json.loads((tmp_path / "out/metrics.json").read_text())
    with pytest.raises(UserError, match="not a readable image"):
        worker.main(worker.Config(image=str(tmp_path / "out/metrics.json"), **about))
    # the photos of the book: grey ones, of which the test split is the second half
    monkeypatch.setattr(data, "groceries", lambda side: eyes.shop())
    assert worker.held_out_photo().getpixel((0, 0)) == (20, 20, 20)
    worker.main(worker.Config(**about))
    wanted = said(talker, [("<image>\nWhich?", None)], [worker.held_out_photo()], new=32)
    assert worker.serve.clean(wanted) in capsys.readouterr().out
