"""rag/raw_rag.py: the retriever finds what is planted, the command writes what it promises, bad flags are one line."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from langchain_core.retrievers import BaseRetriever

import utils.run
from rag import answer, corpus, raw_rag, scores
from tests.conftest import ROOT
from tests.passages import QUICK, TEXTS, Bag, dense


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
    assert dense(1).invoke("a dog barked at the moon")[0].metadata["score"] == pytest.approx(
        1, abs=1e-6
    )


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
    found = raw_rag.build_retriever(replace(cfg, titles=True, out=f"{cfg.out}/titles")).invoke(
        "FAQ: The admin"
    )
    assert found[0].page_content.startswith("django > FAQ: The admin\n\n")


def run(*flags):
    line = [sys.executable, "rag/raw_rag.py", *flags]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_the_command_writes_what_it_promises(tmp_path):
    done = run("--distractors", "0", "--limit", "6", "--tokens", "4", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert (
        metrics["questions"] == 6
        and 0 <= metrics["hit@1"] <= metrics["hit@5"] <= metrics["hit@10"] <= 1
    )
    told = json.loads((tmp_path / "answer.json").read_text("utf-8"))
    assert len(told["passages"]) == 5 and told["with"] and told["without"]
    assert (tmp_path / "hits.png").is_file() and (tmp_path / "index" / "store.json").is_file()
    assert "[1] 0." in done.stdout and "django/faq/models.txt" in done.stdout


def here(monkeypatch, *flags):
    """The same command in this process -> its exit code, or what it returns."""
    monkeypatch.setattr(sys, "argv", ["rag/raw_rag.py", *flags])
    try:
        return utils.run.cli(raw_rag.main, raw_rag.Config)
    except SystemExit as end:
        return end.code


def test_a_folder_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    fruit = "# Apples\n\nApples are red.\n\n# Pears\n\nPears are green and soft."
    (tmp_path / "docs" / "fruit.md").write_text(fruit, "utf-8")
    (tmp_path / "docs" / "broken.pdf").write_bytes(b"no pdf")
    flags = ("--docs", str(tmp_path / "docs"), "--llm", "none", "--out", str(tmp_path / "out"))
    found = here(monkeypatch, *flags, "--question", "Which colour has a pear?")
    said = capsys.readouterr()
    assert found == {"question": "Which colour has a pear?"}, said.err
    assert "fruit.md#" not in said.out and said.out.index("Pears are green") < said.out.index(
        "Apples are red"
    )
    assert "skipped broken.pdf" in said.err and "skipped 1 of 2 files" in said.err


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
    ("--abstain 40", "--abstain is a cosine"),
    ("--question LONG", "29999 characters; 500 are the most"),
    ("--question BLANK", "the question is empty"),
])  # fmt: skip
def test_bad_flags_are_one_line(flags, said, tmp_path, monkeypatch, capsys):
    texts = {"LONG": " ".join(["word"] * 6000), "BLANK": " \n"}
    words = [texts.get(w, w) for w in flags.split()] + (
        [] if "--llm" in flags else ["--llm", "none"]
    )
    words += [] if "--distractors" in flags else ["--distractors", "0"]
    code = here(monkeypatch, *words, "--out", str(tmp_path / "out"))
    lines = capsys.readouterr().err.splitlines()
    assert (
        code == 2 and len([x for x in lines if x.startswith("error: ")]) == 1 and said in lines[-1]
    ), lines
    assert not (tmp_path / "out" / "metrics.json").exists()


class Reader:
    """A language model that always says the same, and keeps what it was asked."""

    def __init__(self, said="The cat sat [1], the dog [2], the cow [9]."):
        self.said, self.chats = said, []

    def stream(self, chat):
        self.chats.append(chat)
        yield self.said


def answered(tmp_path, monkeypatch, **flags):
    """raw_rag.ask over the four passages of the tests -> the model, and what was written down."""
    reader = Reader()
    monkeypatch.setattr(raw_rag, "embedder", lambda name: Bag())
    cfg = raw_rag.Config(
        **{"question": "where is the cat?", "k": 2, "out": str(tmp_path), "abstain": -1} | flags
    )
    raw_rag.ask(cfg, dense(), reader)
    return reader, json.loads((tmp_path / "answer.json").read_text("utf-8"))


def test_the_model_is_asked_without_the_passages_and_with_the_k_best(tmp_path, monkeypatch, capsys):
    reader, told = answered(tmp_path, monkeypatch)
    alone, read = (chat[1]["content"] for chat in reader.chats)
    best = [d.page_content for d in dense().invoke("where is the cat?")]
    assert alone == "where is the cat?" and read.endswith("Question: where is the cat?")
    assert read.count("<passage ") == 2 and 0 < read.index(best[0]) < read.index(best[1])
    assert told["passages"] == [d.metadata["id"] for d in dense().invoke("where is the cat?")[:2]]
    assert told["cited"] == [1, 2] and told["cited but not there"] == [9] and told["answered"]
    assert told["without"] == told["with"] == reader.said
    assert "cites [1] file.md, [2] file.md; and [9], which are not there" in capsys.readouterr().out


def test_far_passages_are_not_answered_from(tmp_path, monkeypatch, capsys):
    """The closest cosine decides, not the first score, which other retrievers have on other scales."""
    sure = float((Bag().encode(TEXTS) @ Bag().encode(["where is the cat?"])[0]).max())
    for abstain, says in ((sure + 1e-3, answer.NOWHERE), (sure - 1e-3, Reader().said)):
        reader, told = answered(tmp_path, monkeypatch, abstain=abstain)
        assert told["with"] == says and told["closest cosine"] == pytest.approx(sure)
        assert (
            told["answered"] == (says != answer.NOWHERE)
            and len(reader.chats) == 1 + told["answered"]
        )
    assert raw_rag.closeness("", "x", []) == -1.0


def test_a_question_is_scored_on_k_passages_and_beside_raw_retrieval(cfg, tmp_path, monkeypatch):
    """Ranks of both on the same questions; the tokens are those of the k passages that a model would read."""
    _, questions = corpus.manuals()
    some = raw_rag.spread(questions, 6)
    assert raw_rag.spread(questions, -1) == questions and raw_rag.spread(questions, 0) == []
    assert some[0] is questions[0] and some[-1] is questions[-1] and len(set(some)) == 6
    one, five = (raw_rag.build_retriever(replace(cfg, k=k)) for k in (1, 10))
    short = raw_rag.row(replace(cfg, k=1), five, some)[1]["tokens"]
    assert short < raw_rag.row(replace(cfg, k=5), five, some)[1]["tokens"] / 3
    monkeypatch.setattr(raw_rag, "baseline", lambda cfg: replace(cfg, k=10))
    metrics = raw_rag.score(cfg, lambda cfg: one, one, some, tmp_path)
    assert metrics["hit@5"] == metrics["hit@1"] and metrics["fewer failures at 5"].startswith(
        "-"
    ) == (scores.hit(raw_rag.row(cfg, five, some)[0], 5).mean() > metrics["hit@1"])


def test_the_baseline_is_raw_retrieval_on_the_same_corpus():
    cfg = raw_rag.Config(docs="d", distractors=3, embedder="e", store="qdrant", store_url="u", seed=4, out="o",
                         titles=True, skip="x", chunk=50, k=1)  # fmt: skip
    raw = raw_rag.baseline(cfg)
    assert (raw.docs, raw.distractors, raw.embedder, raw.store, raw.store_url, raw.seed) == (
        "d",
        3,
        "e",
        "qdrant",
        "u",
        4,
    )
    assert (raw.titles, raw.skip, raw.chunk, raw.k, raw.out) == (
        False,
        "",
        1000,
        scores.DEPTH,
        "o/raw",
    )


def test_what_is_skipped_is_not_searched(cfg):
    cfg = replace(cfg, skip="^django/")
    assert {p.metadata["source"].split("/")[0] for p in raw_rag.passages(cfg)} == {
        "celery",
        "scrapy",
    }


def test_passages_are_cut_as_the_flags_say(cfg):
    parts = raw_rag.passages(replace(cfg, chunk=200, overlap=40))
    assert max(len(p.page_content) for p in parts) <= 200 and len(parts) > len(
        raw_rag.passages(cfg)
    )
    # What neighbours share is counted twice
    assert len(parts) > len(raw_rag.passages(replace(cfg, chunk=200)))
    assert raw_rag.passages(replace(cfg, titles=True))[0].page_content.startswith("django > ")
