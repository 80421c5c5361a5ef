"""What is searched: three software manuals, and their frequent questions with the answers to be found; or any folder.

A page is taken apart at its titles into sections; a section is a LangChain `Document` with `metadata`: `source` (the
file), `id` (file#title) and `title` (the titles it stands below). The manuals hold pages of frequent questions: there a
section is an answer, its question is taken away from it, and the pair (question, id of the answer) is what retrieval
is scored by. A reader of ours asks what the authors' readers asked, and the answer is where the authors put it.

Files of a folder that are broken, too large or no text at all cost one line each and are counted, and nothing stops.
"""

import logging
import random
import re
import sys
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from bs4 import BeautifulSoup
from langchain_core.documents import Document
from langchain_text_splitters import RecursiveCharacterTextSplitter
from pypdf import PdfReader

from utils import data
from utils.run import UserError, check

MEGABYTES = 20  # of one file; a larger one is skipped
PAGES = 2000  # of one PDF
logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what it finds broken is said here, with the name of the file
RST = re.compile(r"^(?:([=\-~^\"'*#+`.:_])\1{2,}\n)?(\S.*)\n(([=\-~^\"'*#+`.:_])\4{2,})$", re.M)
MARKDOWN = re.compile(r"^(#{1,6}) +(.+?) *#*$", re.M)
POINTER = re.compile(r"See (?:(?!\.\s).)*", re.S)  # an answer of one sentence that only names another page
MARKUP = [  # reStructuredText, and what a reader sees of it
    (r"^\.\. _.*:( .*)?\n(?:[ \t]+http.*\n)?", ""),  # where a link leads
    (r"^[ \t]*\.\. [\w:+-]+::?( .*)?\n(?:[ \t]+:\w.*\n)*", r"\1\n"),  # a directive; what stands in it stays
    (r":[\w:+-]+:`[!~]?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1"),  # :role:`words <target>`
    (r"`([^`<]+?)(?:\s*<[^`]*>)?`__?", r"\1"),  # `words <target>`_
    (r"^\*+Answer:?\*+:?\s+", ""),
    (r"``|\*\*(?=\S)|(?<=\S)\*\*", ""),
    (r"::$", ":"),
    (r"^[=\-~^\"'*#+]{4,}\n", ""),
    (r"\\", ""),
    (r"[ \t]+$", ""),
    (r"\n{3,}", "\n\n"),
]


@dataclass(frozen=True)
class Question:
    """A question, and the id of the one section that answers it."""

    text: str
    gold: str
    answer: str


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
    return [Title(len(m[1]), m[2], m.start(), m.end()) for m in MARKDOWN.finditer(text)]


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
    name = re.sub(r"\W+", "-", title.lower()).strip("-")[:60]
    text = f"{title}\n\n{body}".strip() if show else body
    path = " > ".join(t for t in (source.split("/")[0], *above, title if show else "") if t)
    return Document(text, metadata={"source": source, "id": f"{source}#{number}-{name}", "title": path})


@lru_cache(maxsize=1)
def manuals():
    """-> sections of three manuals, and the questions whose answers are among them: the same every time."""
    sections, questions = [], []
    for source, text in data.docs():
        titles = rst_titles(text)
        depth = None  # of the questions: the deeper of the titles underlined with = and with -
        if "/faq" in source:
            depth = max(t.depth for t in titles if t.underline in "=-")
            titles = [t for t in titles if t.depth <= depth]  # small titles within an answer are part of it
        for number, (above, title, body) in enumerate(cut(text, titles)):
            body = plain(body)
            asked = title and 0 < title.depth == depth
            if body:
                sections.append(section(source, number, above, title.text if title else "", body, show=not asked))
            if title and asked and body and not POINTER.fullmatch(body):
                questions.append(Question(title.text, sections[-1].metadata["id"], body))
    return sections, questions


