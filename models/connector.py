"""Connectors: how what an eye says becomes words that a language model can read.

One matrix (LLaVA, Liu et al. 2023, arXiv:2304.08485), or two with a bend between them (1.5, arXiv:2310.03744): as many
tokens out as in. Fewer, because every token costs: neighbours joined into one (MiniGPT-v2, Chen et al. 2023,
arXiv:2310.09478; by squares as in Qwen2-VL, arXiv:2409.12191), means over areas, bilinear samples, or a few learned
questions that look at all of it (the perceiver resampler: Alayrac et al. 2022, arXiv:2204.14198, Sec. 2.1; Idefics2:
Laurencon et al. 2024, arXiv:2405.02246).

Shapes: (B,N,D) from the eye, N = g x g, row by row -> (B,M,E) for the language model, E the size of its words.
What differs: squares that do not fill the grid are filled up with zeros; the resampler has no embedding of time.

    python models/connector.py                    # what each costs, and what it lets through
    python models/connector.py --names pool1 mlp2x_gelu --steps 600
"""

import re
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from models import tower
from utils import data, figures, run
from utils.run import UserError, check

NAMES = ("linear", "mlp2x_gelu", "concat4", "pool3", "pool1", "bilinear3", "perceiver")


@dataclass(frozen=True)
class Config:
    """Train small connectors on photos of fruit, and see what and where they let through."""

    names: tuple[str, ...] = NAMES  # linear, mlp2x_gelu, mlpNx_gelu, identity, concatR, poolS, bilinearS, perceiver
    width: int = 576  # E, of SmolLM2's words
    steps: int = 150  # of training, for each
    batch: int = 64  # photos a step
    lr: float = 1e-3
    judged: int = 300  # photos to be judged by
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/connector"


def mlp(depth, dim_in, dim_out):
    """mlp2x_gelu and the like: `depth` matrices, GELU between them. LLaVA-1.5, Sec. 3.3."""
    layers = [nn.Linear(dim_in, dim_out)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(dim_out, dim_out)]
    return nn.Sequential(*layers)


def grid(x):
    """Tokens row by row -> (B,g,g,D). Raises UserError if they are not a square."""
    g = round(x.shape[1] ** 0.5)
    check(g * g == x.shape[1], f"{x.shape[1]} tokens are no square grid: this connector needs one")
    return rearrange(x, "b (h w) d -> b h w d", h=g)


