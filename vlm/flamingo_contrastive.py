"""Contrastive pre-training of a Flamingo's first gated layer: <image> becomes a word that says what the picture is.

Induction heads of a language model (Olsson et al. 2022, arXiv:2209.11895) find the last place where
the same token stood, and copy what followed. For them two pictures of one class must look like one
word. Flamingo's encoder was pre-trained by a symmetric contrastive loss of pictures and texts
(Alayrac et al. 2022, arXiv:2204.14198, Sec. 2.1 and appendix); here the encoder is given, and the loss (InfoNCE; CLIP,
Radford et al. 2021, arXiv:2103.00020) trains what the first gated layer adds at <image>: two views
of one emoji agree, and both agree with the embeddings of its name. The language model is not run.

Shapes: features (B,N,D), words of the table (B,E).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils import run

TEMPERATURE = 0.07


def first_layer(model, features, words):
    """What stands before the first layer of the language model where a word (E) or (B,E) sees pictures (B,N,D) ->
    (B,E)."""
    latents = model.resampler(features)
    states = words.expand(len(features), -1)[:, None]
    mask = torch.ones(len(features), 1, latents.shape[1], dtype=torch.bool, device=latents.device)
    return model.cross[0](states, latents, mask)[:, 0]


def symmetric_loss(a, b, temperature=TEMPERATURE):
    """InfoNCE both ways: (B,E), (B,E) unit vectors, whose rows belong together."""
    logits = a @ b.T / temperature
    truth = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


class WordSpace:
    """The embeddings of the language model's words, as directions from their mean."""

    def __init__(self, language, tokenizer, ids):
        self.table = language.get_input_embeddings().weight.detach().float()
        self.ids = torch.as_tensor(ids)
        self.mean = self.table[self.ids].mean(0)
        # how far a word is from the mean
        self.radius = (self.table[self.ids] - self.mean).norm(dim=-1).mean()

        # what ends a line in a text
        self.newline = self.table[tokenizer("\n", add_special_tokens=False).input_ids[-1]]

    def names(self, tokenizer, names):
        """Direction of each name, the mean of its tokens: (C,E)."""
        rows = []
        for name in names:
            ids = tokenizer(f" {name}", add_special_tokens=False).input_ids
            rows.append(self.table[torch.tensor(ids)].mean(0))
        return F.normalize(torch.stack(rows) - self.mean, dim=-1)


def loss(model, one, other, names, space, words):
    """Contrastive loss of two views (B,N,D) each, and of both with their names (B,E); <image> becomes as long as a
    word, and other words (B,E) stay what they are."""
    found = first_layer(model, torch.cat([one, other]), model.new_embeddings.weight[0]) - space.mean
    a, b = F.normalize(found, dim=-1).chunk(2)
    views = symmetric_loss(a, b)
    with_names = (symmetric_loss(a, names) + symmetric_loss(b, names)) / 2
    # as far from the mean as a word is
    length = (found.norm(dim=-1) / space.radius - 1).square().mean()
    # a word that sees a picture is still that word
    change = first_layer(model, one[: len(words)], words) - words
    return views + with_names + length + 0.1 * change.square().sum(-1).mean()


def train(model, pictures, space, names, cfg, on):
    """Contrastive steps on emoji; yields the loss. names (C,E) of the emoji's classes, in their order.

    The resampler, the first gated layer and the new tokens learn.
    """
    classes = pictures.of("emoji")
    random = np.random.default_rng([cfg.seed, 4])
    # <image> begins as the mean of all words, <|endofchunk|> as the end of a line
    with torch.no_grad():
        model.new_embeddings.weight.copy_(torch.stack([space.mean, space.newline]))
    parts = {k: p for k, p in model.trainable_parameters().items()
             if k.startswith(("resampler.", "cross.0.", "new_embeddings."))}  # fmt: skip
    gates = [p for k, p in parts.items() if k.endswith(".alpha")]
    rest = [p for k, p in parts.items() if not k.endswith(".alpha")]
    groups = [{"params": rest, "top": cfg.lr}, {"params": gates, "top": 10 * cfg.lr}]
    optimizer = torch.optim.AdamW(groups, cfg.lr, betas=(0.9, 0.98), weight_decay=0.05)
    steps = cfg.contrastive_steps
    for step in range(steps):
        # warm-up, then a cosine to zero
        rate = min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = group["top"] * rate
        # two views of some emoji, half of the places of each
        batch = min(cfg.contrastive_batch, len(classes))
        chosen = random.choice(len(classes), batch, replace=False)
        pairs = [random.choice(classes[i].pictures, 2, replace=False) for i in chosen]
        one, other = torch.from_numpy(np.stack(pairs, 1))
        halves = []
        for rows in (one, other):
            places = torch.randperm(pictures.features.shape[1])[
                : -(-pictures.features.shape[1] // 2)
            ]
            halves.append(pictures.features[rows][:, places].float().to(on))
        words = space.table[space.ids[torch.from_numpy(random.integers(len(space.ids), size=64))]]
        one, other = halves
        with run.autocast(on):
            value = loss(model, one, other, names[chosen], space, words[: len(one)])
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_([*rest, *gates], 1.0)
        optimizer.step()
        yield value.item()
