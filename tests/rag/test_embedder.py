"""rag/embedder.py: the vectors are those of the library, each text is embedded once."""

import numpy as np
import pytest
import torch

from rag import embedder
from tests.passages import tiny_encoder
from utils import pretrained
from utils.run import UserError

TEXTS = [
    "How do I reset a password?",
    "Passwords are set with set_password().",
    "Bananas are yellow. " * 80,
]


@pytest.fixture(scope="module")
def minilm():
    return embedder.Embedder("minilm", cache=False)


def test_the_mean_of_the_token_states_is_the_vector_of_the_library(parity):
    model = embedder.load("minilm", dtype=torch.float32)
    theirs = torch.tensor(model.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False))
    mine = pretrained.embed(TEXTS, *pretrained.minilm())
    parity(
        "RAG", "pretrained.embed", "sentence_transformers SentenceTransformer.encode", mine, theirs
    )


def test_bf16_says_what_fp32_says(minilm):
    full = pretrained.embed(TEXTS, *pretrained.minilm()).numpy()
    half = minilm.encode(TEXTS)
    assert half.dtype == np.float32 and ((full * half).sum(1) > 0.998).all()
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-6)


def test_a_text_is_embedded_once(minilm, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(embedder, "KEEP", 0)
    monkeypatch.setattr(minilm, "path", tmp_path / "vectors.safetensors")
    rows = np.eye(384, dtype=np.float32)
    monkeypatch.setattr(
        minilm, "encode", lambda texts, task: asked.extend(texts) or rows[: len(texts)]
    )
    monkeypatch.setattr(minilm, "known", {})
    first = minilm.vectors(["a", "b", "a"])
    assert asked == ["a", "b"] and (first[0] == first[2]).all()
    monkeypatch.setattr(minilm, "known", {})  # another process, later
    assert (minilm.vectors(["b", "a"]) == first[[1, 0]]).all() and asked == ["a", "b"]
    minilm.vectors(["c"])
    assert asked == ["a", "b", "c"] and len(minilm.read()) == 3
    assert minilm.vectors([]).shape == (0, 384)


def test_a_name_tells_models_apart(minilm):
    assert (
        minilm.id.startswith("minilm-")
        and len(minilm.id) == len("minilm-") + 16
        and minilm.size == 384
    )


def test_no_such_model():
    with pytest.raises(UserError, match="no model nowhere/at-all"):
        embedder.load("nowhere/at-all")
    with pytest.raises(UserError, match="no model nope: name a folder or a hub id"):
        embedder.load("nope")  # is no hub id: said at once, without five attempts to reach the hub


def test_the_vector_of_a_text_does_not_depend_on_its_batch(minilm):
    """bf16 rounds otherwise with padding: texts of other lengths beside it changed a vector by 2e-3."""
    texts = [
        *TEXTS,
        "Bananas.",
        "Is it red?",
        "A password of many words is better than one of many marks.",
    ]
    together = minilm.encode(texts, "document")
    alone = np.concatenate([minilm.encode([text], "document") for text in texts])
    assert (together == alone).all()
    padded = minilm.model.encode(texts, show_progress_bar=False, batch_size=16)
    assert np.abs(embedder.unit(padded) - together).max() > 1e-4  # what the library does by itself
    states = minilm.encode(texts, "document", states=True)
    for one, text in zip(states, texts):
        assert torch.equal(one, minilm.encode([text], "document", states=True)[0])


def identity(folder, **about):
    return embedder.Embedder(tiny_encoder(folder, **about), cache=False).id.split("-")[-1]


def test_every_weight_and_every_setting_is_in_the_name(minilm, tmp_path, monkeypatch):
    """Else the vectors of another model come out of the cache."""
    weights = np.eye(4, 8, k=-1, dtype=np.float32)
    other = weights.copy()
    other[3, 7] = 0.5  # the last number of all
    first = identity(tmp_path / "a")
    assert first == identity(tmp_path / "b", weights=weights)  # the place says nothing
    assert first != identity(tmp_path / "c", weights=other)
    assert first != identity(tmp_path / "d", prompts={"document": "dog "})
    before = embedder.fingerprint(minilm.model)
    assert minilm.id == f"minilm-{before}"
    name, last = list(minilm.model.named_parameters())[-1]
    changed = last.data.clone()
    last.data.view(-1)[-1] += 1
    assert embedder.fingerprint(minilm.model) != before, name
    last.data.copy_(changed)
    monkeypatch.setattr(minilm.model[1], "pooling_mode", "cls")
    assert embedder.fingerprint(minilm.model) != before
    monkeypatch.undo()
    length = minilm.model.max_seq_length
    minilm.model.max_seq_length = 64
    assert embedder.fingerprint(minilm.model) != before
    minilm.model.max_seq_length = length
    monkeypatch.setattr(embedder, "RULES", "another way")
    assert embedder.fingerprint(minilm.model) != before
    monkeypatch.undo()
    assert embedder.fingerprint(minilm.model) == before


def test_questions_and_documents_have_prompts_of_their_own(tmp_path):
    one = embedder.Embedder(
        tiny_encoder(tmp_path, prompts={"query": "cat ", "document": "dog "}), cache=False
    )
    half = 0.5**0.5
    np.testing.assert_allclose(one.encode(["moon"])[0, :3], [half, 0, half], atol=1e-6)
    np.testing.assert_allclose(one.encode(["moon"], "document")[0, :3], [0, half, half], atol=1e-6)
    np.testing.assert_allclose(one.vectors(["moon"])[0, :3], [0, half, half], atol=1e-6)
    np.testing.assert_allclose(one.embed_query("moon")[:3], [half, 0, half], atol=1e-6)
    np.testing.assert_allclose(one.embed_documents(["moon"])[0][:3], [0, half, half], atol=1e-6)


def test_a_text_without_a_known_word_is_zero_and_no_number_is_refused(tmp_path):
    one = embedder.Embedder(tiny_encoder(tmp_path), cache=False)
    vectors = one.encode(["zebra", "moon", "", "cat"])
    assert np.isfinite(vectors).all() and np.linalg.norm(vectors, axis=1).tolist() == [0, 1, 0, 1]
    with pytest.raises(UserError, match="no numbers: take another --embedder"):
        embedder.unit(np.array([[np.nan, 1.0]]))


def test_letters_are_one_however_they_were_typed_and_half_a_character_breaks_nothing(minilm):
    assert embedder.normal("e\u0301") == "\u00e9" and embedder.normal("a\ud800") == "a\ufffd"
    typed = minilm.vectors(["cafe\u0301 \ud800", "caf\u00e9 \ufffd"])
    assert (typed[0] == typed[1]).all()


def test_a_half_downloaded_model_is_one_line(tmp_path):
    folder = tmp_path / "model"
    tiny_encoder(folder)
    weights = next(folder.rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(UserError, match=f"no model {folder}") as told:
        embedder.load(str(folder))
    assert len(str(told.value).splitlines()) == 1
