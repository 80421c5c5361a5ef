"""FAISS vector store: a flat index and its passages in a folder, as a LangChain `VectorStore`.

FAISS: Johnson, Douze & Jegou 2017, arXiv:1702.08734. A flat index compares every query with every
passage, so that nothing is missed. `save` leaves the old store or the new one, whenever it is
killed. N passages, D numbers a vector, Q queries, k results.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStore

from rag.store_sync import as_documents, changes, refuse_options, refuse_other_settings
from utils.run import UserError


class FaissStore(VectorStore):
    """A flat FAISS index of passages. Scores are cosines."""

    def __init__(self, embedder: Any, settings: dict[str, Any] | None = None):
        self.embedder = embedder
        self.settings = settings or {}
        self.documents = {}
        self.index = faiss.IndexIDMap2(faiss.IndexFlatIP(embedder.size))

    def sync(self, documents):
        """Make the store hold exactly these passages -> number of passages added, deleted."""
        new, gone = changes(self.documents, documents)
        # Embed and add what is new
        if new:
            vectors = self.embedder.vectors([d.page_content for d in new.values()])
            self.index.add_with_ids(vectors, np.array(list(new), np.int64))
        # Remove what is gone
        if gone:
            self.index.remove_ids(np.array(gone, np.int64))
        together = self.documents | new
        self.documents = {k: d for k, d in together.items() if k not in set(gone)}
        return len(new), len(gone)

    def similarity_search_with_score(
        self, query: str, k: int = 4, filter: Any = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """The k passages nearest to the query, best first, of those whose metadata pass the filter.

        filter: {name: value}, or a function of the metadata. Raises TypeError for any other option:
        none is passed over in silence.
        """
        refuse_options(kwargs)
        return self.by_vector(self.embedder.encode([query]), k, filter)[0]

    def similarity_search_with_score_by_vector(
        self, embedding: list[float], k: int = 4, filter: Any = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        refuse_options(kwargs)
        return self.by_vector(np.array([embedding], np.float32), k, filter)[0]

    def by_vector(self, queries, k, filter=None):
        """(Q,D) -> for each query [(passage, cosine)].

        A query of length zero, without a known word, finds nothing.
        """
        if k < 1:
            raise ValueError(f"k is {k}: 1 or more")
        if not self.documents:
            return [[] for _ in queries]
        # A filter is applied to all passages, best first, so that it cannot leave fewer than k
        depth = min(k, len(self.documents)) if filter is None else len(self.documents)
        scores, keys = self.index.search(np.ascontiguousarray(queries, np.float32), depth)
        found = []
        for query, row, names in zip(queries, scores, keys):
            # Passages of these keys; faiss gives -1 where it has none
            pairs = []
            for key, score in zip(names.tolist(), row.tolist()):
                if key in self.documents:
                    pairs.append((self.documents[key], float(score)))
            # Those that pass the filter
            if filter is not None:
                pairs = [(d, score) for d, score in pairs if matches(d.metadata, filter)]
            found.append(pairs[:k] if np.any(query) else [])
        return found

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    @classmethod
    def from_texts(
        cls, texts: list[str], embedding: Any, metadatas: list[dict] | None = None, **kwargs: Any
    ) -> Any:
        refuse_options(kwargs)
        # An empty store, then its first passages
        store = cls(embedding)
        store.sync(as_documents(texts, metadatas))
        return store

    def save(self, folder):
        """Write index and passages under names of their own, then the small file that names them.

        A kill leaves the old store or the new one. Raises UserError if the folder cannot be
        written.
        """
        folder = Path(folder)
        # Two parts, each named by its hash
        rows = [[k, d.page_content, d.metadata] for k, d in self.documents.items()]
        parts = {
            "index": faiss.serialize_index(self.index).tobytes(),
            "passages": json.dumps(rows).encode(),
        }
        names = {part: part_name(part, data) for part, data in parts.items()}
        record = json.dumps({"settings": self.settings, **names}, indent=2)
        try:
            # Parts first, then the record that names them
            folder.mkdir(parents=True, exist_ok=True)
            for part, data in parts.items():
                write_atomically(folder / names[part], data)
            write_atomically(folder / "store.json", record.encode())
            # Parts that no record names any more
            for old in folder.glob("*-" + "?" * 64):
                if old.name not in names.values():
                    old.unlink()
        except OSError as error:
            message = f"cannot write {folder}: {error.strerror}; what was there before is untouched"
            raise UserError(message) from None

    @classmethod
    def open(cls, folder, embedder, settings):
        """What `save` wrote.

        Raises UserError if it is damaged, or was made with another model or other passages.
        """
        store = cls(embedder, settings)
        folder = Path(folder)
        # The record, the parts that it names, and whether these are what their names say
        try:
            record = json.loads((folder / "store.json").read_bytes())
            then = record["settings"]
            parts = {part: (folder / record[part]).read_bytes() for part in ("index", "passages")}
            for part, data in parts.items():
                if record[part] != part_name(part, data):
                    raise ValueError
            if not isinstance(then, dict):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            message = f"the index in {folder} is damaged: delete it, it will be made again"
            raise UserError(message) from None
        # Vectors of another model or other passages are of no use
        refuse_other_settings(then, settings, folder)
        store.index = faiss.deserialize_index(np.frombuffer(parts["index"], np.uint8))
        for key, text, metadata in json.loads(parts["passages"]):
            store.documents[key] = Document(text, metadata=metadata)
        return store


def part_name(part, data):
    """The name of a file: which part it is, and the hash of its bytes."""
    return f"{part}-{hashlib.sha256(data).hexdigest()}"


def matches(metadata, filter):
    """Do the metadata of a passage hold what the filter asks for?

    filter: {name: value}, or a function of the metadata.
    """
    # A function, or values that the metadata must have
    if callable(filter):
        return bool(filter(metadata))
    return all(name in metadata and metadata[name] == value for name, value in filter.items())


def write_atomically(path, data):
    """Write under a temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
