"""Document loaders: files of a folder -> sections, which are LangChain `Document`s.

A page is split at its titles into sections; `metadata` of a section: `source` (the file), `id`
(file#title) and `title` (the titles it stands below). Files that are broken, too large or no text
at all cost one line each and are counted; those of other kinds (.docx, pictures) are named
together. Reading takes time in proportion to the size of a file, whatever stands in it.
"""

import logging
import sys
import unicodedata
import warnings
from pathlib import Path

from langchain_core.documents import Document

from rag import markup
from rag.markup import Title, split_at_titles
from rag.word_segmentation import word_pattern
from utils.run import check
from utils.text import clean, decode, printable

MAX_MEGABYTES = 20  # of one file; a larger one is skipped
MAX_PAGES = 2000  # of one PDF
# What pypdf finds broken is said here, with the name of the file
logging.getLogger("pypdf").setLevel(logging.CRITICAL)


def section(source, number, above, title, body, show=True):
    """One Document, named after its title; its text begins with the title if that is shown."""
    # One normal form, without half characters
    title = unicodedata.normalize("NFC", clean(title))
    body = unicodedata.normalize("NFC", clean(body))
    above = [unicodedata.normalize("NFC", clean(t)) for t in above]
    # Its name, its text, and the titles it stands below
    name = "-".join(word_pattern().findall(title.lower())).strip("-")[:60]
    text = f"{title}\n\n{body}".strip() if show else body
    shown = (source.split("/")[0], *above, title if show else "")
    path = " > ".join(t for t in shown if t)
    metadata = {"source": source, "id": f"{source}#{number}-{name}", "title": path}
    return Document(text, metadata=metadata)


def load_folder(path):
    """Every .md, .rst, .txt, .html and .pdf below a folder -> sections.

    What is not read is named and counted. Hidden files, whose names or folders begin with a dot,
    are none of them.
    """
    path = Path(path)
    place = f"--docs {printable(path)}"
    check(path.is_dir(), f"{place} is not a folder")
    home = path.resolve()
    # Files of known and of other kinds
    files = sorted(f for f in path.rglob("*") if f.is_file() and not hidden(f, path))
    known = [f for f in files if f.suffix.lower() in READERS]
    others = [file_name(f, path) for f in files if f.suffix.lower() not in READERS]
    kinds = " ".join(READERS)
    besides = f"; there are {first_names(others)}" if others else ""
    check(known, f"{place}: nothing there ends in {kinds}{besides}")
    sections = []
    skipped = len(others)
    for file in known:
        source = file_name(file, path)
        # Whatever a broken file does to its reader, it costs this file only
        try:
            parts = read(file, home)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:100]
            print(f"skipped {printable(source)}: {printable(reason)}", file=sys.stderr)
            skipped += 1
            continue
        # Each part with words is a section
        for number, (above, title, body) in enumerate(parts):
            body = body.strip()
            if body:
                name = title.text if title else ""
                sections.append(section(source, number, above, name, body))
    # Say what was left out
    if others:
        print(f"skipped {first_names(others)}: none of {kinds}", file=sys.stderr)
    if skipped:
        print(f"skipped {skipped} of {len(files)} files", file=sys.stderr)
    check(sections, f"{place}: no file could be read")
    return sections


def read(file, home):
    """A file below the folder `home` -> [(titles above, title or None, body)].

    Raises ValueError, saying why not.
    """
    # What is refused before it is opened
    if not file.resolve().is_relative_to(home):
        raise ValueError("a link that leads out of the folder")
    if file.stat().st_size > MAX_MEGABYTES * 1e6:
        raise ValueError(f"larger than {MAX_MEGABYTES} MB")
    # By the reader of its kind
    parts = READERS[file.suffix.lower()](file)
    if not any(body.strip() for _, _, body in parts):
        raise ValueError("no text in it")
    return parts


def hidden(file, home):
    """Does its name, or that of a folder above it, begin with a dot?"""
    return any(part.startswith(".") for part in file.relative_to(home).parts)


def file_name(file, home):
    """The name below the folder.

    Bytes in it that are no UTF-8 are written out, so that two names stay two.
    """
    name = file.relative_to(home).as_posix()
    return clean(name.encode(errors="surrogateescape").decode(errors="backslashreplace"))


def first_names(names, count=5):
    """The first of many names, and how many there are besides."""
    shown = ", ".join(printable(name) for name in names[:count])
    if len(names) <= count:
        return shown
    return f"{shown} and {len(names) - count} more"


def read_text(file):
    """The text of a file in UTF-8. Raises ValueError for anything else."""
    content = file.read_bytes()
    if b"\0" in content:
        raise ValueError("not a text in UTF-8")
    return decode(content, "it")


def read_rst(file):
    """reStructuredText, split at its titles, as a reader sees it."""
    text = read_text(file)
    parts = split_at_titles(text, markup.rst_titles(text))
    return [(above, title, markup.rst_to_text(body)) for above, title, body in parts]


def read_markdown(file):
    """Markdown, split at its titles."""
    text = read_text(file)
    return split_at_titles(text, markup.markdown_titles(text))


def read_html(file):
    """The visible text of a page, split at its headings; no scripts, styles or navigation."""
    return split_at_titles(*markup.html_to_text(read_text(file)))


def read_pdf(file):
    """A section a page."""
    from pypdf import PdfReader

    # Warnings of pypdf are not shown: what cannot be read is said by load_folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pages = PdfReader(file).pages
        if len(pages) > MAX_PAGES:
            raise ValueError(f"more than {MAX_PAGES} pages")
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
