"""Multimodal retrieval: text and pictures become vectors of one space, by contrastive learning (InfoNCE).

CLIP, Radford et al. 2021, arXiv:2103.00020, trained both sides from nothing on 400 million pairs. Here both sides are
taken as they are, MiniLM for text and EfficientNet-lite0 for pictures; what is learned is one matrix that carries
picture features into the space of the texts, from 1500 emoji and their names. Two ways to find it: ridge regression
(Hoerl & Kennard 1970), in one line, and CLIP's contrastive loss (their Fig. 3; van den Oord et al. 2018,
arXiv:1807.03748, Eq. 4), which does not ask that a picture lies on its text but only nearer to it than to others.
Differences from CLIP: the text side is frozen, the temperature is fixed, equal captions are no negatives.

Shapes: N pictures, D = 1280 features of a picture, E = 384 numbers of a text, B pairs of a batch, Q queries.

    python rag/multimodal_rag.py                                 # emoji and photos of fruit; 3 minutes, then 1
    python rag/multimodal_rag.py --query "something to drink"
    python rag/multimodal_rag.py --images FOLDER --query "a dog" # your own pictures
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from PIL import Image, ImageDraw
from torch import Tensor

from rag import scores
from utils import assets, checkpoint, data, figures, pretrained, run
from utils.run import check

# Queries whose answers we know
FRUIT = {"a photo of an apple": {"apple"}, "citrus fruit": {"orange", "satsuma"}}
DROPOUT = 0.5  # part of the features that a step of InfoNCE does not see: there are few pairs
QUERIES = [*FRUIT, "a sad face", "something to drink", "a wild animal", "milk carton"]


@dataclass(frozen=True)
class Config:
    """Learn a space that texts and pictures share, search it, and score the search on pictures nobody trained on."""

    query: str = ""  # ask this; empty: six examples
    images: str = ""  # a folder of pictures to search; empty: emoji and photos
    space: str = (
        # How it is found: ridge, infonce, both (InfoNCE begins at ridge); or a folder of papers/clip.py
        "both"
    )
    emoji: int = 1913  # of the 1913 emoji, evenly
    photos: int = 600  # of the 2054 photos, evenly; 0: emoji alone
    k: int = 8  # pictures to find
    ridge: float = 1000.0  # lambda, what a large matrix costs
    steps: int = 150  # of InfoNCE
    batch: int = 512  # B, pairs that are told apart in one step
    lr: float = 1e-3
    temperature: float = 0.05  # tau; CLIP learns it and ends at 0.01
    # cosine from which a training picture or its name is too close to a test picture
    twin: float = 0.8
    seed: int = 0
    device: str = "auto"  # of the two networks
    out: str = "outputs/multimodal_rag"


class Space(NamedTuple):
    """What carries features of pictures into the space of texts."""

    mean: Tensor  # (D,) of the training features
    scale: Tensor  # (D,)
    W: Tensor  # (D,E)
    b: Tensor  # (E,)
    text: Tensor | None = None  # (L,E) carries texts as well; None: the space is that of the texts


def project(space, x):
    """Features (N,D) -> unit vectors (N,E), to be compared with those of texts."""
    return F.normalize((x - space.mean) / space.scale @ space.W + space.b, dim=-1)


def project_text(space, t):
    """Unit vectors of texts (N,L) -> unit vectors (N,E)."""
    return t if space.text is None else F.normalize(t @ space.text, dim=-1)


def load_space(folder):
    """A Space that papers/clip.py saved. Raises UserError if there is none, or if it is for other towers."""
    tensors, towers = checkpoint.read(Path(folder) / "space.safetensors")
    wanted = {"image": "efficientnet", "text": "minilm"}
    check(
        towers == wanted, f"{folder} is a space for {towers}; what looks and reads here is {wanted}"
    )
    return Space(*(tensors[name] for name in Space._fields))


def ridge(x, y, weight):
    """argmin |x W + b - y|^2 + weight |W|^2 for (N,D), (N,E) -> W (D,E), b (E,): W = (x'x + weight I)^-1 x'y."""
    x, y, mx, my = x.double(), y.double(), x.double().mean(0), y.double().mean(0)
    x, y = x - mx, y - my  # so that b, which costs nothing, takes no part
    W = torch.linalg.solve(x.T @ x + weight * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    return W.float(), (my - mx @ W).float()


def info_nce(z, t, temperature, same=None):
    """Unit vectors of pictures (B,E) and their texts (B,E): whose is whose, asked in both directions. CLIP, Fig. 3.

    same (B,B): pairs of equal caption. CLIP calls each wrong for the other; here they are left out.
    """
    logits = t @ z.T / temperature  # (B,B), row: a text among all pictures
    if same is not None:
        logits = logits.masked_fill(same & ~torch.eye(len(z), dtype=torch.bool), -torch.inf)
    of_text = logits.diagonal() - logits.logsumexp(1)
    of_picture = logits.diagonal() - logits.logsumexp(0)
    return -(of_text.mean() + of_picture.mean()) / 2


def train(W, b, x, t, cfg):
    """Move W and b in place so that pictures with standardised features x (N,D) tell their texts t (N,E) apart."""
    optimizer = torch.optim.AdamW(
        [W.requires_grad_(), b.requires_grad_()], cfg.lr, weight_decay=0.1
    )
    pace = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.steps)
    for _ in range(cfg.steps):
        pick = torch.randperm(len(x))[: cfg.batch]
        z = F.normalize(F.dropout(x[pick], DROPOUT) @ W + b, dim=-1)
        loss = info_nce(z, t[pick], cfg.temperature, same=t[pick] @ t[pick].T > 0.9999)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pace.step()
        yield loss.item()


def fit(x, t, cfg, how=None, name="train"):
    """Features (N,D) of pictures and vectors (N,E) of their captions -> the Space, found as `how` says."""
    how = how or cfg.space
    torch.manual_seed(cfg.seed)
    mean, scale = x.mean(0), x.std(0) + 1e-6
    z = (x - mean) / scale
    W, b = (
        ridge(z, t, cfg.ridge)
        if how != "infonce"
        else (0.01 * torch.randn(x.shape[1], t.shape[1]), t.mean(0))
    )
    if how != "ridge":
        for loss in (shown := run.bar(train(W, b, z, t, cfg), cfg.steps, name=name)):
            check(
                np.isfinite(loss), f"the loss is {loss}; try a lower --lr or a higher --temperature"
            )
            shown.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    return Space(mean, scale, W.detach(), b.detach())


def places(z, t):
    """Pictures (N,E), their captions (N,E) -> at which place among all N each caption finds its own, (N,), from 1."""
    closeness = t @ z.T
    return ((closeness > closeness.diagonal()[:, None]).sum(1) + 1).numpy()


def without_twins(x, t, test, limit):
    """Which of the training pictures (N,) have neither features nor a caption closer than `limit` to a test picture."""
    unit = F.normalize(x - x[~test].mean(0), dim=-1)
    closest = torch.maximum(unit @ unit[test].T, t @ t[test].T).amax(1)
    return ~test & (closest <= limit)


class Pictures(NamedTuple):
    thumbs: Tensor  # uint8 (N,3,72,72), to look at
    x: Tensor  # (N,D)
    captions: list[str]
    sources: list[str]
    test: Tensor  # bool (N,): nobody trains on these
    coarse: list[str]  # kind of fruit, "" for emoji


# How `features` are made: a part of their name in the cache
LOOK = "efficientnet_features, pooled, batches of 4"


def features(images, device):
    """uint8 (N,3,H,W) -> (N,D) by EfficientNet-lite0; in the cache under a hash of pictures, weights and settings."""
    network = pretrained.efficientnet(device)
    weights = {name: w.cpu() for name, w in network.state_dict().items()}
    name = checkpoint.digest(weights | {"the pictures": images.contiguous()}, LOOK)[:16]
    path = assets.cache() / "features" / f"efficientnet-{name}.safetensors"
    if not path.exists():
        parts = images.split(32)
        shown = run.bar(parts, len(parts), name="look")
        # Larger is slower on a CPU
        x = [pretrained.efficientnet_features(network, p, batch=4).cpu() for p in shown]
        checkpoint.write(path, {"features": torch.cat(x)})
    return checkpoint.read(path)[0]["features"]


def evenly(count, of):
    """So many places out of `of`, at equal distances: (count,)."""
    return np.linspace(0, of - 1, count).round().astype(int)


def emoji(count, device):
    """So many emoji, evenly out of all; one in five of them is for the test, by a hash of the caption."""
    images, captions, codes = data.emoji(72)
    pick = evenly(count, len(images))
    images, captions, codes = (
        images[torch.from_numpy(pick)],
        [captions[i] for i in pick],
        [codes[i] for i in pick],
    )
    test = torch.tensor([hashlib.sha256(c.encode()).digest()[0] % 5 == 0 for c in captions])
    sources = [f"emoji/{code}.png" for code in codes]
    return Pictures(images, features(images, device), captions, sources, test, [""] * len(captions))


def photos(count, device):
    """So many photos of fruit, evenly out of all, with their authors' own split; "Royal-Gala" is a royal gala apple."""
    g = data.groceries()
    pick = evenly(count, len(g.images))
    images = g.images[torch.from_numpy(pick)]
    coarse = [g.coarse_names[g.coarse[i]].lower().removesuffix("s") for i in pick]
    fine = [g.fine_names[g.fine[i]].lower().replace("-", " ").removesuffix("s") for i in pick]
    captions = [f if c in f else f"{f} {c}" for f, c in zip(fine, coarse)]
    sources = [f"groceries/{g.split[i]}/{i}" for i in pick]
    thumbs = F.interpolate(images.float(), (72, 72), mode="area").round().to(torch.uint8)
    test = torch.tensor([g.split[i] == "test" for i in pick], dtype=torch.bool)
    return Pictures(thumbs, features(images, device), captions, sources, test, coarse)


def folder(path, device):
    """Every picture below a folder; its name is its caption. Raises UserError as `utils.data.image_folder` does."""
    images = data.image_folder(path, 224)
    # In the same order
    paths = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in data.IMAGE_SUFFIXES)
    thumbs = F.interpolate(images.float(), (72, 72), mode="area").round().to(torch.uint8)
    names = [p.stem.replace("_", " ").replace("-", " ") for p in paths]
    test = torch.ones(len(paths), dtype=torch.bool)
    return Pictures(
        thumbs, features(images, device), names, [str(p) for p in paths], test, [""] * len(paths)
    )


