"""rag/compare.py: every script of the chapter has its row."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from rag import compare, corpus, query_transform, scores
from tests.conftest import ROOT
from utils.run import UserError


def test_every_retriever_has_a_row():
    scripts = {
        script.__name__.split(".")[1] for script, _ in compare.variants(compare.Config()).values()
    }
    named = {p.stem for p in (ROOT / "rag").glob("*.py") if "def build_retriever" in p.read_text()}
    assert named - scripts == {"multimodal_rag", "app"}  # one finds pictures, one shows the others


def test_command(tmp_path):
    metrics = compare.main(compare.Config(distractors=0, limit=10, only="round", out=str(tmp_path)))
    assert metrics["questions"] == 10 and {"dense", "round robin"} <= metrics.keys()
    assert json.loads((tmp_path / "metrics.json").read_text())["best"] in ("dense", "round robin")
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert (
        len(lines) == 4
        and all(line.count("|") == 10 for line in lines)
        and (tmp_path / "compare.png").is_file()
    )


def test_bad_input():
    with pytest.raises(UserError, match="--limit"):
        compare.main(compare.Config(limit=0))


def test_the_commands_of_the_page_leave_out_what_the_table_leaves_out():
    pages = "\n".join(page.read_text("utf-8") for page in sorted((ROOT / "rag").glob("*.md")))
    given = re.findall(r'--skip "([^"]*)"', pages)
    assert given and set(given) == {compare.NOTES}


def test_the_rows_are_what_their_names_say():
    rows = compare.variants(compare.Config(distractors=7, embedder="e", llm="l", seed=3))
    for name, (_, cfg) in rows.items():
        assert cfg.titles == ("with titles" in name), name
        assert cfg.skip == (compare.NOTES if "release notes" in name else ""), name
        assert (cfg.distractors, cfg.embedder, cfg.llm, cfg.seed) == (7, "e", "l", 3)
    assert (
        rows["parent-document, whole sections"][1].parent == 0 < rows["parent-document"][1].parent
    )
    assert [rows[n][1].merge for n in ("BM25", "reciprocal rank fusion (RRF)", "round robin")] == [
        "bm25", "rrf", "round-robin"]  # fmt: skip
    assert [rows[n][1].reranker for n in ("MaxSim reranking", "cross-encoder reranking")] == [
        "maxsim",
        "cross",
    ]
    assert [rows[n][1].transform for n in ("HyDE", "multi-query", "step-back")] == [
        "hyde",
        "multi-query",
        "step-back",
    ]


def test_a_row_is_compared_with_dense_retrieval_on_its_own_questions(tmp_path, monkeypatch):
    """A row in which the model writes asks fewer questions: the baseline is cut to the same ones."""
    questions = [corpus.Question(f"q{i}", str(i), "") for i in range(8)]
    monkeypatch.setattr(compare.corpus, "manuals", lambda: ([], questions))
    better = {"q1": 1}  # what both find
    asked = {}

    def row(cfg, retriever, given):
        assert cfg.k == 5 and retriever.k == scores.DEPTH
        asked[retriever.name] = [q.text for q in given]
        ranks = np.array([better.get(q.text, 0) for q in given])
        cells = {name: scores.interval(v) for name, v in scores.all_of(ranks).items()}
        return ranks, cells | {"tokens": 1.0, "ms": 1.0}

    monkeypatch.setattr(compare.raw_rag, "row", row)
    for script in {script for script, _ in compare.variants(compare.Config()).values()}:
        name = script.__name__
        monkeypatch.setattr(
            script, "build_retriever", lambda cfg, n=name: SimpleNamespace(name=n, k=cfg.k)
        )
    compare.main(compare.Config(only="HyDE", written=2, out=str(tmp_path)))
    assert asked == {
        "rag.raw_rag": [q.text for q in questions],
        query_transform.__name__: ["q0", "q7"],
    }
    table = (tmp_path / "table.md").read_text("utf-8").splitlines()
    assert table[-1].startswith("| HyDE | 0.000 |") and table[-1].endswith("| 0 % [0, 0] |")
