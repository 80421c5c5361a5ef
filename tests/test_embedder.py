"""rag/embedder.py: the vectors are those of the library, each text is embedded once."""

import numpy as np
import pytest
import torch

from rag import embedder
from utils import pretrained
from utils.run import UserError

TEXTS = ["How do I reset a password?", "Passwords are set with set_password().", "Bananas are yellow. " * 80]


@pytest.fixture(scope="module")
def minilm():
    return embedder.Embedder("minilm", cache=False)


def test_the_mean_of_the_token_states_is_the_vector_of_the_library(parity):
    model = embedder.load("minilm", dtype=torch.float32)
    theirs = torch.tensor(model.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False))
    mine = pretrained.embed(TEXTS, *pretrained.minilm())
    parity("RAG", "pretrained.embed", "sentence_transformers SentenceTransformer.encode", mine, theirs)


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
    monkeypatch.setattr(minilm, "encode", lambda texts, task: asked.extend(texts) or rows[: len(texts)])
    monkeypatch.setattr(minilm, "known", {})
    first = minilm.vectors(["a", "b", "a"])
    assert asked == ["a", "b"] and (first[0] == first[2]).all()
    monkeypatch.setattr(minilm, "known", {})  # another process, later
    assert (minilm.vectors(["b", "a"]) == first[[1, 0]]).all() and asked == ["a", "b"]
    minilm.vectors(["c"])
    assert asked == ["a", "b", "c"] and len(minilm.read()) == 3
    assert minilm.vectors([]).shape == (0, 384)


def test_a_name_tells_models_apart(minilm):
    assert minilm.id.startswith("minilm-") and len(minilm.id) == len("minilm-") + 16 and minilm.size == 384


def test_no_such_model():
    with pytest.raises(UserError, match="no model nowhere/at-all"):
        embedder.load("nowhere/at-all")
    with pytest.raises(UserError, match="no model nope: name a folder or a hub id"):
        embedder.load("nope")  # is no hub id: said at once, without five attempts to reach the hub
