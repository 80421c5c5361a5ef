"""Reranking: candidates of a fast search, ordered by late interaction (MaxSim) or a cross-encoder.

(a) late interaction, ColBERT, Khattab & Zaharia 2020, arXiv:2004.12832: every token of the question
looks for its best token in the passage; equation numbers are that paper's. The token states are
MiniLM's, which was never trained for it.
(b) a cross-encoder, Nogueira & Cho 2019, arXiv:1901.04085, trained here: `cross_encoder.py`.
(c) any cross-encoder of sentence-transformers by its hub id or folder. L tokens of a question, T of
a passage.

    python rag/advanced_rag_rerank.py                        # (a)
    python rag/advanced_rag_rerank.py --reranker cross       # (b), with the weights that come with the book
    python rag/advanced_rag_rerank.py --reranker cross-encoder/ms-marco-MiniLM-L6-v2
    python rag/advanced_rag_rerank.py --train 200            # train (b) anew and use it
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch.nn.functional as F
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from rag import cross_encoder, embedder, raw_rag
from utils import figures, run
from utils.run import check


@dataclass(frozen=True)
class Config(raw_rag.Config):
    """Put the first candidates in a better order."""

    # maxsim, cross (trained here), a folder or a hub id of a cross-encoder
    reranker: str = "maxsim"
    candidates: int = 30  # passages that the fast search brings
    weights: str = str(cross_encoder.WEIGHTS)  # of --reranker cross
    train: int = 0  # steps to train them anew, into --out; 0: none
    negatives: int = 5  # wrong passages beside the right one in training
    lr: float = 5e-4  # of that training
    out: str = "outputs/advanced_rag_rerank"  # where index, results and trained weights go


def maxsim(query, passage):
    """MaxSim of unit token states (L,D), (T,D): for each query token its best cosine, summed."""
    return (query @ passage.T).amax(1).sum()  # Eq. 3


class MaxSim:
    """Score passages by late interaction over the token states of the embedder.

    The mean of Eq. 3 over the tokens of the question, a cosine as well, and the cosine of the fast
    search, added.
    """

    def __init__(self, encoder):
        self.encoder = encoder

    def states(self, texts, task):
        """-> [(T,D)] of unit length."""
        found = self.encoder.encode(texts, task, states=True)
        return [F.normalize(states.float(), dim=-1) for states in found]

    def __call__(self, question, documents):
        # Token states of the question and of each passage
        [query] = self.states([question], "query")
        passages = self.states([d.page_content for d in documents], "document")
        # Late interaction, added to the cosine
        scores = []
        for d, p in zip(documents, passages):
            scores.append(d.metadata["score"] + float(maxsim(query, p)) / len(query))
        return scores


class LibraryCrossEncoder:
    """A cross-encoder of sentence-transformers."""

    def __init__(self, name):
        from sentence_transformers import CrossEncoder

        self.model: Any = embedder.load(name, CrossEncoder)

    def __call__(self, question, documents):
        pairs = [(question, d.page_content) for d in documents]
        return self.model.predict(pairs, show_progress_bar=False).tolist()


def reranker(cfg):
    """The reranker that --reranker names: (question, documents) -> a score for each."""
    if cfg.reranker == "maxsim":
        return MaxSim(raw_rag.embedder(cfg.embedder))
    if cfg.reranker == "cross":
        return cross_encoder.CrossEncoder(cfg.weights, cfg.embedder)
    return LibraryCrossEncoder(cfg.reranker)


class RerankRetriever(BaseRetriever):
    """Ask for candidates, score each again, keep k."""

    quick: Any
    reranker: Any
    k: int

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        # Candidates of the fast search
        documents = self.quick.invoke(query)
        if not documents:
            return []
        # Score each again, the best first
        found = np.array(self.reranker(query, documents))
        best = np.argsort(-found, kind="stable")[: self.k]
        return [raw_rag.scored(documents[i], found[i]) for i in best]


def build_retriever(cfg: Config) -> BaseRetriever:
    """Dense retrieval with a reranker behind it."""
    check(cfg.candidates >= 1, "--candidates must be 1 or more")
    # At least as many candidates as are kept
    again = reranker(cfg)
    quick = raw_rag.build_retriever(replace(cfg, k=max(cfg.candidates, cfg.k)))
    return RerankRetriever(quick=quick, reranker=again, k=cfg.k)


def main(cfg: Config) -> dict:
    """Train if asked to, then find, answer, score."""
    run.seed(cfg.seed)
    check(cfg.train >= 0 and cfg.negatives >= 1, "--train: 0 steps or more; --negatives: 1 or more")
    # Train the cross-encoder anew, and use it
    if cfg.train:
        folder = run.output(cfg.out, cfg)
        losses = cross_encoder.fit(cfg, folder / "cross_encoder")
        smooth = max(1, len(losses) // 20)
        lines = {"loss": losses}
        figures.curves(folder / "loss.png", lines, x="title", y="cross entropy", smooth=smooth)
        cfg = replace(cfg, weights=str(folder / "cross_encoder"), reranker="cross")
    return raw_rag.show(cfg, build_retriever)


if __name__ == "__main__":
    run.cli(main, Config)