def join(a, b):
    """Two lots of pictures as one."""
    return Pictures(*(torch.cat([p, q]) if isinstance(p, Tensor) else p + q for p, q in zip(a, b)))


def choose(pictures, mask):
    """Those pictures where the mask (N,) holds."""
    keep = [i for i, wanted in enumerate(mask.tolist()) if wanted]
    return Pictures(*(f[mask] if isinstance(f, Tensor) else [f[i] for i in keep] for f in pictures))


class PictureRetriever(BaseRetriever):
    """The k pictures whose vectors in the shared space are closest to the vector of the text. Documents: captions."""

    index: Any
    pictures: Any
    encode: Any  # texts -> unit vectors (Q,E)
    k: int

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        found, keys = self.index.search(
            self.encode([query]).numpy(), min(self.k, self.index.ntotal)
        )
        p = self.pictures
        return [
            Document(
                p.captions[i],
                metadata={
                    "source": p.sources[i],
                    "id": p.sources[i],
                    "score": float(s),
                    "n": int(i),
                },
            )
            for s, i in zip(found[0], keys[0])
        ]


def text_encoder(device):
    """-> a function texts -> unit vectors (N,E) by MiniLM."""
    tokenizer, model = pretrained.minilm(device)
    return lambda texts: pretrained.embed(texts, tokenizer, model).cpu()


