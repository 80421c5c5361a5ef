"""Corpus and splitter: three software manuals and their frequent questions with gold answers; or any folder.

A page is taken apart at its titles into sections; a section is a LangChain `Document` with `metadata`: `source` (the
file), `id` (file#title) and `title` (the titles it stands below). The manuals hold pages of frequent questions: there a
section is an answer, its question is taken away from it, and the pair (question, id of the answer) is what retrieval
is scored by. A reader of ours asks what the authors' readers asked, and the answer is where the authors put it.

Files of a folder that are broken, too large or no text at all cost one line each and are counted; those of other kinds
(.docx, pictures) are named together. Reading takes time in proportion to the size of a file, whatever stands in it.
"""

import logging
import random
import re
import sys
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

from langchain_core.documents import Document

from utils import data
from utils.run import UserError, check
from utils.text import clean, decode, printable

MEGABYTES = 20  # of one file; a larger one is skipped
PAGES = 2000  # of one PDF
# What it finds broken is said here, with the name of the file
logging.getLogger("pypdf").setLevel(logging.CRITICAL)
RST = re.compile(r"^(?:([=\-~^\"'*#+`.:_])\1{2,}\n)?(\S.*)\n(([=\-~^\"'*#+`.:_])\4{2,})$", re.M)
# The first or last line of a block of code in Markdown
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})([^\n]*)")
HEADING = re.compile(r"\x02([1-6])([^\x02\n]*)\x02")  # where a heading stood in HTML
# An answer of one sentence that only names another page
POINTER = re.compile(r"See (?:(?!\.\s).)*", re.S)
MARKUP = [  # reStructuredText, and what a reader sees of it
    (r"^\.\. _.*:( .*)?\n(?:[ \t]+http.*\n)?", ""),  # where a link leads
    # a directive; what stands in it stays
    (r"^[ \t]*\.\. [\w:+-]+::?( .*)?\n(?:[ \t]+:\w.*\n)*", r"\1\n"),
    (r":[\w:+-]{1,40}:`[!~]?([^`<]*)(<[^`]*>)?`", lambda m: shown(m)),  # :role:`words <target>`
    (r"`([^`<]+)(<[^`]*>)?`__?", lambda m: shown(m)),  # `words <target>`_
    (r"^\*+Answer:?\*+:?\s+", ""),
    (r"``|\*\*(?=\S)|(?<=\S)\*\*", ""),
    (r"::$", ":"),
    (r"^[=\-~^\"'*#+]{4,}\n", ""),
    (r"\\", ""),
    (r"(?<![ \t])[ \t]+$", ""),  # looked for once a run of blanks, not once a blank
    (r"\n{3,}", "\n\n"),
]


@dataclass(frozen=True)
class Question:
    """A question, and the id of the one section that answers it."""

    text: str
    gold: str
    answer: str


def shown(match):
    """The words of a link without its target."""
    words, target = match[1], match[2]
    return words.rstrip() if target else words


def plain(text):
    """reStructuredText as a reader sees it, more or less."""
    text += "\n"
    for markup, words in MARKUP:
        text = re.sub(markup, words, text, flags=re.M)
    return text.strip()


class Title(NamedTuple):
    """A title in a text: how deep it stands, and where it begins and ends."""

    depth: int
    text: str
    start: int
    end: int
    underline: str = ""


def rst_titles(text):
    """Titles of reStructuredText. A style of line that is new on the page is one level below those before it."""
    styles, found = [], []
    for m in RST.finditer(text):
        if len(m[3]) + 1 < len(m[2]):  # a short row of dashes below a line of words is no title
            continue
        style = (m[1], m[4])
        if style not in styles:
            styles.append(style)
        found.append(Title(styles.index(style), plain(m[2]), m.start(), m.end(), m[4]))
    return found


