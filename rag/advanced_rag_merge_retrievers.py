"""Hybrid retrieval: BM25 and dense retrieval, reciprocal rank fusion (RRF); lost in the middle.

BM25: Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework". Reciprocal rank fusion:
Cormack, Clarke & Buettcher 2009. Lost in the middle: Liu et al. 2023, arXiv:2307.03172. BM25 finds
the passage that says `acks_late` when the question does; vectors find the one that says the same in
other words. Their scores have no common scale, their ranks have. Each has an index of its own.
Words are those of any script: letters however they were typed (Unicode NFKC), and where a script
puts no blanks between words, each character and each pair of neighbours, as Lucene's CJK analyser.

    python rag/advanced_rag_merge_retrievers.py                  # reciprocal rank fusion
    python rag/advanced_rag_merge_retrievers.py --merge round-robin
    python rag/advanced_rag_merge_retrievers.py --merge bm25     # BM25 alone
    python rag/advanced_rag_merge_retrievers.py --positions 8    # also: does it matter where the answer stands?
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from rag import answer, corpus, language_models, raw_rag
from rag.word_segmentation import terms
from utils import figures, run
from utils.run import check


@dataclass(frozen=True)
class Config(raw_rag.Config):
    """Fuse the rankings of BM25 and of dense retrieval."""

    merge: Literal["rrf", "round-robin", "bm25"] = "rrf"  # how; bm25: without dense retrieval
    depth: int = 50  # passages that each retriever brings to the merger
    constant: float = 60.0  # of reciprocal rank fusion: the larger, the less the first places count
    # the best passages at both ends, the others in the middle; scores then mean less
    reorder: bool = False
    positions: int = 0  # questions for the curve of positions; 0: none
    out: str = "outputs/advanced_rag_merge_retrievers"


class BM25:
    """An inverted index: for each word the passages that hold it, and what the word is worth there."""

    def __init__(self, texts, k1=1.5, b=0.75):
        # Terms and lengths of the passages
        counts = [Counter(terms(text)) for text in texts]
        length = np.array([sum(c.values()) for c in counts], float)
        # Postings: for each term the passages that hold it, and how often
        postings: dict[str, list] = {}
        for i, count in enumerate(counts):
            for word, n in count.items():
                postings.setdefault(word, []).append((i, n))
        # Length normalisation of each passage
        self.size = len(texts)
        norm = k1 * (1 - b + b * length / max(length.mean(), 1e-9))
        # Weight of each term in each of its passages, Eq. 3.15
        self.postings = {}
        for word, pairs in postings.items():
            where, n = np.array(pairs).T
            saturated = n * (k1 + 1) / (n + norm[where])
            self.postings[word] = (where, idf(len(where), len(texts)) * saturated)

    def scores(self, query):
        """-> (N,): what the words of the query are worth in each passage, added up."""
        total = np.zeros(self.size)
        for word in terms(query):
            if word in self.postings:
                where, worth = self.postings[word]
                total[where] += worth
        return total


def idf(n, total):
    """How rare is a word that n of `total` passages hold? Lucene's form, which is never negative."""
    return np.log(1 + (total - n + 0.5) / (n + 0.5))


class BM25Retriever(BaseRetriever):
    """The k passages that are worth most for the words of the question."""

    documents: list
    index: Any
    k: int

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        worth = self.index.scores(query)
        best = np.argsort(-worth, kind="stable")[: self.k]
        return [raw_rag.scored(self.documents[i], worth[i]) for i in best if worth[i] > 0]


def rrf(rankings, constant=60.0):
    """[[id, best first]] -> [(id, sum over rankings of 1 / (constant + rank))], best first."""
    total: dict[str, float] = {}
    for ranking in rankings:
        for rank, name in enumerate(ranking, 1):
            total[name] = total.get(name, 0.0) + 1 / (constant + rank)
    return sorted(total.items(), key=lambda pair: -pair[1])


def round_robin(rankings):
    """[[id, best first]] -> [(id, 1 / place)]: the first of each, then the second of each; none
    twice."""
    turns = []
    for i in range(max(map(len, rankings), default=0)):
        turns += [ranking[i] for ranking in rankings if i < len(ranking)]
    return [(name, 1 / place) for place, name in enumerate(dict.fromkeys(turns), 1)]