def index_of(space, pictures, encode, k):
    """A retriever over these pictures. The index is flat: every query is compared with every picture."""
    index = faiss.IndexFlatIP(space.W.shape[1])
    index.add(project(space, pictures.x).numpy())  # type: ignore[call-arg]  (faiss adds the method in Python)
    return PictureRetriever(
        index=index, pictures=pictures, encode=lambda x: project_text(space, encode(x)), k=k
    )


def gather(cfg):
    """Emoji, and photos if there are to be any, with a text encoder and the vectors of all captions."""
    check(cfg.k >= 1 and cfg.steps >= 1, "--k and --steps must be 1 or more")
    check(40 <= cfg.emoji <= 1913, "--emoji: 40 to 1913")
    check(cfg.photos == 0 or 40 <= cfg.photos <= 2054, "--photos: 40 to 2054, or 0")
    check(cfg.batch >= 2, "--batch: 2 or more, a pair is told apart from others")
    ways = ("ridge", "infonce", "both")
    check(
        cfg.space in ways or Path(cfg.space).is_dir(),
        f"--space is {', '.join(ways)} or a folder, not {cfg.space}",
    )
    check(cfg.ridge > 0 and cfg.temperature > 0, "--ridge and --temperature must be above 0")
    device = run.device(cfg.device)
    # first: a broken picture should cost no minute
    searched = folder(cfg.images, device) if cfg.images else None
    pictures = emoji(cfg.emoji, device)
    pictures = join(pictures, photos(cfg.photos, device)) if cfg.photos else pictures
    encode = text_encoder(device)
    return pictures, searched, encode, encode(pictures.captions)


