"""rag/scores.py: the measures of a ranking, against trec_eval; and intervals, against cases that are known."""

import numpy as np
import pytest
import pytrec_eval
import torch
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from rag import corpus, scores


@pytest.fixture
def ranks():
    return np.random.default_rng(0).integers(0, 13, 60)  # 0: not found


def test_measures_equal_trec_eval(ranks, parity):
    """The same rankings as files of trec_eval: 12 documents, one of them right."""
    right = {str(i): {f"d{r}" if r else "elsewhere": 1} for i, r in enumerate(ranks)}
    rankings = {
        str(i): {f"d{place}": 1.0 / place for place in range(1, 13)} for i in range(len(ranks))
    }
    judge = pytrec_eval.RelevanceEvaluator(right, {"success_1,5,10", "ndcg_cut_10", "recip_rank"})
    found = judge.evaluate(rankings)
    theirs = {name: [found[str(i)][name] for i in range(len(ranks))] for name in found["0"]}
    names = {
        "hit@1": "success_1",
        "hit@5": "success_5",
        "hit@10": "success_10",
        "nDCG@10": "ndcg_cut_10",
    }
    mine = scores.all_of(ranks)
    for ours, name in names.items():
        parity(
            "RAG",
            f"scores {ours}",
            f"trec_eval {name}",
            torch.tensor(mine[ours]),
            torch.tensor(theirs[name]),
        )
    whole = torch.tensor(scores.reciprocal_rank(ranks, 12))
    parity(
        "RAG",
        "scores.reciprocal_rank",
        "trec_eval recip_rank",
        whole,
        torch.tensor(theirs["recip_rank"]),
    )


def test_the_interval_of_a_coin_is_that_of_the_binomial():
    """Of 400 flips with 300 heads: 0.75 with 1.96 sqrt(p (1 - p) / n) on both sides."""
    mean, low, high = scores.interval(np.repeat([1.0, 0.0], [300, 100]))
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert (
        mean == 0.75
        and low == pytest.approx(0.75 - half, abs=3e-3)
        and high == pytest.approx(0.75 + half, abs=3e-3)
    )


def test_intervals_cover_the_truth_in_19_of_20_cases():
    draw = np.random.default_rng(1)
    held = [
        low <= 0.6 <= high
        for _, low, high in (scores.interval(draw.random(100) < 0.6, i) for i in range(300))
    ]
    assert 0.91 < np.mean(held) < 0.98


def test_fewer_failures():
    before, after = np.array([0, 0, 6, 9, 1, 2, 3, 1]), np.array([0, 5, 1, 9, 1, 2, 3, 1])
    # 4 failures among the first five became 2
    cut, low, high = scores.fewer_failures(after, before)
    assert cut == 0.5 and low <= 0.5 <= high
    assert scores.fewer_failures(before, before) == (0.0, 0.0, 0.0)


def test_a_passage_counts_for_its_section():
    found = [
        Document("x", metadata={"id": i, "section": s})
        for i, s in (("a/0", "a"), ("b/1", "b"), ("b/0", "b"))
    ]
    assert [scores.rank(found, s) for s in ("a", "b", "c")] == [1, 2, 0]


def test_every_question_is_asked():
    class Echo(BaseRetriever):
        def _get_relevant_documents(self, query, *, run_manager):
            return [Document(query, metadata={"id": query})]

    questions = [corpus.Question(t, g, "") for t, g in (("a", "a"), ("b", "x"))]
    ranks, ms, found = scores.measure(Echo(), questions)
    assert (
        ranks.tolist() == [1, 0]
        and (ms > 0).all()
        and [d[0].page_content for d in found] == ["a", "b"]
    )


def test_the_table_has_a_line_each():
    lines = scores.table(
        {"raw": {"hit@5": (0.5, 0.4, 0.6), "ms": 3.0}, "other": {"ms": 12.0}}
    ).splitlines()
    assert lines[1] == "raw    0.500 [0.400, 0.600]  3" and lines[2].split() == ["other", "12"]


def test_a_rank_counts_up_to_its_k():
    """Second place is a hit at two and none at one; behind k every score is zero."""
    ranks = np.array([0, 1, 2, 10, 11])
    assert scores.hit(ranks, 1).tolist() == [0, 1, 0, 0, 0] and scores.hit(ranks, 2).tolist() == [
        0,
        1,
        1,
        0,
        0,
    ]
    assert scores.all_of(ranks)["MRR@10"].tolist() == [0, 1, 0.5, 0.1, 0]
    assert scores.all_of(ranks)["hit@10"].tolist() == [0, 1, 1, 1, 0]
    assert scores.all_of(ranks).keys() == {"hit@1", "hit@5", "hit@10", "MRR@10", "nDCG@10"}


def test_each_question_is_judged_by_its_own_answer_and_the_baseline_by_the_same_questions():
    class Same(BaseRetriever):
        def _get_relevant_documents(self, query, *, run_manager):
            return [Document("x", metadata={"id": i}) for i in ("a", "b", "c")]

    questions = [corpus.Question(f"q{g}", g, "") for g in ("c", "a", "b", "z")]
    assert scores.measure(Same(), questions)[0].tolist() == [3, 1, 2, 0]
    after, before = np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1])
    value, low, high = scores.fewer_failures(after, before)
    assert value == 0 and low < -0.5 and high > 0.5  # the same questions are drawn for both
    better = scores.fewer_failures(np.array([1] * 40 + [0] * 40), np.array([0] * 80))
    assert better[0] == 0.5 and 0.35 < better[1] < 0.45 and 0.55 < better[2] < 0.65
    assert scores.fewer_failures(np.array([6, 0]), np.array([0, 0]), k=10)[0] == 0.5
    # Nothing failed: none is saved
    assert scores.fewer_failures(np.array([1, 1]), np.array([1, 2])) == (0, 0, 0)
