"""CLIP: contrastive language-image pretraining with the symmetric InfoNCE loss.

Radford et al. 2021, arXiv:2103.00020. Two towers, one for pictures and one for texts, end in the same space; the label
of a picture is which text of the batch is its own. Afterwards any list of names is a classifier: zero-shot. Figure and
section numbers are the paper's. Batches too large for the memory are taken in pieces without an error: gradient
caching, Gao et al. 2021, arXiv:2101.06983.

Shapes: B pairs of a batch, D numbers of the image tower, L of the text tower, E of the shared space, K classes.
Differences from the paper: 1500 emoji with their names instead of 400 million pairs; both towers are trained before
(EfficientNet-lite0 or this chapter's MAE, and MiniLM) and stay as they are, unless --tune-text; a projection each and
the temperature are learned; equal captions do not occur.

    python papers/clip.py                                  # train, search both ways, classify, sweep: 1 min
    python papers/clip.py --tower mae                      # pictures as this chapter's masked autoencoder sees them
    python papers/clip.py --tune-text --steps 60           # MiniLM learns as well
    python rag/multimodal_rag.py --space outputs/clip --query "something to drink"    # search with what was learned
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from papers import mae, photos
from utils import checkpoint, data, figures, pretrained, run
from utils.run import check

# Sec. 3.1.4: several are better
TEMPLATES = ("a photo of {}", "a photo of a pile of {}", "{}", "{} in a shop")
HIDE = 0.5  # part of the image features that a step does not see: there are few pairs


@dataclass(frozen=True)
class Config:
    """Train two projections into one space on emoji and their names; search, classify photos, sweep."""

    tower: Literal["efficientnet", "mae"] = "efficientnet"  # who looks at the pictures
    tune_text: bool = False  # MiniLM learns as well: slower
    steps: int = 300  # training steps
    batch: int = 512  # B, pairs that are told apart in one step
    chunk: int = 0  # pairs that are in memory at once; 0: all of the batch
    width: int = 256  # E
    lr: float = 1e-3
    temperature: float = 0.07  # where it begins
    learn_temperature: bool = True
    sweep: bool = True  # train again with other temperatures, and other batches of as many pairs
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/clip"


class Towers(nn.Module):
    """What is learned: a projection of each side and the temperature. Fig. 3: W_i, W_t, t."""

    def __init__(self, mean, spread, texts, width, temperature):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)
        self.image = nn.Linear(len(mean), width)
        self.text = nn.Linear(texts, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / temperature).log())

    def encode_image(self, x):
        """(B,D) -> unit vectors (B,E)."""
        x = (x - self.mean) / self.spread
        return F.normalize(self.image(F.dropout(x, HIDE, self.training)), dim=-1)

    def encode_text(self, x):
        """(B,L) -> unit vectors (B,E)."""
        return F.normalize(self.text(x), dim=-1)

    def scale(self):
        """One over the temperature, at most 100. Sec. 2.5."""
        return self.log_scale.exp().clamp(max=100)


def clip_loss(z, t, scale):
    """Unit vectors of pictures and of their texts (B,E): whose is whose, asked in both directions. Fig. 3."""
    logits = scale * t @ z.T  # row: a text among all pictures
    labels = torch.arange(len(z), device=z.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def chance():
    """Where the random numbers are, of the CPU and of a GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_chance(state):
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def cached_backward(encoders, inputs, scale, chunk):
    """Gradients of the loss of a whole batch, with `chunk` pairs in memory at once: -> the loss. Gao et al., Sec. 3.2.

    The loss needs the vectors of all pairs, its gradient with respect to a vector nothing more; and from there on each
    pair goes its own way. So: all vectors without gradients; their gradients; then piece by piece into the towers.
    """
    parts = [x.split(chunk) for x in inputs]
    states, vectors = [], []
    with torch.no_grad():
        for encode, pieces in zip(encoders, parts):
            states.append([])
            vectors.append([])
            for piece in pieces:
                states[-1].append(chance())  # what is dropped now must be dropped again
                vectors[-1].append(encode(piece))
    z, t = (torch.cat(v).requires_grad_() for v in vectors)
    loss = clip_loss(z, t, scale)
    loss.backward()
    gradients: Any = (z.grad, t.grad)
    after = chance()
    for encode, pieces, before, whole in zip(encoders, parts, states, gradients):
        for piece, state, gradient in zip(pieces, before, whole.split(chunk)):
            set_chance(state)
            (encode(piece) * gradient).sum().backward()
    set_chance(after)
    return loss.detach()


