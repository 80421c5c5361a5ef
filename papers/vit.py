"""Vision transformer (ViT): an image as a sequence of patches.

Dosovitskiy et al. 2021, arXiv:2010.11929. A patch is a word: one matrix turns its pixels into a vector, a position is
added, and a plain transformer encoder does the rest. A class token in front of the sentence, or the mean of all tokens,
is what the answer is read from. Equation numbers are the paper's; `mae.py` trains this very network without labels.

Shapes: B images of C x H x W, patches of P x P pixels, N = (H/P)(W/P) tokens, D width, K classes.
Differences from the paper: no dropout; 732 photos of 64 x 64, where the paper needs millions (its Sec. 4.3), which is
what this script shows and `mae.py` mends.

    python papers/vit.py                           # class token against mean, from nothing and from MAE's weights
    python papers/vit.py --weights ""              # from nothing only
    python papers/vit.py --image-size 96 --steps 600
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from papers import photos
from papers.attention_rollout import draw, rollout_map
from utils import checkpoint, data, figures, run
from utils.run import check

WEIGHTS = Path(__file__).parent / "weights" / "mae.safetensors"
SIZES = {  # width D, blocks, heads: one for a laptop, then Table 1
    "tiny": (128, 6, 4),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}


@dataclass(frozen=True)
class Config:
    """Train vision transformers on photos of fruit, read from the class token or the mean, draw what they look at."""

    weights: str = str(WEIGHTS)  # of an encoder that mae.py trained; empty: begin with nothing
    steps: int = 120  # of training, for each of the networks
    batch: int = 64  # photos a step
    lr: float = 1e-3  # peak learning rate
    size: str = "tiny"  # of a network from nothing: tiny, or the paper's B, L, H
    patch: int = 8  # side of a patch in pixels
    image_size: int = 64  # side of a photo in pixels
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/vit"


class PatchEmbedding(nn.Module):
    """(B,C,H,W) -> (B,N,D): a convolution whose stride is its size, row by row. E of Eq. 1."""

    def __init__(self, patch, channels, width):
        super().__init__()
        self.projection = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x):
        return rearrange(self.projection(x), "b d h w -> b (h w) d")


def unfold_and_multiply(embedding, x):
    """The same, said differently: lay the pixels of each patch in a row, multiply by one matrix."""
    conv = embedding.projection
    patches = F.unfold(x, conv.kernel_size, stride=conv.stride).transpose(1, 2)  # (B, N, C P P)
    return F.linear(patches, conv.weight.flatten(1), conv.bias)


class Attention(nn.Module):
    """Multi-head self-attention, (B,N,D) -> (B,N,D). Appendix A."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def split(self, x):
        # Eq. 5
        return rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)

    def weights(self, q, k):
        """Attention weights: (B,heads,N,N), rows add up to one. Eq. 6."""
        logits = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        return logits.softmax(-1)

    def forward(self, x):
        q, k, v = self.split(x)
        # written out: on a CPU the fused kernel needs several times as long for the gradients of so short a sentence
        x = self.weights(q, k) @ v  # Eq. 7
        return self.out(rearrange(x, "b h n d -> b n (h d)"))  # Eq. 8


class Block(nn.Module):
    """Transformer block: attention, then the feed-forward network, each behind a norm and added. Eqs. 2 and 3."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """(B,C,H,W) -> logits (B,K). `pool`: "cls" reads the class token, "mean" the mean of the others. Eqs. 1 to 4."""

    def __init__(
        self, image=64, patch=8, channels=3, width=128, depth=6, heads=4, classes=14, pool="cls"
    ):
        super().__init__()
        self.patch = patch
        self.pool = pool
        self.grid = (image // patch, image // patch)
        # Eq. 1: patches, class token, learned positions
        self.embed = PatchEmbedding(patch, channels, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1 + self.grid[0] * self.grid[1], width))
        # Eqs. 2 to 4: encoder and head
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)  # Sec. 3.2: a new task begins with a head of zeros
        nn.init.zeros_(self.head.bias)

    def tokens(self, x):
        """Patches with their positions behind the class token: (B,1+N,D). Eq. 1; for any size that P divides."""
        grid = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        position = resize_positions(self.position, self.grid, grid)
        cls = self.cls.expand(len(x), -1, -1)
        return torch.cat([cls, self.embed(x)], 1) + position

    def features(self, x):
        """The last normalised states, (B,1+N,D). Eqs. 2 and 3, and the norm of Eq. 4."""
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x):
        x = self.features(x)
        pooled = x[:, 0] if self.pool == "cls" else x[:, 1:].mean(1)
        return self.head(pooled)  # Eq. 4

    @torch.no_grad()
    def maps(self, x):
        """The attention of every block: (B,depth,heads,1+N,1+N)."""
        x = self.tokens(x)
        found = []
        blocks: Any = self.blocks
        for block in blocks:
            q, k, _ = block.attention.split(block.norm1(x))
            found.append(block.attention.weights(q, k))
            x = block(x)
        return torch.stack(found, 1)


def resize_positions(position, old, new):
    """Positions (1,1+N,D) of a grid `old` (rows, columns) -> of a grid `new`; the class token's stays. Sec. 3.2."""
    if tuple(old) == tuple(new):
        return position
    # the table as a picture of D channels, resized
    grid = rearrange(position[:, 1:], "1 (h w) d -> 1 d h w", h=old[0])
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    patches = rearrange(grid, "1 d h w -> 1 (h w) d")
    return torch.cat([position[:, :1], patches], 1)


