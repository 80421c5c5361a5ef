"""Answering from passages, measured: decoding, prompts, and a threshold to abstain.

An answer is right if it holds the key fact of its question: a few words, written down beforehand,
that stand in the passage and not in the question, compared in small letters with single blanks. 40
questions are those of the manuals, 20 are about six made documents (rag/study/documents), whose
facts no model has ever read. Every way of asking is tried on half of them, the best one is judged
on the other half, beside that with a repetition penalty.

Abstention: Kamath et al. 2020, arXiv:2006.09462, answer only where a confidence exceeds a
threshold. Here it is the highest cosine of question and passages; its threshold is chosen on other
questions than the 60 and 20 that judge it.

    python rag/answer_study.py
    python rag/answer_study.py --llm http://localhost:8080/v1     # another reader, the same questions
    python rag/answer_study.py --only "penalty"                   # ways of asking whose name holds this
"""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rag import answer, language_models, raw_rag, scores, self_rag
from utils import figures, run
from utils.run import check

HERE = Path(__file__).parent / "study"
BATCH = 10  # questions that a model in this process answers at a time
EXTRACT = "Copy the one sentence out of the passages that answers the question, word for word."
CHOSEN = "1 passage"  # the default of the chapter
OLD = "3 passages, penalty 1.1"  # to compare with


@dataclass(frozen=True)
class Config:
    """Score ways of asking by the key facts in the answers."""

    llm: str = "smollm2"  # or a folder, a hub id, http://host:port/v1 (a server)
    embedder: str = "minilm"  # or a folder or hub id of sentence-transformers
    distractors: int = 300  # sections of the manuals that answer no question, by lot; -1: all
    limit: int = -1  # questions of each kind; -1: all
    only: str = ""  # ways of asking whose name holds this
    tokens: int = 32  # of an answer, at most
    seed: int = 0
    out: str = "outputs/answer_study"


@dataclass(frozen=True)
class Way:
    """A way of asking: how many passages, in which order with the question, which instruction,
    which decoding."""

    k: int = 3
    question: str = "last"  # behind the passages; or first, or both
    instruction: str = answer.WITH
    repeated: str = ""  # instruction once more, behind everything
    decoding: dict = field(default_factory=dict)


PLAIN = Way()
ONE = replace(PLAIN, k=1)
WAYS = {
    "3 passages": PLAIN,
    "3 passages, penalty 1.05": replace(PLAIN, decoding={"repetition_penalty": 1.05}),
    OLD: replace(PLAIN, decoding={"repetition_penalty": 1.1}),
    "3 passages, no 4 tokens twice": replace(PLAIN, decoding={"no_repeat_ngram_size": 4}),
    "3 passages, question first": replace(PLAIN, question="first"),
    "3 passages, question first and last": replace(PLAIN, question="both"),
    "3 passages, extractive": replace(PLAIN, instruction=EXTRACT),
    "3 passages, extractive, repeated": replace(PLAIN, instruction=EXTRACT, repeated=EXTRACT),
    "5 passages": replace(PLAIN, k=5),
    CHOSEN: ONE,
    "1 passage, penalty 1.1": replace(ONE, decoding={"repetition_penalty": 1.1}),
    "1 passage, extractive, repeated": replace(ONE, instruction=EXTRACT, repeated=EXTRACT),
}


def normal(text):
    """Small letters, single blanks, one kind of apostrophe and hyphen."""
    text = text.lower().replace("\u2019", "'").replace("\u2011", "-").replace("`", "")
    return " ".join(text.split())


def holds(said, keys):
    """Does the answer hold one of the key facts, as whole words?"""
    return any(re.search(rf"(?<!\w){re.escape(normal(key))}(?!\w)", normal(said)) for key in keys)


def chat(question, passages, way):
    """The messages of one way of asking."""
    asked = f"Question: {question}"
    told = answer.format_passages(passages)
    parts = {"last": [told, asked], "first": [asked, told], "both": [asked, told, asked]}[
        way.question
    ]
    parts += [way.repeated] if way.repeated else []
    return [
        {"role": "system", "content": way.instruction},
        {"role": "user", "content": "\n\n".join(parts)},
    ]


@torch.no_grad()
def say(llm, chats, decoding):
    """Yields (which, answer). A model in this process answers a batch at a time, padded at the
    left: rounding in bf16 depends on the batch, so that a word may differ from what it says
    alone."""
    if not hasattr(llm, "model"):
        yield from ((i, "".join(llm.stream(chat)).strip()) for i, chat in enumerate(chats))
        return
    prompts = {i: llm.prompt(chat)[0] for i, chat in enumerate(chats)}
    # Neighbours of equal length need little padding
    order = sorted(prompts, key=lambda i: len(prompts[i]))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        wide = max(len(prompts[i]) for i in batch)
        ids = torch.full((len(batch), wide), llm.rules["pad_token_id"])
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, wide - len(prompts[i]) :] = prompts[i].cpu()
            mask[row, wide - len(prompts[i]) :] = 1
        on, rules = llm.model.device, llm.rules | decoding
        told = llm.model.generate(
            ids.to(on), attention_mask=mask.to(on), max_new_tokens=llm.tokens, **rules
        )
        for i, words in zip(
            batch, llm.tokenizer.batch_decode(told[:, wide:], skip_special_tokens=True)
        ):
            yield i, words.strip()


