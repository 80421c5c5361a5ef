"""rag/advanced_rag_compression.py: what is kept is verbatim, what is lost is what the thresholds say."""

import time
from dataclasses import replace

import numpy as np
import pytest
from langchain_community.document_transformers.embeddings_redundant_filter import (
    _filter_similar_embeddings,
)
from langchain_community.utils.math import cosine_similarity

from rag import advanced_rag_compression as compression
from rag import corpus
from tests.passages import QUICK, Bag, dense, document
from utils.run import UserError

TEXT = "Set DEBUG to True. Then look:\n\n    connection.queries\n\n* one thing\n* another. It's a list of e.g. dicts."


def test_sentences_put_together_are_the_text():
    parts = compression.sentences(TEXT)
    assert "".join(parts) == TEXT and len(parts) >= 5 and parts[0] == "Set DEBUG to True. "
    for section in corpus.manuals()[0][::50]:
        assert "".join(compression.sentences(section.page_content)) == section.page_content
    assert compression.sentences("one") == ["one"]


def test_of_two_that_say_the_same_the_later_one_goes():
    """LangChain's filter finds the same pairs, but of each pair it drops the one that stands first, the better one."""
    generator = np.random.default_rng(0)
    base = generator.standard_normal((6, 16))
    vectors = np.concatenate([base, base[:3] + 0.01 * generator.standard_normal((3, 16))])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kept = np.flatnonzero(compression.different(vectors, 0.95)).tolist()
    theirs = _filter_similar_embeddings(vectors.tolist(), cosine_similarity, 0.95)
    # 6, 7, 8 say what 0, 1, 2 say
    assert kept == [0, 1, 2, 3, 4, 5] and sorted(theirs) == [3, 4, 5, 6, 7, 8]
    assert compression.different(vectors, 1.0).all()


def test_extraction_keeps_the_sentences_above_the_threshold_in_their_order():
    parts = ["A. ", "B. ", "C. ", "D."]
    likeness = np.array([0.1, 0.8, 0.3, 0.6])
    assert compression.extract(parts, likeness, 0.5) == "... B. ... D."
    assert compression.extract(parts, likeness, -1) == "A. B. C. D."
    assert compression.extract(parts, likeness, 0.99) == "... B."  # the best one stays in any case


def test_the_model_chooses_by_number():
    class Fake:
        def __init__(self, said):
            self.said = said

        def stream(self, chat):
            assert "1. A." in chat[0]["content"]
            yield self.said

    assert (
        compression.extract_by_llm(Fake("Lines 1 and 3, not 9."), "q", ["A. ", "B. ", "C."])
        == "A. C."
    )
    assert compression.extract_by_llm(Fake("none"), "q", ["A. ", "B. ", "C."]) == "A. B. C."


def test_what_is_held_of_an_answer():
    assert compression.held(
        "the debug setting is here", "DEBUG setting must be True"
    ) == pytest.approx(2 / 4)
    assert compression.held("", "words there") == 0


def test_it_shortens_and_keeps_the_source(tmp_path):
    cfg = compression.Config(**QUICK, k=5, out=str(tmp_path))
    retriever = compression.build_retriever(cfg)
    question = "How can I see the raw SQL queries Django is running?"
    short, whole = retriever.invoke(question), retriever.quick.invoke(question)
    size = lambda found: sum(len(d.page_content) for d in found)  # noqa: E731
    assert 0 < size(short) < size(whole)
    originals = {d.metadata["id"]: d.page_content for d in whole}
    for d in short:
        assert all(
            part.strip() in originals[d.metadata["id"]] for part in d.page_content.split("... ")
        )
        assert {"source", "id", "score"} <= d.metadata.keys()
    rows = compression.sweep(cfg, retriever, corpus.manuals()[1][:3])
    tokens, held = zip(*rows.values())
    assert list(tokens) == sorted(tokens, reverse=True) and held[0] == max(held)
    assert retriever.invoke("zzz qqq xxx") == [] or size(retriever.invoke("zzz qqq xxx")) < size(
        whole
    )


def test_flags_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="--keep is a cosine"):
        compression.build_retriever(
            replace(compression.Config(**QUICK, out=str(tmp_path)), keep=2.0)
        )


def test_sentences_of_other_scripts_and_in_proportion_to_the_size():
    assert compression.sentences("你好。今天天气很好！Yes. 走吧") == [
        "你好。",
        "今天天气很好！",
        "Yes. ",
        "走吧",
    ]
    assert compression.sentences("यह है। वह था।") == ["यह है। ", "वह था।"]
    assert compression.sentences("Schön. Über alles, z. b. dies. Это так.") == [
        "Schön. ", "Über alles, z. b. dies. ", "Это так."]  # fmt: skip
    for unit in ("\n ", ". ", "\n", " "):
        times = []
        for count in (20_000, 80_000):
            start = time.process_time()
            compression.sentences("A" + unit * count + "a")
            times.append(time.process_time() - start)
        assert times[1] < 8 * times[0] + 0.02, (unit, times)


def test_passages_and_sentences_are_judged_by_the_question_and_keep_their_metadata():
    """The filters one by one: far passages, repeated ones, far sentences; `keep` is not `relevant`."""
    texts = [
        "the moon rose. The dog barked.",
        "the moon rose. The dog barked.",
        "Cats eat fish.",
        "the moon is far.",
    ]
    found = [document(text, f"{i}") for i, text in enumerate(texts)]
    asked = []

    class Two(Bag):
        def encode(self, texts, task="query"):
            asked.append((task, *texts))
            return super().encode(texts)

    cfg = compression.Config(relevant=0.3, same=0.95, keep=0.7)
    one = compression.CompressionRetriever(quick=dense(), encoder=Two(), llm=None, cfg=cfg)
    short = one.compress("the moon rose.", found)
    assert [(d.page_content, d.metadata["id"]) for d in short][0] == ("the moon rose.", "0")
    assert [d.metadata["id"] for d in short] == ["0", "3"]
    assert all(s.metadata == found[int(s.metadata["id"])].metadata for s in short)
    assert asked[0] == ("query", "the moon rose.") and asked[1] == ("document", *texts)
    assert {task for task, *_ in asked[2:]} == {"document"}
    every = replace(cfg, relevant=-1.0, same=1.0, keep=-1.0)
    assert [
        d.page_content
        for d in one.model_copy(update={"cfg": every}).compress("the moon rose.", found)
    ] == texts
    assert one.compress("the moon rose.", []) == []


def test_a_threshold_is_reached_by_what_equals_it():
    similarity = np.array([0.2, 0.5])
    assert compression.relevant(similarity, 0.5).tolist() == [False, True]
    assert compression.extract(["A. ", "B."], similarity, 0.2) == "A. B."
