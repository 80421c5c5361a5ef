"""Prompt and decoding variants compared by key facts in the answers; a threshold to abstain.

An answer is right if it holds the key fact of its question: a few words, written down beforehand,
that stand in the passage and not in the question, compared in small letters with single blanks. 40
questions are those of the manuals, 20 are about six made documents (rag/study/documents), whose
facts no model has ever read. Every prompt variant (`prompt_variants.py`) is tried on half of them,
the best one is judged on the other half, beside that with a repetition penalty.

Abstention: Kamath et al. 2020, arXiv:2006.09462, answer only where a confidence exceeds a
threshold. Here it is the highest cosine of question and passages; its threshold is chosen on other
questions than the 60 and 20 that judge it.

    python rag/answer_study.py
    python rag/answer_study.py --llm http://localhost:8080/v1     # another reader, the same questions
    python rag/answer_study.py --only "penalty"                   # variants whose name holds this
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rag import answer, language_models, raw_rag, scores, self_rag
from rag.prompt_variants import CHOSEN, OLD, VARIANTS, chat
from utils import figures, run
from utils.run import check

HERE = Path(__file__).parent / "study"
BATCH = 10  # questions that a model in this process answers at a time


@dataclass(frozen=True)
class Config:
    """Score prompt variants by the key facts in the answers."""

    llm: str = "smollm2"  # or a folder, a hub id, http://host:port/v1 (a server)
    embedder: str = "minilm"  # or a folder or hub id of sentence-transformers
    distractors: int = 300  # sections of the manuals that answer no question, at random; -1: all
    limit: int = -1  # questions of each kind; -1: all
    only: str = ""  # prompt variants whose name holds this
    tokens: int = 32  # of an answer, at most
    seed: int = 0
    out: str = "outputs/answer_study"


def normal(text):
    """Small letters, single blanks, one kind of apostrophe and hyphen."""
    text = text.lower().replace("\u2019", "'").replace("\u2011", "-").replace("`", "")
    return " ".join(text.split())


def holds(said, keys):
    """Does the answer hold one of the key facts, as whole words?"""
    return any(re.search(rf"(?<!\w){re.escape(normal(key))}(?!\w)", normal(said)) for key in keys)


@torch.no_grad()
def generate(llm, chats, decoding):
    """Yields (index of the chat, answer).

    A model in this process answers a batch at a time, padded at the left: rounding in bf16 depends
    on the batch, so that a word may differ from what it says alone.
    """
    # A server: one after the other
    if not hasattr(llm, "model"):
        for i, messages in enumerate(chats):
            yield i, "".join(llm.stream(messages)).strip()
        return
    # Neighbours of equal length need little padding
    prompts = {i: llm.prompt(messages)[0] for i, messages in enumerate(chats)}
    order = sorted(prompts, key=lambda i: len(prompts[i]))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        # Left padding, and the attention mask that hides it
        width = max(len(prompts[i]) for i in batch)
        ids = torch.full((len(batch), width), llm.rules["pad_token_id"])
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i]) :] = prompts[i].cpu()
            mask[row, width - len(prompts[i]) :] = 1
        # Generate, and keep what stands behind the prompt
        device = llm.model.device
        rules = llm.rules | decoding
        told = llm.model.generate(
            ids.to(device), attention_mask=mask.to(device), max_new_tokens=llm.tokens, **rules
        )
        texts = llm.tokenizer.batch_decode(told[:, width:], skip_special_tokens=True)
        for i, words in zip(batch, texts):
            yield i, words.strip()


def load(cfg):
    """-> {"judged" or "for choosing": {corpus: rows}}.

    A row has its question, its keys ([]: no answer is there) and the passages that dense retrieval
    found for it.
    """
    listed = json.loads((HERE / "questions.json").read_text("utf-8"))
    # A retriever of the manuals, and one of the made documents
    out = f"{cfg.out}/index"
    flags: dict[str, Any] = {
        "embedder": cfg.embedder,
        "distractors": cfg.distractors,
        "k": 5,
        "seed": cfg.seed,
    }
    manuals = raw_rag.Config(**flags, out=f"{out}/manuals")
    documents = raw_rag.Config(**flags, docs=str(HERE / "documents"), out=f"{out}/own")
    retrievers = {
        "manuals": raw_rag.build_retriever(manuals),
        "documents": raw_rag.build_retriever(documents),
    }
    sets: dict[str, dict[str, list]] = {}
    for part, kinds in listed.items():
        sets[part] = {}
        for kind, rows in kinds.items():
            # Questions without an answer are listed without a key
            rows = [row if isinstance(row, dict) else {"question": row, "key": []} for row in rows]
            retriever = retrievers[kind.removeprefix("not in the ")]
            # Retrieve for each
            sets[part][kind] = []
            for row in raw_rag.spread(rows, cfg.limit):
                sets[part][kind].append(row | {"found": retriever.invoke(row["question"])})
    return sets


def ask(llm, rows, variant, name):
    """Every row with this prompt variant -> answers, and whether each holds its key fact (Q,)."""
    chats = [chat(row["question"], row["found"][: variant.k], variant) for row in rows]
    said = dict(run.bar(generate(llm, chats, variant.decoding), len(rows), name=name))
    answers = [said[i] for i in range(len(rows))]
    right = [holds(text, row["key"]) for text, row in zip(answers, rows)]
    return answers, np.array(right, float)


def compare(llm, rows, variants, path):
    """-> {variant: {score: (mean, low, high)}} on these questions; writes all answers to `path`.

    Context recall: for how many questions one of the passages that were read holds the key fact.
    """
    manuals = np.array([row["kind"] == "manuals" for row in rows])
    table = {}
    said = {"questions": [row["question"] for row in rows]}
    for name, variant in variants.items():
        # Answer, and keep what was said
        said[name], right = ask(llm, rows, variant, name)
        run.write_json(path, said)
        # Could the model have known it?
        read = []
        for row in rows:
            read.append(any(holds(d.page_content, row["key"]) for d in row["found"][: variant.k]))
        table[name] = {
            "answers": scores.interval(right),
            "manuals": scores.interval(right[manuals]),
            "documents": scores.interval(right[~manuals]),
            "context recall": float(np.mean(read)),
        }
    return table


def cosine(row):
    """How close the best passage is to the question."""
    return max(d.metadata["score"] for d in row["found"])


def abstain(sets, threshold=None):
    """What this threshold does on the judged questions.

    Without one, that which the questions for choosing give.
    """
    # Cosines of questions with an answer, and of those without
    cosines = {}
    for part, kinds in sets.items():
        rows = [row for rows in kinds.values() for row in rows]
        there = [cosine(row) for row in rows if row["key"]]
        missing = [cosine(row) for row in rows if not row["key"]]
        cosines[part] = [np.array(there), np.array(missing)]
    # Chosen on the one set, judged on the other
    if threshold is None:
        threshold = self_rag.best_threshold(*cosines["for choosing"])
    there, missing = cosines["judged"]
    return {
        "threshold": threshold,
        "AUC": self_rag.auc(there, missing),
        "right abstentions": scores.interval(missing < threshold),
        "wrong abstentions": scores.interval(there < threshold),
    }


def main(cfg: Config) -> dict:
    """Ask with every prompt variant, choose one, then choose when not to answer."""
    run.seed(cfg.seed)
    check(cfg.limit == -1 or cfg.limit >= 2, "--limit: 2 or more, or -1 for all")
    variants = {name: variant for name, variant in VARIANTS.items() if cfg.only in name}
    check(variants, f"--only {cfg.only}: the variants are {', '.join(VARIANTS)}")
    llm = language_models.language_model(cfg.llm, cfg.tokens)
    folder = run.output(cfg.out, cfg)
    sets = load(cfg)
    asked = []
    for kind in ("manuals", "documents"):
        asked += [row | {"kind": kind} for row in sets["judged"][kind]]
    # Choose on every second question
    tried = compare(llm, asked[::2], variants, folder / "choosing.json")
    print(scores.table(tried), end="\n\n")
    best = max(tried, key=lambda name: tried[name]["answers"][0])
    # Judge on the others
    last = {name: VARIANTS[name] for name in (OLD, CHOSEN, best)}  # each once
    judged = compare(llm, asked[1::2], last, folder / "judging.json")
    print(f"best: {best}. On the other half of the questions:\n{scores.table(judged)}", end="\n\n")
    # Abstention, by the cosine and by the model itself
    rates = abstain(sets)
    usual = abstain(sets, raw_rag.Config.abstain)
    nowhere = []
    for kind, rows in sets["judged"].items():
        if kind.startswith("not"):
            nowhere += rows
    said, _ = ask(llm, nowhere, VARIANTS[best], "no answer is there")
    by_itself = [answer.NOWHERE in normal(text) for text in said]
    rates["said by the model itself"] = scores.interval(by_itself)
    lines = {"abstention by cosine": rates, "with the default of --abstain": usual}
    print(scores.table(lines), end="\n\n")
    # Figure and metrics, without intervals
    bars = {name: row["answers"] for name, row in tried.items()}
    figures.bars(folder / "answers.png", bars, x="answers with the key fact")
    metrics: dict[str, Any] = {"best": best, "questions": len(asked)}
    metrics |= {f"{name}, judged": row["answers"][0] for name, row in judged.items()}
    for name, value in rates.items():
        metrics[name] = value[0] if isinstance(value, tuple) else value
    return run.report(folder, metrics)


if __name__ == "__main__":
    run.cli(main, Config)
