"""rag/advanced_rag_rerank.py: late interaction and the cross-encoder against sentence-transformers; it learns."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from langchain_core.documents import Document
from sentence_transformers import CrossEncoder
from sentence_transformers.util import similarity

from rag import advanced_rag_rerank as rerank
from rag import cross_encoder
from tests.passages import QUICK, Bag, dense
from utils.run import UserError


def test_maxsim_is_that_of_sentence_transformers(parity):
    query, passages = (
        F.normalize(torch.randn(5, 8), dim=-1),
        [F.normalize(torch.randn(n, 8), dim=-1) for n in (3, 9, 6)],
    )
    mine = torch.stack([rerank.maxsim(query, p) for p in passages])
    parity(
        "RAG",
        "rerank.maxsim (Eq. 3)",
        "sentence_transformers maxsim",
        mine,
        similarity.maxsim([query], passages)[0],
    )


def test_maxsim_of_a_text_with_itself_is_its_length():
    states = F.normalize(torch.randn(7, 16), dim=-1)
    assert float(rerank.maxsim(states, states)) == pytest.approx(7, abs=1e-4)
    assert float(rerank.maxsim(states[:2], states)) == pytest.approx(2, abs=1e-4)


def test_before_training_the_order_is_that_of_the_quick_search():
    tokenizer, model = cross_encoder.untrained()
    found = cross_encoder.logits(
        model.eval(), tokenizer, "a question", ["a text", "another, longer text"]
    )
    assert found.tolist() == [0, 0]


def test_the_loss_and_its_gradient(parity):
    """With zero corrections it is the cross entropy of the cosines; its gradient pushes the right passage up."""
    tokenizer, model = cross_encoder.untrained()
    cosines = torch.tensor([0.4, 0.5, 0.3])
    value = cross_encoder.loss(
        model.eval(), tokenizer, "q", ["right", "wrong", "wrong too"], cosines
    )
    parity(
        "RAG",
        "cross_encoder.loss at zero",
        "torch logsumexp",
        value,
        (20 * cosines).logsumexp(0) - 20 * cosines[0],
    )
    value.backward()
    assert (
        model.classifier.bias.grad.abs() < 1e-6 < model.classifier.weight.grad.abs().max()
    )  # a common shift is nothing


def test_the_cross_encoder_is_that_of_sentence_transformers(tmp_path, parity):
    """The merged weights in fp32, read by the library's CrossEncoder."""
    cross = cross_encoder.CrossEncoder(cross_encoder.WEIGHTS)
    cross.model.float().save_pretrained(tmp_path)
    cross.tokenizer.save_pretrained(tmp_path)
    library = CrossEncoder(
        str(tmp_path), max_length=256, activation_fn=torch.nn.Identity(), device="cpu"
    )
    found = dense().invoke("the moon")
    theirs = library.predict([("the moon", d.page_content) for d in found], show_progress_bar=False)
    cosines = cross_encoder.SCALE * np.array([d.metadata["score"] for d in found])
    mine = torch.tensor(np.array(cross("the moon", found)) - cosines).float()
    parity(
        "RAG",
        "cross_encoder.CrossEncoder",
        "sentence_transformers CrossEncoder",
        mine,
        torch.tensor(theirs),
        atol=1e-4,
    )


def test_it_learns_what_it_is_shown():
    """One question again and again: the right passage comes first, although its cosine is the lowest."""
    tokenizer, model = cross_encoder.untrained()
    texts, cosines = (
        ["Cats sleep all day.", "Dogs run.", "Fish swim."],
        torch.tensor([0.1, 0.3, 0.2]),
    )
    cfg = rerank.Config(train=80, lr=1e-3)
    losses = list(
        cross_encoder.train(model, tokenizer, [("Who sleeps?", texts, cosines)] * 80, cfg)
    )
    assert losses[0] > 3 and losses[-1] < 0.5


def test_training_examples_hide_the_title_and_leave_out_the_questions(monkeypatch):
    """Pages of questions and release notes teach nothing; no text begins with the title that it is asked by."""
    pages = {
        "a/one.txt": "Cats sleep",
        "a/faq.txt": "Dogs run",
        "a/releases/1.txt": "Fish swim",
        "a/two.txt": "Owls fly",
    }
    sections = []
    for source, words in pages.items():
        for i in range(12):
            name, body = (
                f"{words} number {i}",
                f"{words} here {i} " + f"word{i} and more of it " * 8,
            )
            one = Document(
                f"{name}\n\n{body}".strip(),
                metadata={"source": source, "id": f"{source}#{i}", "title": name},
            )
            sections.append(one)
    monkeypatch.setattr(cross_encoder.corpus, "manuals", lambda: (sections, []))
    lessons = list(cross_encoder.training_examples(rerank.Config(train=10, negatives=3), Bag()))
    assert 0 < len(lessons) <= 10
    for question, texts, cosines in lessons:
        assert question.startswith(("Cats", "Owls")) and 1 < len(texts) == len(cosines) <= 4
        assert not any("Dogs" in t or "Fish" in t or t.startswith(question) for t in texts)
        assert (cosines[1:] < 0.95 * cosines[0]).all()  # what is closer may be right as well