def train(towers, reader, x, captions, cfg):
    """Yields the loss of each step. x (N,D); captions (N,L) vectors, or token ids (N,T) if a reader reads them."""
    weights = [
        p
        for p in (*towers.parameters(), *(reader.parameters() if reader else ()))
        if p.requires_grad
    ]
    slow = {id(p) for p in reader.parameters()} if reader else set()
    groups = [{"params": [p for p in weights if id(p) not in slow], "weight_decay": 0.1},
              {"params": [p for p in weights if id(p) in slow], "lr": cfg.lr / 50}]  # fmt: skip
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], cfg.lr)
    pace = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.steps)
    read = (lambda ids: towers.encode_text(reader(ids))) if reader else towers.encode_text
    towers.train()
    on = towers.image.weight.device
    for _ in range(cfg.steps):
        pick = torch.randperm(len(x))[: cfg.batch]
        pictures, texts = x[pick].to(on), captions[pick].to(on)
        optimizer.zero_grad()
        if cfg.chunk:
            loss = cached_backward(
                (towers.encode_image, read), (pictures, texts), towers.scale(), cfg.chunk
            )
        else:
            loss = clip_loss(towers.encode_image(pictures), read(texts), towers.scale())
            loss.backward()
        optimizer.step()
        pace.step()
        yield loss.item()


class Reader(nn.Module):
    """MiniLM with gradients: token ids (B,T), 0 where there is none -> unit vectors (B,L)."""

    def __init__(self, device):
        super().__init__()
        self.tokenizer, self.model = pretrained.minilm(device)
        self.model.requires_grad_(True)

    def ids(self, texts):
        return self.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"].to(
            self.model.device
        )

    def forward(self, ids):
        mask = (ids != 0).long()
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return F.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)


def recall(z, t, ks=(1, 5, 10)):
    """Pictures and their texts (N,E): how often the right one is among the first k, asked from both sides."""
    found = {}
    for name, closeness in (("text finds picture", t @ z.T), ("picture finds text", z @ t.T)):
        place = (closeness > closeness.diagonal()[:, None]).sum(1)
        found[name] = {f"recall@{k}": float((place < k).float().mean()) for k in ks}
    return found


def zero_shot(z, names, encode):
    """Pictures (N,E) and K names -> logits (N,K): a class is the mean of its sentences. Sec. 3.1.4."""
    classes = [
        F.normalize(encode([s.format(name) for s in TEMPLATES]).mean(0), dim=0) for name in names
    ]
    return z @ torch.stack(classes).T


def held_out(captions):
    """bool (N,): one caption in five, by its hash, is not for training."""
    return torch.tensor([hashlib.sha256(c.encode()).digest()[0] % 5 == 0 for c in captions])


def look(images, tower, device):
    """uint8 (N,3,H,W) -> features of the image tower (N,D)."""
    if tower == "efficientnet":
        return photos.imagenet(images, device)
    model, flags = mae.load(mae.WEIGHTS, device)
    return mae.features(model.eval(), images, flags["image_size"])


def fit(x, captions, cfg, reader=None, name="train"):
    """Train towers on features (N,D) and captions: vectors (N,L), or token ids for a reader -> (towers, losses)."""
    torch.manual_seed(cfg.seed)
    towers = Towers(x.mean(0), x.std(0) + 1e-6, 384, cfg.width, cfg.temperature)
    towers.log_scale.requires_grad_(cfg.learn_temperature)
    if reader:
        towers.to(reader.model.device)
    steps = train(towers, reader, x, captions, cfg)
    losses = []
    for loss in (shown := run.bar(steps, cfg.steps, name=name)):
        check(loss == loss, "the loss is nan; try a lower --lr or a higher --temperature")
        shown.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        losses.append(loss)
    return towers.eval().cpu(), losses


