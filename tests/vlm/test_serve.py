"""Model worker: answers about photos over HTTP are those of the model; questions on one photo share its blocks."""

import io

import openai
import pytest
import torch
from PIL import Image

from deploy.engine import Engine
from deploy.int8_linear import Int8Linear
from tests import eyes
from tests.deploy import servers
from utils import data, images
from utils.run import UserError
from vlm import generation, llava, prompts
from vlm.serve import worker

ASK = "What fruit is this?"


def chat(client, url, text=ASK, **about):
    messages = [{"role": "user", "content": worker.question(url, text)}]
    about = {"max_tokens": 12, "temperature": 0} | about
    return client.chat.completions.create(model="llava", messages=messages, **about)


@pytest.mark.long
def test_answers_about_photos_and_shared_blocks(parity):
    """The shipped weights: three photos, then another question on the first."""
    tokenizer, language, about = worker.load(worker.Config())
    model = about["chat"].__closure__
    model = next(c.cell_contents for c in model if isinstance(c.cell_contents, worker.llava.Llava))
    fruit = data.groceries(348)
    chosen = [i for i, part in enumerate(fruit.split) if part == "test"][::500][:3]
    photos = [Image.fromarray(fruit.images[i].permute(1, 2, 0).numpy()) for i in chosen]
    urls = [worker.data_url(photo) for photo in photos]
    pixels = [data.square(photo, worker.SIDE) for photo in photos]
    wanted = [generation.answer(tokenizer, model, x, ASK, 12, tiles=1) for x in pixels]
    engine = Engine(language, blocks=100, block_size=8)
    about = {"name": "llava", "engine": engine} | about
    with (
        servers.running(language, tokenizer, **about) as server,
        openai.OpenAI(base_url=server.address, api_key="x", max_retries=0) as client,
    ):
        found = [chat(client, url).choices[0].message.content.strip() for url in urls]
        assert found == wanted
        # another question on a photo finds its blocks; the same question on another photo only what is before
        hits = []
        for url, text in [
            (urls[0], "Is it a vegetable?"),
            (worker.data_url(photos[0].rotate(90)), ASK),
        ]:
            before = engine.scheduler.shared
            chat(client, url, text, max_tokens=1)
            hits.append(engine.scheduler.shared - before)
        prompt = chat(client, urls[0], max_tokens=1).usage.prompt_tokens
        assert hits[0] > hits[1] and hits[0] % 8 == 0
        assert prompt > model.count
        # a stream, and what is refused
        shown = [c.choices[0].delta.content or "" for c in chat(client, urls[1], stream=True)]
        assert "".join(shown).strip() == wanted[1]
        for url, line in [
            ("http://127.0.0.1:1/x.png", "fetches no address"),
            ("data:image/png;base64,AAAA", "not a readable image"),
        ]:
            with pytest.raises(openai.BadRequestError, match=line):
                chat(client, url)
        assert servers.becomes_idle(server.service)
    rows = [torch.tensor(list(" | ".join(x).encode())) for x in (found, wanted)]
    parity(
        "Server",
        "vlm/serve/worker.py, three photos",
        "generation.answer, transformers generate",
        *rows,
        0,
    )


def test_a_conversation_becomes_questions_and_answers():
    turns = [
        ("system", ["Be brief."]),
        ("user", [b"one", "What?"]),
        ("assistant", ["A fig."]),
        ("user", ["And <image> this?", b"two"]),
    ]
    pairs, system, photos = worker.as_questions(turns)
    assert system == "Be brief." and photos == [b"one", b"two"]
    assert pairs == [("<image>\nWhat?", "A fig."), ("And < image> this?\n<image>", None)]


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [("assistant", ["A"])],
        [("user", ["A"]), ("assistant", ["B"])],
        [("user", ["A"]), ("user", ["B"])],
        [("system", [b"photo"]), ("user", ["A"])],
    ],
)
def test_conversations_that_make_no_sense(turns):
    with pytest.raises(UserError):
        worker.as_questions(turns)


def test_tokens_of_a_photo_are_kept_by_its_hash(monkeypatch):
    seen = []

    def embeddings(model, pixels, tiles):
        seen.append(pixels)
        return torch.full((1, 2, 3), float(len(seen)))

    monkeypatch.setattr(generation, "photo_embeddings", embeddings)
    tokens = worker.PhotoTokens(None, most=2)
    photos = []
    for colour in ("red", "blue", "green"):
        packed = io.BytesIO()
        Image.new("RGB", (9, 9), colour).save(packed, "PNG")
        photos.append(packed.getvalue())
    names = [tokens(photo)[0] for photo in (photos[0], photos[1], photos[0])]
    assert names[0] == names[2] != names[1] and len(seen) == 2
    # the least recently used one goes
    tokens(photos[2])
    assert tokens(photos[0])[1][0, 0] == 1 and len(seen) == 3
    tokens(photos[1])
    assert len(seen) == 4 and seen[0].shape == (3, worker.SIDE, worker.SIDE)


def test_data_urls(tmp_path):
    image = Image.new("RGB", (4, 3), "red")
    assert worker.data_url(image).startswith("data:image/png;base64,")
    image.save(tmp_path / "photo.jpg")
    assert worker.data_url(tmp_path / "photo.jpg").startswith("data:image/jpeg;base64,/9j/")
    assert images.open_image(tmp_path / "photo.jpg").size == (4, 3)


def test_layers_in_few_bits(tmp_path, monkeypatch):
    """--int8 is of the language model alone; the tower and the connector stay."""
    pair = eyes.talker(tmp_path)
    monkeypatch.setattr(llava, "load", lambda *about: pair)
    _, language, about = worker.load(worker.Config(int8=True, device="cpu"))
    assert isinstance(language.model.layers[0].mlp.up_proj, Int8Linear)
    assert not [m for m in pair[1].vision.modules() if isinstance(m, Int8Linear)]
    assert about["eos"] == prompts.ends(*pair[:1], language)
    with pytest.raises(UserError, match="blocks of 32"):
        pair = eyes.talker(tmp_path)
        worker.load(worker.Config(int4=True, device="cpu"))
