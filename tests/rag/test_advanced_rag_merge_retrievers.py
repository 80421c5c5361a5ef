"""rag/advanced_rag_merge_retrievers.py: BM25, reciprocal rank fusion and reordering against other libraries."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from langchain_community.document_transformers import LongContextReorder
from qdrant_client.http.models import ScoredPoint
from qdrant_client.hybrid.fusion import reciprocal_rank_fusion
from rank_bm25 import BM25Okapi

from rag import advanced_rag_merge_retrievers as merging
from rag import corpus, word_segmentation
from rag.advanced_rag_merge_retrievers import BM25
from tests.passages import QUICK, TEXTS, dense, documents
from utils.run import UserError


@pytest.fixture(scope="module")
def texts():
    sections, questions = corpus.manuals()
    return [s.page_content for s in corpus.sample(sections, questions, 100)], [
        q.text for q in questions[:20]
    ]


def test_bm25_is_that_of_rank_bm25_with_our_idf(texts, parity):
    """Its own idf falls below zero for words that half of the texts hold, and is then replaced: ours never does."""
    known, asked = texts
    mine, theirs = (
        BM25(known),
        BM25Okapi([word_segmentation.terms(t) for t in known], k1=1.5, b=0.75),
    )
    held = {w: sum(w in freq for freq in theirs.doc_freqs) for w in theirs.idf}
    theirs.idf = {w: merging.idf(n, len(known)) for w, n in held.items()}
    a = torch.tensor(np.stack([mine.scores(q) for q in asked]))
    b = torch.tensor(np.stack([theirs.get_scores(word_segmentation.terms(q)) for q in asked]))
    parity("RAG", "merge.BM25.scores (Eq. 3.15)", "rank_bm25 BM25Okapi with the same idf", a, b)
    okapi = BM25Okapi([word_segmentation.terms(t) for t in known], k1=1.5, b=0.75)
    rare = {w: x for w, x in okapi.idf.items() if held[w] <= 3}
    diff = [merging.idf(held[w], len(known)) - x for w, x in rare.items()]
    # For rare words both are the same but for the one in the logarithm
    assert max(map(abs, diff)) < 0.02


def test_bm25_by_hand():
    index = BM25(["a b", "a c", "c c c c"])
    assert index.scores("z").tolist() == [0, 0, 0] and index.scores("b").argmax() == 0
    worth, mean = index.scores("c"), 8 / 3
    by_hand = np.log(1 + 1.5 / 2.5) * 4 * 2.5 / (4 + 1.5 * (0.25 + 0.75 * 4 / mean))
    assert worth[2] == pytest.approx(by_hand) and worth[2] > worth[1] > worth[0] == 0
    assert word_segmentation.terms("Set task_acks_late, OK?") == [
        "set",
        "task_acks_late",
        "ok",
        "task",
        "acks",
        "late",
    ]


def test_rrf_is_that_of_qdrant(parity):
    generator = np.random.default_rng(0)
    rankings = [[str(x) for x in generator.permutation(30)[:12]] for _ in range(3)]
    points = [[ScoredPoint(id=int(x), version=0, score=0) for x in ranking] for ranking in rankings]
    # Rank + 61 - 1
    theirs = {str(p.id): p.score for p in reciprocal_rank_fusion(points, 99, ranking_constant_k=61)}
    mine = dict(merging.rrf(rankings, 60))
    assert list(mine.values()) == sorted(mine.values(), reverse=True)
    keys = sorted(mine)
    parity("RAG", "merge.rrf", "qdrant_client reciprocal_rank_fusion", torch.tensor([mine[k] for k in keys]),
           torch.tensor([theirs[k] for k in keys]))  # fmt: skip
    assert mine.keys() == theirs.keys()


def test_rrf_prefers_what_both_found():
    assert merging.rrf([["a", "b"], ["c", "b"]], 60)[0] == ("b", 2 / 62)
    assert merging.rrf([["a", "b"], ["c", "b"]], 1)[0][1] == pytest.approx(2 / 3)
    assert merging.rrf([]) == []


def test_turns():
    assert [name for name, _ in merging.round_robin([["a", "b", "c"], ["b", "d"], []])] == [
        "a",
        "b",
        "d",
        "c",
    ]


@pytest.mark.parametrize("n", range(8))
def test_reordering_is_that_of_langchain(n):
    """Both put the best at the ends; theirs begins at the other one."""
    numbers = list(range(n))
    theirs = [
        int(d.page_content)
        for d in LongContextReorder().transform_documents([_numbered(i) for i in numbers])
    ]
    assert (
        merging.edges_first(numbers) == theirs
        if n % 2
        else merging.edges_first(numbers) == theirs[::-1]
    )
    assert sorted(merging.edges_first(numbers)) == numbers


def _numbered(i):
    from langchain_core.documents import Document

    return Document(str(i))


def test_two_retrievers_are_merged():
    sparse = merging.BM25Retriever(documents=documents(), index=BM25(TEXTS), k=4)
    assert [d.metadata["id"] for d in sparse.invoke("the moon")][0] in (
        "file.md#1/0",
        "file.md#3/0",
    )
    assert sparse.invoke("zebra") == []  # a passage without any of the words is not found
    both = merging.MergedRetriever(retrievers=[dense(), sparse], merge="rrf", constant=60.0, k=3)
    found = both.invoke("the moon is far away")
    assert len(found) == 3 and found[0].metadata["id"] == "file.md#3/0"
    assert found[0].metadata["score"] == pytest.approx(2 / 61)
    ends = both.model_copy(update={"reorder": True}).invoke("the moon is far away")
    assert [d.metadata["id"] for d in ends] == [found[i].metadata["id"] for i in (0, 2, 1)]


def test_it_runs_on_the_answers_and_words_find_a_name(tmp_path):
    cfg = merging.Config(**QUICK, k=5, out=str(tmp_path))
    for merge in ("rrf", "round-robin", "bm25"):
        found = merging.build_retriever(replace(cfg, merge=merge)).invoke(
            "What does COOKIES_DEBUG do?"
        )
        assert "COOKIES_DEBUG" in found[0].page_content + found[1].page_content, merge
        assert len({d.metadata["id"] for d in found}) == len(found) <= 5
    with pytest.raises(UserError, match="--constant"):
        merging.build_retriever(replace(cfg, constant=0.0))


def test_the_curve_of_positions(tmp_path):
    """The losses are those of the model: one place for each, the same passages, only their order differs."""

    class Counting:
        asked: list = []

        def loss(self, chat, told):
            self.asked.append(chat[1]["content"])
            return float(len(self.asked))

    llm, cfg = Counting(), merging.Config(**QUICK, k=3, out=str(tmp_path))
    questions = corpus.manuals()[1][:2]
    losses, alone = merging.position_curve(
        cfg, llm, merging.build_retriever(replace(cfg, k=6)), questions
    )
    assert losses.shape == (2, 3) and alone.shape == (2,)
    for i in range(3):
        place = [p.split("</passage>")[0] for p in llm.asked[i].split("<passage ")[1:]]
        assert [questions[0].answer[:40] in p for p in place] == [j == i for j in range(3)]


def test_words_are_those_of_any_script():
    """Decomposed letters, wide letters, marks of Hindi; Chinese and Japanese by characters and pairs of them."""
    assert (
        word_segmentation.terms("Cafe\u0301")
        == word_segmentation.terms("CAF\u00c9")
        == ["caf\u00e9"]
    )
    assert word_segmentation.terms("\uff21\uff22\uff11") == ["ab1"] and word_segmentation.terms(
        "STRASSE"
    ) == word_segmentation.terms("Stra\u00dfe")
    assert word_segmentation.terms("हिन्दी में") == ["हिन्दी", "में"]
    assert word_segmentation.terms("黑猫在睡") == ["黑", "猫", "黑猫", "在", "猫在", "睡", "在睡"]
    assert word_segmentation.terms("用Python写") == ["用", "python", "写"]
    assert word_segmentation.terms("ไทย")[:3] == ["ไ", "ท", "ไท"]
    index = BM25(["黑猫在睡觉", "天气很好", "狗在跑", "cafe\u0301 हिन्दी"])
    assert index.scores("猫").argmax() == 0 and index.scores("天气").argmax() == 1
    assert index.scores("caf\u00e9").argmax() == 3 and index.scores("हिन्दी").argmax() == 3
    assert index.scores("हन").max() == 0  # letters without their marks are another word


def test_the_constant_of_rank_fusion():
    assert merging.rrf([["a", "b"]]) == [("a", 1 / 61), ("b", 1 / 62)]
    assert merging.Config().constant == 60
    sparse = merging.BM25Retriever(documents=documents(), index=BM25(TEXTS), k=4)
    rules = {"retrievers": [dense(), sparse], "k": 3}
    asked = "the moon is far away"
    found = merging.MergedRetriever(merge="rrf", constant=1.0, **rules).invoke(asked)
    assert found[0].metadata["score"] == pytest.approx(2 / 2)  # first of both
    turns = merging.MergedRetriever(merge="round-robin", constant=1.0, **rules).invoke(asked)
    assert [d.metadata["score"] for d in turns] == [1, 1 / 2, 1 / 3]
    assert len({d.metadata["id"] for d in turns}) == 3
    assert all({"source", "title", "section"} <= d.metadata.keys() for d in found + turns)


def test_the_parts_of_the_merger_are_those_of_the_flags(tmp_path, monkeypatch):
    """Words and vectors over the same passages, `depth` of each; BM25 alone brings k."""
    monkeypatch.setattr(merging.raw_rag, "passages", lambda cfg: documents())
    monkeypatch.setattr(merging.raw_rag, "open_index", lambda cfg, passages: dense().store)
    cfg = merging.Config(**QUICK, k=2, depth=3, constant=7.0, reorder=True, out=str(tmp_path))
    merged = merging.build_retriever(cfg)
    vectors, words = merged.retrievers
    assert (vectors.k, words.k, merged.k) == (3, 3, 2) and merged.constant == 7 and merged.reorder
    assert isinstance(words, merging.BM25Retriever) and type(vectors).__name__ == "DenseRetriever"
    assert merging.build_retriever(replace(cfg, k=5)).retrievers[0].k == 5
    assert merging.build_retriever(replace(cfg, merge="bm25")).k == 2
    assert [d.page_content for d in words.documents] == TEXTS and words.index.size == 4


def test_long_passages_and_common_words_weigh_less():
    index = BM25(["moon", "moon " + "x " * 50, "x", "x", "x"])
    short, long = index.scores("moon")[:2]
    assert short > 1.5 * long > 0
    flat = BM25(["moon", "moon " + "x " * 50, "x", "x", "x"], b=0)
    assert flat.scores("moon")[0] == flat.scores("moon")[1]
    # Two of five hold it, four of five
    assert index.scores("moon").max() > index.scores("x").max() > 0
    best = merging.BM25Retriever(documents=documents()[:1] * 5, index=index, k=5).invoke("moon")
    assert [round(d.metadata["score"], 6) for d in best] == [
        round(float(s), 6) for s in (short, long)
    ]