def test_reranking_changes_the_order():
    quick = dense()
    again = rerank.RerankRetriever(
        quick=quick, reranker=lambda q, found: [-d.metadata["score"] for d in found], k=2
    )
    first, second = quick.invoke("moon"), again.invoke("moon")
    assert [d.metadata["id"] for d in second] == [d.metadata["id"] for d in first[::-1][:2]]
    assert second[0].metadata["score"] >= second[1].metadata["score"]


@pytest.mark.parametrize("kind", ["maxsim", "cross"])
def test_it_runs_on_the_answers(kind, tmp_path):
    cfg = rerank.Config(**QUICK, reranker=kind, candidates=6, k=3, out=str(tmp_path))
    found = rerank.build_retriever(cfg).invoke("Is Django stable?")
    assert len(found) == 3 and found[0].metadata["score"] >= found[2].metadata["score"]
    assert {"source", "id", "section"} <= found[0].metadata.keys()


def test_flags_that_cannot_be(tmp_path):
    cfg = rerank.Config(**QUICK, out=str(tmp_path))
    wrongs: list = [
        ({"candidates": 0}, "--candidates"),
        ({"weights": str(tmp_path), "reranker": "cross"}, "no weights of a cross-encoder"),
    ]
    for wrong, said in [*wrongs, ({"reranker": "no/where"}, "no model no/where")]:
        with pytest.raises(UserError, match=said):
            rerank.build_retriever(replace(cfg, **wrong))


class States:
    """An encoder whose token states are given, not of unit length; notes what it is asked as."""

    def __init__(self, states):
        self.known, self.asked = states, []

    def encode(self, texts, task="query", states=False):
        assert states
        self.asked.append((task, list(texts)))
        return [self.known[text] for text in texts]


def test_maxsim_adds_the_cosine_and_the_mean_over_the_words_of_the_question():
    east, north = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0])
    encoder = States(
        {
            "q": torch.stack([east, north]),
            "one": east[None],
            "both": torch.stack([north, east, east]),
        }
    )
    found = [
        Document(name, metadata={"score": score})
        for name, score in (("one", 0.25), ("both", 0.125))
    ]
    marks = rerank.MaxSim(encoder)("q", found)
    assert marks == pytest.approx([0.25 + 1 / 2, 0.125 + 2 / 2])
    assert encoder.asked == [("query", ["q"]), ("document", ["one", "both"])]


def test_the_reranker_sees_as_many_candidates_as_asked_and_keeps_k(tmp_path, monkeypatch):
    asked = []

    def quick(cfg):
        asked.append(cfg.k)
        return dense(cfg.k)

    monkeypatch.setattr(rerank.raw_rag, "build_retriever", quick)
    monkeypatch.setattr(
        rerank,
        "reranker",
        lambda cfg: lambda q, found: asked.append(len(found)) or range(len(found)),
    )
    cfg = rerank.Config(**QUICK, candidates=4, k=2, out=str(tmp_path))
    found = rerank.build_retriever(cfg).invoke("moon")
    assert asked == [4, 4] and [d.metadata["score"] for d in found] == [3, 2]  # the highest first
    assert all({"source", "title", "section"} <= d.metadata.keys() for d in found)
    assert rerank.build_retriever(replace(cfg, k=9)).quick.k == 9
    nothing = rerank.RerankRetriever(quick=dense().model_copy(update={"k": 1}), reranker=None, k=2)
    monkeypatch.setattr(type(nothing.quick), "_get_relevant_documents", lambda *_, **__: [])
    assert nothing.invoke("moon") == []


def test_the_loss_asks_for_the_first_passage_and_adds_the_cosine(monkeypatch):
    said = torch.tensor([0.0, 1.0, 2.0])
    monkeypatch.setattr(cross_encoder, "logits", lambda *_, **__: said)
    cosines = torch.tensor([0.4, 0.2, 0.1])
    expected = -torch.log_softmax(cross_encoder.SCALE * cosines + said, 0)[0]
    assert float(cross_encoder.loss(None, None, "q", [], cosines)) == pytest.approx(float(expected))
    cross = object.__new__(cross_encoder.CrossEncoder)
    cross.model = cross.tokenizer = None
    found = [Document("x", metadata={"score": float(c)}) for c in cosines]
    assert cross("q", found) == pytest.approx((cross_encoder.SCALE * cosines + said).tolist())


def test_four_titles_make_an_update(monkeypatch):
    """The gradient of an update is the mean over four titles, clipped, and begins anew."""
    weight = torch.nn.Parameter(torch.zeros(1))
    model = SimpleNamespace(
        parameters=lambda: [weight], train=lambda: None, device=torch.device("cpu")
    )
    monkeypatch.setattr(
        cross_encoder,
        "loss",
        lambda model, tokenizer, question, texts, cosines: question * weight.sum(),
    )
    seen = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *_: seen.append(float(weight.grad)))
    scale = [8.0, 8.0, 8.0, 8.0, 0.1, 0.2, 0.3, 0.4, 1.0]
    lessons = [(x, [], torch.zeros(1)) for x in scale]
    list(cross_encoder.train(model, None, lessons, rerank.Config(train=9)))
    assert seen == pytest.approx([1.0, 0.25])  # the first one is clipped to length one
