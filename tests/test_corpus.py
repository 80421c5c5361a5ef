"""rag/corpus.py: sections, questions and passages of the manuals, and of any folder."""

from collections import Counter

import pytest
from pypdf import PdfWriter

from rag import corpus
from utils.run import UserError

PAGE = """
====
Page
====

Intro.

One
===

Text of ``one``, see :class:`~pkg.One` or `there <https://x.org>`_::

    code()

Two
---

More.

Three
=====

Last.
"""


def test_a_page_is_cut_at_its_titles_and_a_section_knows_what_it_stands_below():
    parts = corpus.cut(PAGE, corpus.rst_titles(PAGE))
    assert [(above, t.text if t else None) for above, t, _ in parts] == [
        ((), None), ((), "Page"), (("Page",), "One"), (("Page", "One"), "Two"), (("Page",), "Three"),
    ]  # fmt: skip
    assert corpus.plain(parts[2][2]) == "Text of one, see pkg.One or there:\n\n    code()"
    assert "".join(body for _, _, body in parts).count("Last.") == 1


def test_the_manuals_hold_129_questions_and_each_answer_is_one_section():
    sections, questions = corpus.manuals()
    ids = Counter(s.metadata["id"] for s in sections)
    assert max(ids.values()) == 1 and len(sections) > 9000
    assert Counter(q.gold.split("/")[0] for q in questions) == {"django": 53, "celery": 46, "scrapy": 30}
    known = {s.metadata["id"]: s for s in sections}
    for q in questions:
        gold = known[q.gold].page_content
        assert gold == q.answer and not gold.startswith(q.text), q.text
        assert q.text not in known[q.gold].metadata["title"]
    answers = {q.text: q.answer for q in questions}
    assert answers["Is Django stable?"].startswith("Yes, it's quite stable. Companies like Disqus")
    assert "Why won't my periodic task run?" not in answers  # its answer only names another page


def test_a_sample_keeps_every_answer_and_is_the_same_every_time():
    sections, questions = corpus.manuals()
    few = corpus.sample(sections, questions, 50, seed=3)
    assert len(few) == len(questions) + 50 and few == corpus.sample(sections, questions, 50, seed=3)
    assert {q.gold for q in questions} <= {s.metadata["id"] for s in few}
    assert few != corpus.sample(sections, questions, 50, seed=4)
    assert corpus.sample(sections, questions, -1) == sections


def test_passages_lose_no_word_and_are_no_longer_than_asked():
    sections = corpus.manuals()[0][:200]
    parts = corpus.passages(sections, 300)
    assert max(len(p.page_content) for p in parts) <= 300
    for s in sections[:50]:
        own = " ".join(p.page_content for p in parts if p.metadata["section"] == s.metadata["id"])
        assert own.split() == s.page_content.split()
    assert len({p.metadata["id"] for p in parts}) == len(parts)
    [titled] = corpus.passages(sections[1:2], 10_000, titles=True)
    assert titled.page_content.startswith(sections[1].metadata["title"] + "\n\n")
    with pytest.raises(UserError, match="--chunk"):
        corpus.passages(sections, 100, 100)


def test_a_folder_is_read_and_what_is_broken_is_named_and_counted(tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.md").write_text("# Apples\n\nAre red.\n\n## Green ones\n\nToo.")
    (tmp_path / "deep" / "b.rst").write_text(PAGE)
    (tmp_path / "c.html").write_text("<html><script>x()</script><h1>Pears</h1><p>Are <b>soft</b>.</p><h2>Old</h2>Hard.")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\x00binary")
    (tmp_path / "e.pdf").write_bytes(b"%PDF-1.4 not really")
    (tmp_path / "f.txt").write_text("  \n")
    (tmp_path / "g.md").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "h.jpg").write_bytes(b"ignored")
    blank = PdfWriter()
    blank.add_blank_page(100, 100)
    blank.write(tmp_path / "i.pdf")
    (tmp_path / "j.txt").write_bytes(b"x" * (corpus.MEGABYTES * 1_000_000 + 1))
    found = corpus.folder(tmp_path)
    texts = {s.metadata["id"]: s.page_content for s in found}
    assert texts["a.md#1-apples"] == "Apples\n\nAre red." and texts["a.md#2-green-ones"] == "Green ones\n\nToo."
    assert texts["c.html#1-pears"] == "Pears\n\nAre soft."
    assert not any("x()" in t for t in texts.values())
    assert [s.metadata["title"] for s in found if s.metadata["source"] == "a.md"][1] == "a.md > Apples > Green ones"
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == [
        "skipped d.txt", "skipped e.pdf", "skipped f.txt", "skipped g.md", "skipped i.pdf", "skipped j.txt",
        "skipped h.jpg", "skipped 7 of 10 files",
    ]  # fmt: skip
    assert all(len(line) < 160 for line in told)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path, capsys):
    (tmp_path / "secret.txt").write_text("the password is swordfish")
    inside = tmp_path / "docs"
    inside.mkdir()
    (inside / "fine.md").write_text("all is well")
    (inside / "link.txt").symlink_to(tmp_path / "secret.txt")
    (inside / "here.txt").symlink_to(inside / "fine.md")
    texts = " ".join(s.page_content for s in corpus.folder(inside))
    assert "swordfish" not in texts and texts.count("all is well") == 2
    assert "skipped link.txt: a link that leads out of the folder" in capsys.readouterr().err


def test_a_broken_pdf_costs_one_line(tmp_path, capfd):
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4\nnothing else")
    (tmp_path / "fine.md").write_text("all is well")
    corpus.folder(tmp_path)
    assert len(capfd.readouterr().err.splitlines()) == 2  # the file, and the count


def test_a_pdf_is_a_section_a_page(tmp_path):
    from matplotlib import pyplot as plt
    from matplotlib.backends.backend_pdf import PdfPages

    with PdfPages(tmp_path / "two.pdf") as pdf:
        for word in ("first", "second"):
            figure = plt.figure()
            figure.text(0.5, 0.5, f"the {word} page")
            pdf.savefig(figure)
            plt.close(figure)
    found = corpus.folder(tmp_path)
    assert [s.page_content for s in found] == ["page 1\n\nthe first page", "page 2\n\nthe second page"]


@pytest.mark.parametrize("make, said", [
    (lambda p: p / "nowhere", "is not a folder"),
    (lambda p: p, "nothing there ends in"),
])  # fmt: skip
def test_a_folder_that_cannot_be_is_refused(tmp_path, make, said):
    with pytest.raises(UserError, match=said):
        corpus.folder(make(tmp_path))