def load(cfg):
    """-> {"judged" or "for choosing": {corpus: rows}}, a row with its question, its keys ([]: no
    answer is there) and the passages that raw retrieval found for it."""
    listed = json.loads((HERE / "questions.json").read_text("utf-8"))
    out = f"{cfg.out}/index"
    flags: dict[str, Any] = {
        "embedder": cfg.embedder,
        "distractors": cfg.distractors,
        "k": 5,
        "seed": cfg.seed,
    }
    retrievers = {
        "manuals": raw_rag.build_retriever(raw_rag.Config(**flags, out=f"{out}/manuals")),
        "documents": raw_rag.build_retriever(
            raw_rag.Config(**flags, docs=str(HERE / "documents"), out=f"{out}/own")
        ),
    }
    sets: dict[str, dict[str, list]] = {}
    for part, kinds in listed.items():
        sets[part] = {}
        for kind, rows in kinds.items():
            rows = [row if isinstance(row, dict) else {"question": row, "key": []} for row in rows]
            retriever = retrievers[kind.removeprefix("not in the ")]
            count = raw_rag.spread(rows, cfg.limit)
            sets[part][kind] = [row | {"found": retriever.invoke(row["question"])} for row in count]
    return sets


def ask(llm, rows, way, name):
    """Every row in this way -> answers, and whether each holds its key fact (Q,)."""
    chats = [chat(row["question"], row["found"][: way.k], way) for row in rows]
    said = dict(run.bar(say(llm, chats, way.decoding), len(rows), name=name))
    answers = [said[i] for i in range(len(rows))]
    return answers, np.array([holds(said, row["key"]) for said, row in zip(answers, rows)], float)


def compare(llm, rows, ways, folder):
    """-> {way: {score: (mean, low, high)}} on these questions, how many hold the fact, and writes
    all answers."""
    manuals = np.array([row["kind"] == "manuals" for row in rows])
    table, said = {}, {"questions": [row["question"] for row in rows]}
    for name, way in ways.items():
        said[name], right = ask(llm, rows, way, name)
        run.write_json(folder, said)
        read = [
            any(holds(d.page_content, row["key"]) for d in row["found"][: way.k]) for row in rows
        ]
        table[name] = {
            "answers": scores.interval(right),
            "manuals": scores.interval(right[manuals]),
            "documents": scores.interval(right[~manuals]),
            "fact was read": float(np.mean(read)),
        }
    return table


def cosine(row):
    """How close the best passage is to the question."""
    return max(d.metadata["score"] for d in row["found"])


def abstain(sets, cut=None):
    """What this threshold does on the judged questions; without one, that which the questions for
    choosing give."""
    marks = {}
    for part, kinds in sets.items():
        rows = [row for rows in kinds.values() for row in rows]
        marks[part] = [
            np.array([cosine(row) for row in rows if bool(row["key"]) == there])
            for there in (True, False)
        ]
    cut = self_rag.best_threshold(*marks["for choosing"]) if cut is None else cut
    there, missing = marks["judged"]
    return {
        "threshold": cut,
        "AUC": self_rag.auc(there, missing),
        "right abstentions": scores.interval(missing < cut),
        "wrong abstentions": scores.interval(there < cut),
    }


def main(cfg: Config) -> dict:
    """Ask in every way, choose one, then choose when not to answer."""
    run.seed(cfg.seed)
    check(cfg.limit == -1 or cfg.limit >= 2, "--limit: 2 or more, or -1 for all")
    ways = {name: way for name, way in WAYS.items() if cfg.only in name}
    check(ways, f"--only {cfg.only}: the ways are {', '.join(WAYS)}")
    llm = language_models.language_model(cfg.llm, cfg.tokens)
    folder = run.output(cfg.out, cfg)
    sets = load(cfg)
    asked = [
        row | {"kind": kind} for kind in ("manuals", "documents") for row in sets["judged"][kind]
    ]
    tried = compare(llm, asked[::2], ways, folder / "choosing.json")
    print(scores.table(tried), end="\n\n")
    best = max(tried, key=lambda name: tried[name]["answers"][0])
    last = {name: WAYS[name] for name in (OLD, CHOSEN, best)}  # each once
    judged = compare(llm, asked[1::2], last, folder / "judging.json")
    print(f"best: {best}. On the other half of the questions:\n{scores.table(judged)}", end="\n\n")
    rates, usual = abstain(sets), abstain(sets, raw_rag.Config.abstain)
    nowhere = [
        row for kind, rows in sets["judged"].items() if kind.startswith("not") for row in rows
    ]
    said, _ = ask(llm, nowhere, WAYS[best], "no answer is there")
    rates["said by the model itself"] = scores.interval(
        [answer.NOWHERE in normal(text) for text in said]
    )
    print(
        scores.table({"abstention by cosine": rates, "with the default of --abstain": usual}),
        end="\n\n",
    )
    figures.bars(
        folder / "answers.png",
        {n: row["answers"] for n, row in tried.items()},
        x="answers with the key fact",
    )
    metrics: dict[str, Any] = {"best": best, "questions": len(asked)}
    metrics |= {f"{name}, judged": row["answers"][0] for name, row in judged.items()}
    return run.report(
        folder, metrics | {k: v[0] if isinstance(v, tuple) else v for k, v in rates.items()}
    )


if __name__ == "__main__":
    run.cli(main, Config)