def sample(sections, questions, distractors, seed=0):
    """The sections that answer a question, and so many others by lot (-1: all), in the order of the manuals."""
    check(distractors >= -1, "--distractors: 0 or more, or -1 for all")
    gold = {q.gold for q in questions}
    others = [s.metadata["id"] for s in sections if s.metadata["id"] not in gold]
    keep = gold | set(others if distractors < 0 else random.Random(seed).sample(others, min(distractors, len(others))))
    return [s for s in sections if s.metadata["id"] in keep]


def passages(sections, chunk=1000, overlap=0, titles=False):
    """Sections -> passages of at most `chunk` characters, cut at paragraphs, lines or words; `section` names the whole.
    With `titles` each begins with the titles it stands below: words that it needs to be understood alone.

    MiniLM reads 256 tokens, about a thousand characters: what comes behind them would not be found.
    """
    check(chunk >= 50 and 0 <= overlap < chunk, "--chunk: 50 characters or more; --overlap: 0 or more, below --chunk")
    splitter = RecursiveCharacterTextSplitter(chunk_size=chunk, chunk_overlap=overlap)
    found = []
    for one in sections:
        name = one.metadata["id"]
        for i, text in enumerate(splitter.split_text(one.page_content)):
            text = f"{one.metadata['title']}\n\n{text}" if titles else text
            found.append(Document(text, metadata=one.metadata | {"id": f"{name}/{i}", "section": name}))
    return found


def whole(sections):
    """Each section as one passage."""
    return [Document(s.page_content, metadata=s.metadata | {"section": s.metadata["id"]}) for s in sections]


def folder(path):
    """Every .md, .rst, .txt, .html and .pdf below a folder -> sections. What cannot be read is named and counted."""
    path = Path(path)
    check(path.is_dir(), f"--docs {path} is not a folder")
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in READERS and f.is_file())
    home = path.resolve()
    check(files, f"--docs {path}: nothing there ends in {' '.join(READERS)}")
    sections, skipped = [], 0
    for file in files:
        source = file.relative_to(path).as_posix()
        try:
            if not file.resolve().is_relative_to(home):
                raise ValueError("a link that leads out of the folder")
            if file.stat().st_size > MEGABYTES * 1e6:
                raise ValueError(f"larger than {MEGABYTES} MB")
            parts = READERS[file.suffix.lower()](file)
            if not any(body.strip() for _, _, body in parts):
                raise ValueError("no text in it")
        except Exception as error:  # whatever a broken file does to its reader, it costs this file only
            reason = (str(error) or type(error).__name__).splitlines()[0][:100]
            print(f"skipped {source}: {reason}", file=sys.stderr)
            skipped += 1
            continue
        sections += [
            section(source, number, above, title.text if title else "", body.strip())
            for number, (above, title, body) in enumerate(parts)
            if body.strip()
        ]
    if skipped:
        print(f"skipped {skipped} of {len(files)} files", file=sys.stderr)
    check(sections, f"--docs {path}: no file could be read")
    return sections


def read_text(file):
    data = file.read_bytes()
    if b"\0" in data:
        raise ValueError("not a text")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise ValueError("not a text in UTF-8") from None


def read_rst(file):
    text = read_text(file)
    return [(above, title, plain(body)) for above, title, body in cut(text, rst_titles(text))]


def read_markdown(file):
    text = read_text(file)
    return cut(text, markdown_titles(text))


def read_html(file):
    """The words of a page, cut at its headings; scripts, styles and what only serves navigation are no words."""
    soup = BeautifulSoup(read_text(file), "html.parser")
    for tag in soup(["head", "script", "style", "nav", "noscript", "template"]):
        tag.decompose()
    for tag in soup(["h1", "h2", "h3", "h4", "h5", "h6"]):
        words = " ".join(tag.get_text(" ").split())
        if words:
            tag.replace_with(f"\n\n{'#' * int(tag.name[1])} {words}\n\n")
    text = re.sub(r"\n\s*\n+", "\n\n", soup.get_text())
    return cut(text, markdown_titles(text))


def read_pdf(file):
    """A section a page."""
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