def markdown_titles(text):
    """Titles of Markdown: lines of one to six `#`, a blank and words. In a block of code a `#` begins a comment."""
    found, start, fence = [], 0, ""
    for line in text.split("\n"):
        end = start + len(line)
        mark = FENCE.match(line)
        if fence:
            # only a line of the same marks, as many or more, ends the block
            if mark and mark[1].startswith(fence) and not mark[2].strip():
                fence = ""
        elif mark and not (mark[1][0] == "`" and "`" in mark[2]):
            fence = mark[1]
        elif line.lstrip(" ").startswith("#") and len(line) - len(line.lstrip(" ")) <= 3:
            depth, words = heading(line)
            if words:
                found.append(Title(depth, words, start, end))
        start = end + 1
    return found


def heading(line):
    """A line that begins with # -> how many, and the words; "" if it is no title. "## Usage ##" -> 2, "Usage"."""
    line = line.strip()
    words = line.lstrip("#")
    depth = len(line) - len(words)
    if depth > 6 or not words[:1].isspace():
        return depth, ""
    words = words.strip()
    bare = words.rstrip("#")
    return depth, bare.rstrip() if bare[-1:].isspace() else words


@lru_cache(maxsize=1)
def marks():
    """Every character that only changes the one before it (accents, vowel signs of Hindi), for a class in a pattern."""
    found = [c for c in map(chr, range(0x300, 0x1F000)) if unicodedata.category(c).startswith("M")]
    return "".join(found) + "\u200c\u200d"  # and what joins or parts two letters


@lru_cache(maxsize=1)
def word_pattern():
    """A word in any script: `\\w+` alone cuts it at each mark."""
    return re.compile(rf"[\w{marks()}]+")


def cut(text, titles):
    """A text and its titles -> [(titles above, title or None, body)]; what comes before the first title has none."""
    parts, above = [((), None, text[: titles[0].start] if titles else text)], []
    for title, end in zip(titles, [t.start for t in titles[1:]] + [len(text)]):
        above = [t for t in above if t.depth < title.depth]
        parts.append((tuple(t.text for t in above), title, text[title.end : end]))
        above.append(title)
    return parts


def section(source, number, above, title, body, show=True):
    """One Document, named after its title; its text begins with the title if that is shown."""
    title, body = (unicodedata.normalize("NFC", clean(part)) for part in (title, body))
    name = "-".join(word_pattern().findall(title.lower())).strip("-")[:60]
    text = f"{title}\n\n{body}".strip() if show else body
    above = [unicodedata.normalize("NFC", clean(t)) for t in above]
    path = " > ".join(t for t in (source.split("/")[0], *above, title if show else "") if t)
    return Document(
        text, metadata={"source": source, "id": f"{source}#{number}-{name}", "title": path}
    )


@lru_cache(maxsize=1)
def manuals():
    """-> sections of three manuals, and the questions whose answers are among them: the same every time."""
    sections, questions = [], []
    for source, text in data.docs():
        titles = rst_titles(text)
        depth = None  # of the questions: the deeper of the titles underlined with = and with -
        if "/faq" in source:
            depth = max(t.depth for t in titles if t.underline in "=-")
            # Small titles within an answer are part of it
            titles = [t for t in titles if t.depth <= depth]
        for number, (above, title, body) in enumerate(cut(text, titles)):
            body = plain(body)
            asked = title and 0 < title.depth == depth
            if body:
                sections.append(
                    section(
                        source, number, above, title.text if title else "", body, show=not asked
                    )
                )
            if title and asked and body and not POINTER.fullmatch(body):
                questions.append(Question(title.text, sections[-1].metadata["id"], body))
    return sections, questions


def sample(sections, questions, distractors, seed=0):
    """The sections that answer a question, and so many others by lot (-1: all), in the order of the manuals."""
    check(distractors >= -1, "--distractors: 0 or more, or -1 for all")
    gold = {q.gold for q in questions}
    others = [s.metadata["id"] for s in sections if s.metadata["id"] not in gold]
    keep = gold | set(
        others
        if distractors < 0
        else random.Random(seed).sample(others, min(distractors, len(others)))
    )
    return [s for s in sections if s.metadata["id"] in keep]


