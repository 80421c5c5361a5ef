"""rag/advanced_rag_rerank.py: late interaction and the cross-encoder against sentence-transformers; it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from langchain_core.documents import Document
from sentence_transformers import CrossEncoder
from sentence_transformers.util import similarity

from rag import advanced_rag_rerank as rerank
from tests.passages import QUICK, Bag, dense
from utils.run import UserError


def test_maxsim_is_that_of_sentence_transformers(parity):
    query, passages = (
        F.normalize(torch.randn(5, 8), dim=-1),
        [F.normalize(torch.randn(n, 8), dim=-1) for n in (3, 9, 6)],
    )
    mine = torch.stack([rerank.maxsim(query, p) for p in passages])
    parity(
        "RAG", "rerank.maxsim (Eq. 3)", "sentence_transformers maxsim", mine, similarity.maxsim([query], passages)[0]
    )


def test_maxsim_of_a_text_with_itself_is_its_length():
    states = F.normalize(torch.randn(7, 16), dim=-1)
    assert float(rerank.maxsim(states, states)) == pytest.approx(7, abs=1e-4)
    assert float(rerank.maxsim(states[:2], states)) == pytest.approx(2, abs=1e-4)


def test_before_training_the_order_is_that_of_the_quick_search():
    tokenizer, model = rerank.parts()
    found = rerank.logits(model.eval(), tokenizer, "a question", ["a text", "another, longer text"])
    assert found.tolist() == [0, 0]


def test_the_loss_and_its_gradient(parity):
    """With zero corrections it is the cross entropy of the cosines; its gradient pushes the right passage up."""
    tokenizer, model = rerank.parts()
    cosines = torch.tensor([0.4, 0.5, 0.3])
    value = rerank.loss(model.eval(), tokenizer, "q", ["right", "wrong", "wrong too"], cosines)
    parity("RAG", "rerank.loss at zero", "torch logsumexp", value, (20 * cosines).logsumexp(0) - 20 * cosines[0])
    value.backward()
    assert (
        model.classifier.bias.grad.abs() < 1e-6 < model.classifier.weight.grad.abs().max()
    )  # a common shift is nothing


def test_the_cross_encoder_is_that_of_sentence_transformers(tmp_path, parity):
    """The merged weights in fp32, read by the library's CrossEncoder."""
    cross = rerank.Cross(rerank.WEIGHTS)
    cross.model.float().save_pretrained(tmp_path)
    cross.tokenizer.save_pretrained(tmp_path)
    library = CrossEncoder(str(tmp_path), max_length=256, activation_fn=torch.nn.Identity(), device="cpu")
    found = dense().invoke("the moon")
    theirs = library.predict([("the moon", d.page_content) for d in found], show_progress_bar=False)
    cosines = rerank.SCALE * np.array([d.metadata["score"] for d in found])
    mine = torch.tensor(np.array(cross("the moon", found)) - cosines).float()
    parity("RAG", "rerank.Cross", "sentence_transformers CrossEncoder", mine, torch.tensor(theirs), atol=1e-4)


def test_it_learns_what_it_is_shown():
    """One question again and again: the right passage comes first, although its cosine is the lowest."""
    tokenizer, model = rerank.parts()
    texts, cosines = ["Cats sleep all day.", "Dogs run.", "Fish swim."], torch.tensor([0.1, 0.3, 0.2])
    cfg = rerank.Config(train=80, lr=1e-3)
    losses = list(rerank.train(model, tokenizer, [("Who sleeps?", texts, cosines)] * 80, cfg))
    assert losses[0] > 3 and losses[-1] < 0.5


def test_lessons_hide_the_title_and_leave_out_the_questions(monkeypatch):
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
            name, body = f"{words} number {i}", f"{words} here {i} " + f"word{i} and more of it " * 8
            one = Document(
                f"{name}\n\n{body}".strip(), metadata={"source": source, "id": f"{source}#{i}", "title": name}
            )
            sections.append(one)
    monkeypatch.setattr(rerank.corpus, "manuals", lambda: (sections, []))
    lessons = list(rerank.lessons(rerank.Config(train=10, negatives=3), Bag()))
    assert 0 < len(lessons) <= 10
    for question, texts, cosines in lessons:
        assert question.startswith(("Cats", "Owls")) and 1 < len(texts) == len(cosines) <= 4
        assert not any("Dogs" in t or "Fish" in t or t.startswith(question) for t in texts)
        assert (cosines[1:] < 0.95 * cosines[0]).all()  # what is closer may be right as well


def test_the_second_look_changes_the_order():
    quick = dense()
    again = rerank.RerankRetriever(quick=quick, reranker=lambda q, found: [-d.metadata["score"] for d in found], k=2)
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
