"""rag/raw_rag.py: the retriever finds what is planted, the command writes what it promises, bad flags are one line."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from langchain_core.retrievers import BaseRetriever

from rag import corpus, raw_rag, scores
from tests.conftest import ROOT
from tests.passages import QUICK, dense


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    return raw_rag.Config(**QUICK, out=str(tmp_path_factory.mktemp("raw")))


@pytest.fixture(scope="module")
def retriever(cfg):
    return raw_rag.build_retriever(replace(cfg, k=10))


def test_documents_carry_source_id_and_score_best_first(retriever):
    found = retriever.invoke("Can I use Django with MongoDB?")
    assert isinstance(retriever, BaseRetriever) and len(found) == 10
    marks = [d.metadata["score"] for d in found]
    assert marks == sorted(marks, reverse=True) and -1 <= marks[-1] <= marks[0] <= 1
    assert all({"source", "id", "title", "section"} <= d.metadata.keys() for d in found)
    assert found[0].metadata["id"].startswith("django/faq/models.txt#")
    assert found[0].page_content.startswith("NoSQL databases are not officially supported")


def test_a_planted_passage_is_found():
    assert dense(1).invoke("a dog barked at the moon")[0].metadata["score"] == pytest.approx(1, abs=1e-6)


def test_meaning_is_found_without_the_words(retriever):
    """Far above chance: among the answers alone, 10 of some 190 passages."""
    _, questions = corpus.manuals()
    ranks, _, _ = scores.measure(retriever, questions[::4])
    assert scores.hit(ranks, 5).mean() > 0.6


def test_every_query_leaves_the_index_as_it_is(cfg, retriever):
    first = retriever.invoke("pickle")
    again = raw_rag.build_retriever(replace(cfg, k=10)).invoke("pickle")
    assert first == again


def test_qdrant_finds_the_same(cfg, retriever):
    other = raw_rag.build_retriever(replace(cfg, k=10, store="qdrant", limit=0))
    for question in ("How do I log in?", "Is Celery multilingual?"):
        a, b = retriever.invoke(question), other.invoke(question)
        assert [d.metadata["id"] for d in a] == [d.metadata["id"] for d in b]
        assert a[0].metadata["score"] == pytest.approx(b[0].metadata["score"], abs=2e-3)
        assert a[0].metadata.keys() == b[0].metadata.keys()


def test_titles_are_searched_too(cfg):
    found = raw_rag.build_retriever(replace(cfg, titles=True, out=f"{cfg.out}/titles")).invoke("FAQ: The admin")
    assert found[0].page_content.startswith("django > FAQ: The admin\n\n")


def run(*flags):
    line = [sys.executable, "rag/raw_rag.py", *flags]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_the_command_writes_what_it_promises(tmp_path):
    done = run("--distractors", "0", "--limit", "6", "--tokens", "4", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["questions"] == 6 and 0 <= metrics["hit@1"] <= metrics["hit@5"] <= metrics["hit@10"] <= 1
    told = json.loads((tmp_path / "answer.json").read_text())
    assert len(told["passages"]) == 5 and told["with"] and told["without"]
    assert (tmp_path / "hits.png").is_file() and (tmp_path / "index" / "store.json").is_file()
    assert "[1] 0." in done.stdout and "django/faq/models.txt" in done.stdout


def test_a_folder_of_ones_own(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "fruit.md").write_text("# Apples\n\nApples are red.\n\n# Pears\n\nPears are green and soft.")
    (tmp_path / "docs" / "broken.pdf").write_bytes(b"no pdf")
    flags = ("--docs", str(tmp_path / "docs"), "--llm", "none", "--out", str(tmp_path / "out"))
    done = run(*flags, "--question", "Which colour has a pear?")
    assert done.returncode == 0, done.stderr
    assert "fruit.md#" not in done.stdout and done.stdout.index("Pears are green") < done.stdout.index("Apples are red")
    assert "skipped broken.pdf" in done.stderr and "skipped 1 of 2 files" in done.stderr


@pytest.mark.parametrize("flags, said", [
    ("--docs nowhere --question x", "--docs nowhere is not a folder"),
    ("--docs rag", "ask one with --question"),
    ("--k 0", "--k must be"),
    ("--limit -2", "--limit"),
    ("--chunk 10", "--chunk"),
    ("--distractors -7", "--distractors"),
    ("--embedder no/such-model", "no model no/such-model"),
    ("--llm no/such-model", "no/such-model"),
    ("--store-url http://127.0.0.1:9", "--store qdrant"),
    ("--store qdrant --store-url http://127.0.0.1:9", "no Qdrant at"),
])  # fmt: skip
def test_bad_flags_are_one_line(flags, said, tmp_path):
    words = flags.split() if "--llm" in flags else [*flags.split(), "--llm", "none"]
    words += [] if "--distractors" in flags else ["--distractors", "0"]
    done = run(*words, "--out", str(tmp_path / "out"))
    lines = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and said in lines[0], done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out" / "metrics.json").exists()
