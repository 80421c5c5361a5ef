"""Flamingo: gated cross-attention, with zero-initialised tanh gates, between the layers of a frozen language model.

Alayrac et al. 2022, arXiv:2204.14198; sections and figures are those of its second version. A perceiver resampler makes
a few visual tokens (latents) out of each photo; the new layers ask them by cross-attention. At zero the gates change
nothing: training begins with exactly the old language model. Text sees the last photo before it, and no other. It is
trained on interleaved image-text chains, photos and their names, and asked by one that lacks its last name (few-shot).

Shapes: features (B,N,D) of a photo, latents (B,J,M,V) of J photos in a text, M each; text (B,T), its states (B,T,E).
Differences from the paper: 1.9 M new parameters, not 10 000 M; 732 photos of fruit, not 2300 M pictures; the resampler
is one layer deep, with ReLU as in transformers' Idefics, and a photo has no time that would need an embedding.
Examples in the prompt do not help: names before a photo were drawn at random and say nothing about it. Four of them
harm, because such a chain is as long as the longest in training, which it hardly saw: 21.8 names a step stand at place
one, 1.8 at place five. With --shortest 5 all chains are equally long: no drop, but fewer right names without examples.

    python vlm/flamingo.py                     # 5 minutes on two cores
    python vlm/flamingo.py --pretrained        # weights of the book, no training
    python vlm/flamingo.py --every 10 --latents 4 --shots 0 1 8
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from deploy import decode
from utils import checkpoint, data, figures, pretrained, run
from utils.run import check
from vlm import connector, fruit_photos, probe, prompts, tower

WEIGHTS = Path(__file__).parent / "weights" / "flamingo.safetensors"
IMAGE, END = "<image>", "<|endofchunk|>"
# What parameters are called in files that were written before they had the names of today
OLD_NAMES = {
    "words": "new_embeddings",
    "resampler.inlet.weight": "resampler.input_proj.weight",
    "resampler.inlet.bias": "resampler.input_proj.bias",
}


@dataclass(frozen=True)
class Config:
    """Teach a frozen language model to name fruit, and see what examples in the prompt are worth."""

    steps: int = 120  # training steps
    batch: int = 48  # photos a step, in chains that are all equally long
    longest: int = 5  # photos in the longest chain
    # photos in the shortest one; as many as in the longest: all chains are equally long
    shortest: int = 1
    lr: float = 2e-3  # of new layers; the gates' is ten times that
    every: int = 6  # a new layer before every so many-th layer of the language model
    latents: int = 16  # M, vectors that stand for a photo
    shots: tuple[int, ...] = (0, 2, 4)  # examples in the prompt when judged
    judged: int = 300  # photos to be judged by; 0: all 1322
    language: str = "smollm2"  # the language model: smollm2, or a folder or hub id
    pretrained: bool = False  # start from the shipped weights and skip the training
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/flamingo"


def media_mask(ids, image_id, before=0):
    """Which photo each word sees, the last one before it: ids (B,T) -> counts (B,T), j for the j-th, 0 for none.

    Sec. 2.3. The word <image> itself already sees its photo; before: photos read earlier.
    """
    return before + (ids == image_id).cumsum(1)


def visible(counts, photos, latents):
    """Counts (B,T) -> mask (B,T,J*M): the M latents of the one photo that a word sees."""
    mask = counts[..., None] == torch.arange(1, photos + 1, device=counts.device)
    return repeat(mask, "b t j -> b t (j m)", m=latents)


class GatedCrossAttention(nn.Module):
    """States (B,T,E), latents (B,J*M,V), mask (B,T,J*M) -> states (B,T,E): both gates at zero change nothing. Fig. 4.

    use_rmsnorm_swiglu: RMSNorm and SwiGLU, as Idefics has it; else the paper's LayerNorm and squared ReLU.
    """

    def __init__(self, width, seen, heads=4, head_dim=32, hidden=64, use_rmsnorm_swiglu=False):
        super().__init__()
        self.heads = heads
        norm = partial(nn.RMSNorm, eps=1e-6) if use_rmsnorm_swiglu else nn.LayerNorm
        self.norm_attention = norm(width)
        self.norm_mlp = norm(width)
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(seen, heads * head_dim, bias=False)
        self.v_proj = nn.Linear(seen, heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        # Large norm: the states that it is added to are of size 3 to 30
        nn.init.normal_(self.o_proj.weight, std=0.4)
        self.gate_proj = nn.Linear(width, hidden, bias=False) if use_rmsnorm_swiglu else None
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        # zero-initialised tanh gates: the paper's alpha
        self.gate_attention = nn.Parameter(torch.zeros(1))
        self.gate_mlp = nn.Parameter(torch.zeros(1))

    def attention_weights(self, x, latents, mask):
        """Cross-attention weights (B,heads,T,J*M): rows add up to one, or to exactly zero where nothing can be seen."""
        q = rearrange(self.q_proj(self.norm_attention(x)), "b t (h d) -> b h t d", h=self.heads)
        k = rearrange(self.k_proj(latents), "b n (h d) -> b h n d", h=self.heads)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).float()  # (B,heads,T,J*M)
        mask = mask[:, None]  # the same for all heads
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask

    def attend(self, x, latents, mask):
        """Cross-attention: words (B,T,E) are the queries, latents of photos (B,J*M,V) the keys and values."""
        v = rearrange(self.v_proj(latents), "b n (h d) -> b h n d", h=self.heads)
        weights = self.attention_weights(x, latents, mask).to(v.dtype)
        return self.o_proj(rearrange(weights @ v, "b h t d -> b t (h d)"))

    def mlp(self, x):
        """Feed-forward network: squared ReLU, or SwiGLU."""
        up = self.up_proj(x)
        hidden = up.relu().square() if self.gate_proj is None else F.silu(self.gate_proj(x)) * up
        return self.down_proj(hidden)

    def forward(self, x, latents, mask):
        # gated cross-attention, then a gated feed-forward network: Fig. 4
        x = x + self.gate_attention.tanh() * self.attend(x, latents, mask)
        return x + self.gate_mlp.tanh() * self.mlp(self.norm_mlp(x))


class Flamingo(nn.Module):
    """A frozen language model, a resampler, and gated layers before every `every`-th layer of it. Fig. 3.

    new: ids of <image> and <|endofchunk|>. Their two embeddings, for reading and for writing, are all of the vocabulary
    that is trained.
    """

    new: torch.Tensor

    def __init__(
        self, language, new, dim_in=1280, every=6, latents=16, seen=192, use_rmsnorm_swiglu=False
    ):
        super().__init__()
        # the language model stays frozen
        self.language = language.requires_grad_(False)
        self.latents = latents
        layers = blocks(language)
        width = language.config.get_text_config().hidden_size
        check(
            0 < every <= len(layers),
            f"--every {every}: the language model has {len(layers)} layers",
        )
        # new: resampler, a gated cross-attention layer before every `every`-th layer, two embeddings
        self.resampler = connector.PerceiverResampler(
            dim_in, seen, depth=1, latents=latents, heads=6, kv_heads=6, use_rmsnorm_swiglu=False
        )
        self.cross_layer_ids = range(0, len(layers), every)
        self.cross = nn.ModuleList(
            GatedCrossAttention(width, seen, use_rmsnorm_swiglu=use_rmsnorm_swiglu)
            for _ in self.cross_layer_ids
        )
        self.register_buffer("new", torch.tensor(new), persistent=False)
        table = language.get_input_embeddings().weight.float()
        self.new_embeddings = nn.Parameter(
            table.mean(0) + table.std() * torch.randn(len(new), width)
        )
        # latents and mask, while the language model reads; its layers call the new ones through hooks
        self.visual_context = None
        for i, cross in zip(self.cross_layer_ids, self.cross):
            layers[i].register_forward_pre_hook(
                partial(self.cross_attention_hook, cross), with_kwargs=True
            )

    def cross_attention_hook(self, cross, layer, args, kwargs):
        """Before a layer of the language model: what enters it goes through gated cross-attention first."""
        if self.visual_context is None:
            return None
        latents, mask = self.visual_context
        states = args[0]
        seen = cross(states.float(), latents, mask).to(states.dtype)
        return (seen, *args[1:]), kwargs

    def resample(self, features):
        """Features (B,J,N,D) -> latents (B,J,M,V). Sec. 2.1, Fig. 5."""
        latents = self.resampler(features.flatten(0, 1))  # (B*J,N,D) -> (B*J,M,V)
        return rearrange(latents, "(b j) m v -> b j m v", b=len(features))

    def embed(self, ids):
        """(B,T) -> (B,T,E): the embeddings of the language model, but for those of the new tokens."""
        is_new = ids[..., None] == self.new  # (B,T,2)
        text = self.language.get_input_embeddings()(ids.where(~is_new.any(-1), 0))
        new = (is_new.float() @ self.new_embeddings).to(text.dtype)
        return torch.where(is_new.any(-1, keepdim=True), new, text)

    def states(self, ids, latents=None, before=0, cache=None):
        """What the language model makes of words and photos: (B,T), (B,J,M,V) -> (B,T,E).

        before: photos that stand before these words, in what the cache remembers. Raises UserError if a text has more
        words <image> than there are photos: the last of them would see nothing, without a word.
        """
        if latents is not None:
            counts = media_mask(ids, self.new[0], before)
            there = latents.shape[1]
            check(
                int(counts.max()) <= there,
                f"a text has {int(counts.max())} words {IMAGE}, but {there} photos",
            )
            mask = visible(counts, *latents.shape[1:3])
            self.visual_context = (latents.flatten(1, 2), mask)
        try:
            out = self.language.base_model(
                inputs_embeds=self.embed(ids), cache=cache, use_cache=cache is not None
            )
        finally:
            self.visual_context = None
        return out.last_hidden_state

    def head(self, states):
        """(...,E) -> logits (...,words)."""
        logits = self.language.get_output_embeddings()(states)
        return logits.index_copy(
            -1, self.new, (states.float() @ self.new_embeddings.T).to(logits.dtype)
        )

    def forward(self, ids, latents=None, before=0, cache=None):
        return self.head(self.states(ids, latents, before, cache))

    def gates(self):
        """tanh(alpha) of (attention, mlp) by layer: (2, layers)."""
        return (
            torch.stack([torch.cat([c.gate_attention, c.gate_mlp]) for c in self.cross], 1)
            .detach()
            .tanh()
        )

    def trainable_parameters(self):
        """All that is trained, by name."""
        return {k: p for k, p in self.named_parameters() if p.requires_grad}


def blocks(language):
    """The layers of any causal language model of transformers."""
    count = language.config.get_text_config().num_hidden_layers
    return next(m for m in language.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def add_words(tokenizer, language):
    """<image> and <|endofchunk|> -> their ids. The table may grow, and no row is lost."""
    prompts.add_words(tokenizer, language, (IMAGE, END))
    return tokenizer.convert_tokens_to_ids([IMAGE, END])


def chunk(tokenizer, name):
    """`<image> NAME<|endofchunk|>` -> ids; all but the first are learned. Sec. 2.4."""
    return tokenizer(f"{IMAGE} {name}{END}", add_special_tokens=False).input_ids


def start(tokenizer):
    """The id that every text begins with: language models pile up on their first word what belongs nowhere (Xiao et al.
    2023, arXiv:2309.17453), and there SmolLM2's states are a hundred times as large: no photo would be heard."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def interleaved_batch(random, first, chunks, kinds, batch, longest, shortest=1):
    """Interleaved image-text batch: about `batch` photos drawn at random, as chains of J photos, each with its name.

    -> ids (B,T), which of them are supervised (B,T), which photos (B,J). J is drawn from `shortest` to `longest`;
    first: id at the start; chunks: ids by kind; kinds (photos,).
    """
    # one length for all chains of the batch, then the photos
    size = random.integers(shortest, longest + 1)
    photos = random.integers(len(kinds), size=(max(1, batch // size), size))
    # <start> <image> NAME <end> <image> NAME <end> ...
    texts = []
    for chain in photos:
        ids = [first]
        for photo in chain:
            ids += chunks[kinds[photo]]
        texts.append(torch.tensor(ids))
    # At the end, where nobody looks back
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=first)
    # neither <image> is a target, nor padding
    supervised = (ids != first) & (ids != chunks[0][0])
    return ids, supervised, torch.from_numpy(photos)


def patch_dropout(features):
    """Keep a random half of the image tokens of photos (B,J,N,D): what was learned by heart is of less use."""
    count = features.shape[2]
    kept = torch.randperm(count)[: (count + 1) // 2]
    return features[:, :, kept]


def loss(model, ids, supervised, features):
    """Mean of -log p(word | words before it, the photo it sees). Eq. 1. The head is asked at supervised tokens only."""
    states = model.states(ids, model.resample(features))  # (B,T,E)
    # the state of a word predicts the next one
    is_target = supervised[:, 1:]
    states = states[:, :-1][is_target]  # (targets,E)
    targets = ids[:, 1:][is_target]
    return F.cross_entropy(model.head(states).float(), targets)


def train(model, said, kinds, first, chunks, cfg, on):
    """The loop; yields the loss of each step. said (photos,N,D), kinds (photos,)."""
    # two parameter groups: gates learn ten times as fast as the rest
    gates = [alpha for block in model.cross for alpha in (block.gate_attention, block.gate_mlp)]
    rest = [
        p for p in model.trainable_parameters().values() if all(p is not alpha for alpha in gates)
    ]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "top": cfg.lr}, {"params": gates, "top": 10 * cfg.lr}], cfg.lr
    )
    random = np.random.default_rng([cfg.seed, 1])
    shortest = getattr(cfg, "shortest", 1)
    for step in range(cfg.steps):
        # learning rate of this step: warm-up times a cosine to zero
        for group in optimizer.param_groups:
            group["lr"] = (
                group["top"]
                * min(1, (step + 1) / 20)
                * (1 + math.cos(math.pi * step / cfg.steps))
                / 2
            )
        # a batch of interleaved photos and names
        ids, supervised, photos = interleaved_batch(
            random, first, chunks, kinds, cfg.batch, cfg.longest, shortest
        )
        features = patch_dropout(said[photos]).float()
        # forward pass and loss, matrix products in bf16
        with run.autocast(on):
            value = loss(model, ids.to(on), supervised.to(on), features.to(on))
        # backward pass, long gradients clipped
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_([*rest, *gates], 1.0)
        optimizer.step()
        yield value.item()


