"""Synchronising a vector store with documents: keys by hash, what to add and delete, same settings.

A passage is known by the hash of its text and its metadata, so that doing it twice changes nothing.
A store remembers which model and which length of passages it was made with and refuses others:
their vectors would not be comparable.
"""

import hashlib
import json

from langchain_core.documents import Document

from utils.run import check


def document_key(document):
    """Hash of a document, text and metadata: its name in a store, 63 bits."""
    # The same bytes for the same metadata, in whatever order they were set
    text = json.dumps([document.page_content, document.metadata], sort_keys=True)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def changes(have, documents):
    """-> {key: document} to add, and keys to delete, so that a store holds `documents`.

    `have`: the keys that are in the store.
    """
    # The same passage twice is one
    wanted = {document_key(d): d for d in documents}
    new = {k: d for k, d in wanted.items() if k not in have}
    gone = [k for k in have if k not in wanted]
    return new, gone


def as_documents(texts, metadatas=None):
    """Texts, and a dict of metadata for each, -> documents."""
    metadatas = metadatas or [{}] * len(texts)
    return [Document(text, metadata=m) for text, m in zip(texts, metadatas, strict=True)]


def refuse_options(kwargs):
    """Raises TypeError, as a function without these options would."""
    if kwargs:
        names = ", ".join(sorted(kwargs))
        raise TypeError(f"this store does not know {names}; it knows k and filter")


def refuse_other_settings(then, settings, place):
    """Raises UserError if a store was made with other settings than those of this run."""
    # Embedder, length and overlap of passages, titles
    different = []
    for name, now in settings.items():
        if then.get(name) != now:
            different.append(f"{name} {then.get(name)}, now {now}")
    changed = ", ".join(different)
    remedy = "delete it, or choose another place with --out"
    message = f"the index in {place} was made with {changed}: {remedy}"
    check(not changed, message)
