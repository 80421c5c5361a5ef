"""Parsing of markup: titles and plain text of reStructuredText, Markdown and HTML.

A text is split at its titles into parts, each with the titles that it stands below. Parsing takes
time in proportion to the length of the text, whatever stands in it.
"""

import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any, NamedTuple

RST_TITLE = re.compile(
    r"^(?:([=\-~^\"'*#+`.:_])\1{2,}\n)?(\S.*)\n(([=\-~^\"'*#+`.:_])\4{2,})$", re.M
)
# The first or last line of a block of code in Markdown
CODE_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})([^\n]*)")
HTML_HEADING = re.compile(r"\x02([1-6])([^\x02\n]*)\x02")  # where a heading stood in HTML
RST_MARKUP = [  # reStructuredText, and what a reader sees of it
    (r"^\.\. _.*:( .*)?\n(?:[ \t]+http.*\n)?", ""),  # where a link leads
    # a directive; what stands in it stays
    (r"^[ \t]*\.\. [\w:+-]+::?( .*)?\n(?:[ \t]+:\w.*\n)*", r"\1\n"),
    # :role:`words <target>`
    (r":[\w:+-]{1,40}:`[!~]?([^`<]*)(<[^`]*>)?`", lambda m: link_text(m)),
    (r"`([^`<]+)(<[^`]*>)?`__?", lambda m: link_text(m)),  # `words <target>`_
    (r"^\*+Answer:?\*+:?\s+", ""),
    (r"``|\*\*(?=\S)|(?<=\S)\*\*", ""),
    (r"::$", ":"),
    (r"^[=\-~^\"'*#+]{4,}\n", ""),
    (r"\\", ""),
    (r"(?<![ \t])[ \t]+$", ""),  # looked for once a run of blanks, not once a blank
    (r"\n{3,}", "\n\n"),
]


class Title(NamedTuple):
    """A title in a text: how deep it stands, and where it begins and ends."""

    depth: int
    text: str
    start: int
    end: int
    underline: str = ""


def split_at_titles(text, titles):
    """A text and its titles -> [(titles above, title or None, body)].

    What comes before the first title has none.
    """
    first = titles[0].start if titles else len(text)
    parts = [((), None, text[:first])]
    above = []
    ends = [t.start for t in titles[1:]] + [len(text)]
    for title, end in zip(titles, ends):
        # Only titles of lower depth stand above this one
        above = [t for t in above if t.depth < title.depth]
        path = tuple(t.text for t in above)
        parts.append((path, title, text[title.end : end]))
        above.append(title)
    return parts


def link_text(match):
    """The words of a link without its target."""
    words, target = match[1], match[2]
    return words.rstrip() if target else words


def rst_to_text(text):
    """reStructuredText as a reader sees it, more or less."""
    text += "\n"
    for pattern, replacement in RST_MARKUP:
        text = re.sub(pattern, replacement, text, flags=re.M)
    return text.strip()


def rst_titles(text):
    """Titles of reStructuredText.

    A style of underline that is new on the page is one level below those before it.
    """
    styles = []
    titles = []
    for m in RST_TITLE.finditer(text):
        # A short row of dashes below a line of words is no title
        if len(m[3]) + 1 < len(m[2]):
            continue
        style = (m[1], m[4])
        if style not in styles:
            styles.append(style)
        depth = styles.index(style)
        titles.append(Title(depth, rst_to_text(m[2]), m.start(), m.end(), m[4]))
    return titles


def markdown_titles(text):
    """Titles of Markdown: lines of one to six `#`, a blank and words.

    In a block of code a `#` begins a comment.
    """
    titles = []
    start = 0
    fence = ""  # the marks that opened a block of code
    for line in text.split("\n"):
        end = start + len(line)
        mark = CODE_FENCE.match(line)
        indent = len(line) - len(line.lstrip(" "))
        if fence:
            # Within code: only a line of the same marks, as many or more, ends the block
            if mark and mark[1].startswith(fence) and not mark[2].strip():
                fence = ""
        elif mark and not (mark[1][0] == "`" and "`" in mark[2]):
            # A block of code opens
            fence = mark[1]
        elif line.lstrip(" ").startswith("#") and indent <= 3:
            # A title, if there are words
            depth, words = markdown_heading(line)
            if words:
                titles.append(Title(depth, words, start, end))
        start = end + 1
    return titles


def markdown_heading(line):
    """A line that begins with # -> how many, and the words; "" if it is no title.

    "## Usage ##" -> 2, "Usage".
    """
    line = line.strip()
    words = line.lstrip("#")
    depth = len(line) - len(words)
    if depth > 6 or not words[:1].isspace():
        return depth, ""
    # Closing marks are no words, if a blank stands before them
    words = words.strip()
    bare = words.rstrip("#")
    if bare[-1:].isspace():
        words = bare.rstrip()
    return depth, words


class HtmlText(HTMLParser):
    """The visible text of HTML.

    A heading becomes a line between two \\x02, which no text of the page can hold.
    """

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
        # A heading that is not closed ends where the next block begins
        if tag in self.BLOCKS:
            self.end_heading()
        if tag == "body":
            self.hidden.clear()  # </head> may be left out
        elif tag in self.HIDDEN:
            self.hidden[tag] += 1
        elif tag in self.HEADINGS and not self.hidden.total():
            self.heading = []
            self.depth = tag[1]

    def handle_endtag(self, tag: str) -> None:
        if self.hidden[tag] > 0:
            self.hidden[tag] -= 1
        elif tag in self.HEADINGS:
            self.end_heading()

    def handle_data(self, data: str) -> None:
        if self.hidden.total():
            return
        target = self.pieces if self.heading is None else self.heading
        target.append(data)

    def end_heading(self) -> None:
        words = " ".join(" ".join(self.heading or ()).split())
        if words:
            self.pieces.append(f"\n\n\x02{self.depth}{words}\x02\n\n")
        self.heading = None

    def text(self) -> str:
        self.end_heading()
        return re.sub(r"\n\s*\n+", "\n\n", "".join(self.pieces))


def html_to_text(html):
    """The visible text of a page of HTML, and its titles."""
    parser = HtmlText()
    parser.feed(without_open_ends(html))
    parser.close()
    text = parser.text()
    titles = [Title(int(m[1]), m[2], m.start(), m.end()) for m in HTML_HEADING.finditer(text)]
    return text, titles


def without_open_ends(html):
    """HTML without what Python's parser looks for the end of again and again, up to the end."""
    # Comments, which end at the next --> or never
    first, *rest = html.replace("\x02", "").split("<!--")
    text = first + "".join(part.partition("-->")[2] for part in rest)
    # Sections like <![CDATA[, which HTML reads as a comment up to the next >
    text = text.replace("<![", "<!")
    # Behind the last > no tag is complete: it is text
    head, close, tail = text.rpartition(">")
    return head + close + tail.replace("<", "&lt;")
