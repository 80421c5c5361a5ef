"""Contextual compression: of retrieved passages keep only the sentences that bear on the question.

Three filters, by vectors alone: relevance (a passage must be close enough to the question),
redundancy (of two passages that say the same the later one goes; compare Carbonell & Goldstein
1998, maximal marginal relevance) and extraction (of each passage only its sentences closest to the
question, in their order). `--by llm` asks the language model which sentences to keep instead. What
is lost is measured on the known answers: the part of their words that the context still holds,
beside the tokens that it costs.

    python rag/advanced_rag_compression.py                       # the filters, and a sweep of the threshold
    python rag/advanced_rag_compression.py --keep 0.35           # keep sentences of cosine 0.35 or more
    python rag/advanced_rag_compression.py --by llm --limit 10   # slow: the model reads every passage
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from rag import answer, corpus, language_models, raw_rag
from utils import figures, run
from utils.run import check


@dataclass(frozen=True)
class Config(raw_rag.Config):
    """Shorten what was found."""

    by: Literal["vectors", "llm"] = "vectors"  # who chooses the sentences
    relevant: float = 0.2  # cosine with the question below which a passage goes
    same: float = 0.95  # cosine with an earlier passage above which a passage goes
    keep: float = 0.3  # cosine with the question from which on a sentence stays
    sweep: bool = True  # measure other values of --keep as well
    out: str = "outputs/advanced_rag_compression"


def sentences(text):
    """A text -> its sentences and the lines of its lists and code; put together they are the text
    again."""
    ends = [m.end() for m in sentence_ends().finditer(text)]
    parts = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)])]
    # The space between two sentences belongs to the first
    joined: list[str] = []
    for part in parts:
        if part.isspace() and joined:
            joined[-1] += part
        elif part:
            joined.append(part)
    return joined


@lru_cache(maxsize=1)
def sentence_ends():
    """A point and blanks before a capital letter, a letter without case or a mark; a full stop of
    Chinese, Hindi or Urdu; an empty line; the end of a line before one of a list."""
    lower = "".join(c for c in map(chr, range(0x80, 0x1F000)) if c.islower())
    point = rf"(?<=[.!?:\u061f])\s+(?=[`\"'(*]|(?![a-z{lower}\d_])\w)"
    stop = r"[\u3002\uff01\uff1f\uff1b\u0964\u0965\u06d4]+\s*"
    return re.compile(rf"{point}|{stop}|\n{{2,}}|\n(?=[^\S\n]*[*\-#])")


def relevant(similarity, threshold):
    """(N,) cosines with the question -> (N,) keep?"""
    return similarity >= threshold


def different(vectors, threshold):
    """(N,D) unit vectors, best first -> (N,) keep? A passage goes if it is that close to one kept
    before it."""
    keep = np.zeros(len(vectors), bool)
    for i, vector in enumerate(vectors):
        keep[i] = not (vectors[:i][keep[:i]] @ vector > threshold).any()
    return keep


def extract(parts, similarity, threshold):
    """Sentences and (N,) cosines -> the text of those that reach the threshold; the best one stays
    in any case."""
    # The best one stays, whatever its cosine
    keep = similarity >= threshold
    keep[np.argmax(similarity)] = True
    # Dots where something was left out
    text = ""
    for i, part in enumerate(parts):
        if keep[i]:
            gap = i > 0 and not keep[i - 1]
            text += f"... {part}" if gap else part
    return text.strip()


def extract_by_llm(llm, question, parts):
    """The sentences that the model names by their number; all of them if it names none."""
    # Numbered sentences, and the question which of them help
    listed = "\n".join(f"{i}. {' '.join(p.split())}" for i, p in enumerate(parts, 1))
    content = f"{listed}\n\nWhich of these lines help to answer: {question}\nAnswer with their numbers only."
    said = "".join(llm.stream([{"role": "user", "content": content}]))
    # The numbers that were named
    named = [int(n) for n in re.findall(r"\d+", said) if 1 <= int(n) <= len(parts)]
    return "".join(part for i, part in enumerate(parts, 1) if i in named or not named).strip()


class CompressionRetriever(BaseRetriever):
    """Ask for k passages, filter them, keep the sentences that matter."""

    quick: Any
    encoder: Any
    llm: Any
    cfg: Any

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        return self.compress(query, self.quick.invoke(query))

    def compress(self, query, documents):
        """The passages that pass the filters, each with its extracted sentences only."""
        # Vectors of question and passages
        question = self.encoder.encode([query])[0]
        vectors = self.encoder.vectors([d.page_content for d in documents])
        # Relevance and redundancy filters
        keep = relevant(vectors @ question, self.cfg.relevant) & different(vectors, self.cfg.same)
        short = []
        for document, kept in zip(documents, keep):
            if not kept:
                continue
            # Extraction
            parts = sentences(document.page_content)
            if self.llm:
                text = extract_by_llm(self.llm, query, parts)
            else:
                text = extract(parts, self.encoder.vectors(parts) @ question, self.cfg.keep)
            short.append(Document(text, metadata=document.metadata))
        return short


def build_retriever(cfg: Config) -> BaseRetriever:
    """The quick search of dense retrieval with the filters behind it."""
    for name in ("relevant", "same", "keep"):
        check(-1 <= getattr(cfg, name) <= 1, f"--{name} is a cosine: between -1 and 1")
    llm = language_models.language_model(cfg.llm, 32) if cfg.by == "llm" else None
    encoder = raw_rag.embedder(cfg.embedder)
    quick = raw_rag.build_retriever(cfg)
    return CompressionRetriever(quick=quick, encoder=encoder, llm=llm, cfg=cfg)


def held(context, known):
    """What part of the words of the known answer are in the context? Words of up to three letters
    do not count."""
    # Words of the answer that are in the context
    wanted = {w for w in re.findall(r"\w+", known.lower()) if len(w) > 3}
    there = set(re.findall(r"\w+", context.lower()))
    return len(wanted & there) / max(len(wanted), 1)


def sweep(cfg, retriever, questions):
    """{--keep: (tokens of the context, part of the known answer that it holds)}; -1.0 has all
    sentences that fit."""
    # What is retrieved does not depend on the threshold
    found = [retriever.quick.invoke(q.text)[: cfg.k] for q in questions]
    tokenizer = raw_rag.embedder(cfg.embedder).model.tokenizer
    rows = {}
    for keep in (-1.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8):
        # The context of each question with this threshold
        short = retriever.model_copy(update={"cfg": replace(cfg, keep=keep), "llm": None})
        contexts = []
        for q, documents in zip(questions, found):
            contexts.append(answer.format_passages(short.compress(q.text, documents)))
        # What it costs and what it holds
        ids = tokenizer(contexts, verbose=False)["input_ids"]
        tokens = np.mean([len(one) for one in ids])
        recall = np.mean([held(c, q.answer) for c, q in zip(contexts, questions)])
        rows[keep] = (float(tokens), float(recall))
    return rows


def main(cfg: Config) -> dict:
    """Find, shorten, answer, score; then the sweep."""
    run.seed(cfg.seed)
    metrics = raw_rag.show(cfg, build_retriever)
    if cfg.sweep and not cfg.docs and cfg.limit:
        questions = raw_rag.spread(corpus.load(cfg)[1], cfg.limit)
        rows = sweep(cfg, build_retriever(cfg), questions)
        tokens, held_words = zip(*rows.values())
        figures.curves(Path(cfg.out) / "sweep.png", {"sentences kept": (tokens, held_words)},
                       x=f"tokens of {cfg.k} passages", y="words of the answer in them")  # fmt: skip
        for k, (t, h) in rows.items():
            print(f"--keep {k:>4}: {t:7.1f} tokens hold {h:.3f} of the answer")
        metrics |= {"sweep": {str(k): h for k, (_, h) in rows.items()}}
        run.report(Path(cfg.out), metrics)
    return metrics


if __name__ == "__main__":
    run.cli(main, Config)
