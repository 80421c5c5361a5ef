"""Retrieval methods compared on the same questions, corpus and model: one table, one picture.

    python rag/compare.py                        # all passages of the manuals
    python rag/compare.py --distractors 1000     # the quick run

Intervals are 95 % of the bootstrap over questions. `fewer failures` compares a row with raw retrieval question by
question: by what part fewer questions have no answer among the first five passages.
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


@dataclass(frozen=True)
class Config:
    """Score all retrievers of the chapter."""

    distractors: int = -1  # sections of the manuals that answer no question, by lot; -1: all
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
    raw, small = raw_rag.Config(**same), child_parent.Config(**same)
    merged, again, short = merging.Config(**same), rerank.Config(**same), compression.Config(**same)
    notes = {"titles": True, "skip": NOTES}
    return {
        "raw": (raw_rag, raw),
        "raw, with titles": (raw_rag, replace(raw, titles=True)),
        "raw, without release notes": (raw_rag, replace(raw, skip=notes["skip"])),
        "raw, with titles, without release notes": (raw_rag, replace(raw, **notes)),
        "child to parent": (child_parent, small),
        "child to section": (child_parent, replace(small, parent=0)),
        "child to parent, with titles": (child_parent, replace(small, titles=True)),
        "words alone (BM25)": (merging, replace(merged, merge="bm25")),
        "merged by rank fusion": (merging, merged),
        "merged by rank fusion, with titles": (merging, replace(merged, titles=True)),
        "merged by turns": (merging, replace(merged, merge="round-robin")),
        "reranked by MaxSim": (rerank, again),
        "reranked by cross-encoder": (rerank, replace(again, reranker="cross")),
        "reranked by MaxSim, with titles, without release notes": (rerank, replace(again, **notes)),
        "compressed": (compression, short),
        "HyDE": (query_transform, query_transform.Config(**same)),
        "multi-query": (query_transform, query_transform.Config(**same, transform="multi-query")),
        "step-back": (query_transform, query_transform.Config(**same, transform="step-back")),
        "self-RAG": (self_rag, self_rag.Config(**same)),
    }


def main(cfg: Config) -> dict:
    """Ask every retriever every question."""
    run.seed(cfg.seed)
    chosen = {name: v for name, v in variants(cfg).items() if cfg.only in name or name == "raw"}
    check(
        cfg.limit != 0 and cfg.written >= 1,
        "--limit: 1 or more, or -1 for all; --written: 1 or more",
    )
    folder = run.output(cfg.out, cfg)
    all_questions = raw_rag.spread(corpus.manuals()[1], cfg.limit)
    rows: dict[str, Any] = {}
    ranks: dict[str, Any] = {}
    for name, (script, settings) in chosen.items():
        writes = script is query_transform
        questions = raw_rag.spread(all_questions, cfg.written) if writes else all_questions
        place = f"{cfg.out}/{name.replace(' ', '_').replace(',', '')}"
        retriever = script.build_retriever(replace(settings, k=scores.DEPTH, out=place))
        ranks[name], rows[name] = raw_rag.row(replace(settings, k=5), retriever, questions)
        base = ranks["raw"]
        if writes:
            base = base[[all_questions.index(q) for q in questions]]
        if name != "raw":
            rows[name]["fewer failures at 5"] = scores.fewer_failures(ranks[name], base)
        print(f"{name}: {scores.table({'': rows[name]}).splitlines()[1].strip()}", flush=True)
    print("\n" + scores.table(rows), end="\n\n")
    (folder / "table.md").write_text(markdown(rows), "utf-8")
    figures.bars(
        folder / "compare.png", {name: row["hit@5"] for name, row in rows.items()}, x="hit@5"
    )
    metrics = {
        name: {k: v[0] if isinstance(v, tuple) else v for k, v in row.items()}
        for name, row in rows.items()
    }
    best = max(
        (name for name in rows if len(ranks[name]) == len(all_questions)),
        key=lambda n: rows[n]["hit@5"][0],
    )
    return run.report(folder, metrics | {"questions": len(all_questions), "best": best})


def markdown(rows):
    """The table as it stands in the README."""
    number = lambda x: f"{x:.3f}" if np.isfinite(x) else ""  # noqa: E731
    cell = lambda x: f"{number(x[0])} [{number(x[1])}, {number(x[2])}]"  # noqa: E731
    lines = ["| retriever | hit@1 | hit@5 [95 %] | hit@10 | MRR@10 | nDCG@10 | tokens | ms | fewer failures at 5 |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, r in rows.items():
        cut = r.get("fewer failures at 5")
        saved = f"{100 * cut[0]:.0f} % [{100 * cut[1]:.0f}, {100 * cut[2]:.0f}]" if cut else ""
        lines.append(
            f"| {name} | {r['hit@1'][0]:.3f} | {cell(r['hit@5'])} | {r['hit@10'][0]:.3f} | {r['MRR@10'][0]:.3f} | "
            f"{r['nDCG@10'][0]:.3f} | {r['tokens']:.0f} | {r['ms']:.0f} | {saved} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run.cli(main, Config)
