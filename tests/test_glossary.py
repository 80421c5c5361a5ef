"""The glossary names what exists, in order; headings, first cells of tables and names speak the field's language."""

import ast
import re
import unicodedata
from functools import cache

import pytest

from tests.conftest import ROOT
from tests.test_repo import CHAPTERS

GLOSSARY = ROOT / "docs" / "GLOSSARY.md"
LINK = r"\[([^\]]+)\]\(([^)]+)\) `([^`]+)`"  # [file.py](../chapter/file.py) `Class.method`
SCRIPTS = [path for chapter in CHAPTERS for path in sorted((ROOT / chapter).glob("*.py"))]
TOPICS = [path for path in SCRIPTS if path.with_suffix(".md").is_file()]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [path for chapter in CHAPTERS for path in sorted((ROOT / chapter).glob("*.md"))]


def tables(text):
    """Markdown -> [cells of each row of its tables], without the lines of dashes; blocks of code are left out."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    lines = [line.strip() for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if not set("".join(row)) <= set("-: ")]


def headings(text):
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return re.findall(r"^#+ +(.*)$", text, re.M)


@cache
def glossary():
    """{term: (what it is, [(file, symbol)])}, in the order of the page."""
    rows = tables(GLOSSARY.read_text("utf-8"))[1:]
    assert all(len(row) == 3 for row in rows), [row for row in rows if len(row) != 3]
    terms = [row[0] for row in rows]
    assert len(terms) == len(set(terms)), "a term is there twice"
    return {term: (text, places(where)) for term, text, where in rows}


def places(where):
    """The last cell of a row -> [(file, symbol)]. It consists of such links, and of nothing else."""
    found = re.findall(LINK, where)
    assert ", ".join(f"[{name}]({link}) `{symbol}`" for name, link, symbol in found) == where, where
    assert all(link.split("/")[-1] == name for name, link, _ in found), where
    return [((GLOSSARY.parent / link).resolve(), symbol) for _, link, symbol in found]


def targets(node):
    """The names that a statement defines: of a function, a class, or what is assigned to."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    assigned = []
    if isinstance(node, ast.Assign):
        assigned = node.targets
    if isinstance(node, ast.AnnAssign):
        assigned = [node.target]
    return [target.id for target in assigned if isinstance(target, ast.Name)]


@cache
def defined(path):
    """Names that a file defines, those of a class with its name before them: {"Schedule", "Schedule.to", ...}."""
    names = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        names.update(targets(node))
        if isinstance(node, ast.ClassDef):
            names.update(f"{node.name}.{name}" for inner in node.body for name in targets(inner))
    return names


def letters(text):
    """For the order: without accents, all small."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().casefold()


def test_the_glossary_covers_every_chapter():
    assert len(glossary()) >= 120
    named = {path.parent.name for _, where in glossary().values() for path, _ in where}
    assert named >= set(CHAPTERS)


def test_terms_are_sorted_and_unique():
    terms = [letters(term) for term in glossary()]
    wrong = [f"{b} stands after {a}" for a, b in zip(terms, terms[1:], strict=False) if a >= b]
    assert terms == sorted(set(terms)), wrong


def test_a_term_is_explained_in_one_or_two_sentences():
    for term, (text, _) in glossary().items():
        sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
        assert text.endswith(".") and len(sentences) <= 2, f"{term}: {text}"


def test_every_term_is_defined_where_the_glossary_says():
    wrong = []
    for term, (_, where) in glossary().items():
        assert where, f"{term} names no place"
        for path, symbol in where:
            if not path.is_file():
                wrong.append(f"{term}: there is no {path.relative_to(ROOT)}")
            elif symbol not in defined(path):
                wrong.append(f"{term}: {path.relative_to(ROOT)} defines no {symbol}")
    assert not wrong, "\n".join(wrong)


def test_every_topic_is_named():
    named = {path for _, where in glossary().values() for path, _ in where}
    missing = [str(path.relative_to(ROOT)) for path in TOPICS if path not in named]
    assert TOPICS and not missing, f"docs/GLOSSARY.md names nothing of {missing}"


def words(text):
    """Small letters and single blanks: `Look-twice` and look_twice are the same words."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return " ".join(re.findall(r"[^\W_]+", letters(text)))


@cache
def idioms():
    """{private idiom: what the field says}, from the table in CONTRIBUTING.md; a row may list several, with commas."""
    section = re.search(
        r"^## Words$(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.S | re.M
    )
    assert section, "CONTRIBUTING.md has no section Words"
    rows = tables(section[1])[1:]
    return {words(idiom): field for private, field in rows for idiom in private.split(",")}


def spoken(text):
    """Idioms in a heading or a cell. Code, formulas and the targets of links are not prose."""
    prose = re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)", " ", text)
    return [idiom for idiom in idioms() if f" {idiom} " in f" {words(prose)} "]


def test_idioms_are_found():
    assert len(idioms()) >= 10
    assert all(idiom and field for idiom, field in idioms().items())
    assert spoken("## 3. Fewer numbers, more pictures") == ["fewer numbers"]
    assert spoken("`fewer_numbers` for [the latent autoencoder](fewer-numbers.md)") == []


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_headings_and_first_cells_say_what_the_field_says(path):
    text = path.read_text("utf-8")
    cells = [row[0] for row in tables(text)]
    found = [
        f"{x!r}: say {idioms()[idiom]}" for x in [*headings(text), *cells] for idiom in spoken(x)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_name_is_an_idiom(path):
    """Functions, classes, their methods and the fields of a Config, which are flags."""
    names = {name: words(name.split(".")[-1]) for name in defined(path)}
    found = [f"{name}: say {idioms()[said]}" for name, said in names.items() if said in idioms()]
    assert not found, "\n".join(found)