def build_retriever(cfg: Config) -> BaseRetriever:
    """Learn the space from emoji and training photos; search the folder, or the pictures that nobody trained on."""
    pictures, searched, encode, t = gather(cfg)
    space = space_of(pictures, t, cfg)
    return index_of(space, searched or choose(pictures, pictures.test), encode, cfg.k)


def space_of(pictures, t, cfg, name="train"):
    """The space that --space names: loaded, or learned from all pictures that are not for the test."""
    if Path(cfg.space).is_dir():
        return load_space(cfg.space)
    return fit(pictures.x[~pictures.test], t[~pictures.test], cfg, name=name)


def row(ranks):
    """Places (Q,) -> {score: (mean, low, high)}."""
    return {name: scores.interval(values) for name, values in scores.all_of(ranks).items()}


def emoji_scores(pictures, t, cfg):
    """Names of test emoji, each in search of its picture among all test emoji: three ways to learn; one to cheat.

    Flags, families and faces come in rows that look alike and are called alike. A training picture beside a test
    picture gives it away: the last line trains without such twins, the line before without as many others, by lot.
    """
    test = pictures.test
    clean = without_twins(pictures.x, t, test, cfg.twin)
    check(
        clean.sum() > 1,
        "no training emoji is left without its twins: take a higher --twin or more --emoji",
    )
    order = torch.randperm(int((~test).sum()), generator=torch.Generator().manual_seed(cfg.seed))
    lot = (~test).nonzero()[:, 0][order[: int(clean.sum())]]
    fewer = torch.zeros_like(test).index_fill(0, lot, True)
    count, n = int(test.sum()), int((~test).sum())
    print(
        f"{count} emoji for the test, {n} to learn from: {n - int(clean.sum())} of these are twins of test emoji"
    )
    rows = {
        "chance": {
            name: float(v.mean()) for name, v in scores.all_of(np.arange(1, count + 1)).items()
        }
    }
    trained = {"ridge": (~test, "ridge"), "infonce": (~test, "infonce"), "both": (~test, "both")}
    trained |= {
        f"{cfg.space}, fewer by lot": (fewer, cfg.space),
        f"{cfg.space}, no twins": (clean, cfg.space),
    }
    for name, (mask, how) in trained.items():
        space = fit(pictures.x[mask], t[mask], cfg, how, name)
        rows[name] = row(places(project(space, pictures.x[test]), t[test]))
    return rows