def edges_first(documents):
    """Best first -> best at both ends: 1 3 5 ... 6 4 2. What stands in the middle of a long prompt
    is read least."""
    return documents[::2] + documents[1::2][::-1]


class MergedRetriever(BaseRetriever):
    """Ask all retrievers, merge their rankings, keep k."""

    retrievers: list
    merge: str
    constant: float
    reorder: bool = False
    k: int

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        # Rankings of all retrievers
        found = [retriever.invoke(query) for retriever in self.retrievers]
        known = {d.metadata["id"]: d for documents in found for d in documents}
        rankings = [[d.metadata["id"] for d in documents] for documents in found]
        # Fusion
        merged = rrf(rankings, self.constant) if self.merge == "rrf" else round_robin(rankings)
        best = [raw_rag.scored(known[name], score) for name, score in merged[: self.k]]
        return edges_first(best) if self.reorder else best


def build_retriever(cfg: Config) -> BaseRetriever:
    """BM25 and vectors over the same passages, each in an index of its own."""
    check(cfg.depth >= 1 and cfg.constant > 0, "--depth: 1 or more; --constant: above 0")
    passages = raw_rag.passages(cfg)
    depth = max(cfg.depth, cfg.k)
    # Sparse retrieval, by terms
    inverted = BM25([p.page_content for p in passages])
    sparse = BM25Retriever(documents=passages, index=inverted, k=depth)
    if cfg.merge == "bm25":
        return sparse.model_copy(update={"k": cfg.k})
    # Dense retrieval, by vectors
    index = raw_rag.open_index(cfg, passages)
    dense = raw_rag.DenseRetriever(store=index, k=depth)
    rules = {"merge": cfg.merge, "constant": cfg.constant, "reorder": cfg.reorder}
    return MergedRetriever(retrievers=[dense, sparse], k=cfg.k, **rules)


def position_curve(cfg, llm, retriever, questions):
    """Loss of the known answer (nats a token) with the right passage at each of k places among k -
    1 wrong ones.

    -> (Q, k); and (Q,) without any passage. Lower is better: the model finds the answer more
    likely.
    """
    sections = {s.metadata["id"]: s for s in corpus.load(cfg)[0]}
    with_it = []
    alone = []
    for question in run.bar(questions, len(questions), name="positions"):
        # Wrong passages, as retrieval finds them, and the right one
        found = retriever.invoke(question.text)
        wrong = [d for d in found if d.metadata.get("section") != question.gold]
        wrong = wrong[: cfg.k - 1]
        text = question.answer[: cfg.chunk]
        right = Document(text, metadata=sections[question.gold].metadata)
        # Loss with the right one at each place, and without passages
        losses = []
        for i in range(len(wrong) + 1):
            chat = answer.messages(question.text, [*wrong[:i], right, *wrong[i:]])
            losses.append(llm.loss(chat, text[:300]))
        with_it.append(losses)
        alone.append(llm.loss(answer.messages(question.text), text[:300]))
    return np.array(with_it), np.array(alone)


def main(cfg: Config) -> dict:
    """Find, answer, score; then the curve of positions."""
    run.seed(cfg.seed)
    metrics = raw_rag.show(cfg, build_retriever)
    if cfg.positions > 0:
        llm = language_models.language_model(cfg.llm, cfg.tokens)
        message = "--positions needs a model in this process and the manuals"
        check(hasattr(llm, "loss") and not cfg.docs, message)
        questions = raw_rag.spread(corpus.load(cfg)[1], cfg.positions)
        # Twice as many passages, of which wrong ones are taken
        retriever = build_retriever(replace(cfg, k=2 * cfg.k))
        losses, alone = position_curve(cfg, llm, retriever, questions)
        places = {str(i): losses[:, i - 1].mean() for i in range(1, losses.shape[1] + 1)}
        figures.curves(Path(cfg.out) / "positions.png", {"loss of the answer": list(places.values())},
                       x="place of the passage that holds the answer", y="nats a token")  # fmt: skip
        at_places = ", ".join(f"{v:.3f} at place {p}" for p, v in places.items())
        without = f"{alone.mean():.3f} nats a token without passages"
        print(f"loss of the known answer: {without}, {at_places}")
        metrics |= {"loss without": float(alone.mean()), "loss at place": places}
        run.report(Path(cfg.out), metrics)
    return metrics


if __name__ == "__main__":
    run.cli(main, Config)