@torch.no_grad()
def likelihoods(model, features, first, chunks, shots=(), examples=None):
    """log p(NAME<|endofchunk|> | examples, <image>) for photos (B,N,D) -> (B,C). Sec. 2.5, Fig. 8.

    shots: kinds of the examples, whose features are examples (S,N,D). The prompt is read once, each name after it.
    Raises UserError if examples, photo and name are longer than the language model's positions.
    """
    from transformers import DynamicCache

    photos = features[:, None]
    if examples is not None and len(shots):
        photos = torch.cat([examples.expand(len(features), -1, -1, -1), photos], 1)
    latents, on = model.resample(photos), features.device
    prompt = torch.tensor(
        [[first] + [i for kind in shots for i in chunks[kind]] + chunks[0][:1]], device=on
    )
    decode.check_length(model.language, prompt.shape[1], max(map(len, chunks)) - 1)
    cache, scores = DynamicCache(), []
    states = model.states(prompt.expand(len(features), -1), latents, cache=cache)
    begins = model.head(states[:, -1]).float().log_softmax(-1)
    for name in chunks:
        ids = torch.tensor([name[1:]], device=on).expand(len(features), -1)
        more = model(ids[:, :-1], latents, len(shots) + 1, cache).float().log_softmax(-1)
        scores.append(begins[:, ids[0, 0]] + more.gather(2, ids[:, 1:, None])[..., 0].sum(1))
        cache.crop(1 - ids.shape[1])  # forget this name
    return torch.stack(scores, 1)


