"""Parent-document retrieval (small to big): short passages are searched, their parents are read.

A vector of a short text says precisely what it is about, a long text says enough to answer from. So
a section is cut into parents and each parent into children; children are searched, and their
parents are returned, each once. A parent is as good as its best child, which is late interaction
(see advanced_rag_rerank.py) between whole texts: score(parent) = max over its children of
cos(question, child).

    python rag/advanced_rag_child_parent_retrieval.py                 # children of 300 characters, parents of 1500
    python rag/advanced_rag_child_parent_retrieval.py --parent 0      # the whole section is the parent
    python rag/advanced_rag_child_parent_retrieval.py --merge sum     # several good children count more than one

The first run embeds the children, which takes as long as embedding the passages did.
"""

from dataclasses import dataclass
from typing import Any, Literal

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from rag import chunking, corpus, raw_rag
from utils import run
from utils.run import check


@dataclass(frozen=True)
class Config(raw_rag.Config):
    """Search children, return parents."""

    chunk: int = 300  # characters of a child
    parent: int = 1500  # characters of a parent; 0: whole sections
    children: int = 50  # that are looked at
    merge: Literal["max", "sum"] = "max"  # what several children of one parent are worth
    out: str = "outputs/advanced_rag_child_parent_retrieval"


def split_twice(sections, parent, child, overlap=0, titles=False):
    """-> parents, and children whose metadata name their `parent`."""
    parents = (
        chunking.passages(sections, parent, 0) if parent else chunking.whole_sections(sections)
    )
    # Each parent is split into children
    children = []
    for one in parents:
        for part in chunking.passages([one], child, overlap, titles):
            metadata = part.metadata | {
                "parent": one.metadata["id"],
                "section": one.metadata["section"],
            }
            children.append(Document(part.page_content, metadata=metadata))
    return parents, children


def parents_of(children, merge="max"):
    """[(child, score), best first] -> [(id of a parent, score)], best first; each parent once."""
    total: dict[str, float] = {}
    for child, score in children:
        name = child.metadata["parent"]
        # The best child counts, or all of them
        before = total.get(name, 0.0 if merge == "sum" else score)
        total[name] = before + score if merge == "sum" else max(before, score)
    return sorted(total.items(), key=lambda pair: -pair[1])


class ParentRetriever(BaseRetriever):
    """The k parents of the children that are closest to the question."""

    store: Any
    parents: dict
    children: int
    merge: str
    k: int

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        # Search the children, and return their parents
        found = self.store.similarity_search_with_score(query, self.children)
        best = parents_of(found, self.merge)[: self.k]
        return [raw_rag.scored(self.parents[name], score) for name, score in best]


def build_retriever(cfg: Config) -> BaseRetriever:
    """Cut twice, index the children, keep the parents beside them."""
    message = "--parent must be longer than --chunk, or 0 for whole sections"
    check(cfg.parent == 0 or cfg.parent > cfg.chunk, message)
    check(cfg.children >= 1, "--children must be 1 or more")
    # Sections, parents and children
    sections, _ = corpus.load(cfg)
    parents, children = split_twice(sections, cfg.parent, cfg.chunk, cfg.overlap, cfg.titles)
    # Children are indexed, parents are kept beside them
    index = raw_rag.open_index(cfg, children)
    known = {p.metadata["id"]: p for p in parents}
    return ParentRetriever(
        store=index, parents=known, children=cfg.children, merge=cfg.merge, k=cfg.k
    )


def main(cfg: Config) -> dict:
    """Find, answer, score."""
    run.seed(cfg.seed)
    return raw_rag.show(cfg, build_retriever)


if __name__ == "__main__":
    run.cli(main, Config)