def load_encoder(model, path):
    """Put the encoder of a file of mae.py into a ViT of the same width; positions are fitted to its grid."""
    # is it a file of mae.py?
    tensors, meta = checkpoint.read(path)
    flags = isinstance(meta, dict) and {"image_size", "patch"} <= meta.keys()
    instead = 'name another, or --weights "" to begin with nothing'
    check(flags and "position" in tensors, f"{path} is no encoder of mae.py; {instead}")
    # as deep as this one?
    own = model.state_dict()
    deeper = [k for k in tensors if k.startswith("blocks.") and k not in own]
    check(not deeper, f"{path} is of another network: it has {deeper[:1]}, this one has not")
    # positions fitted to this grid; is all as wide as here?
    found = {k: v.float() for k, v in tensors.items() if k in own}
    side = meta["image_size"] // meta["patch"]
    found["position"] = resize_positions(found["position"], (side, side), model.grid)
    wrong = [k for k, v in found.items() if v.shape != own[k].shape]
    check(
        not wrong, f'{path} is of another network ({wrong[:1]}): --weights "" begins with nothing'
    )
    # all but the head is there?
    missing = model.load_state_dict(found, strict=False).missing_keys
    head_only = set(missing) <= {"head.weight", "head.bias"}
    check(head_only, f"{path} is no encoder: {', '.join(missing[:3])} is missing")
    return model


def train(model, images, labels, cfg):
    """Cross entropy on random crops; yields the loss. images uint8 (N,C,H,W), labels (N,)."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, betas=(0.9, 0.95), weight_decay=0.05)
    # moves the first beta, too: 0.95 to 0.85 and back
    total = cfg.steps + 1
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.lr, total_steps=total, pct_start=0.15)
    model.train()
    for _ in range(cfg.steps):
        # random crops of random photos
        pick = torch.randint(len(images), (cfg.batch,))
        x = photos.crops(data.to_float(images[pick]).to(device), cfg.image_size, smallest=0.35)
        # forward pass and loss, matrix products in bf16
        with run.autocast(device):
            value = F.cross_entropy(model(x).float(), labels[pick].to(device), label_smoothing=0.1)
        # backward pass, long gradients clipped
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        pace.step()
        yield value.item()


@torch.no_grad()
def predict(model, images, size):
    """Logits (N,K) of whole photos and their mirror images, together."""
    device = next(model.parameters()).device
    found = []
    parts = photos.whole(images, size).split(128)
    for part in run.bar(parts, len(parts), name="look", delay=2):
        with run.autocast(device):
            logits = model(part.to(device)) + model(part.flip(-1).to(device))
        found.append(logits.float().cpu())
    return torch.cat(found)


def build(image_size, patch, size="tiny", pool="cls", classes=14, **_):
    """The vision transformer of these flags. Raises UserError if there is none."""
    check(size in SIZES, f"there is no --size {size}; there are: {', '.join(SIZES)}")
    divides = patch > 0 and image_size >= patch and image_size % patch == 0
    check(divides, f"--patch {patch} does not divide --image-size {image_size}")
    return ViT(image_size, patch, 3, *SIZES[size], classes=classes, pool=pool)


def main(cfg: Config) -> dict:
    """Train each network in turn, measure it on held-out photos, draw what its answer has read."""
    sizes = min(cfg.steps, cfg.batch) > 0 and 0 < cfg.lr < 1
    check(sizes, "--steps and --batch must be at least 1, --lr 0 to 1")
    check(cfg.image_size <= 1024, "--image-size must be at most 1024")
    trial = build(cfg.image_size, cfg.patch, cfg.size)
    if cfg.weights:
        load_encoder(trial, cfg.weights)  # what does not fit is said now, not after two trainings
    run.seed(cfg.seed)
    device = run.device(cfg.device)

    # data: photos of fruit in the data set's own split, eight held-out ones to draw
    fruit = data.groceries(2 * cfg.image_size)
    folder = run.output(cfg.out, cfg)
    learn, judge = photos.split(fruit)
    shown = judge[torch.linspace(0, len(judge) - 1, 8).long()]
    drawn = photos.whole(fruit.images[shown], cfg.image_size)
    metrics = {"majority": photos.majority(fruit, learn, judge)}
    seen = {}
    losses = {}

    for start in ("nothing", "MAE") if cfg.weights else ("nothing",):
        for pool in ("cls", "mean"):
            # the network, from the same seed each time
            name = f"{pool} from {start}"
            torch.manual_seed(cfg.seed)
            model = build(cfg.image_size, cfg.patch, cfg.size, pool)
            if start == "MAE":
                model = load_encoder(model, cfg.weights)
            model = model.to(device)
            # train, measure, look at its attention
            steps = train(model, fruit.images[learn], fruit.fine[learn], cfg)
            losses[name] = list(run.progress(steps, cfg.steps))
            logits = predict(model.eval(), fruit.images[judge], cfg.image_size)
            metrics[name] = photos.accuracies(logits, fruit, judge)
            seen[name] = rollout_map(model, drawn.to(device)).cpu()

    # draw
    figures.curves(folder / "loss.png", losses, "step", "cross entropy", smooth=10)
    draw(folder / "attention.png", drawn, seen)
    return run.report(folder, metrics, then=f"open {folder}/attention.png")


if __name__ == "__main__":
    run.cli(main, Config)
