"""rag/corpus.py and what it reads with: sections, questions and passages of manuals and folders."""

import time
from collections import Counter
from types import SimpleNamespace

import pytest
from pypdf import PdfWriter

from rag import chunking, corpus, document_loaders, markup, word_segmentation
from tests import fuzz
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
    parts = markup.split_at_titles(PAGE, markup.rst_titles(PAGE))
    assert [(above, t.text if t else None) for above, t, _ in parts] == [
        ((), None), ((), "Page"), (("Page",), "One"), (("Page", "One"), "Two"), (("Page",), "Three"),
    ]  # fmt: skip
    assert markup.rst_to_text(parts[2][2]) == "Text of one, see pkg.One or there:\n\n    code()"
    assert "".join(body for _, _, body in parts).count("Last.") == 1


def test_the_manuals_hold_129_questions_and_each_answer_is_one_section():
    sections, questions = corpus.manuals()
    ids = Counter(s.metadata["id"] for s in sections)
    assert max(ids.values()) == 1 and len(sections) > 9000
    assert Counter(q.gold.split("/")[0] for q in questions) == {
        "django": 53,
        "celery": 46,
        "scrapy": 30,
    }
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
    parts = chunking.passages(sections, 300)
    assert max(len(p.page_content) for p in parts) <= 300
    for s in sections[:50]:
        own = " ".join(p.page_content for p in parts if p.metadata["section"] == s.metadata["id"])
        assert own.split() == s.page_content.split()
    assert len({p.metadata["id"] for p in parts}) == len(parts)
    [titled] = chunking.passages(sections[1:2], 10_000, titles=True)
    assert titled.page_content.startswith(sections[1].metadata["title"] + "\n\n")
    with pytest.raises(UserError, match="--chunk"):
        chunking.passages(sections, 100, 100)


def test_a_folder_is_read_and_what_is_broken_is_named_and_counted(tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.md").write_text("# Apples\n\nAre red.\n\n## Green ones\n\nToo.")
    (tmp_path / "deep" / "b.rst").write_text(PAGE)
    (tmp_path / "c.html").write_text(
        "<html><script>x()</script><h1>Pears</h1><p>Are <b>soft</b>.</p><h2>Old</h2>Hard."
    )
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\x00binary")
    (tmp_path / "e.pdf").write_bytes(b"%PDF-1.4 not really")
    (tmp_path / "f.txt").write_text("  \n")
    (tmp_path / "g.md").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "h.jpg").write_bytes(b"ignored")
    blank = PdfWriter()
    blank.add_blank_page(100, 100)
    blank.write(tmp_path / "i.pdf")
    (tmp_path / "j.txt").write_bytes(b"x" * (document_loaders.MAX_MEGABYTES * 1_000_000 + 1))
    found = document_loaders.load_folder(tmp_path)
    texts = {s.metadata["id"]: s.page_content for s in found}
    assert (
        texts["a.md#1-apples"] == "Apples\n\nAre red."
        and texts["a.md#2-green-ones"] == "Green ones\n\nToo."
    )
    assert texts["c.html#1-pears"] == "Pears\n\nAre soft."
    assert not any("x()" in t for t in texts.values())
    assert [s.metadata["title"] for s in found if s.metadata["source"] == "a.md"][
        1
    ] == "a.md > Apples > Green ones"
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
    texts = " ".join(s.page_content for s in document_loaders.load_folder(inside))
    assert "swordfish" not in texts and texts.count("all is well") == 2
    assert "skipped link.txt: a link that leads out of the folder" in capsys.readouterr().err


def test_a_broken_pdf_costs_one_line(tmp_path, capfd):
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4\nnothing else")
    (tmp_path / "fine.md").write_text("all is well")
    document_loaders.load_folder(tmp_path)
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
    found = document_loaders.load_folder(tmp_path)
    assert [s.page_content for s in found] == [
        "page 1\n\nthe first page",
        "page 2\n\nthe second page",
    ]


