"""rag/query_transform.py: what is searched is what the model wrote, and the question itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rag import query_transform as transforming
from rag import raw_rag
from tests.passages import QUICK, TEXTS, Bag, Store
from utils.run import UserError


class Fake:
    """Says the same whatever it is asked."""

    def __init__(self, said):
        self.said, self.asked = said, []

    def stream(self, chat):
        self.asked.append(chat[0]["content"])
        yield from self.said


class Vectors(Store):
    def similarity_search_with_score_by_vector(self, vector, k=4):
        found = [
            (d, float(Bag().encode([d.page_content])[0] @ np.array(vector)))
            for d, _ in self.similarity_search_with_score("x")
        ]
        return sorted(found, key=lambda pair: -pair[1])[:k]


def retriever(kind, said, k=2):
    quick = raw_rag.DenseRetriever(store=Vectors(), k=4)
    return transforming.TransformRetriever(
        quick=quick, encoder=Bag(), llm=Fake(said), kind=kind, k=k, known={}
    )


def test_the_lines_of_the_model_are_cleaned_and_counted():
    said = (
        '1. How far is the moon?\n- "Is the moon far away?"\nok\n'
        "3) Where is the moon now?\n4. One too many, isn't it?"
    )
    assert transforming.transform(Fake(said), "multi-query", "moon?") == [
        "moon?", "How far is the moon?", "Is the moon far away?", "Where is the moon now?"]  # fmt: skip
    assert len(transforming.transform(Fake(said), "step-back", "moon?")) == 2
    assert transforming.transform(Fake(""), "hyde", "moon?") == ["moon?"]
    assert (
        "moon?" in (fake := Fake("x")).asked
        or transforming.transform(fake, "hyde", "moon?")
        and "moon?" in fake.asked[0]
    )


def test_the_vector_of_hyde_is_the_direction_between(parity):
    vectors = Bag().encode(TEXTS[:3])
    theirs = torch.nn.functional.normalize(torch.tensor(vectors).mean(0, keepdim=True), dim=-1)
    parity(
        "RAG",
        "query_transform.mean (Eq. 8)",
        "torch normalize of the mean",
        torch.tensor(transforming.mean(vectors)),
        theirs,
    )


def test_an_invented_answer_finds_the_real_one():
    """The question shares no word with the passage, the invention does."""
    asked = "lunar distance?"
    found = retriever("hyde", "the moon is very far away").invoke(asked)
    assert found[0].metadata["id"] == "file.md#3/0" and found[0].metadata["score"] > 0.4


def test_several_questions_are_merged_by_rank():
    found = retriever(
        "multi-query", "a dog barked loudly at night\nthe dog barked at something", k=4
    ).invoke("barking?")
    assert found[0].metadata["id"] == "file.md#1/0" and found[0].metadata["score"] > 1 / 61


def test_the_model_is_asked_once_a_question():
    one = retriever("step-back", "what do animals do at night?")
    assert one.invoke("dogs?") == one.invoke("dogs?") and len(one.llm.asked) == 1


def test_it_needs_a_model(tmp_path):
    cfg = replace(transforming.Config(**QUICK), out=str(tmp_path))
    with pytest.raises(UserError, match="give --llm"):
        transforming.main(cfg)
    with pytest.raises(UserError, match="--words"):
        transforming.build_retriever(replace(cfg, llm="smollm2", words=0))


def test_the_question_is_read_as_a_question_and_the_invention_as_a_document():
    asked = []

    class Two(Bag):
        def encode(self, texts, task="query"):
            asked.append((task, *texts))
            return super().encode(texts)

    one = retriever("hyde", "the moon is very far away").model_copy(update={"encoder": Two()})
    found = one.invoke("lunar distance?")
    assert asked == [("query", "lunar distance?"), ("document", "the moon is very far away")]
    between = transforming.mean(Bag().encode(["lunar distance?", "the moon is very far away"]))
    assert len(found) == 2
    assert found[0].metadata["score"] == pytest.approx(
        float(Bag().encode([TEXTS[3]])[0] @ between[0]), abs=1e-5
    )


def test_opposite_vectors_have_no_mean():
    vectors = Bag().encode(TEXTS[:1])
    assert (transforming.mean(np.concatenate([vectors, -vectors])) == 0).all()


def test_what_each_kind_asks_the_model_and_searches(tmp_path, monkeypatch):
    for kind, words in (
        ("hyde", "passage"),
        ("multi-query", "three other ways"),
        ("step-back", "more general"),
    ):
        fake = Fake("a dog barked loudly\nthe moon is far")
        found = transforming.transform(fake, kind, "moon?")
        assert (
            words in fake.asked[0]
            and fake.asked[0].endswith("Question: moon?")
            and found[0] == "moon?"
        )
        assert len(found) == {"hyde": 2, "multi-query": 3, "step-back": 2}[kind]
    merged = retriever("multi-query", "the moon is far away\nthe moon is far away now", k=1).invoke(
        "moon far away"
    )
    # First in all three rankings
    assert len(merged) == 1 and merged[0].metadata["score"] == pytest.approx(3 / 61)
    quick = []
    monkeypatch.setattr(raw_rag, "build_retriever", lambda cfg: quick.append(cfg.k))
    monkeypatch.setattr(raw_rag, "embedder", lambda name: Bag())
    monkeypatch.setattr(
        transforming.language_models,
        "language_model",
        lambda name, tokens, **rules: (name, tokens, rules),
    )
    cfg = transforming.Config(transform="step-back", k=3, words=7, out=str(tmp_path))
    one = transforming.build_retriever(cfg)
    assert one.llm == ("smollm2", 7, {"repetition_penalty": 1.1})
    assert (one.kind, one.k) == ("step-back", 3)
    assert transforming.build_retriever(replace(cfg, k=30)).k == 30 and quick == [20, 30]