def photo_scores(pictures, t, encode, cfg):
    """How many of the first ten photos show the fruit that was asked for: by a space that has seen photos, and not."""
    is_photo = torch.tensor([c != "" for c in pictures.coarse])
    shown = choose(pictures, pictures.test & is_photo)
    asked = {
        "5 kinds": (sorted(set(shown.coarse)), shown.coarse),
        "sorts": (sorted(set(shown.captions)), shown.captions),
    }
    lines = {"chance": {}, "learnt from emoji": {}, "from emoji and photos": {}}
    for learnt, mask in (
        ("learnt from emoji", ~pictures.test & ~is_photo),
        ("from emoji and photos", ~pictures.test),
    ):
        space = fit(pictures.x[mask], t[mask], cfg, name=learnt)
        z, everything = project(space, shown.x), choose(pictures, pictures.test)
        queries = encode([f"a photo of {a(name)}" for name in asked["sorts"][0]])
        among = (queries @ project(space, everything.x).T).topk(10).indices
        for what, (names, truth) in asked.items():
            right = torch.tensor([[name == c for c in truth] for name in names]).float()  # (Q,N)
            found = (
                (encode([f"a photo of {a(name)}" for name in names]) @ z.T)
                .topk(min(10, len(z)))
                .indices
            )
            lines[learnt][f"{what}, P@10"] = scores.interval(right.gather(1, found).mean(1))
            lines["chance"][f"{what}, P@10"] = float(right.mean())
        lines[learnt]["photos among 10"] = float(
            torch.tensor([c != "" for c in everything.coarse])[among].float().mean()
        )
    lines["chance"]["photos among 10"] = len(shown.x) / int(pictures.test.sum())
    return lines


def means(rows, about):
    """A table without its intervals, for metrics.json."""
    return {
        f"{about}, {n}": {s: v[0] if isinstance(v, tuple) else v for s, v in r.items()}
        for n, r in rows.items()
    }


def a(name):
    """The noun with its article."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def card(thumb, score, right=False):
    """A picture (3,72,72) with its score on a strip below, in a green frame if it is right: (3,90,78) in [-1, 1]."""
    image = Image.new("RGB", (78, 90), "limegreen" if right else "white")
    image.paste(Image.fromarray(thumb.permute(1, 2, 0).numpy()), (3, 3))
    image.paste("white", (0, 78, 78, 90))
    ImageDraw.Draw(image).text((27, 79), f"{score:.2f}", fill="black")
    return data.to_float(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def show(retriever, queries, path):
    """Print what each query finds, with scores and sources, and draw it."""
    drawn = {}
    for query in queries:
        found = retriever.invoke(query)
        print(f"\n{query}")
        for i, d in enumerate(found[:4], 1):
            print(f"[{i}] {d.metadata['score']:.3f}  {d.page_content}  ({d.metadata['source']})")
        p, places = retriever.pictures, [(d.metadata["n"], d.metadata["score"]) for d in found]
        drawn[query] = torch.stack(
            [card(p.thumbs[n], s, p.coarse[n] in FRUIT.get(query, ())) for n, s in places]
        )
    print()
    figures.rows(path, drawn)


def main(cfg: Config) -> dict:
    """Learn the space in several ways and score each; then search with the one that --space names."""
    check(
        cfg.query or not cfg.images, "nobody has written queries for --images: ask one with --query"
    )
    run.seed(cfg.seed)
    pictures, searched, encode, t = gather(cfg)
    out = run.output(cfg.out, cfg)
    metrics: dict[str, Any] = {"pictures to learn from": int((~pictures.test).sum())}
    space = space_of(pictures, t, cfg, name="final")
    if Path(cfg.space).is_dir():
        shown = pictures.test & torch.tensor([c == "" for c in pictures.coarse])
        ranks = places(project(space, pictures.x[shown]), project_text(space, t[shown]))
        metrics |= means({cfg.space: row(ranks)}, "emoji")
    elif not cfg.images:
        is_emoji = torch.tensor([c == "" for c in pictures.coarse])
        rows = emoji_scores(choose(pictures, is_emoji), t[is_emoji], cfg)
        print(scores.table(rows), end="\n\n")
        metrics |= means(rows, "emoji")
        if cfg.photos:
            lines = photo_scores(pictures, t, encode, cfg)
            print(scores.table(lines), end="\n\n")
            metrics |= means(lines, "photos")
    retriever = index_of(space, searched or choose(pictures, pictures.test), encode, cfg.k)
    show(retriever, [cfg.query] if cfg.query else QUERIES, out / "found.png")
    return run.report(out, metrics, then="python rag/raw_rag.py")


if __name__ == "__main__":
    run.cli(main, Config)
