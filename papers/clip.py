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

from papers.clip_evaluation import classify, matrix, recall
from papers.contrastive_loss import cached_backward, clip_loss
from papers.image_tower import image_features
from utils import checkpoint, data, figures, pretrained, run
from utils.run import check

HIDE = 0.5  # part of the image features that a step does not see: there are few pairs


@dataclass(frozen=True)
class Config:
    """Train two projections into one space on emoji and their names; search, classify photos, sweep."""

    tower: Literal["efficientnet", "mae"] = "efficientnet"  # frozen features of the pictures
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


def trainable(module):
    """The parameters of a module that learn."""
    return [p for p in module.parameters() if p.requires_grad]


def train(towers, reader, x, captions, cfg):
    """Yields the loss of each step. x (N,D); captions (N,L) vectors, or token ids (N,T) if a reader reads them."""
    # parameter groups: the projections and the temperature; MiniLM, if it learns, fifty times slower
    groups = [{"params": trainable(towers), "weight_decay": 0.1}]
    if reader:
        groups.append({"params": trainable(reader), "lr": cfg.lr / 50})
    optimizer = torch.optim.AdamW(groups, cfg.lr)
    pace = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.steps)

    def encode_text(texts):
        return towers.encode_text(reader(texts) if reader else texts)

    towers.train()
    device = towers.image.weight.device
    for _ in range(cfg.steps):
        # a batch of pairs, none of them twice
        pick = torch.randperm(len(x))[: cfg.batch]
        pictures = x[pick].to(device)
        texts = captions[pick].to(device)
        # loss and its gradients, of the whole batch at once or in chunks
        optimizer.zero_grad()
        if cfg.chunk:
            encoders = (towers.encode_image, encode_text)
            loss = cached_backward(encoders, (pictures, texts), towers.scale(), cfg.chunk)
        else:
            loss = clip_loss(towers.encode_image(pictures), encode_text(texts), towers.scale())
            loss.backward()
        # weights, then the learning rate of the next step
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
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        return tokens["input_ids"].to(self.model.device)

    def forward(self, ids):
        mask = (ids != 0).long()
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        # the mean of the words, not of the padding
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(mean, dim=-1)


def held_out(captions):
    """bool (N,): one caption in five, by its hash, is not for training."""
    first_bytes = [hashlib.sha256(caption.encode()).digest()[0] for caption in captions]
    return torch.tensor([byte % 5 == 0 for byte in first_bytes])


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

    def score(flags):
        """Train with these flags -> recall@1 of the held-out names."""
        with torch.enable_grad():
            towers, _ = fit(x[learn], t[learn], flags, None, "sweep")
        found = recall(towers.encode_image(x[~learn]), towers.encode_text(t[~learn]))
        return found["text finds picture"]["recall@1"]

    rows = {"temperature": {}, "batch": {}}
    # temperatures, not learned
    for value in (0.01, 0.03, 0.07, 0.2, 0.5):
        flags = replace(cfg, temperature=value, learn_temperature=False)
        rows["temperature"][value] = score(flags)
    # batches, as many pairs with each
    for size in (32, 128, 512):
        steps = max(1, cfg.steps * cfg.batch // size)
        rows["batch"][size] = score(replace(cfg, batch=size, steps=steps))
    return rows


def save(towers, folder, cfg):
    """What `rag/multimodal_rag.py --space` reads: the projections of both sides, and whose features they take."""
    tensors = {
        "mean": towers.mean,
        "scale": towers.spread,
        "W": towers.image.weight.T,
        "b": towers.image.bias,
        "text": towers.text.weight.T,
    }
    checkpoint.write(folder / "space.safetensors", tensors, {"image": cfg.tower, "text": "minilm"})


def main(cfg: Config) -> dict:
    """Train on emoji, search among those held out, classify photos of fruit, sweep, save."""
    sizes = min(cfg.steps, cfg.width) >= 1 and cfg.batch >= 2
    check(sizes, "--steps, --width: at least 1; --batch: at least 2")
    check(cfg.chunk >= 0 and 0 < cfg.lr < 1, "--chunk: 0 or more; --lr: above 0, below 1")
    least = "--temperature: 0.01, the least that the paper allows, to 10"
    check(0.01 <= cfg.temperature <= 10, least)
    run.seed(cfg.seed)
    device = run.device(cfg.device)

    # data: features of emoji and embeddings of their names, one in five held out
    images, captions, _ = data.emoji(72)
    learn = ~held_out(captions)
    pairs = int(learn.sum())
    check(cfg.batch <= pairs, f"--batch {cfg.batch}: there are {pairs} pairs to learn from")
    folder = run.output(cfg.out, cfg)
    x = image_features(images, cfg.tower, device)
    tokenizer, model = pretrained.minilm(device)

    def embed(texts):
        """Texts -> unit vectors (N,L) of the text tower as it is by now."""
        if reader is None:
            return pretrained.embed(texts, tokenizer, model).cpu()
        with torch.no_grad():
            return reader(reader.ids(texts)).cpu()

    # train
    reader = None
    t = embed(captions)
    if cfg.tune_text:
        reader = Reader(device)
        ids = reader.ids(captions).cpu()
        towers, losses = fit(x[learn], ids[learn], cfg, reader)
        t = torch.cat([embed(captions[i : i + 64]) for i in range(0, len(captions), 64)])
    else:
        towers, losses = fit(x[learn], t[learn], cfg)

    # measure: search among the held-out pairs, zero-shot classification of photos
    with torch.no_grad():
        z = towers.encode_image(x[~learn])
        words = towers.encode_text(t[~learn])
        metrics: dict[str, Any] = {"pairs to learn from": pairs, "pairs held out": len(z)}
        metrics |= recall(z, words)
        metrics["chance"] = {f"recall@{k}": k / len(z) for k in (1, 5, 10)}
        metrics["temperature at the end"] = 1 / towers.scale().item()
        metrics |= classify(towers, embed, cfg, device)

    # draw the loss, and twelve held-out pictures against their captions
    figures.curves(folder / "loss.png", {"loss": losses}, "step", "contrastive loss", smooth=10)
    spread = torch.linspace(0, len(z) - 1, 12).long()
    shown = (~learn).nonzero()[:, 0][spread]
    titles = [captions[i] for i in shown]
    matrix(folder / "matrix.png", images[shown], titles, z[spread], words[spread])

    # sweep temperatures and batches; save the space for rag/multimodal_rag.py
    if cfg.sweep and not cfg.tune_text:
        for name, row in sweeps(x, t, learn, cfg).items():
            metrics |= {f"recall@1, {name} {value:g}": score for value, score in row.items()}
            curve = {"": (list(row), list(row.values()))}
            figures.curves(folder / f"{name}.png", curve, name, "recall@1", log="x")
    if not cfg.tune_text:
        save(towers, folder, cfg)
    return run.report(folder, metrics, then=f"open {folder}/matrix.png")


if __name__ == "__main__":
    run.cli(main, Config)
