"""Vector index: FAISS (flat, IVF, HNSW, PQ) on disk or a Qdrant collection, as a LangChain `VectorStore`.

`sync(passages)` makes a store hold exactly these passages: a passage is known by the hash of its text and its metadata,
what is new is embedded and added, what is gone is deleted, and doing it twice changes nothing. A store remembers which
model and which length of passages it was made with and refuses others: their vectors would not be comparable.
FAISS: Johnson, Douze & Jegou 2017, arXiv:1702.08734. HNSW: Malkov & Yashunin 2016, arXiv:1603.09320. Product
quantisation: Jegou, Douze & Schmid 2011. N passages, D numbers a vector, k results.

    python rag/store.py                    # kinds of index compared: what is lost, what is won
    python rag/store.py --kind ivf         # look at one of them for different efforts
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStore

from rag import chunking, corpus
from rag.embedder import Embedder
from utils import figures, run
from utils.run import UserError, check


def key(document):
    """Hash of a document, text and metadata: its name in a store, 63 bits."""
    text = json.dumps([document.page_content, document.metadata], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def changes(have, documents):
    """-> {key: document} to add, and keys to delete, so that a store that has the keys `have` holds `documents`."""
    wanted = {key(d): d for d in documents}
    return {k: d for k, d in wanted.items() if k not in have}, [k for k in have if k not in wanted]


class FaissStore(VectorStore):
    """A flat index: every query is compared with every passage, so nothing is missed. Scores are cosines."""

    def __init__(self, embedder: Any, settings: dict[str, Any] | None = None):
        self.embedder, self.settings, self.documents = embedder, settings or {}, {}
        self.index = faiss.IndexIDMap2(faiss.IndexFlatIP(embedder.size))

    def sync(self, documents):
        """-> number of passages added, deleted."""
        new, gone = changes(self.documents, documents)
        if new:
            vectors = self.embedder.vectors([d.page_content for d in new.values()])
            self.index.add_with_ids(vectors, np.array(list(new), np.int64))
        if gone:
            self.index.remove_ids(np.array(gone, np.int64))
        self.documents = {k: d for k, d in (self.documents | new).items() if k not in set(gone)}
        return len(new), len(gone)

    def similarity_search_with_score(
        self, query: str, k: int = 4, filter: Any = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """The k passages closest in meaning, best first, of those whose metadata pass the filter: {name: value}, or a
        function of the metadata. Raises TypeError for any other option: none is passed over in silence."""
        known_options(kwargs)
        return self.by_vector(self.embedder.encode([query]), k, filter)[0]

    def similarity_search_with_score_by_vector(
        self, embedding: list[float], k: int = 4, filter: Any = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        known_options(kwargs)
        return self.by_vector(np.array([embedding], np.float32), k, filter)[0]

    def by_vector(self, queries, k, filter=None):
        """(Q,D) -> for each query [(passage, cosine)]. A query of length zero, without a known word, finds nothing."""
        if k < 1:
            raise ValueError(f"k is {k}: 1 or more")
        if not self.documents:
            return [[] for _ in queries]
        # a filter is applied to all passages, best first: the index is flat, so that nothing is missed
        depth = min(k, len(self.documents)) if filter is None else len(self.documents)
        scores, keys = self.index.search(np.ascontiguousarray(queries, np.float32), depth)
        found = []
        for query, row, names in zip(queries, scores, keys):
            pairs = [
                (self.documents[i], float(s))
                for i, s in zip(names.tolist(), row.tolist())
                if i in self.documents
            ]
            passed = [(d, s) for d, s in pairs if filter is None or passes(d.metadata, filter)]
            found.append(passed[:k] if np.any(query) else [])
        return found

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    @classmethod
    def from_texts(
        cls, texts: list[str], embedding: Any, metadatas: list[dict] | None = None, **kwargs: Any
    ) -> Any:
        known_options(kwargs)
        store = cls(embedding)
        store.sync(
            [
                Document(text, metadata=m)
                for text, m in zip(texts, metadatas or [{}] * len(texts), strict=True)
            ]
        )
        return store

    def save(self, folder):
        """Write index and passages under names of their own, then the small file that names them both: a kill leaves
        the old store or the new one. Raises UserError if the folder cannot be written."""
        folder = Path(folder)
        rows = [[k, d.page_content, d.metadata] for k, d in self.documents.items()]
        parts = {
            "index": faiss.serialize_index(self.index).tobytes(),
            "passages": json.dumps(rows).encode(),
        }
        names = {part: f"{part}-{hashlib.sha256(data).hexdigest()}" for part, data in parts.items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for part, data in parts.items():
                whole(folder / names[part], data)
            whole(
                folder / "store.json",
                json.dumps({"settings": self.settings, **names}, indent=2).encode(),
            )
            for old in folder.glob("*-" + "?" * 64):
                if old.name not in names.values():
                    old.unlink()
        except OSError as error:
            raise UserError(
                f"cannot write {folder}: {error.strerror}; what was there before is untouched"
            ) from None

    @classmethod
    def open(cls, folder, embedder, settings):
        """What `save` wrote. Raises UserError if it is damaged, or was made with another model or other passages."""
        store = cls(embedder, settings)
        try:
            record = json.loads((Path(folder) / "store.json").read_bytes())
            then = record["settings"]
            parts = {
                part: (Path(folder) / record[part]).read_bytes() for part in ("index", "passages")
            }
            for part, data in parts.items():
                if record[part] != f"{part}-{hashlib.sha256(data).hexdigest()}":
                    raise ValueError
            if not isinstance(then, dict):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"the index in {folder} is damaged: delete it, it will be made again"
            ) from None
        refuse_others(then, settings, folder)
        store.index = faiss.deserialize_index(np.frombuffer(parts["index"], np.uint8))
        store.documents = {
            k: Document(text, metadata=m) for k, text, m in json.loads(parts["passages"])
        }
        return store


def known_options(kwargs):
    """Raises TypeError, as a function without these options would."""
    if kwargs:
        raise TypeError(
            f"this store does not know {', '.join(sorted(kwargs))}; it knows k and filter"
        )


def passes(metadata, filter):
    """Do the metadata of a passage hold what the filter asks for? {name: value}, or a function of the metadata."""
    if callable(filter):
        return bool(filter(metadata))
    return all(name in metadata and metadata[name] == value for name, value in filter.items())


def whole(path, data):
    """Temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def refuse_others(then, settings, place):
    """Raises UserError if a store was made with other settings than those of this run."""
    changed = ", ".join(
        f"{name} {then.get(name)}, now {now}"
        for name, now in settings.items()
        if then.get(name) != now
    )
    check(
        not changed,
        f"the index in {place} was made with {changed}: delete it, or choose another place with --out",
    )