class Concat(nn.Module):
    """Squares of s x s neighbours become one token, their features side by side, row by row; then an MLP."""

    def __init__(self, side, dim_in, dim_out):
        super().__init__()
        self.side, self.mlp = side, mlp(2, side * side * dim_in, dim_out)

    def count(self, n):
        return (-(-round(n**0.5) // self.side)) ** 2

    def join(self, x):
        x = grid(x)
        rest = -x.shape[1] % self.side  # a grid of 7 is filled up to 8
        x = F.pad(x, (0, 0, 0, rest, 0, rest))
        return rearrange(x, "b (h p) (w q) d -> b (h w) (p q d)", p=self.side, q=self.side)

    def forward(self, x):
        return self.mlp(self.join(x))


class Pool(nn.Module):
    """S x S tokens: means over areas, or bilinear samples between the four nearest; then an MLP."""

    def __init__(self, side, dim_in, dim_out, how):
        super().__init__()
        self.side, self.how, self.mlp = side, how, mlp(2, dim_in, dim_out)

    def count(self, n):
        return self.side**2

    def shrink(self, x):
        x = rearrange(grid(x), "b h w d -> b d h w")
        if self.how == "pool":
            x = F.adaptive_avg_pool2d(x, self.side)
        else:
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False)
        return rearrange(x, "b d h w -> b (h w) d")

    def forward(self, x):
        return self.mlp(self.shrink(x))


class Gated(nn.Module):
    """Feed-forward with a gate, SwiGLU: down(silu(gate x) * up x). Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, width, widen):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, widen * width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(widen * width, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PerceiverLayer(nn.Module):
    """Latents (B,M,E) look at the picture (B,N,E), and at themselves if `joined`; then each thinks alone."""

    def __init__(self, width, heads, kv_heads, head_dim, joined, widen, modern):
        super().__init__()
        check(heads % kv_heads == 0, f"{heads} heads cannot share {kv_heads} keys evenly")
        self.heads, self.kv_heads, self.joined = heads, kv_heads, joined
        norm = nn.RMSNorm if modern else nn.LayerNorm  # Idefics2, or Flamingo
        self.norm_latents, self.norm_context, self.norm_mlp = (
            norm(width, eps=1e-6 if modern else 1e-5) for _ in range(3)
        )
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, kv_heads * head_dim, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        plain = (nn.Linear(width, widen * width, bias=False), nn.ReLU(), nn.Linear(widen * width, width, bias=False))
        self.mlp = Gated(width, widen) if modern else nn.Sequential(*plain)

    def weights(self, latents, context):
        """Who looks where: (B,heads,M,N), or N + M keys if joined; rows add up to one. And the values."""
        latents, context = self.norm_latents(latents), self.norm_context(context)
        keys = torch.cat([context, latents], 1) if self.joined else context  # Flamingo, Fig. 5
        q = rearrange(self.q_proj(latents), "b n (h d) -> b h n d", h=self.heads)
        k, v = (rearrange(m(keys), "b n (h d) -> b h n d", h=self.kv_heads) for m in (self.k_proj, self.v_proj))
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))  # grouped queries
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1), v

    def forward(self, latents, context):
        look, v = self.weights(latents, context)
        latents = latents + self.o_proj(rearrange(look @ v, "b h n d -> b n (h d)"))
        return latents + self.mlp(self.norm_mlp(latents))


class Perceiver(nn.Module):
    """M learned latents ask the picture, again in every layer: any number of tokens becomes M. Flamingo, Sec. 2.1.

    kv_heads: keys and values that groups of heads share; joined: latents are among the keys; modern: RMSNorm and a
    gated feed-forward (Idefics2), else LayerNorm and ReLU as in Idefics, its counterpart in transformers; the paper has
    squared ReLU here too (its appendix, hyper-parameters).
    """

    def __init__(
        self, dim_in, dim_out, depth=2, latents=16, heads=8, kv_heads=8, head_dim=32, joined=True, widen=2, modern=True
    ):  # fmt: skip
        super().__init__()
        self.inlet = nn.Linear(dim_in, dim_out) if dim_in != dim_out else nn.Identity()
        self.latents = nn.Parameter(torch.randn(latents, dim_out))
        about = (dim_out, heads, kv_heads, head_dim, joined, widen, modern)
        self.layers = nn.ModuleList([PerceiverLayer(*about) for _ in range(depth)])
        self.norm = nn.RMSNorm(dim_out, eps=1e-6) if modern else nn.LayerNorm(dim_out)

    def count(self, n):
        return len(self.latents)

    def forward(self, x):
        context = self.inlet(x)
        latents = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(latents, context)
        return self.norm(latents)

    @torch.no_grad()
    def looks(self, x):
        """How much each latent looks at each token of the picture, mean over heads, last layer: (B,M,N)."""
        context, latents = self.inlet(x), self.latents.expand(len(x), -1, -1)
        for layer in self.layers[:-1]:
            latents = layer(latents, context)
        last: Any = self.layers[-1]
        return last.weights(latents, context)[0].mean(1)[..., : x.shape[1]]


def build(name, dim_in, dim_out, **options):
    """A connector by its name: (B,N,dim_in) -> (B,M,dim_out). Raises UserError for a name that there is not."""
    known = r"(linear|identity|perceiver)|(mlp)([1-9]\d*)x_gelu|(concat|pool|bilinear)([1-9]\d*)"
    found = re.fullmatch(known, name)
    kind, number = [g for g in (*found.groups(), "") if g is not None][:2] if found else ("", "")
    if kind == "linear":
        return nn.Linear(dim_in, dim_out)  # LLaVA, Eq. 1
    if kind == "mlp":
        return mlp(int(number), dim_in, dim_out)
    if kind == "identity":
        check(dim_in == dim_out, f"identity: the eye has {dim_in} numbers a token, the language model {dim_out}")
        return nn.Identity()
    if kind == "concat":
        side = round(int(number) ** 0.5)
        check(side * side == int(number), f"{name}: neighbours are joined in squares: concat4, concat9 ...")
        return Concat(side, dim_in, dim_out)
    if kind in ("pool", "bilinear"):
        return Pool(int(number), dim_in, dim_out, kind)
    if kind == "perceiver":
        return Perceiver(dim_in, dim_out, **options)
    names = "linear, mlp2x_gelu, mlpNx_gelu, identity, concatR, poolS, bilinearS, perceiver"
    raise UserError(f"there is no connector '{name}'; known are {names}, with numbers for N, R and S")


def tokens(connector: Any, n):
    """How many tokens come out of n."""
    return connector.count(n) if hasattr(connector, "count") else n


PLACES = [(y, x) for y in (0, 2, 5) for x in (0, 2, 5)]  # of a patch of 2 x 2 tokens in a grid of 7 x 7


def stick(maps, places, sticker):
    """Put the same 2 x 2 tokens (2,2,D) into every photo (B,49,D), each at its place of nine: can it be told where?"""
    x = grid(maps).clone()
    for i, place in enumerate(places.tolist()):
        top, left = PLACES[place]
        x[i, top : top + 2, left : left + 2] = sticker
    return x.flatten(1, 2)


class Judge(nn.Module):
    """A connector and two linear readers: what, from the mean of its tokens; where, from their row."""

    def __init__(self, join, n, width):
        super().__init__()
        self.join = join
        self.what, self.where = nn.Linear(width, 14), nn.Linear(tokens(join, n) * width, len(PLACES))

    def forward(self, x):
        x = self.join(x)
        return self.what(x.mean(1)), self.where(x.flatten(1))


def train(judge, maps, kinds, sticker, cfg, on):
    """The loop; yields the loss of both readers."""
    optimizer = torch.optim.AdamW(judge.parameters(), cfg.lr, weight_decay=0.01)
    for step in range(cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, (step + 1) / 10, 2 * (cfg.steps - step) / cfg.steps)
        pick = torch.randint(len(maps), (cfg.batch,))
        places = torch.randint(len(PLACES), (cfg.batch,))
        x = stick(maps[pick], places, sticker).float().to(on)
        with run.autocast(on):
            what, where = judge(x)
            loss = F.cross_entropy(what, kinds[pick].to(on)) + F.cross_entropy(where, places.to(on))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def score(judge, maps, kinds, sticker, on):
    """Share of right answers on photos that no training saw: {"what": of 14, "where": of 9}."""
    random = torch.Generator().manual_seed(0)
    places = torch.randint(len(PLACES), (len(maps),), generator=random)
    what, where = judge.eval()(stick(maps, places, sticker).float().to(on))
    right = lambda logits, truth: float((logits.argmax(-1).cpu() == truth).float().mean())  # noqa: E731
    return {"what": right(what, kinds), "where": right(where, places)}


def looks(join, x):
    """Where each token that comes out comes from: (M,g,g), by how much it moves when a token that goes in does."""
    if isinstance(join, Perceiver):
        return join.looks(x)[0].unflatten(1, grid(x).shape[1:3])
    x = x.clone().requires_grad_()
    found = [torch.autograd.grad(row.square().sum(), x, retain_graph=True)[0][0].norm(dim=-1) for row in join(x)[0]]
    return torch.stack(found).unflatten(1, grid(x).shape[1:3])


def draw(path, photo, maps, joins):
    """A photo, and for each connector where its tokens come from: each token a colour, blended by how much it looks."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(joins) + 1, figsize=(1.55 * (len(joins) + 1), 2))
    axes[0].imshow(photo.permute(1, 2, 0))
    axes[0].set_title("photo", fontsize=8)
    for ax, (name, join) in zip(axes[1:], joins.items()):
        weight = looks(join, maps[None].float())
        weight = weight / weight.sum((1, 2), keepdim=True).clamp(min=1e-9)
        colours = torch.tensor(plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(weight)))[:, :3]).float()
        colours = colours[torch.randperm(len(colours), generator=torch.Generator().manual_seed(3))]
        share = weight / weight.sum(0).clamp(min=1e-9)
        picture = torch.einsum("mhw,mc->hwc", share, colours)
        ax.imshow(photo.permute(1, 2, 0))
        ax.imshow(
            picture.clamp(0, 1), alpha=0.65, extent=(0, photo.shape[2], photo.shape[1], 0), interpolation="nearest"
        )
        ax.set_title(f"{name}\n{len(weight)} tokens", fontsize=8)
    for ax in axes:
        ax.axis("off")
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Cost and worth of each connector: parameters, tokens, time, what and where."""
    check(min(cfg.steps, cfg.batch, cfg.width, cfg.judged) > 0 and cfg.lr > 0, "all numbers must be above 0")
    check(cfg.names, "--names needs one at least")
    joins = {}
    run.seed(cfg.seed)
    for name in cfg.names:
        joins[name] = build(name, 1280, cfg.width)
    on = run.device(cfg.device)
    folder = run.output(cfg.out, cfg)
    from models import evaluate_vlm

    fruit, eye = data.groceries(224), tower.load("efficientnet", on=on)
    learn, unseen = evaluate_vlm.split(fruit, cfg.judged)
    maps, others = tower.said(eye, fruit.images[learn]), tower.said(eye, fruit.images[unseen])
    sticker, metrics = grid(maps[:1])[0, 3:5, 3:5], {}  # the middle of one photo
    for name, join in joins.items():
        run.seed(cfg.seed)
        judge = Judge(join, maps.shape[1], tokens(join, 1) if name == "identity" else cfg.width).to(on)
        clock = time.process_time()
        for _ in run.progress(train(judge, maps, fruit.fine[learn], sticker, cfg, on), cfg.steps):
            pass
        seconds = (time.process_time() - clock) / cfg.steps
        size = sum(p.numel() for p in join.parameters())
        row = {"parameters": size, "tokens": tokens(join, maps.shape[1]), "seconds a step": seconds}
        metrics[name] = row | score(judge, others, fruit.fine[unseen], sticker, on)
    draw(folder / "connector.png", fruit.images[unseen[5]], others[5].to(on), joins)
    return run.report(folder, metrics, "python models/llava.py")


if __name__ == "__main__":
    run.cli(main, Config)
