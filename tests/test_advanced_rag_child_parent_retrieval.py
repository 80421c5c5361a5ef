"""rag/advanced_rag_child_parent_retrieval.py: children are parts of their parents, and find them."""

from dataclasses import replace

import pytest

from rag import advanced_rag_child_parent_retrieval as small_to_big
from rag import corpus, raw_rag
from tests.passages import QUICK, document
from utils.run import UserError


@pytest.fixture(scope="module")
def sections():
    return corpus.sample(*corpus.manuals(), 0)


def test_every_child_is_a_part_of_its_parent(sections):
    parents, children = small_to_big.family(sections, 1500, 300)
    known = {p.metadata["id"]: p.page_content for p in parents}
    assert max(map(len, known.values())) <= 1500 and max(len(c.page_content) for c in children) <= 300
    for child in children:
        assert child.page_content in known[child.metadata["parent"]]
    assert {c.metadata["parent"] for c in children} == known.keys()
    assert len({c.metadata["id"] for c in children}) == len(children)
    whole, _ = small_to_big.family(sections, 0, 300)
    assert [p.page_content for p in whole] == [s.page_content for s in sections]


def test_a_parent_is_as_good_as_its_best_child_and_comes_once():
    child = lambda name, parent: document("x", name) if not parent else _child(name, parent)  # noqa: E731
    found = [(child("a/0/1", "a/0"), 0.9), (child("b/0/0", "b/0"), 0.8), (child("a/0/0", "a/0"), 0.7)]
    assert small_to_big.adopt(found) == [("a/0", 0.9), ("b/0", 0.8)]
    total = dict(small_to_big.adopt([found[1], (found[0][0], 0.5), (found[2][0], 0.4)], "sum"))
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
    plain = raw_rag.build_retriever(raw_rag.Config(**QUICK, k=3, chunk=300, out=str(tmp_path / "b")))
    assert len(found[0].page_content) > len(plain.invoke(asked)[0].page_content)


def test_flags_that_cannot_be(tmp_path):
    cfg = small_to_big.Config(**QUICK, out=str(tmp_path))
    for wrong in ({"parent": 200}, {"children": 0}):
        with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
            small_to_big.build_retriever(replace(cfg, **wrong))
