"""Retrieval methods compared on the same questions, corpus and model: one table, one picture.

    python rag/compare.py                        # all passages of the manuals
    python rag/compare.py --distractors 1000     # the quick run

Intervals are 95 % of the bootstrap over questions. `fewer failures` compares a row with dense
retrieval question by question: by what part fewer questions have no answer among the first five
passages.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rag import advanced_rag_child_parent_retrieval as child_parent
from rag import advanced_rag_compression as compression
from rag import advanced_rag_merge_retrievers as merging
from rag import advanced_rag_rerank as rerank
from rag import corpus, query_transform, raw_rag, scores, self_rag
from utils import figures, run
from utils.run import check

# Files that say what changed, which is seldom what is asked
NOTES = "releases/|history/|news|changelog"
BASELINE = "dense"  # the row that all others are compared with
FEWER = "fewer failures at 5"


@dataclass(frozen=True)
class Config:
    """Score all retrievers of the chapter."""

    distractors: int = -1  # sections of the manuals that answer no question, at random; -1: all
    limit: int = -1  # questions; -1: all
    written: int = 40  # questions for the rows in which the language model writes: seconds each
    embedder: str = "minilm"
    llm: str = "smollm2"
    only: str = ""  # rows whose name has this in it
    seed: int = 0
    out: str = "outputs/compare_rag"


def variants(cfg):
    """{name: (the script, its configuration)}."""
    same: dict[str, Any] = {
        "distractors": cfg.distractors,
        "embedder": cfg.embedder,
        "llm": cfg.llm,
        "seed": cfg.seed,
    }
    # The default of each script
    dense = raw_rag.Config(**same)
    parent = child_parent.Config(**same)
    hybrid = merging.Config(**same)
    maxsim = rerank.Config(**same)
    titles = {"titles": True}
    notes = {"titles": True, "skip": NOTES}
    # And what is changed in it
    return {
        BASELINE: (raw_rag, dense),
        "dense, with titles": (raw_rag, replace(dense, **titles)),
        "dense, without release notes": (raw_rag, replace(dense, skip=NOTES)),
        "dense, with titles, without release notes": (raw_rag, replace(dense, **notes)),
        "parent-document": (child_parent, parent),
        "parent-document, whole sections": (child_parent, replace(parent, parent=0)),
        "parent-document, with titles": (child_parent, replace(parent, **titles)),
        "BM25": (merging, replace(hybrid, merge="bm25")),
        "reciprocal rank fusion (RRF)": (merging, hybrid),
        "reciprocal rank fusion (RRF), with titles": (merging, replace(hybrid, **titles)),
        "round robin": (merging, replace(hybrid, merge="round-robin")),
        "MaxSim reranking": (rerank, maxsim),
        "cross-encoder reranking": (rerank, replace(maxsim, reranker="cross")),
        "MaxSim reranking, with titles, without release notes": (rerank, replace(maxsim, **notes)),
        "contextual compression": (compression, compression.Config(**same)),
        "HyDE": (query_transform, query_transform.Config(**same)),
        "multi-query": (query_transform, query_transform.Config(**same, transform="multi-query")),
        "step-back": (query_transform, query_transform.Config(**same, transform="step-back")),
        "Self-RAG": (self_rag, self_rag.Config(**same)),
    }


def main(cfg: Config) -> dict:
    """Ask every retriever every question."""
    run.seed(cfg.seed)
    rows_wanted = {
        name: variant
        for name, variant in variants(cfg).items()
        if cfg.only in name or name == BASELINE
    }
    message = "--limit: 1 or more, or -1 for all; --written: 1 or more"
    check(cfg.limit != 0 and cfg.written >= 1, message)
    folder = run.output(cfg.out, cfg)
    all_questions = raw_rag.spread(corpus.manuals()[1], cfg.limit)
    rows: dict[str, Any] = {}
    ranks: dict[str, Any] = {}
    for name, (script, settings) in rows_wanted.items():
        # Fewer questions where the language model writes for each
        writes = script is query_transform
        questions = raw_rag.spread(all_questions, cfg.written) if writes else all_questions
        # Retrieve and score
        place = f"{cfg.out}/{name.replace(' ', '_').replace(',', '')}"
        retriever = script.build_retriever(replace(settings, k=scores.DEPTH, out=place))
        ranks[name], rows[name] = raw_rag.row(replace(settings, k=5), retriever, questions)
        # Compare with dense retrieval on the same questions
        base = ranks[BASELINE]
        if writes:
            base = base[[all_questions.index(q) for q in questions]]
        if name != BASELINE:
            rows[name][FEWER] = scores.fewer_failures(ranks[name], base)
        line = scores.table({"": rows[name]}).splitlines()[1].strip()
        print(f"{name}: {line}", flush=True)
    # Table and figure
    print("\n" + scores.table(rows), end="\n\n")
    (folder / "table.md").write_text(markdown(rows), "utf-8")
    hits = {name: row["hit@5"] for name, row in rows.items()}
    figures.bars(folder / "compare.png", hits, x="hit@5")
    # Values without their intervals, and the best row of those that were asked all questions
    metrics = {}
    for name, row in rows.items():
        metrics[name] = {k: v[0] if isinstance(v, tuple) else v for k, v in row.items()}
    asked_all = [name for name in rows if len(ranks[name]) == len(all_questions)]
    best = max(asked_all, key=lambda name: rows[name]["hit@5"][0])
    return run.report(folder, metrics | {"questions": len(all_questions), "best": best})


def number(x):
    """Three decimals; empty for what is no number."""
    return f"{x:.3f}" if np.isfinite(x) else ""


def markdown(rows):
    """The table as it stands in the README."""
    columns = ["retriever", "hit@1", "hit@5 [95 %]", "hit@10", "MRR@10", "nDCG@10", "tokens", "ms"]
    columns.append(FEWER)
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name, r in rows.items():
        # Failures in percent, empty for the baseline
        saved = ""
        if FEWER in r:
            value, low, high = (100 * x for x in r[FEWER])
            saved = f"{value:.0f} % [{low:.0f}, {high:.0f}]"
        hit, low, high = (number(x) for x in r["hit@5"])
        cells = [
            name,
            f"{r['hit@1'][0]:.3f}",
            f"{hit} [{low}, {high}]",
            f"{r['hit@10'][0]:.3f}",
            f"{r['MRR@10'][0]:.3f}",
            f"{r['nDCG@10'][0]:.3f}",
            f"{r['tokens']:.0f}",
            f"{r['ms']:.0f}",
            saved,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run.cli(main, Config)
