"""A corpus of a few lines, and an embedder that costs nothing, for the tests of the chapter on retrieval."""

import hashlib
import random

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings

from rag import raw_rag

# Flags with which a script of the chapter takes seconds
QUICK = {"distractors": 0, "llm": "none", "limit": 12}


class Bag(Embeddings):
    """Each word has a direction of its own, drawn from its letters; a text is the sum of its words."""

    id, size = "bag", 32

    def encode(self, texts, task="query"):
        sums = [
            sum(self.word(w) for w in text.lower().split()) + np.zeros(self.size) for text in texts
        ]
        found = np.array(sums).reshape(-1, self.size)
        return (found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)).astype(
            np.float32
        )

    def word(self, letters):
        seed = int.from_bytes(hashlib.sha256(letters.encode()).digest()[:4])
        return np.random.default_rng(seed).standard_normal(self.size)

    def vectors(self, texts):
        return self.encode(texts, "document")

    def embed_documents(self, texts):
        return self.vectors(texts).tolist()

    def embed_query(self, text):
        return self.encode([text])[0].tolist()


def document(text, name, section=None):
    metadata = {
        "source": "file.md",
        "id": name,
        "title": "file.md > Title",
        "section": section or name,
    }
    return Document(text, metadata=metadata)


TEXTS = [
    "the cat sat on the mat",
    "a dog barked at the moon",
    "cats and dogs are friends",
    "the moon is far away",
]


def documents():
    return [document(text, f"file.md#{i}/0", f"file.md#{i}") for i, text in enumerate(TEXTS)]


class Store:
    """A store of four passages, closest first."""

    def similarity_search_with_score(self, query, k=4):
        found = documents()
        cosines = Bag().encode(TEXTS) @ Bag().encode([query])[0]
        return [(found[i], float(cosines[i])) for i in np.argsort(-cosines)[:k]]


def dense(k=4):
    return raw_rag.DenseRetriever(store=Store(), k=k)


PIECES = (
    "<|im_start|>", "<|im_end|>", "</s>", "[INST]", "<<SYS>>", "</passage>", "< / passage >", '<passage number="1">',
    "[1]", "[99]", "[007]", "<script>", "&lt;", "${x}", "{{x}}", "{}", "%s", "\x00", "\x1b[31m", "\r\n", "\u2028",
    "\ud800", "\udfff", "\ufeff", "\u202e", "\u0301", "\U0001f600", "\u200d", "\u4e2d\u6587", "\u0939\u093f",
    "\u0627\u0644", "\u05d0", "\uff1f", "\u0663", "[\u0663]", "a" * 300, " " * 300, "[" * 200, "<" * 200, "\n" * 100,
    "who", "is", "the", "cat", "?",
)  # fmt: skip


def fuzz(count, seed=0):
    """So many texts of what texts should not hold, and of letters of all scripts; the same every time."""
    dice, texts = random.Random(seed), []
    for i in range(count):
        parts = dice.choices(PIECES, k=dice.randrange(12))
        parts += [chr(dice.randrange(0x110000)) for _ in range(dice.randrange(20))]
        dice.shuffle(parts)
        texts.append(dice.choice(("", " ")).join(parts) * (1000 if i % 100 == 99 else 1))
    return texts


def tiny_encoder(folder, weights=None, prompts=None):
    """A sentence encoder in `folder` that adds up vectors of three words, and knows no others; -> the folder's name."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(
        models.WordLevel({"[UNK]": 0, "cat": 1, "dog": 2, "moon": 3}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if weights is None:
        weights = np.eye(4, 8, k=-1, dtype=np.float32)  # row 0, the unknown word, is zero
    model = SentenceTransformer(
        modules=[StaticEmbedding(words, weights)], prompts=prompts, device="cpu"
    )
    model.save(str(folder))
    return str(folder)
