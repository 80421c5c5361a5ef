"""Qdrant vector store: passages in a collection, through LangChain's own store.

On a server, or inside this process. Inside, it is kept in memory: the client's folder on disk is
made of pickles, which whoever can write that folder can turn into a program. The vectors come out
of the embedder's cache, so that filling it again takes seconds.
"""

import uuid
from collections.abc import Iterable
from typing import Any

from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStore

from rag.store_sync import as_documents, changes, refuse_options, refuse_other_settings
from utils.run import UserError


class QdrantStore(VectorStore):
    """A collection of passages in Qdrant. Scores are cosines."""

    NAME = "vlm-action"

    def __init__(self, client: Any, embedder: Any, settings: dict[str, Any]) -> None:
        from langchain_qdrant import QdrantVectorStore

        self.client = client
        self.embedder = embedder
        self.settings = settings
        self.inner = QdrantVectorStore(client, self.NAME, embedder)

    @classmethod
    def open(cls, url, embedder, settings):
        """The collection at a URL, or an empty one in memory.

        Raises UserError if nobody answers there.
        """
        from qdrant_client import QdrantClient, models

        # Connect, and create the collection if it is not there
        try:
            client = QdrantClient(url, timeout=20) if url else QdrantClient(":memory:")
            if not client.collection_exists(cls.NAME):
                shape = models.VectorParams(size=embedder.size, distance=models.Distance.COSINE)
                client.create_collection(cls.NAME, vectors_config=shape)
        except Exception as error:  # each transport has errors of its own
            reason = str(error).splitlines()[0][:100]
            raise UserError(f"no Qdrant at --store-url {url}: {reason}") from None
        # One point tells with which settings all were made
        for record in client.scroll(cls.NAME, limit=1, with_payload=["metadata"])[0]:
            then = (record.payload or {})["metadata"].get("settings", {})
            refuse_other_settings(then, settings, url)
        return cls(client, embedder, settings)

    def have(self):
        """{key: id of the point} of everything in the collection."""
        found = {}
        offset = None
        # A thousand points at a time
        while True:
            records, offset = self.client.scroll(
                self.NAME, limit=1000, offset=offset, with_payload=False
            )
            for record in records:
                found[uuid.UUID(str(record.id)).int] = record.id
            if offset is None:
                return found

    def sync(self, documents: Iterable[Document]):
        """Make the store hold exactly these passages -> number of passages added, deleted."""
        have = self.have()
        new, gone = changes(have, documents)
        # Add what is new, each with the settings
        if new:
            marked = []
            for d in new.values():
                metadata = d.metadata | {"settings": self.settings}
                marked.append(Document(d.page_content, metadata=metadata))
            self.inner.add_documents(marked, ids=[str(uuid.UUID(int=k)) for k in new])
        # Remove what is gone
        if gone:
            self.inner.delete([have[k] for k in gone])
        return len(new), len(gone)

    def similarity_search_with_score(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As FaissStore; `filter` and other options are those of langchain_qdrant."""
        # Our embedder, which reads it as a question
        vector = self.embedder.encode([query])[0].tolist()
        return self.similarity_search_with_score_by_vector(vector, k, **kwargs)

    def similarity_search_with_score_by_vector(
        self, embedding: list[float], k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        if k < 1:
            raise ValueError(f"k is {k}: 1 or more")
        # No direction: nothing is close to it
        if not any(embedding):
            return []
        return self.inner.similarity_search_with_score_by_vector(embedding, k, **kwargs)

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    @classmethod
    def from_texts(
        cls, texts: list[str], embedding: Any, metadatas: list[dict] | None = None, **kwargs: Any
    ) -> Any:
        refuse_options(kwargs)
        store = cls.open("", embedding, {})
        store.sync(as_documents(texts, metadatas))
        return store
