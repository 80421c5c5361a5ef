"""Chunking: sections are split into passages of bounded length before they are embedded.

MiniLM reads 256 tokens, about a thousand characters: what comes behind them would not be found.
"""

from langchain_core.documents import Document

from rag.word_segmentation import combining_marks
from utils.run import check


def passage_splitter(chunk, overlap):
    """A recursive splitter: at paragraphs, else lines, else words.

    In scripts without blanks after sentences, else between characters, but never between a letter
    and its marks.
    """
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    # Tried in this order, each only where the one before leaves too much
    after_full_stop = "(?<=[。！？；।॥۔])"
    between_letters = rf"(?![{combining_marks()}])"
    separators = [r"\n\n", r"\n", " ", after_full_stop, between_letters, ""]
    return RecursiveCharacterTextSplitter(
        separators, is_separator_regex=True, chunk_size=chunk, chunk_overlap=overlap
    )


def passages(sections, chunk=1000, overlap=0, titles=False):
    """Sections -> passages of at most `chunk` characters; `section` names the whole.

    With `titles` each begins with the titles it stands below: words that it needs to be understood
    alone.
    """
    message = "--chunk: 50 characters or more; --overlap: 0 or more, below --chunk"
    check(chunk >= 50 and 0 <= overlap < chunk, message)
    splitter = passage_splitter(chunk, overlap)
    found = []
    # Each passage knows its section
    for one in sections:
        name = one.metadata["id"]
        for i, text in enumerate(splitter.split_text(one.page_content)):
            # The titles are a prefix, beside the `chunk` characters
            if titles:
                text = f"{one.metadata['title']}\n\n{text}"
            metadata = one.metadata | {"id": f"{name}/{i}", "section": name}
            found.append(Document(text, metadata=metadata))
    return found


def whole_sections(sections):
    """Each section as one passage."""
    found = []
    for one in sections:
        metadata = one.metadata | {"section": one.metadata["id"]}
        found.append(Document(one.page_content, metadata=metadata))
    return found