class QdrantStore(VectorStore):
    """The same in a Qdrant collection, through LangChain's own store; on a server or inside this process.

    Inside, it is kept in memory: the client's folder on disk is made of pickles, which whoever can write that folder
    can turn into a program. The vectors come out of the embedder's cache, so that filling it again takes seconds.
    """

    NAME = "vlm-action"

    def __init__(self, client: Any, embedder: Any, settings: dict[str, Any]) -> None:
        from langchain_qdrant import QdrantVectorStore

        self.client, self.embedder, self.settings = client, embedder, settings
        self.inner = QdrantVectorStore(client, self.NAME, embedder)

    @classmethod
    def open(cls, url, embedder, settings):
        """The collection at a URL, or an empty one in memory. Raises UserError if nobody answers there."""
        from qdrant_client import QdrantClient, models

        try:
            client = QdrantClient(url, timeout=20) if url else QdrantClient(":memory:")
            if not client.collection_exists(cls.NAME):
                shape = models.VectorParams(size=embedder.size, distance=models.Distance.COSINE)
                client.create_collection(cls.NAME, vectors_config=shape)
        except Exception as error:  # each transport has errors of its own
            raise UserError(
                f"no Qdrant at --store-url {url}: {str(error).splitlines()[0][:100]}"
            ) from None
        for record in client.scroll(cls.NAME, limit=1, with_payload=["metadata"])[0]:
            refuse_others((record.payload or {})["metadata"].get("settings", {}), settings, url)
        return cls(client, embedder, settings)

    def have(self):
        """{key: id of the point} of everything in the collection."""
        found, offset = {}, None
        while True:
            records, offset = self.client.scroll(
                self.NAME, limit=1000, offset=offset, with_payload=False
            )
            found |= {uuid.UUID(str(r.id)).int: r.id for r in records}
            if offset is None:
                return found

    def sync(self, documents: Iterable[Document]):
        """-> number of passages added, deleted."""
        have = self.have()
        new, gone = changes(have, documents)
        if new:
            marked = [
                Document(d.page_content, metadata=d.metadata | {"settings": self.settings})
                for d in new.values()
            ]
            self.inner.add_documents(marked, ids=[str(uuid.UUID(int=k)) for k in new])
        if gone:
            self.inner.delete([have[k] for k in gone])
        return len(new), len(gone)

    def similarity_search_with_score(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As FaissStore; `filter` and other options are those of langchain_qdrant."""
        return self.similarity_search_with_score_by_vector(
            self.embedder.encode([query])[0].tolist(), k, **kwargs
        )

    def similarity_search_with_score_by_vector(
        self, embedding: list[float], k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        if k < 1:
            raise ValueError(f"k is {k}: 1 or more")
        if not any(embedding):  # no direction: nothing is close to it
            return []
        return self.inner.similarity_search_with_score_by_vector(embedding, k, **kwargs)

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    @classmethod
    def from_texts(
        cls, texts: list[str], embedding: Any, metadatas: list[dict] | None = None, **kwargs: Any
    ) -> Any:
        known_options(kwargs)
        store = cls.open("", embedding, {})
        store.sync(
            [
                Document(text, metadata=m)
                for text, m in zip(texts, metadatas or [{}] * len(texts), strict=True)
            ]
        )
        return store


def open_store(cfg, embedder, documents, folder=None):
    """The store that --store names, holding exactly these passages; FAISS is read from and saved to `folder`."""
    check(
        cfg.store == "qdrant" or not cfg.store_url,
        "--store-url is the address of a Qdrant: add --store qdrant",
    )
    settings = {
        "embedder": embedder.id,
        "chunk": cfg.chunk,
        "overlap": cfg.overlap,
        "titles": cfg.titles,
    }
    if cfg.store == "qdrant":
        store = QdrantStore.open(cfg.store_url, embedder, settings)
        store.sync(documents)
        return store
    kept = folder is not None and (Path(folder) / "store.json").is_file()
    store = FaissStore.open(folder, embedder, settings) if kept else FaissStore(embedder, settings)
    if any(store.sync(documents)) and folder is not None:
        store.save(folder)
    return store


@dataclass(frozen=True)
class Config:
    """Compare kinds of FAISS index on the passages of the manuals."""

    docs: str = ""  # a folder of .md .rst .txt .html .pdf; empty: the manuals
    skip: str = ""  # a regular expression: files that are left out
    distractors: int = -1  # sections that answer no question, by lot; -1: all
    chunk: int = 1000  # characters of a passage
    overlap: int = 0  # characters that neighbours share
    embedder: str = "minilm"  # or a folder or hub id of sentence-transformers
    kind: Literal["all", "flat", "ivf", "hnsw", "sq8", "pq"] = "all"  # which kind of index
    repeat: int = 5  # times that the questions are asked; the fastest counts
    seed: int = 0
    out: str = "outputs/store"


def kinds(size, n):
    """{name: (what faiss.index_factory understands, efforts of the search)}; the more effort, the less is missed."""
    lists = max(1, int(4 * n**0.5))
    # 8 numbers of a vector become one byte
    parts = next(p for p in range(size // 8, 0, -1) if size % p == 0)
    return {
        "flat": ("Flat", {"": None}),  # all vectors, 4 D bytes each
        # Only the nearest of many groups
        "ivf": (f"IVF{lists},Flat", {f"nprobe={p}": p for p in (1, 4, 16, 64)}),
        # From neighbour to neighbour
        "hnsw": ("HNSW32", {f"efSearch={e}": e for e in (16, 64, 256)}),
        "sq8": ("SQ8", {"": None}),  # one byte a number
        # One byte for a group; np: no renaming of codes
        "pq": (f"PQ{parts}x{8 if n >= 1000 else 4}np", {"": None}),
    }


def build(recipe, vectors):
    """-> a trained index that holds the vectors (N,D), and the seconds it took."""
    start = time.perf_counter()
    index = faiss.index_factory(vectors.shape[1], recipe, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    return index, time.perf_counter() - start


def search(index, queries, k, effort=None):
    """-> keys (Q,k), and milliseconds of CPU for one query, asked one by one as in service."""
    if effort is not None:
        name = "nprobe" if isinstance(faiss.downcast_index(index), faiss.IndexIVF) else "efSearch"
        faiss.ParameterSpace().set_index_parameter(index, name, effort)
    start = time.process_time()
    keys = np.concatenate([index.search(q[None], k)[1] for q in queries])
    return keys, 1000 * (time.process_time() - start) / len(queries)


def recall(keys, exact):
    """(Q,k), (Q,k) -> what part of the exact k nearest was found, (Q,)."""
    return np.array([len(set(a) & set(b)) / len(b) for a, b in zip(keys.tolist(), exact.tolist())])


def main(cfg: Config) -> dict:
    """Embed, build each kind of index, ask every question of each."""
    run.seed(cfg.seed)
    check(cfg.repeat >= 1, "--repeat: 1 or more")
    sections, questions = corpus.load(cfg)
    parts = chunking.passages(sections, cfg.chunk, cfg.overlap)
    check(
        len(parts) >= 100,
        f"{len(parts)} passages are too few to compare kinds of index: 100 or more",
    )
    embedder = Embedder(cfg.embedder)
    folder = run.output(cfg.out, cfg)
    vectors = embedder.vectors([p.page_content for p in parts])
    asked = [q.text for q in questions] or [s.metadata["title"] for s in sections[:200]]
    queries = np.ascontiguousarray(embedder.encode(asked), np.float32)
    faiss.omp_set_num_threads(1)
    exact, _ = search(build("Flat", vectors)[0], queries, 10)
    rows, points = {}, {}
    for name, (recipe, efforts) in kinds(*reversed(vectors.shape)).items():
        if cfg.kind not in ("all", name):
            continue
        index, seconds = build(recipe, vectors)
        size = len(faiss.serialize_index(index)) / len(vectors)
        for label, effort in efforts.items():
            runs = [search(index, queries, 10, effort) for _ in range(cfg.repeat)]
            found, ms = recall(runs[0][0], exact).mean(), min(ms for _, ms in runs)
            row = f"{recipe} {label}".strip()
            rows[row] = {"recall@10": found, "ms": ms, "bytes": size, "build s": seconds}
            points.setdefault(name, []).append((ms, found))
    print(
        f"{len(vectors)} passages, {vectors.shape[1]} numbers each; {len(queries)} questions, one at a time, one thread"
    )
    lines = {name: tuple(zip(*found)) for name, found in points.items()}
    figures.curves(folder / "store.png", lines, x="milliseconds a question", y="recall@10")
    return run.report(folder, rows | {"passages": len(vectors)}, then="python rag/raw_rag.py")


if __name__ == "__main__":
    run.cli(main, Config)
