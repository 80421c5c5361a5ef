"""Query transformation: the question is rewritten before searching (HyDE, multi-query, step-back).

Multi-query: the question in other words; rankings are merged by reciprocal rank fusion. HyDE, Gao
et al. 2022, arXiv:2212.10496: the model invents an answer, and what is close to the invention is
searched; the vectors of question and inventions are averaged (their Eq. 8). Step-back, Zheng et al.
2023, arXiv:2310.06117: a more general question beside the one that was asked. All three hope that
the model knows how the answer sounds; a small one may not.

    python rag/query_transform.py                               # HyDE
    python rag/query_transform.py --transform multi-query
    python rag/query_transform.py --transform step-back
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from rag import advanced_rag_merge_retrievers as merging
from rag import embedder, language_models, raw_rag
from utils import run
from utils.run import check


@dataclass(frozen=True)
class Config(raw_rag.Config):
    """Rewrite the question, search with what comes out."""

    transform: Literal["hyde", "multi-query", "step-back"] = "hyde"
    words: int = 48  # tokens that the model may write
    limit: int = 40  # questions that are scored: the model writes for each
    out: str = "outputs/query_transform"


PROMPTS = {
    "hyde": "Write a short passage of a software manual that answers the question.\nQuestion: {}",
    "multi-query": "Write three other ways to ask this question, one a line, and nothing else.\nQuestion: {}",
    "step-back": "Write one more general question about the topic of this question, and nothing else.\nQuestion: {}",
}


def transform(llm, kind, question):
    """-> texts to search with, the question itself first."""
    # What the model writes
    prompt = PROMPTS[kind].format(question)
    said = "".join(llm.stream([{"role": "user", "content": prompt}])).strip()
    # HyDE: all of it is one invented passage
    if kind == "hyde":
        return [question, said] if said else [question]
    # Otherwise a question a line, without numbers and bullets
    lines = [line.strip(' -*0123456789.)"') for line in said.splitlines()]
    most = 3 if kind == "multi-query" else 1
    return [question, *[line for line in lines if len(line) > 10][:most]]


def mean(vectors):
    """(N,D) unit vectors -> (1,D), the direction between them; zero if they cancel out."""
    middle = vectors.mean(0, keepdims=True)  # Eq. 8
    return np.ascontiguousarray(embedder.unit(middle), np.float32)


class TransformRetriever(BaseRetriever):
    """Search with the rewritten question."""

    quick: Any
    encoder: Any
    llm: Any
    kind: str
    k: int
    known: dict = {}  # what was written for a question

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        # Rewrite the question, once
        texts = self.known.setdefault(query, None) or transform(self.llm, self.kind, query)
        self.known[query] = texts
        if self.kind == "hyde":
            # HyDE: an invention is read as a document is, the question as a question
            vectors = [self.encoder.encode(texts[:1]), self.encoder.encode(texts[1:], "document")]
            return self.by_vector(mean(np.concatenate(vectors)))
        # Multi-query and step-back: search with each, and fuse the rankings
        found = [self.quick.invoke(text) for text in texts]
        known = {d.metadata["id"]: d for documents in found for d in documents}
        merged = merging.rrf([[d.metadata["id"] for d in documents] for documents in found])
        return [raw_rag.scored(known[name], score) for name, score in merged[: self.k]]

    def by_vector(self, vector):
        """The k passages nearest to a vector (1,D)."""
        found = self.quick.store.similarity_search_with_score_by_vector(vector[0].tolist(), self.k)
        return [raw_rag.scored(d, s) for d, s in found]


def build_retriever(cfg: Config) -> BaseRetriever:
    """The quick search of dense retrieval, asked with what the language model writes."""
    message = "the language model rewrites: give --llm, and --words of 1 or more"
    check(cfg.llm != "none" and cfg.words > 0, message)
    quick = raw_rag.build_retriever(replace(cfg, k=max(20, cfg.k)))
    encoder = raw_rag.embedder(cfg.embedder)
    # A repetition penalty: it writes freely, and copies nothing
    llm = language_models.language_model(cfg.llm, cfg.words, repetition_penalty=1.1)
    return TransformRetriever(
        quick=quick, encoder=encoder, llm=llm, kind=cfg.transform, k=cfg.k, known={}
    )


def main(cfg: Config) -> dict:
    """Rewrite, find, answer, score."""
    run.seed(cfg.seed)
    check(cfg.llm != "none", "the language model rewrites: give --llm")
    # Show what one question becomes
    question = raw_rag.asked(cfg)
    retriever: Any = build_retriever(replace(cfg, k=1))
    print("searched with:", *transform(retriever.llm, cfg.transform, question), sep="\n  ")
    return raw_rag.show(cfg, build_retriever)


if __name__ == "__main__":
    run.cli(main, Config)