@pytest.mark.parametrize("make, said", [
    (lambda p: p / "nowhere", "is not a folder"),
    (lambda p: p, "nothing there ends in"),
])  # fmt: skip
def test_a_folder_that_cannot_be_is_refused(tmp_path, make, said):
    with pytest.raises(UserError, match=said):
        document_loaders.load_folder(make(tmp_path))


MARKDOWN = """# Install ##

Run it:

```bash
# not a title
make
~~~
# nor this
```

  ## Use C#
~~~~ text
# code
```
~~~
# still code
~~~~
#tag is a word
####### seven are too many
### 
## Last
"""


def test_a_comment_in_a_block_of_code_is_no_title(tmp_path):
    titles = markup.markdown_titles(MARKDOWN)
    assert [(t.depth, t.text) for t in titles] == [(1, "Install"), (2, "Use C#"), (2, "Last")]
    (tmp_path / "a.md").write_text(MARKDOWN, "utf-8")
    [first, second] = document_loaders.load_folder(tmp_path)
    assert "# nor this" in first.page_content and "# still code" in second.page_content
    (tmp_path / "a.md").unlink()
    (tmp_path / "b.html").write_text(
        "<h1>Install</h1><pre># not a title\nmake</pre><h2>Use</h2>x", "utf-8"
    )
    assert [s.metadata["title"] for s in document_loaders.load_folder(tmp_path)] == [
        "b.html > Install",
        "b.html > Install > Use",
    ]


def test_html_is_read_as_browsers_show_it(tmp_path):
    page = (
        "<head><title>t</title><body><nav>menu</nav><h1>Big <em>red</em></h1><p>a &amp; b<!-- hidden <b> -->"
        "<h2>open<div>in a block</div><script>if (a < b) x()</script><style>y</style>&#xD800; end <b"
    )
    (tmp_path / "a.html").write_text(page, "utf-8")
    texts = {s.metadata["id"]: s.page_content for s in document_loaders.load_folder(tmp_path)}
    assert texts == {
        "a.html#1-big-red": "Big red\n\na & b",
        "a.html#2-open": "open\n\nin a block\ufffd end <b",
    }


GROWING = {
    ".md": ["# a{}b", "# a{} #", "`{}", "```\n{}", "# a\n{}", "#{}"],
    ".rst": [
        "x y{}z", ":{}", ":a{}`", " \n{}", "` {}", "`a <{}", ":a:`x {}<", "*{}", ".. _:{}", ".. a:{}x", "a\n={}x",
        "a\n===\n{}", "`a {}", "`a<>{}", ".. a::\n :a{}\n", "\t {}x", "\\{}",
    ],
    ".html": [
        "<{}", "<div>{}", "<!--{}", "<!-- >{}", "<![CDATA[{}", "<![CDATA[ >{}", "<?{}", "</a{}", "<a b {}", '<a b="{}',
        "<p>x{}", "<h1>{}", "<h1>a</h1>{}", "&{}", "&#x{}", "<script>{}", "<script></{}", "<!a{}", "<b><i>{}",
    ],
}  # fmt: skip


