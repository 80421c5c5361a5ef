"""Dense retrieval-augmented generation (RAG), as plain as it gets: embed, retrieve, answer.

Lewis et al. 2020, arXiv:2005.11401, gave a language model the passages that are closest to a
question; here as there, closeness is the dot product of two vectors (their Sec. 2.2), but nothing
is trained: a sentence encoder and a chat model are taken as they are. Everything else of this
chapter changes one step of this script, and imports the rest.

    python rag/raw_rag.py                                  # the manuals of Django, Celery and Scrapy
    python rag/raw_rag.py --question "Can I use Django with MongoDB?"
    python rag/raw_rag.py --docs FOLDER --question "..."   # your own .md .rst .txt .html .pdf
    python rag/raw_rag.py --distractors 1000               # the quick run: a sample of what is not the answer
    python rag/raw_rag.py --titles                         # passages that say where they stand
    python rag/raw_rag.py --skip "releases/|history/|news|changelog" # leave the release notes out
    python rag/raw_rag.py --store qdrant                   # another store, the same answers

The first run embeds 14 thousand passages; they are kept in the cache of the project, so that later
runs take seconds.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from rag import answer, chunking, corpus, language_models, scores, store
from rag.embedder import Embedder
from utils import figures, run
from utils.run import check
from utils.text import clean, printable


@dataclass(frozen=True)
class Config:
    """Retrieve passages, answer from them, and score the retrieval on the questions of three
    manuals."""

    docs: str = ""  # a folder of .md .rst .txt .html .pdf to search; empty: the manuals
    distractors: int = -1  # sections of the manuals that answer no question, at random; -1: all
    # a regular expression: files that are not searched, say "releases/|history/|news|changelog"
    skip: str = ""
    chunk: int = 1000  # characters of a passage
    overlap: int = 0  # characters that neighbours share
    titles: bool = False  # search a passage together with the titles it stands below
    embedder: str = "minilm"  # or a folder or hub id of sentence-transformers
    llm: str = "smollm2"  # or a folder, a hub id, http://host:port/v1 (a server), none
    k: int = 5  # passages that the model reads
    # no answer if no passage has this cosine (of minilm) with the question; -1: always answer
    abstain: float = 0.38
    store: Literal["faiss", "qdrant"] = "faiss"  # where vectors live
    store_url: str = ""  # of a Qdrant; empty: in this process
    question: str = ""  # ask this; empty: one out of the manuals
    limit: int = -1  # questions that are scored; -1: all, 0: none
    tokens: int = 96  # of an answer, at most
    seed: int = 0
    out: str = "outputs/raw_rag"  # where index and results go


class DenseRetriever(BaseRetriever):
    """The k passages whose vectors are closest to the vector of the question."""

    store: Any
    k: int

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        return [scored(d, s) for d, s in self.store.similarity_search_with_score(query, self.k)]


def scored(document, score):
    """A copy of a passage that carries its score, without what the store keeps for itself."""
    metadata = {}
    for name, value in document.metadata.items():
        if not name.startswith("_") and name != "settings":
            metadata[name] = value
    metadata["score"] = float(score)
    return Document(document.page_content, metadata=metadata)


@lru_cache(maxsize=4)
def embedder(name):
    """The Embedder of that name, loaded once."""
    return Embedder(name)


def build_retriever(cfg: Config) -> BaseRetriever:
    """Split the corpus into passages, embed what is new, and open the index."""
    return DenseRetriever(store=open_index(cfg, passages(cfg)), k=cfg.k)


def passages(cfg):
    """The passages of the corpus, as long as this run wants them."""
    return chunking.passages(corpus.load(cfg)[0], cfg.chunk, cfg.overlap, cfg.titles)


def open_index(cfg, documents):
    """The store in the folder of this run, brought up to date: it holds these passages and no
    others."""
    return store.open_store(cfg, embedder(cfg.embedder), documents, Path(cfg.out) / "index")


EXAMPLE = "Can I use Django with MongoDB?"  # unless --question is given


def asked(cfg):
    """The question of this run. Raises UserError: none about --docs, or one that is too long."""
    message = "nobody has written questions for --docs: ask one with --question"
    check(cfg.question or not cfg.docs, message)
    return answer.checked_question(cfg.question or EXAMPLE)


def closeness(name, question, documents):
    """The highest cosine of the question with a passage, by the embedder of that name; -1 if there
    is no passage."""
    if not documents:
        return -1.0
    encoder = embedder(name)
    vectors = encoder.vectors([d.page_content for d in documents])  # (N,D)
    return float((vectors @ encoder.encode([question])[0]).max())


def show(cfg, build):
    """What every script does with its retriever: one question from beginning to end, then all of
    them scored."""
    check(cfg.limit >= -1, "--limit: 0 or more, or -1 for all")
    check(cfg.k >= 1, "--k must be 1 or more")
    check(-1 <= cfg.abstain <= 1, "--abstain is a cosine: between -1 and 1")
    asked(cfg)
    # Model, questions and retriever
    llm = None
    if cfg.llm != "none":
        llm = language_models.language_model(cfg.llm, cfg.tokens)
    folder = run.output(cfg.out, cfg)
    questions = [] if cfg.docs or cfg.limit == 0 else corpus.load(cfg)[1]
    retriever = build(replace(cfg, k=max(cfg.k, scores.DEPTH)))
    # One question to look at, then all of them
    metrics = ask(cfg, retriever, llm)
    if questions:
        metrics |= score(cfg, build, retriever, spread(questions, cfg.limit), folder)
    return run.report(folder, metrics, then="" if cfg.docs else "python rag/compare.py")


def ask(cfg, retriever, llm):
    """Print one question, what was found, and the answers without and with it."""
    # Retrieve, and print what was found
    question = asked(cfg)
    found = retriever.invoke(question)[: cfg.k]
    print(f"\nquestion: {question}\n")
    for i, d in enumerate(found, 1):
        text = " ".join(d.page_content.split())
        where = printable(f"{d.metadata['source']}  ({d.metadata['title']})")
        print(f"[{i}] {d.metadata['score']:.3f}  {where}\n    {clean(text[:160])}")
    if llm is None:
        return {"question": question}
    # The answer of the model alone
    print("\nwithout the passages: ", end="", flush=True)
    alone = speak(answer.chain(llm).stream(question))
    # The answer from passages, or abstention if none is close enough
    print("\nwith the passages: ", end="", flush=True)
    sure = closeness(cfg.embedder, question, found)
    answered = bool(found) and sure >= cfg.abstain
    words = answer.chain(llm, retriever, cfg.k).stream(question) if answered else [answer.NOWHERE]
    told = speak(words)
    # Its citations, and those that are not there
    real, invented = answer.citations(told, answer.passages_read(llm, found))
    cited = ", ".join(f"[{n}] {printable(found[n - 1].metadata['source'])}" for n in real)
    not_there = f"; and {invented}, which are not there" if invented else ""
    print(f"\ncites {cited or 'no passage'}{not_there}\n")
    # Kept for later
    seen = [d.metadata["id"] for d in found]
    record = {"question": question, "passages": seen, "without": alone, "with": told, "cited": real}
    record |= {"closest cosine": sure, "answered": answered}
    run.write_json(Path(cfg.out) / "answer.json", record | {"cited but not there": invented})
    return {"question": question}


def speak(words):
    """Print words as they come; -> all of them."""
    said = []
    for word in words:
        print(word, end="", flush=True)
        said.append(word)
    return "".join(said).strip()


def spread(questions, limit):
    """So many questions, evenly spread over the manuals; -1: all."""
    count = min(limit, len(questions)) if limit >= 0 else len(questions)
    places = np.linspace(0, len(questions) - 1, count).round().astype(int)
    return [questions[i] for i in places]


def score(cfg, build, retriever, questions, folder):
    """Ask all questions; unless this is dense retrieval itself, compare with it on the same
    questions."""
    rows = {}
    ranks = {}
    ranks["this"], rows["this"] = row(cfg, retriever, questions)
    if build is not build_retriever:
        plain = build_retriever(baseline(cfg))
        ranks["raw"], rows["raw"] = row(cfg, plain, questions)
    print(scores.table(rows), end="\n\n")
    # hit@k for every k
    hits = {}
    for name, r in ranks.items():
        hits[name] = [scores.hit(r, k).mean() for k in range(1, scores.DEPTH + 1)]
    figures.curves(folder / "hits.png", hits, x="passages", y="questions answered among them")
    # Values without their intervals, and the paired comparison
    metrics: dict[str, Any] = {"questions": len(questions)}
    for name, value in rows["this"].items():
        metrics[name] = value[0] if isinstance(value, tuple) else value
    if "raw" in ranks:
        cut, low, high = scores.fewer_failures(ranks["this"], ranks["raw"])
        metrics["fewer failures at 5"] = f"{100 * cut:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
    return metrics


def row(cfg, retriever, questions):
    """-> ranks (Q,), {score: (mean, low, high)} with what it costs to read and to find."""

    def bar(asked):
        return run.bar(asked, len(asked), name="questions")

    # Ranks, and every score with its interval
    ranks, ms, found = scores.measure(retriever, questions, bar)
    row: dict[str, Any] = {}
    for name, values in scores.all_of(ranks).items():
        row[name] = scores.interval(values)
    # Tokens of the passages that the model reads, and milliseconds of a question
    texts = [answer.format_passages(documents[: cfg.k]) for documents in found]
    tokenizer = embedder(cfg.embedder).model.tokenizer
    tokens = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
    row["tokens"] = float(np.mean([len(t) for t in tokens]))
    row["ms"] = float(np.median(ms))
    return ranks, row


def baseline(cfg):
    """The configuration of dense retrieval on the same corpus, for comparison."""
    # And neither --skip nor --titles
    same = ("docs", "distractors", "embedder", "store", "store_url", "seed")
    flags = {name: getattr(cfg, name) for name in same}
    return Config(**flags, k=scores.DEPTH, out=f"{cfg.out}/raw")


def main(cfg: Config) -> dict:
    """Find, answer, score."""
    run.seed(cfg.seed)
    return show(cfg, build_retriever)


if __name__ == "__main__":
    run.cli(main, Config)
