"""Benchmark of the store and the embedder against what they are built on: `make bench`.

Our FAISS store against LangChain's own with the same vectors: the same ranking for every question,
queries in turn. Our indexing (cut, hash, embed, add) against sentence-transformers that only
embeds. CPU time, one thread, medians of ratios: neighbours on the machine do not count.

    python rag/bench.py    # half a minute on one CPU core; needs langchain-community, which is in the dev extra
"""

import statistics
import time
from dataclasses import dataclass

import faiss
import numpy as np
import torch

from rag import chunking, corpus, faiss_store, raw_rag
from rag.embedder import Embedder
from utils import run
from utils.run import check


@dataclass(frozen=True)
class Config:
    """Compare queries and indexing with the libraries alone."""

    distractors: int = -1  # sections in the index; -1: all of the manuals
    queries: int = 129  # questions, each asked of both stores
    rounds: int = 3  # repetitions of indexing
    sections: int = 60  # that are indexed in a round
    embedder: str = "minilm"
    chunk: int = 1000
    overlap: int = 0
    titles: bool = False
    docs: str = ""
    skip: str = ""
    seed: int = 0
    out: str = "outputs/rag_bench"


def seconds(action):
    """-> CPU seconds of an action, and its result."""
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


class CachedEmbedder:
    """An embedder that has read everything before: what is timed is the store."""

    def __init__(self, encoder, questions):
        self.size = encoder.size
        self.id = encoder.id
        self.vectors = encoder.vectors
        self.known = dict(zip(questions, encoder.encode(questions)))

    def encode(self, texts, task="query"):
        return np.stack([self.known[text] for text in texts])

    def __call__(self, text):
        return self.known[text].tolist()


def queries(cfg, encoder):
    """Each question to our store and to LangChain's, in turn -> milliseconds of both, and if the
    rankings are one."""
    from langchain_community.docstore import InMemoryDocstore
    from langchain_community.vectorstores import FAISS
    from langchain_community.vectorstores.utils import DistanceStrategy

    # Passages and questions; all vectors are known beforehand
    passages = raw_rag.passages(cfg)
    asked = [q.text for q in raw_rag.spread(corpus.manuals()[1], cfg.queries)]
    known = CachedEmbedder(encoder, asked)
    # Our store, and LangChain's with the same vectors
    ours = faiss_store.FaissStore(known)
    ours.sync(passages)
    flat = faiss.IndexFlatIP(encoder.size)
    flat.add(encoder.vectors([p.page_content for p in passages]))
    texts = InMemoryDocstore({str(i): p for i, p in enumerate(passages)})
    names = {i: str(i) for i in range(len(passages))}
    theirs = FAISS(known, flat, texts, names, distance_strategy=DistanceStrategy.MAX_INNER_PRODUCT)
    faiss.omp_set_num_threads(1)
    # Each question to both, in turn
    times = []
    same = []
    for question in asked:
        a, mine = seconds(lambda q=question: ours.similarity_search_with_score(q, 10))
        b, other = seconds(lambda q=question: theirs.similarity_search_with_score(q, 10))
        times.append((a, b))
        # The same passages in the same order?
        same.append([d.metadata["id"] for d, _ in mine] == [d.metadata["id"] for d, _ in other])
    return {
        "times_faster": statistics.median(b / a for a, b in times),
        "ms": 1e3 * statistics.median(a for a, _ in times),
        "their_ms": 1e3 * statistics.median(b for _, b in times),
        "same_ranking": sum(same) / len(same),
    }


def indexing(cfg, encoder):
    """Sections into a new store, and their passages through sentence-transformers -> passages a
    second of both."""
    sections = corpus.manuals()[0]
    rows = []
    count = 0
    for i in range(cfg.rounds):
        # Other sections in each round, so that none is cached
        part = sections[200 * i : 200 * i + cfg.sections]
        texts = [p.page_content for p in chunking.passages(part, cfg.chunk)]
        # Ours: split, hash, embed, add; theirs: embed
        a, _ = seconds(
            lambda part=part: faiss_store.FaissStore(encoder).sync(
                chunking.passages(part, cfg.chunk)
            )
        )
        b, _ = seconds(
            lambda texts=texts: encoder.model.encode(
                texts, batch_size=16, normalize_embeddings=True
            )
        )
        # Forget the vectors: the next round embeds again
        encoder.known = {}
        rows.append((a, b))
        count = len(texts)
    return {
        "times_faster": statistics.median(b / a for a, b in rows),
        "passages_a_second": count / rows[-1][0],
        "theirs": count / rows[-1][1],
    }


def main(cfg: Config) -> dict:
    """Time queries, then indexing."""
    message = "--queries, --rounds and --sections must be at least 1"
    check(min(cfg.queries, cfg.rounds, cfg.sections) > 0, message)
    # One thread, so that CPU time is what is compared
    torch.set_num_threads(1)
    folder = run.output(cfg.out, cfg)
    metrics = {"queries": queries(cfg, raw_rag.embedder(cfg.embedder))}
    metrics["indexing"] = indexing(cfg, Embedder(cfg.embedder, cache=False))
    return run.report(folder, metrics)


if __name__ == "__main__":
    run.cli(main, Config)