def passages(sections, chunk=1000, overlap=0, titles=False):
    """Sections -> passages of at most `chunk` characters, cut at paragraphs, lines or words; `section` names the whole.
    With `titles` each begins with the titles it stands below: words that it needs to be understood alone.

    MiniLM reads 256 tokens, about a thousand characters: what comes behind them would not be found.
    """
    check(
        chunk >= 50 and 0 <= overlap < chunk,
        "--chunk: 50 characters or more; --overlap: 0 or more, below --chunk",
    )
    splitter = passage_splitter(chunk, overlap)
    found = []
    for one in sections:
        name = one.metadata["id"]
        for i, text in enumerate(splitter.split_text(one.page_content)):
            text = f"{one.metadata['title']}\n\n{text}" if titles else text
            found.append(
                Document(text, metadata=one.metadata | {"id": f"{name}/{i}", "section": name})
            )
    return found


def passage_splitter(chunk, overlap):
    """Cuts at paragraphs, else lines, else words; in scripts without blanks after sentences, else between characters,
    but never between a letter and its marks."""
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    cuts = [r"\n\n", r"\n", " ", "(?<=[。！？；।॥۔])", rf"(?![{marks()}])", ""]
    return RecursiveCharacterTextSplitter(
        cuts, is_separator_regex=True, chunk_size=chunk, chunk_overlap=overlap
    )


def whole(sections):
    """Each section as one passage."""
    return [
        Document(s.page_content, metadata=s.metadata | {"section": s.metadata["id"]})
        for s in sections
    ]


def folder(path):
    """Every .md, .rst, .txt, .html and .pdf below a folder -> sections. What is not read is named and counted.

    Hidden files, whose names or folders begin with a dot, are none of them.
    """
    path = Path(path)
    check(path.is_dir(), f"--docs {printable(path)} is not a folder")
    home = path.resolve()
    files = sorted(f for f in path.rglob("*") if f.is_file() and not hidden(f, path))
    known = [f for f in files if f.suffix.lower() in READERS]
    others = [file_name(f, path) for f in files if f.suffix.lower() not in READERS]
    kinds = " ".join(READERS)
    besides = f"; there are {some(others)}" if others else ""
    check(known, f"--docs {printable(path)}: nothing there ends in {kinds}{besides}")
    sections, skipped = [], len(others)
    for file in known:
        source = file_name(file, path)
        try:
            parts = read(file, home)
        # Whatever a broken file does to its reader, it costs this file only
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:100]
            print(f"skipped {printable(source)}: {printable(reason)}", file=sys.stderr)
            skipped += 1
            continue
        for number, (above, title, body) in enumerate(parts):
            if body.strip():
                sections.append(
                    section(source, number, above, title.text if title else "", body.strip())
                )
    if others:
        print(f"skipped {some(others)}: none of {kinds}", file=sys.stderr)
    if skipped:
        print(f"skipped {skipped} of {len(files)} files", file=sys.stderr)
    check(sections, f"--docs {printable(path)}: no file could be read")
    return sections


def read(file, home):
    """A file below the folder `home` -> [(titles above, title or None, body)]. Raises ValueError, saying why not."""
    if not file.resolve().is_relative_to(home):
        raise ValueError("a link that leads out of the folder")
    if file.stat().st_size > MEGABYTES * 1e6:
        raise ValueError(f"larger than {MEGABYTES} MB")
    parts = READERS[file.suffix.lower()](file)
    if not any(body.strip() for _, _, body in parts):
        raise ValueError("no text in it")
    return parts


def hidden(file, home):
    return any(part.startswith(".") for part in file.relative_to(home).parts)


def file_name(file, home):
    """The name below the folder; bytes in it that are no UTF-8 are written out, so that two names stay two."""
    name = file.relative_to(home).as_posix()
    return clean(name.encode(errors="surrogateescape").decode(errors="backslashreplace"))