def judge(model, features, first, chunks, said, kinds, shots, cfg, on):
    """Likelihoods (photos,C), with so many examples, drawn anew from the training photos for every 20 photos."""
    random, found = np.random.default_rng([cfg.seed, 2]), []
    for part in features.split(20):
        pick = random.integers(len(kinds), size=shots)
        with run.autocast(on):
            examples = said[pick].float().to(on)
            score = likelihoods(
                model, part.float().to(on), first, chunks, kinds[pick].tolist(), examples
            )
        found.append(score.cpu())
    return torch.cat(found)


@torch.no_grad()
def image_attention_map(model, features, first):
    """Where the word <image> looks in photos (B,N,D) -> (B,N), an attention rollout through the latents.

    Its cross-attention weights over the latents, times the latents' weights over the image tokens.
    """
    found = []

    def keep_weights(cross, args):
        weights = cross.attention_weights(*args)  # (B,heads,T,M)
        found.append(weights[:, :, 1].mean(1))  # of <image>, mean over heads: (B,M)

    hooks = [cross.register_forward_pre_hook(keep_weights) for cross in model.cross]
    ids = torch.tensor([[first, int(model.new[0])]], device=features.device).expand(
        len(features), -1
    )
    model.states(ids, model.resample(features[:, None]))
    for hook in hooks:
        hook.remove()
    over_latents = torch.stack(found).mean(0)  # mean over layers: (B,M)
    return torch.einsum("bm,bmn->bn", over_latents, model.resampler.attention_map(features))


