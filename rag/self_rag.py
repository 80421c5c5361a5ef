"""Self-RAG: retrieve on demand, grade relevance and support, abstain if no passage is relevant.

Self-RAG, Asai et al. 2023, arXiv:2310.11511, trains a model of 7 billion weights to write marks of
reflection: Retrieve (is a search needed?), IsRel (does the passage bear on the question?), IsSup
(does it support the answer?), IsUse (does it help?). Here nothing is trained. Each mark is a number
between 0 and 1 that a critic gives: `llm` asks the chat model a question with the answer yes or no
and compares the probabilities of both; `cosine`, `maxsim` and `cross` take the scores of retrieval
and those of advanced_rag_rerank.py. Which critic can be trusted is measured: each question is asked
twice, with its answer among the documents and with that answer hidden, and the critic has to tell
which is which.

    python rag/self_rag.py                                             # the four critics, and one answer
    python rag/self_rag.py --question "How do I bake bread?"           # not in the documents
    python rag/self_rag.py --critic llm
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from rag import advanced_rag_rerank as rerank
from rag import answer, corpus, cross_encoder, language_models, raw_rag
from rag.advanced_rag_compression import held
from utils import figures, run
from utils.run import check


@dataclass(frozen=True)
class Config(raw_rag.Config):
    """Answer only from passages that a critic accepts."""

    critic: Literal["cosine", "maxsim", "cross", "llm"] = "cosine"  # who judges
    threshold: float = -1.0  # of IsRel; -1: the best one on questions that are not scored
    # also measure how well each critic tells a hidden answer from one that is there
    critics: bool = True
    limit: int = 32  # questions for that, and for the scores
    out: str = "outputs/self_rag"


@torch.no_grad()
def yes(llm, question):
    """P(yes) / (P(yes) + P(no)) of the next word of the model."""
    ids = llm.prompt([{"role": "user", "content": f"{question}\nAnswer with Yes or No."}])
    words = [llm.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("Yes", "No")]
    return float(llm.model(ids, logits_to_keep=1).logits[0, -1, words].float().softmax(0)[0])


def sigmoid(x):
    """A logit -> a number between 0 and 1."""
    return float(1 / (1 + np.exp(-x)))


class Critic:
    """IsRel of each passage, (N,) in 0..1."""

    def __init__(self, kind, llm, cfg):
        self.kind = kind
        self.llm = llm
        self.again: Any = None
        if kind in ("maxsim", "cross"):
            self.again = rerank.reranker(rerank.Config(reranker=kind, embedder=cfg.embedder))

    def __call__(self, question, documents):
        if self.kind == "llm":
            ask = "Does this text answer the question?\nText: {}\nQuestion: {}"
            texts = [" ".join(d.page_content.split()) for d in documents]
            return [yes(self.llm, ask.format(text, question)) for text in texts]
        if self.kind == "cross":
            # Centred and scaled, so that the sigmoid tells them apart
            found = self.again(question, documents)
            return [sigmoid((x - cross_encoder.SCALE / 2) / 4) for x in found]
        if self.kind == "maxsim":
            return [x / 2 for x in self.again(question, documents)]  # two cosines, added
        return [d.metadata["score"] for d in documents]


def supported(said, documents):
    """IsSup: what part of the words of the answer are in the passages, 0..1."""
    return held(" ".join(d.page_content for d in documents), said)


def auc(positive, negative):
    """How often is one of the positives above one of the negatives? 0.5 is chance. Ties count half."""
    a, b = np.asarray(positive)[:, None], np.asarray(negative)[None]
    return float((a > b).mean() + (a == b).mean() / 2)


def best_threshold(positive, negative):
    """The value that most of the positives reach and most of the negatives do not."""
    both = np.unique([*positive, *negative])
    return float(max(both, key=lambda t: np.mean(positive >= t) + np.mean(negative < t)))


class SelfRetriever(BaseRetriever):
    """The passages that the critic accepts, the most relevant first. None: the documents do not say
    it."""

    quick: Any
    critic: Any
    threshold: float
    k: int

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        # Retrieve, and grade relevance (IsRel)
        documents = self.quick.invoke(query)
        judged = [raw_rag.scored(d, s) for d, s in zip(documents, self.critic(query, documents))]
        # Keep what reaches the threshold, the most relevant first
        accepted = [d for d in judged if d.metadata["score"] >= self.threshold]
        return sorted(accepted, key=lambda d: -d.metadata["score"])[: self.k]


def judge(critic, retriever, questions, k):
    """The highest IsRel among k passages, with the answer among them and with it hidden: (Q,),
    (Q,).

    Only of questions whose answer is among the k passages: for the others both are the same.
    """
    there = []
    hidden = []
    for question in run.bar(questions, len(questions), name=critic.kind):
        found = retriever.invoke(question.text)[: k + 5]
        right = [d.metadata["section"] == question.gold for d in found]
        # IsRel of all, and without those that hold the answer
        if any(right[:k]):
            marks = np.array(critic(question.text, found))
            there.append(marks[:k].max())
            hidden.append(marks[~np.array(right)][:k].max())
    return np.array(there), np.array(hidden)


EVERYDAY = (  # what no manual is needed for
    "What is 2 + 2?", "Hello, how are you?", "Name a colour of the rainbow.", "What is the capital of France?",
    "How many days has a week?", "Thank you!", "Tell me a joke.", "Is water wet?", "What is the opposite of hot?",
    "Who wrote Romeo and Juliet?", "Translate good morning into Spanish.", "Which animal barks?",
)  # fmt: skip


def needed(llm, question):
    """Retrieve: does the model say that it must look the answer up?"""
    return yes(llm, f"Must you look into a software manual to answer this?\nQuestion: {question}")


def quick_search(cfg):
    """Dense retrieval of at least 20 passages, for the critic to grade."""
    return raw_rag.build_retriever(replace(cfg, k=max(20, cfg.k)))


def others(questions, limit, count):
    """So many questions that are not among the `limit` that are scored; of all, if all are."""
    scored = raw_rag.spread(questions, limit)
    # So few questions that all are scored: choose among them
    return raw_rag.spread([q for q in questions if q not in scored] or questions, count)


def build_retriever(cfg: Config) -> BaseRetriever:
    """The quick search of dense retrieval with a critic behind it."""
    in_process = not cfg.llm.startswith(("http", "none"))
    check(cfg.critic != "llm" or in_process, "--critic llm needs a model in this process")
    message = "--threshold: between 0 and 1, or -1 to choose it"
    check(cfg.threshold == -1 or 0 <= cfg.threshold <= 1, message)
    # The critic, and the search before it
    llm = None
    if cfg.critic == "llm":
        llm = language_models.language_model(cfg.llm, cfg.tokens)
    critic = Critic(cfg.critic, llm, cfg)
    quick = quick_search(cfg)
    # The threshold, chosen on other questions unless it is given
    threshold = max(0.0, cfg.threshold)
    if cfg.threshold == -1 and not cfg.docs:
        count = 16 if cfg.critic == "llm" else 97  # the language model takes seconds each
        tried = others(corpus.load(cfg)[1], cfg.limit, count)
        there, hidden = judge(critic, quick, tried, 5)
        threshold = best_threshold(there, hidden) if len(there) else 0.0
    quick = quick.model_copy(update={"k": max(10, cfg.k)})
    return SelfRetriever(quick=quick, critic=critic, threshold=threshold, k=cfg.k)


def respond(question, retriever, llm, k=5):
    """-> the answer, the passages behind it, IsSup. Without an accepted passage no answer is
    written."""
    found = retriever.invoke(question)[:k]
    if not found:
        return answer.NOWHERE, [], 0.0
    # Answer, and grade support (IsSup)
    found = answer.passages_read(llm, found)
    said = "".join(llm.stream(answer.messages(question, found)))
    return said, found, supported(said, found)


def compare(cfg, folder, llm):
    """How well does each critic tell an answer that is there from one that is hidden?"""
    questions = raw_rag.spread(corpus.load(cfg)[1], cfg.limit)
    quick = quick_search(cfg)
    rows = {}
    sides = {}
    kinds = ["cosine", "maxsim", "cross"]
    if hasattr(llm, "loss"):
        kinds.append("llm")
    # IsRel of each critic, with the answer and without it
    for kind in kinds:
        there, hidden = judge(Critic(kind, llm, cfg), quick, questions, cfg.k)
        check(len(there) >= 4, f"only {len(there)} answers were found: raise --limit")
        # Chosen on every second question, used on the others
        cut = best_threshold(there[::2], hidden[::2])
        right = (np.mean(there[1::2] >= cut) + np.mean(hidden[1::2] < cut)) / 2
        rows[f"IsRel by {kind}"] = {
            "AUC": auc(there, hidden),
            "balanced accuracy": float(right),
            "questions": float(len(there)),
        }
        sides[kind] = there, hidden
    draw_critics(sides, folder / "critics.png")
    # Retrieve: questions of the manuals against everyday ones
    if hasattr(llm, "loss"):
        say = [[needed(llm, q) for q in texts] for texts in ([q.text for q in questions], EVERYDAY)]
        rows["Retrieve by llm"] = {"AUC": auc(*say), "questions": float(len(questions))}
    return rows


def draw_critics(sides, path):
    """{critic: (IsRel with the answer, IsRel without it)} -> histograms."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(sides), figsize=(3 * len(sides), 2.6))
    for axis, (kind, (there, hidden)) in zip(axes, sides.items()):
        bins = np.linspace(min(*there, *hidden), max(*there, *hidden), 13)
        axis.hist([there, hidden], bins, label=["answer is there", "answer is hidden"])
        axis.set(title=f"{kind}: AUC {auc(there, hidden):.2f}", xlabel="IsRel", ylabel="questions")
    # The names stand above the bars
    axes[0].set_ylim(top=1.4 * axes[0].get_ylim()[1])
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    figure.tight_layout()
    figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Judge the critics, then find, judge, answer, score."""
    run.seed(cfg.seed)
    check(cfg.llm != "none", "--llm none: there is nobody to answer")
    metrics: dict[str, Any] = {}
    if cfg.critics and not cfg.docs and cfg.limit:
        llm = language_models.language_model(cfg.llm, cfg.tokens)
        metrics = compare(cfg, run.output(cfg.out, cfg), llm)
    metrics |= raw_rag.show(cfg, build_retriever)
    return run.report(Path(cfg.out), metrics, then="python rag/compare.py")


if __name__ == "__main__":
    run.cli(main, Config)
