"""Vector index: FAISS (flat, IVF, HNSW, PQ) compared; the store of a run, FAISS or Qdrant.

`open_store` gives a store that holds exactly the passages of a run: `faiss_store.py` keeps them on
disk, `qdrant_store.py` in a Qdrant collection. The command compares kinds of FAISS index.
FAISS: Johnson, Douze & Jegou 2017, arXiv:1702.08734. HNSW: Malkov & Yashunin 2016,
arXiv:1603.09320. Product quantisation: Jegou, Douze & Schmid 2011. N passages, D numbers a vector,
Q queries, k results.

    python rag/store.py                    # kinds of index compared: recall, time and size
    python rag/store.py --kind ivf         # look at one of them for different efforts
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import faiss
import numpy as np

from rag import chunking, corpus
from rag.embedder import Embedder
from rag.faiss_store import FaissStore
from rag.qdrant_store import QdrantStore
from utils import figures, run
from utils.run import check


def open_store(cfg, embedder, documents, folder=None):
    """The store that --store names, holding exactly these passages.

    FAISS is read from and saved to `folder`.
    """
    message = "--store-url is the address of a Qdrant: add --store qdrant"
    check(cfg.store == "qdrant" or not cfg.store_url, message)
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
    # FAISS: open what was saved, or begin anew
    if folder is not None and (Path(folder) / "store.json").is_file():
        store = FaissStore.open(folder, embedder, settings)
    else:
        store = FaissStore(embedder, settings)
    # Save it if anything changed
    if any(store.sync(documents)) and folder is not None:
        store.save(folder)
    return store


@dataclass(frozen=True)
class Config:
    """Compare kinds of FAISS index on the passages of the manuals."""

    docs: str = ""  # a folder of .md .rst .txt .html .pdf; empty: the manuals
    skip: str = ""  # a regular expression: files that are left out
    distractors: int = -1  # sections that answer no question, at random; -1: all
    chunk: int = 1000  # characters of a passage
    overlap: int = 0  # characters that neighbours share
    embedder: str = "minilm"  # or a folder or hub id of sentence-transformers
    kind: Literal["all", "flat", "ivf", "hnsw", "sq8", "pq"] = "all"  # which kind of index
    repeat: int = 5  # times that the questions are asked; the fastest counts
    seed: int = 0
    out: str = "outputs/store"


def index_kinds(size, n):
    """{name: (description for faiss.index_factory, {label: search effort})} for N vectors of D.

    The more effort, the less is missed.
    """
    lists = max(1, int(4 * n**0.5))
    # PQ: eight numbers of a vector become one byte
    parts = next(p for p in range(size // 8, 0, -1) if size % p == 0)
    bits = 8 if n >= 1000 else 4
    return {
        "flat": ("Flat", {"": None}),  # all vectors, 4 D bytes each
        # Only the nearest of many clusters
        "ivf": (f"IVF{lists},Flat", {f"nprobe={p}": p for p in (1, 4, 16, 64)}),
        # A graph, from neighbour to neighbour
        "hnsw": ("HNSW32", {f"efSearch={e}": e for e in (16, 64, 256)}),
        "sq8": ("SQ8", {"": None}),  # scalar quantisation, one byte a number
        # Product quantisation, one byte for a group; np: no renaming of codes
        "pq": (f"PQ{parts}x{bits}np", {"": None}),
    }


def build(description, vectors):
    """-> a trained index that holds the vectors (N,D), and the seconds it took."""
    start = time.perf_counter()
    index = faiss.index_factory(vectors.shape[1], description, faiss.METRIC_INNER_PRODUCT)
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
    seconds = time.process_time() - start
    return keys, 1000 * seconds / len(queries)


def recall(keys, exact):
    """(Q,k), (Q,k) -> what part of the exact k nearest was found, (Q,)."""
    parts = []
    for found, nearest in zip(keys.tolist(), exact.tolist()):
        parts.append(len(set(found) & set(nearest)) / len(nearest))
    return np.array(parts)


def main(cfg: Config) -> dict:
    """Embed, build each kind of index, ask every question of each."""
    run.seed(cfg.seed)
    check(cfg.repeat >= 1, "--repeat: 1 or more")
    # Passages
    sections, questions = corpus.load(cfg)
    passages = chunking.passages(sections, cfg.chunk, cfg.overlap)
    message = f"{len(passages)} passages are too few to compare kinds of index: 100 or more"
    check(len(passages) >= 100, message)
    # Vectors of passages and of questions; a folder without questions is asked for its titles
    embedder = Embedder(cfg.embedder)
    folder = run.output(cfg.out, cfg)
    vectors = embedder.vectors([p.page_content for p in passages])
    asked = [q.text for q in questions] or [s.metadata["title"] for s in sections[:200]]
    queries = np.ascontiguousarray(embedder.encode(asked), np.float32)
    # The exact neighbours, which recall is measured against
    faiss.omp_set_num_threads(1)
    exact, _ = search(build("Flat", vectors)[0], queries, 10)
    rows, points = {}, {}
    n, size = vectors.shape
    for name, (description, efforts) in index_kinds(size, n).items():
        if cfg.kind not in ("all", name):
            continue
        index, seconds = build(description, vectors)
        bytes_each = len(faiss.serialize_index(index)) / n
        # Each search effort: recall, and the fastest of some repetitions
        for label, effort in efforts.items():
            runs = [search(index, queries, 10, effort) for _ in range(cfg.repeat)]
            found = recall(runs[0][0], exact).mean()
            ms = min(ms for _, ms in runs)
            row = {"recall@10": found, "ms": ms, "bytes": bytes_each, "build s": seconds}
            rows[f"{description} {label}".strip()] = row
            points.setdefault(name, []).append((ms, found))
    print(f"{n} passages, {size} numbers each; {len(queries)} questions, one at a time, one thread")
    # Recall against time
    lines = {name: tuple(zip(*found)) for name, found in points.items()}
    figures.curves(folder / "store.png", lines, x="milliseconds a question", y="recall@10")
    return run.report(folder, rows | {"passages": n}, then="python rag/raw_rag.py")


if __name__ == "__main__":
    run.cli(main, Config)