def draw_gates(ax, part, title):
    """Gates (steps + 1, layers): a line for each new layer while it learned; without training a bar for each."""
    import matplotlib.pyplot as plt

    colours = [plt.get_cmap("viridis")(i / part.shape[1]) for i in range(part.shape[1])]
    if len(part) == 1:
        ax.bar(range(1, part.shape[1] + 1), part[0], color=colours)
        ax.set_xlabel("new layer, in the order of the text", fontsize=8)
    else:
        for i, line in enumerate(part.T):
            ax.plot(line, color=colours[i])
            ax.text(1.02 * (len(part) - 1), line[-1], f"{i + 1}", fontsize=7, va="center")
        ax.set_xlabel("step (numbers: new layer)", fontsize=8)
    ax.axhline(0, color="gray", lw=0.5)
    ax.set_title(f"gates tanh(alpha) of {title}", fontsize=9)
    ax.tick_params(labelsize=7)


def draw(path, gates, photos, maps, names, truth, log_p):
    """Above: the gates of each new layer. Below: photos, where <image> looks, the likeliest names."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(9.2, 6.6), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.9))
    top, bottom = halves
    for ax, part, title in zip(
        top.subplots(1, 2, sharey=True), gates.unbind(1), ("attention", "feed-forward")
    ):
        draw_gates(ax, part, title)
    axes = bottom.subplots(2, 4).flat
    side = round(maps.shape[1] ** 0.5)
    for ax, photo, attention, right, score in zip(
        axes, photos, maps.view(-1, side, side), truth, log_p
    ):
        heat = F.interpolate(attention[None, None], photo.shape[1:], mode="bicubic")[0, 0]
        ax.imshow(photo.permute(1, 2, 0))
        ax.imshow(heat, cmap="inferno", alpha=0.45)
        best = score.softmax(-1).topk(2)
        for line, (p, k) in enumerate(zip(best.values, best.indices)):
            found = names[k] == right
            ax.text(0.5, 1.16 - 0.12 * line, f"{100 * p:.0f} % {names[k]}", transform=ax.transAxes, fontsize=8,
                    ha="center", color="tab:green" if found else "black")  # fmt: skip
        ax.text(
            0.5,
            -0.02,
            right,
            fontsize=7,
            color="gray",
            ha="center",
            va="top",
            transform=ax.transAxes,
        )
        ax.axis("off")
    return figures.close(figure, path)


def load(path, language, new, on="cpu"):
    """Weights written by this script, in front of the same language model -> Flamingo, frozen."""
    tensors, meta = checkpoint.read(path)
    tensors = {OLD_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
    try:
        model = Flamingo(language, new, **meta).to(on)
        parts = model.trainable_parameters()
        if parts.keys() != tensors.keys() or any(
            p.shape != tensors[k].shape for k, p in parts.items()
        ):
            raise KeyError(path)
    except (TypeError, KeyError):
        raise run.UserError(
            f"{path} belongs to another language model or script: leave out --pretrained"
        ) from None
    with torch.no_grad():
        for name, p in parts.items():
            p.copy_(tensors[name])
    return model.eval().requires_grad_(False)


def check_same_shape(cfg):
    """Raises UserError if the flags ask for another network than that of the shipped weights."""
    made = checkpoint.read(WEIGHTS)[1]
    for name, asked in (("every", cfg.every), ("latents", cfg.latents)):
        same = made[name] == asked
        check(
            same,
            f"--{name} {asked}: the weights have {made[name]}; leave out --{name} or --pretrained",
        )
    check(
        cfg.language == "smollm2",
        "the weights were learned in front of smollm2: leave out --language or --pretrained",
    )


def main(cfg: Config) -> dict:
    """Train (or load) the new layers, ask for the names of photos with and without examples, draw what is seen."""
    check(
        min(cfg.steps, cfg.batch, cfg.longest, cfg.latents) > 0 and cfg.lr > 0,
        "all numbers must be above 0",
    )
    check(1 <= cfg.shortest <= cfg.longest, "--shortest must be at least 1 and at most --longest")
    check(cfg.judged >= 0 and cfg.every > 0, "--judged must be 0 or more, --every at least 1")
    check(cfg.shots and min(cfg.shots) >= 0, "--shots takes one number or more, none below 0")
    check(
        not cfg.pretrained or WEIGHTS.is_file(),
        f"there are no weights at {WEIGHTS}: leave out --pretrained",
    )
    if cfg.pretrained:
        check_same_shape(cfg)
    run.seed(cfg.seed)
    on, clock = run.device(cfg.device), run.Clock()
    ours = cfg.language == "smollm2"
    tokenizer, language = (
        pretrained.smollm2(on) if ours else pretrained.language_model(cfg.language, on)
    )
    new, first = add_words(tokenizer, language), start(tokenizer)
    language.set_attn_implementation("eager")  # faster for short texts on a CPU
    eye, fruit = tower.load("efficientnet", on=on), data.groceries(224)
    names = [fruit_photos.NAMES[kind] for kind in fruit.fine_names]
    chunks = [chunk(tokenizer, name) for name in names]
    learn, chosen = fruit_photos.split(fruit, cfg.judged, cfg.seed)
    longest = max(map(len, chunks))
    decode.check_length(language, 1 + longest * max(cfg.longest, 1 + max(cfg.shots)), 0)
    shape = {"dim_in": eye.width, "every": cfg.every, "latents": cfg.latents}
    model = (
        load(WEIGHTS, language, new, on)
        if cfg.pretrained
        else Flamingo(language, new, **shape).to(on)
    )
    folder = run.output(cfg.out, cfg)
    fresh = [model.resampler, *model.cross]
    metrics = {
        "parameters, frozen": sum(p.numel() for p in language.parameters()),
        "parameters, new": model.new_embeddings.numel()
        + sum(p.numel() for part in fresh for p in part.parameters()),
        "new layers before layers": ", ".join(map(str, model.cross_layer_ids)),
    }
    said, unseen, kinds = (
        tower.said(eye, fruit.images[learn]),
        tower.said(eye, fruit.images[chosen]),
        fruit.fine[learn],
    )
    losses, gates = [], [model.gates().cpu()]
    if not cfg.pretrained:
        for value in run.progress(train(model, said, kinds, first, chunks, cfg, on), cfg.steps):
            losses.append(value)
            gates.append(model.gates().cpu())
        metrics |= {"loss": sum(losses[-20:]) / len(losses[-20:]), "train_seconds": clock()}
        figures.curves(folder / "loss.png", {"loss": losses}, "step", "-log p of a word", smooth=10)
        checkpoint.write(folder / "model.safetensors", model.trainable_parameters(), shape)
    model.eval()
    answers = {}
    for shots in cfg.shots:
        log_p = answers[shots] = judge(model, unseen, first, chunks, said, kinds, shots, cfg, on)
        metrics[f"{shots} examples"] = {
            "14 kinds": probe.share(log_p.argmax(-1) == fruit.fine[chosen]),
            "5 groups": probe.share(fruit_photos.grouped(log_p, fruit) == fruit.coarse[chosen]),
        }
    metrics |= probe.yardsticks(eye, fruit, learn, chosen)
    for name, line in zip(("gates of attention", "gates of feed-forward"), gates[-1]):
        metrics[name] = " ".join(f"{g:+.2f}" for g in line.tolist())
    some = fruit_photos.spread(torch.arange(len(chosen)))
    maps = image_attention_map(model, unseen[some].float().to(on), first).cpu()
    truth, photos = (
        [fruit_photos.name_of(fruit, i) for i in chosen[some]],
        data.groceries(348).images[chosen[some]],
    )
    draw(
        folder / "flamingo.png",
        torch.stack(gates),
        photos,
        maps,
        names,
        truth,
        answers[cfg.shots[0]][some],
    )
    return run.report(folder, metrics, "python vlm/flamingo.py --shots 0 1 8 --pretrained")


if __name__ == "__main__":
    run.cli(main, Config)