def some(names, count=5):
    """The first of many names, and how many there are besides."""
    shown = ", ".join(printable(name) for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


def read_text(file):
    content = file.read_bytes()
    if b"\0" in content:
        raise ValueError("not a text in UTF-8")
    return decode(content, "it")


def read_rst(file):
    text = read_text(file)
    return [(above, title, plain(body)) for above, title, body in cut(text, rst_titles(text))]


def read_markdown(file):
    text = read_text(file)
    return cut(text, markdown_titles(text))


class Page(HTMLParser):
    """The words of a page of HTML; a heading becomes a line between two \\x02, which no text of the page can hold."""

    # What they hold is not shown as words
    HIDDEN = ("head", "script", "style", "nav", "noscript", "template")
    HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
    BLOCKS = {"p", "div", "section", "article", "main", "ul", "ol", "dl", "table", "pre", *HEADINGS}

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.hidden: Counter[str] = Counter()  # how many of each kind are open
        self.heading: list[str] | None = None  # words of the heading that is open
        self.depth = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in self.BLOCKS:
            self.end_heading()  # a heading that is not closed ends where the next block begins
        if tag == "body":
            self.hidden.clear()  # </head> may be left out
        elif tag in self.HIDDEN:
            self.hidden[tag] += 1
        elif tag in self.HEADINGS and not self.hidden.total():
            self.heading, self.depth = [], tag[1]

    def handle_endtag(self, tag: str) -> None:
        if self.hidden[tag] > 0:
            self.hidden[tag] -= 1
        elif tag in self.HEADINGS:
            self.end_heading()

    def handle_data(self, data: str) -> None:
        if self.hidden.total():
            return
        (self.pieces if self.heading is None else self.heading).append(data)

    def end_heading(self) -> None:
        words = " ".join(" ".join(self.heading or ()).split())
        if words:
            self.pieces.append(f"\n\n\x02{self.depth}{words}\x02\n\n")
        self.heading = None

    def text(self) -> str:
        self.end_heading()
        return re.sub(r"\n\s*\n+", "\n\n", "".join(self.pieces))


def read_html(file):
    """The words of a page, cut at its headings; scripts, styles and what only serves navigation are no words."""
    page = Page()
    page.feed(tame(read_text(file)))
    page.close()
    text = page.text()
    titles = [Title(int(m[1]), m[2], m.start(), m.end()) for m in HEADING.finditer(text)]
    return cut(text, titles)


def tame(text):
    """HTML without what Python's parser looks for the end of again and again, up to the end of the file."""
    # comments, which end at the next --> or never
    first, *rest = text.replace("\x02", "").split("<!--")
    text = first + "".join(part.partition("-->")[2] for part in rest)
    # sections like <![CDATA[, which HTML reads as a comment up to the next >
    text = text.replace("<![", "<!")
    # behind the last > no tag is complete: it is text
    head, close, tail = text.rpartition(">")
    return head + close + tail.replace("<", "&lt;")


def read_pdf(file):
    """A section a page."""
    from pypdf import PdfReader

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pages = PdfReader(file).pages
        if len(pages) > PAGES:
            raise ValueError(f"more than {PAGES} pages")
        texts = [page.extract_text().replace("\0", "") for page in pages]
    return [((), Title(0, f"page {i}", 0, 0), text) for i, text in enumerate(texts, 1)]


READERS = {
    ".md": read_markdown,
    ".rst": read_rst,
    ".txt": read_rst,
    ".html": read_html,
    ".htm": read_html,
    ".pdf": read_pdf,
}


def load(cfg):
    """-> sections, questions: of the manuals, or those of --docs, for which nobody wrote questions."""
    try:
        skip = re.compile(cfg.skip) if cfg.skip else None
    except re.error as error:
        raise UserError(f"--skip is no regular expression: {error}") from None
    sections, questions = (folder(cfg.docs), []) if cfg.docs else manuals()
    if not cfg.docs:
        sections = sample(sections, questions, cfg.distractors, cfg.seed)
    kept = [s for s in sections if not (skip and skip.search(s.metadata["source"]))]
    check(kept, f"--skip {cfg.skip} leaves nothing to search")
    return kept, questions