@pytest.mark.parametrize("suffix", GROWING)
def test_reading_takes_time_in_proportion_to_the_size(suffix, tmp_path):
    """Four times the text, about four times the time; a pattern that looks again from each place needs sixteen."""
    path = tmp_path / f"a{suffix}"

    def seconds(pattern, size):
        begin, rest = pattern.split("{}")
        unit = begin[-4:] if suffix == ".rst" else begin
        path.write_text((begin + unit * (size // len(unit)) + rest), "utf-8")
        times = []
        for _ in range(2):
            start = time.process_time()
            document_loaders.READERS[suffix](path)
            times.append(time.process_time() - start)
        return min(times)

    for pattern in GROWING[suffix]:
        small, large = seconds(pattern, 20_000), seconds(pattern, 80_000)
        assert large < 8 * small + 0.02, (pattern, small, large)
        assert large < 1.5, (pattern, large)


def test_blanks_and_colons_of_a_manual_are_no_trouble():
    """Once 20 000 blanks took 6.5 s, and 8000 colons 0.3 s with four times as much for twice as many."""
    for text in ("x" + " " * 100_000 + "y", ":" * 100_000, "`a" + " " * 100_000, ":a" * 50_000):
        start = time.process_time()
        markup.rst_to_text(text)
        assert time.process_time() - start < 1


@pytest.fixture(scope="module")
def page_of_each_kind(tmp_path_factory):
    """{suffix: bytes} of a small document of each kind."""
    from matplotlib import pyplot as plt

    path = tmp_path_factory.mktemp("pdf") / "a.pdf"
    figure = plt.figure(figsize=(2, 1))
    figure.text(0.1, 0.5, "the first page")
    figure.savefig(path)
    plt.close(figure)
    body = "<body><h1>Pears</h1><p>Are <b>soft</b> &amp; sweet.</p><pre>x</pre></body>"
    html = f"<html><head><title>T</title></head>{body}"
    pages = {
        ".md": MARKDOWN.encode(),
        ".rst": PAGE.encode(),
        ".txt": PAGE.encode(),
        ".html": html.encode(),
    }
    return pages | {".pdf": path.read_bytes()}


@pytest.mark.parametrize(
    "suffix", [".md", ".rst", ".txt", ".html", pytest.param(".pdf", marks=pytest.mark.long)]
)
def test_damaged_documents_are_read_or_refused(suffix, page_of_each_kind, tmp_path, capsys):
    """500 of each kind: sections that the store and the embedder can take, or one line that names the file."""
    good, path = page_of_each_kind[suffix], tmp_path / f"bad{suffix}"
    read = 0
    for bad in fuzz.damaged(good, 500, seed=0):
        path.write_bytes(bad)
        start = time.process_time()
        try:
            sections = document_loaders.load_folder(tmp_path)
        except UserError as error:
            assert "no file could be read" in str(error)
            [line, count] = capsys.readouterr().err.splitlines()
            assert (
                line.startswith(f"skipped bad{suffix}: ")
                and count == "skipped 1 of 1 files"
                and len(line) < 160
            )
            sections = []
        assert time.process_time() - start < 2
        for s in sections:
            s.page_content.encode()
            assert (
                s.page_content.strip()
                and "\0" not in s.page_content
                and s.metadata["source"] == f"bad{suffix}"
            )
        read += bool(sections)
        # Nothing is left out or guessed: what is no UTF-8 is refused whole
        if suffix != ".pdf" and sections:
            bad.decode("utf-8-sig")
    assert 0 < read < 500


def test_words_and_cuts_of_any_script(tmp_path):
    """Marks stay with their letters, titles of Hindi keep their names, and Chinese is cut behind a full stop."""
    assert word_segmentation.word_pattern().findall("हिन्दी में, e\u0301te\u0301!") == [
        "हिन्दी",
        "में",
        "e\u0301te\u0301",
    ]
    (tmp_path / "a.md").write_text("# हिन्दी\n\nयह है।\n\n# Cafe\u0301\n\nx", "utf-8")
    hindi, cafe = document_loaders.load_folder(tmp_path)
    assert hindi.metadata["id"] == "a.md#1-हिन्दी" and cafe.metadata["id"] == "a.md#2-caf\u00e9"
    assert cafe.page_content == "Caf\u00e9\n\nx"
    sentence = "今天天气很好我们去公园散步吧。"
    found = chunking.passages([document_loaders.section("a", 0, (), "", sentence * 9)], 50)
    assert (
        all(p.page_content.endswith("。") for p in found)
        and "".join(p.page_content for p in found) == sentence * 9
    )
    letter = "q\u0323\u0307"  # has no composed form
    for part in chunking.passages([document_loaders.section("a", 0, (), "", letter * 60)], 50):
        assert len(part.page_content) % 3 == 0 and part.page_content[0] == "q"


def test_names_of_files_that_are_no_utf8_stay_apart_and_can_be_printed(tmp_path, capsys):
    for name in (b"a\xe9.md", b"a\xe8.md", b"b\xe9.bin"):
        with open(bytes(tmp_path) + b"/" + name, "w", encoding="utf-8") as file:
            file.write("# T\n\nx")
    sources = [s.metadata["source"] for s in document_loaders.load_folder(tmp_path)]
    assert sorted(sources) == ["a\\xe8.md", "a\\xe9.md"]
    assert capsys.readouterr().err.splitlines()[0].startswith("skipped b\\xe9.bin: none of .md")


def test_files_of_other_kinds_are_named_and_counted(tmp_path, capsys):
    (tmp_path / "a.md").write_text("fine", "utf-8")
    for i in range(7):
        (tmp_path / f"report{i}.docx").write_bytes(b"PK")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("x", "utf-8")
    document_loaders.load_folder(tmp_path)
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith(
        "skipped report0.docx, report1.docx, report2.docx, report3.docx, report4.docx and 2 more"
    )
    assert told[1] == "skipped 7 of 8 files"
    (tmp_path / "a.md").unlink()
    with pytest.raises(UserError, match="nothing there ends in .*; there are report0.docx"):
        document_loaders.load_folder(tmp_path)


def test_bytes_of_another_encoding_are_said_in_one_line(tmp_path, capsys):
    # a byte order mark is no letter
    (tmp_path / "a.md").write_bytes("\ufeff# Marked\r\n\r\nfine".encode())
    (tmp_path / "b.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "c.txt").write_bytes("caf\xe9".encode("utf-16"))
    [only] = document_loaders.load_folder(tmp_path)
    assert only.page_content == "Marked\n\nfine"
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "skipped b.txt: it is not UTF-8 (byte 3 is 0xe9); save it as UTF-8",
        "skipped c.txt: not a text in UTF-8",
        "skipped 2 of 3 files",
    ]


def test_half_characters_out_of_a_pdf_are_replaced(tmp_path, monkeypatch):
    page = SimpleNamespace(extract_text=lambda: "half \ud835 of a letter\0")
    monkeypatch.setattr("pypdf.PdfReader", lambda _: SimpleNamespace(pages=[page]))
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    [only] = document_loaders.load_folder(tmp_path)
    assert only.page_content == "page 1\n\nhalf \ufffd of a letter"


def test_titles_sample_and_skip_reach_the_passages():
    """What the flags say is what is searched."""
    cfg = SimpleNamespace(docs="", skip="", distractors=0, seed=0)
    sections, questions = corpus.load(cfg)
    assert {s.metadata["id"] for s in sections} == {q.gold for q in questions} and len(
        questions
    ) == 129
    kept, asked = corpus.load(SimpleNamespace(docs="", skip="celery/", distractors=0, seed=0))
    assert len(asked) == 129 and {s.metadata["source"].split("/")[0] for s in kept} == {
        "django",
        "scrapy",
    }
    lots = [
        corpus.load(SimpleNamespace(docs="", skip="", distractors=5, seed=s))[0] for s in (0, 0, 1)
    ]
    assert lots[0] == lots[1] != lots[2] and len(lots[0]) == 134
    for wrong, said in (
        ({"skip": "("}, "--skip is no regular"),
        ({"skip": "."}, "leaves nothing"),
        ({"distractors": -2}, "--dis"),
    ):
        with pytest.raises(UserError, match=said):
            corpus.load(
                SimpleNamespace(**{"docs": "", "skip": "", "distractors": 0, "seed": 0} | wrong)
            )
    one = document_loaders.section("a.md", 3, ("Above",), "Title", "word " * 40)
    plain, titled = chunking.passages([one], 100), chunking.passages([one], 100, titles=True)
    assert len(plain) == len(titled) == 3
    for a, b in zip(plain, titled):
        assert (
            b.page_content == f"a.md > Above > Title\n\n{a.page_content}"
            and a.metadata == b.metadata
        )
        assert a.metadata["section"] == "a.md#3-title" == one.metadata["id"]
    numbers = document_loaders.section("a.md", 3, (), "", " ".join(f"w{i}" for i in range(60)))
    first, second = (
        p.page_content.split() for p in chunking.passages([numbers], 100, overlap=30)[:2]
    )
    assert second[0] in first and second[0] != first[0]
