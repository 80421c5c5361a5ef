"""Multimodal retrieval: texts and images in one embedding space, by contrastive learning (InfoNCE).

CLIP, Radford et al. 2021, arXiv:2103.00020, trained both towers from nothing on 400 million pairs.
Here both are frozen, MiniLM for text and EfficientNet-lite0 for images; what is learned is one
matrix that projects image features into the space of the texts, from 1500 emoji and their names:
`image_projection.py`. Two ways to find it: ridge regression (Hoerl & Kennard 1970), in one line,
and CLIP's contrastive loss (their Fig. 3; van den Oord et al. 2018, arXiv:1807.03748, Eq. 4), which
does not ask that an image lies on its text but only nearer to it than to others. Differences from
CLIP: the text side is frozen, the temperature is fixed, equal captions are no negatives.

Shapes: N images, D = 1280 features of an image, E = 384 numbers of a text, Q queries.

    python rag/multimodal_rag.py                                 # emoji and photos; 3 minutes, then 1
    python rag/multimodal_rag.py --query "something to drink"
    python rag/multimodal_rag.py --images FOLDER --query "a dog" # your own pictures
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from PIL import Image, ImageDraw

from rag import image_data, multimodal_scores, scores
from rag.image_projection import fit, load_space, project, project_text
from utils import data, figures, pretrained, run
from utils.run import check

# Queries whose relevant classes we know
RELEVANT = {"a photo of an apple": {"apple"}, "citrus fruit": {"orange", "satsuma"}}
QUERIES = [*RELEVANT, "a sad face", "something to drink", "a wild animal", "milk carton"]


@dataclass(frozen=True)
class Config:
    """Fit a joint space of texts and images, search it, and score it on held-out images."""

    query: str = ""  # ask this; empty: six examples
    images: str = ""  # a folder of pictures to search; empty: emoji and photos
    space: str = "both"  # ridge, infonce, both (InfoNCE from ridge); or a folder of papers/clip.py
    emoji: int = 1913  # of the 1913 emoji, evenly
    photos: int = 600  # of the 2054 photos, evenly; 0: emoji alone
    k: int = 8  # images to find
    ridge: float = 1000.0  # lambda, weight of the penalty on the matrix
    steps: int = 150  # of InfoNCE
    batch: int = 512  # B, pairs that are told apart in one step
    lr: float = 1e-3
    temperature: float = 0.05  # tau; CLIP learns it and ends at 0.01
    twin: float = 0.8  # cosine above which a training image is a near-duplicate of a test image
    seed: int = 0
    device: str = "auto"  # of the two networks
    out: str = "outputs/multimodal_rag"


class ImageRetriever(BaseRetriever):
    """The k images closest to the text in the joint space. Documents: captions."""

    index: Any
    images: Any
    encode: Any  # texts -> unit vectors (Q,E)
    k: int

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        # Embed the query, and find its nearest images
        vector = self.encode([query]).numpy()
        similarity, keys = self.index.search(vector, min(self.k, self.index.ntotal))
        # Each image as a document: its caption is the text
        documents = []
        for score, i in zip(similarity[0], keys[0]):
            source = self.images.sources[i]
            metadata = {"source": source, "id": source, "score": float(score), "n": int(i)}
            documents.append(Document(self.images.captions[i], metadata=metadata))
        return documents


def text_encoder(device):
    """-> a function texts -> unit vectors (N,E) by MiniLM."""
    tokenizer, model = pretrained.minilm(device)
    return lambda texts: pretrained.embed(texts, tokenizer, model).cpu()


def index_of(space, images, encode, k):
    """A retriever over these images. The index is flat: every query is compared with every image."""
    index = faiss.IndexFlatIP(space.W.shape[1])
    index.add(project(space, images.x).numpy())  # type: ignore[call-arg]  (faiss adds the method in Python)

    def encode_query(texts):
        return project_text(space, encode(texts))

    return ImageRetriever(index=index, images=images, encode=encode_query, k=k)


def check_flags(cfg):
    """Raises UserError for values that cannot be run with."""
    check(cfg.k >= 1 and cfg.steps >= 1, "--k and --steps must be 1 or more")
    check(40 <= cfg.emoji <= 1913, "--emoji: 40 to 1913")
    check(cfg.photos == 0 or 40 <= cfg.photos <= 2054, "--photos: 40 to 2054, or 0")
    check(cfg.batch >= 2, "--batch: 2 or more, a pair is told apart from others")
    ways = ("ridge", "infonce", "both")
    message = f"--space is {', '.join(ways)} or a folder, not {cfg.space}"
    check(cfg.space in ways or Path(cfg.space).is_dir(), message)
    check(cfg.ridge > 0 and cfg.temperature > 0, "--ridge and --temperature must be above 0")


def load_data(cfg):
    """-> images to train and test on, those of --images, the text encoder, vectors of captions."""
    check_flags(cfg)
    device = run.device(cfg.device)
    # The folder first: a broken image should cost no minute
    searched = image_data.folder(cfg.images, device) if cfg.images else None
    # Emoji, and photos if there are to be any
    images = image_data.emoji(cfg.emoji, device)
    if cfg.photos:
        images = image_data.concatenate(images, image_data.photos(cfg.photos, device))
    # Captions through the text encoder
    encode = text_encoder(device)
    return images, searched, encode, encode(images.captions)


def build_retriever(cfg: Config) -> BaseRetriever:
    """Fit the space to training images; search the folder, or the held-out images."""
    images, searched, encode, t = load_data(cfg)
    space = space_of(images, t, cfg)
    held_out = image_data.subset(images, images.test)
    return index_of(space, searched or held_out, encode, cfg.k)


def space_of(images, t, cfg, name="train"):
    """The space that --space names: loaded, or fitted to all images that are not held out."""
    if Path(cfg.space).is_dir():
        return load_space(cfg.space)
    train = ~images.test
    return fit(images.x[train], t[train], cfg, name=name)


def result_card(thumb, score, relevant=False):
    """An image (3,72,72) above its score, in a green frame if relevant: (3,90,78) in [-1, 1]."""
    card = Image.new("RGB", (78, 90), "limegreen" if relevant else "white")
    card.paste(Image.fromarray(thumb.permute(1, 2, 0).numpy()), (3, 3))
    # The score stands on a white strip below
    card.paste("white", (0, 78, 78, 90))
    ImageDraw.Draw(card).text((27, 79), f"{score:.2f}", fill="black")
    return data.to_float(torch.from_numpy(np.array(card)).permute(2, 0, 1))


def show(retriever, queries, path):
    """Print what each query finds, with scores and sources, and draw it."""
    drawn = {}
    for query in queries:
        found = retriever.invoke(query)
        # The first four as text
        print(f"\n{query}")
        for i, d in enumerate(found[:4], 1):
            print(f"[{i}] {d.metadata['score']:.3f}  {d.page_content}  ({d.metadata['source']})")
        # All of them as a row of cards
        cards = []
        for d in found:
            n = d.metadata["n"]
            relevant = retriever.images.coarse[n] in RELEVANT.get(query, ())
            cards.append(result_card(retriever.images.thumbs[n], d.metadata["score"], relevant))
        drawn[query] = torch.stack(cards)
    print()
    figures.rows(path, drawn)


def main(cfg: Config) -> dict:
    """Fit the space in several ways and score each; then search with the one that --space names."""
    message = "nobody has written queries for --images: ask one with --query"
    check(cfg.query or not cfg.images, message)
    run.seed(cfg.seed)
    # Data, and the space to search with
    images, searched, encode, t = load_data(cfg)
    out = run.output(cfg.out, cfg)
    space = space_of(images, t, cfg, name="final")
    is_emoji = torch.tensor([c == "" for c in images.coarse])
    held_out = image_data.subset(images, images.test)
    metrics: dict[str, Any] = {"pictures to learn from": int((~images.test).sum())}
    # Scores: of a loaded space, or of every way to fit one
    if Path(cfg.space).is_dir():
        shown = images.test & is_emoji
        z = project(space, images.x[shown])
        ranks = multimodal_scores.retrieval_ranks(z, project_text(space, t[shown]))
        rows = {cfg.space: multimodal_scores.score_row(ranks)}
        metrics |= multimodal_scores.without_intervals(rows, "emoji")
    elif not cfg.images:
        emoji = image_data.subset(images, is_emoji)
        rows = multimodal_scores.emoji_scores(emoji, t[is_emoji], cfg)
        print(scores.table(rows), end="\n\n")
        metrics |= multimodal_scores.without_intervals(rows, "emoji")
        if cfg.photos:
            rows = multimodal_scores.photo_scores(images, t, encode, cfg)
            print(scores.table(rows), end="\n\n")
            metrics |= multimodal_scores.without_intervals(rows, "photos")
    # Search
    retriever = index_of(space, searched or held_out, encode, cfg.k)
    show(retriever, [cfg.query] if cfg.query else QUERIES, out / "found.png")
    return run.report(out, metrics, then="python rag/raw_rag.py")


if __name__ == "__main__":
    run.cli(main, Config)