@torch.no_grad()
def sweeps(x, t, learn, cfg):
    """recall@1 of names in search of pictures, for other temperatures, kept as they are, and for other batches.

    Batches are compared at equal pairs: with equal steps the larger batch would have seen more of them.
    """
    score = lambda towers: recall(towers.encode_image(x[~learn]), towers.encode_text(t[~learn]))  # noqa: E731
    rows = {"temperature": {}, "batch": {}}
    with torch.enable_grad():
        for value in (0.01, 0.03, 0.07, 0.2, 0.5):
            towers, _ = fit(
                x[learn],
                t[learn],
                replace(cfg, temperature=value, learn_temperature=False),
                None,
                "sweep",
            )
            rows["temperature"][value] = score(towers)["text finds picture"]["recall@1"]
        for size in (32, 128, 512):
            steps = max(1, cfg.steps * cfg.batch // size)
            towers, _ = fit(
                x[learn], t[learn], replace(cfg, batch=size, steps=steps), None, "sweep"
            )
            rows["batch"][size] = score(towers)["text finds picture"]["recall@1"]
    return rows


def save(towers, folder, cfg):
    """What `rag/multimodal_rag.py --space` reads: the projections of both sides, and whose features they take."""
    tensors = {"mean": towers.mean, "scale": towers.spread, "W": towers.image.weight.T, "b": towers.image.bias,
               "text": towers.text.weight.T}  # fmt: skip
    checkpoint.write(folder / "space.safetensors", tensors, {"image": cfg.tower, "text": "minilm"})


def matrix(path, images, captions, z, t):
    """Every picture against every caption: cosines, with the pictures themselves along the top."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 5.6))
    closeness = (t @ z.T).numpy()
    axis.imshow(closeness, cmap="viridis")
    for i, row in enumerate(closeness):
        for j, value in enumerate(row):
            axis.text(j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=6,
                      color="black" if value > 0.6 * closeness.max() else "white")  # fmt: skip
    axis.set_yticks(range(len(captions)), captions, fontsize=7)
    axis.set_xticks([])
    for j, image in enumerate(images):
        corner = axis.inset_axes((j - 0.45, -1.5, 0.9, 0.9), transform=axis.transData)
        corner.imshow(image.permute(1, 2, 0).numpy())
        corner.axis("off")
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Train on emoji, search among those held out, classify photos of fruit, sweep, save."""
    check(
        min(cfg.steps, cfg.width) >= 1 and cfg.batch >= 2,
        "--steps, --width: at least 1; --batch: at least 2",
    )
    check(cfg.chunk >= 0 and 0 < cfg.lr < 1, "--chunk: 0 or more; --lr: above 0, below 1")
    check(
        0.01 <= cfg.temperature <= 10, "--temperature: 0.01, the least that the paper allows, to 10"
    )
    run.seed(cfg.seed)
    device = run.device(cfg.device)
    images, captions, _ = data.emoji(72)
    learn = ~held_out(captions)
    check(
        cfg.batch <= learn.sum(),
        f"--batch {cfg.batch}: there are {int(learn.sum())} pairs to learn from",
    )
    folder, x = run.output(cfg.out, cfg), look(images, cfg.tower, device)
    tokenizer, model = pretrained.minilm(device)
    embed = lambda texts: pretrained.embed(texts, tokenizer, model).cpu()  # noqa: E731
    t, reader = embed(captions), None
    if cfg.tune_text:
        reader = Reader(device)
        towers, losses = fit(x[learn], reader.ids(captions).cpu()[learn], cfg, reader)
        embed = torch.no_grad()(lambda texts: reader(reader.ids(texts)).cpu())
        t = torch.cat([embed(captions[i : i + 64]) for i in range(0, len(captions), 64)])
    else:
        towers, losses = fit(x[learn], t[learn], cfg)
    with torch.no_grad():
        z, words = towers.encode_image(x[~learn]), towers.encode_text(t[~learn])
        metrics: dict[str, Any] = {
            "pairs to learn from": int(learn.sum()),
            "pairs held out": len(z),
        }
        metrics |= recall(z, words) | {"chance": {f"recall@{k}": k / len(z) for k in (1, 5, 10)}}
        metrics["temperature at the end"] = 1 / towers.scale().item()
        metrics |= classify(towers, embed, cfg, device)
    figures.curves(folder / "loss.png", {"loss": losses}, "step", "contrastive loss", smooth=10)
    spread = torch.linspace(0, len(z) - 1, 12).long()
    shown = (~learn).nonzero()[:, 0][spread]
    matrix(
        folder / "matrix.png", images[shown], [captions[i] for i in shown], z[spread], words[spread]
    )
    if cfg.sweep and not cfg.tune_text:
        for name, row in sweeps(x, t, learn, cfg).items():
            metrics |= {f"recall@1, {name} {value:g}": score for value, score in row.items()}
            figures.curves(
                folder / f"{name}.png",
                {"": (list(row), list(row.values()))},
                name,
                "recall@1",
                log="x",
            )
    if not cfg.tune_text:
        save(towers, folder, cfg)
    return run.report(folder, metrics, then=f"open {folder}/matrix.png")


def classify(towers, embed, cfg, device):
    """Photos of fruit, by the names of 14 kinds and of 5 groups: accuracies. No photo was paired with a text."""
    fruit = data.groceries(224)
    learn, judge = photos.split(fruit)
    z = towers.encode_image(look(fruit.images, cfg.tower, device)[judge])
    group = [
        fruit.coarse_names[fruit.coarse[fruit.fine == k][0]].lower()
        for k in range(len(fruit.fine_names))
    ]
    kinds = [n.lower().replace("-", " ") for n in fruit.fine_names]
    kinds = [n if g.rstrip("s") in n else f"{n} {g}" for n, g in zip(kinds, group)]
    encode = lambda texts: towers.encode_text(embed(texts))  # noqa: E731
    right = {
        kind: float((zero_shot(z, names, encode).argmax(-1) == y[judge]).float().mean())
        for kind, names, y in (("14 kinds", kinds, fruit.fine),
                               ("5 groups", [n.lower() for n in fruit.coarse_names], fruit.coarse))
    }  # fmt: skip
    chance = {"14 kinds": 1 / 14, "5 groups": 1 / 5}
    return {
        "zero-shot photos": right,
        "by chance": chance,
        "by majority": photos.majority(fruit, learn, judge),
    }


if __name__ == "__main__":
    run.cli(main, Config)
