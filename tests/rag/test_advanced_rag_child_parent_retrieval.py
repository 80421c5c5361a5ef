"""rag/advanced_rag_child_parent_retrieval.py: children are parts of their parents, and find them."""

from dataclasses import replace

import pytest

from rag import advanced_rag_child_parent_retrieval as small_to_big
from rag import corpus, document_loaders, raw_rag
from tests.passages import QUICK, document
from utils.run import UserError


@pytest.fixture(scope="module")
def sections():
    return corpus.sample(*corpus.manuals(), 0)


def test_every_child_is_a_part_of_its_parent(sections):
    parents, children = small_to_big.split_twice(sections, 1500, 300)
    known = {p.metadata["id"]: p.page_content for p in parents}
    assert (
        max(map(len, known.values())) <= 1500 and max(len(c.page_content) for c in children) <= 300
    )
    for child in children:
        assert child.page_content in known[child.metadata["parent"]]
    assert {c.metadata["parent"] for c in children} == known.keys()
    assert len({c.metadata["id"] for c in children}) == len(children)
    whole, _ = small_to_big.split_twice(sections, 0, 300)
    assert [p.page_content for p in whole] == [s.page_content for s in sections]


def test_a_parent_is_as_good_as_its_best_child_and_comes_once():
    child = lambda name, parent: document("x", name) if not parent else _child(name, parent)  # noqa: E731
    found = [
        (child("a/0/1", "a/0"), 0.9),
        (child("b/0/0", "b/0"), 0.8),
        (child("a/0/0", "a/0"), 0.7),
    ]
    assert small_to_big.parents_of(found) == [("a/0", 0.9), ("b/0", 0.8)]
    total = dict(small_to_big.parents_of([found[1], (found[0][0], 0.5), (found[2][0], 0.4)], "sum"))
    assert total == {"b/0": 0.8, "a/0": pytest.approx(0.9)}


def _child(name, parent):
    one = document("x", name)
    one.metadata["parent"] = parent
    return one


def test_a_sentence_finds_the_passage_that_it_stands_in(tmp_path):
    cfg = small_to_big.Config(**QUICK, k=3, out=str(tmp_path / "a"))
    retriever = small_to_big.build_retriever(cfg)
    asked = "django.db.connection.queries is only available if DEBUG is True. It's a list of dictionaries"
    found = retriever.invoke(asked)
    assert "connection.queries" in found[0].page_content and len(found) == 3
    assert len({d.metadata["id"] for d in found}) == 3 and found[0].metadata["score"] > 0.5
    plain = raw_rag.build_retriever(
        raw_rag.Config(**QUICK, k=3, chunk=300, out=str(tmp_path / "b"))
    )
    assert len(found[0].page_content) > len(plain.invoke(asked)[0].page_content)


def test_flags_that_cannot_be(tmp_path):
    cfg = small_to_big.Config(**QUICK, out=str(tmp_path))
    for wrong in ({"parent": 200}, {"children": 0}):
        with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
            small_to_big.build_retriever(replace(cfg, **wrong))


class Found:
    """A store that finds what it was told, and notes how many it was asked for."""

    def __init__(self, pairs):
        self.pairs = pairs

    def similarity_search_with_score(self, query, k):
        self.k = k
        return self.pairs[:k]


def test_parents_come_back_once_each_as_many_as_asked():
    pairs = [(_child("a/0/1", "a/0"), 0.9), (_child("a/0/0", "a/0"), 0.8), (_child("b/0/0", "b/0"), 0.7),
             (_child("c/0/0", "c/0"), 0.6), (_child("b/0/1", "b/0"), 0.5)]  # fmt: skip
    known = {name: document(f"all of {name}", name, name[0]) for name in ("a/0", "b/0", "c/0")}
    one = small_to_big.ParentRetriever(
        store=Found(pairs), parents=known, children=5, merge="max", k=2
    )
    found = one.invoke("?")
    assert [d.page_content for d in found] == ["all of a/0", "all of b/0"] and one.store.k == 5
    assert [d.metadata["score"] for d in found] == [0.9, 0.7] and found[0].metadata[
        "section"
    ] == "a"
    total = one.model_copy(update={"merge": "sum"}).invoke("?")
    assert [d.metadata["score"] for d in total] == pytest.approx([1.7, 1.2])
    assert len(one.model_copy(update={"children": 1, "k": 9}).invoke("?")) == 1


def test_titles_and_lengths_reach_the_children(tmp_path, monkeypatch):
    """Titles are searched with the children, and are no part of the parents that are read."""
    section = document_loaders.section(
        "a.md", 1, ("Above",), "Title", "\n\n".join(f"w{i} " * 30 for i in range(6))
    )
    parents, children = small_to_big.split_twice([section], 400, 100, titles=True)
    assert all(c.page_content.startswith("a.md > Above > Title\n\n") for c in children)
    assert not any("Above" in p.page_content for p in parents) and len(children) > len(parents) > 1
    assert {c.metadata["section"] for c in children} == {section.metadata["id"]}
    searched = []
    monkeypatch.setattr(small_to_big.corpus, "load", lambda cfg: ([section], []))
    monkeypatch.setattr(
        small_to_big.raw_rag, "open_index", lambda cfg, passages: searched.extend(passages)
    )
    cfg = small_to_big.Config(
        **QUICK, parent=400, chunk=100, titles=True, children=7, k=3, out=str(tmp_path)
    )
    one = small_to_big.build_retriever(cfg)
    assert [c.page_content for c in searched] == [c.page_content for c in children]
    assert [p.page_content for p in one.parents.values()] == [p.page_content for p in parents]
    assert (one.children, one.k, one.merge) == (7, 3, "max")
    assert len(small_to_big.build_retriever(replace(cfg, parent=0)).parents) == 1
