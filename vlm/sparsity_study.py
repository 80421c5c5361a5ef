"""Accuracy against visual tokens: four photos in one picture, a question about one of them, tokens
chosen by the prompt.

A picture is a mosaic of four photos of fruit of different groups, 4 x 9 image tokens; "What kind of
pear is this?" asks about one, the others are distractors. The shipped LLaVA is not trained here.
Only the query is (sparsity.py), in seconds and without the language model: gates p =
sigmoid(cosine) are sampled, and a linear layer must tell the kind asked for from the mean of the
open patches; a Beta-Bernoulli prior says how many should be open. Then the language model answers
from all tokens, from the k of highest cosine, from open gates, from k at random, or evenly spaced.

Shapes: B mosaics, N = 36 image tokens of width E, prompts of T tokens, C = 14 kinds.

    python vlm/sparsity_study.py                     # 5 CPU min
    python vlm/sparsity_study.py --mosaics 30 --keep 9
"""

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import data, run
from utils.run import check
from vlm import fruit_photos, llava, prompted_answers, sparsity, sparsity_figures, tower

PHOTOS = 4  # in a mosaic
GROUPS = fruit_photos.GROUPS


@dataclass(frozen=True)
class Config:
    """Choose image tokens by the prompt, and measure what that costs and saves."""

    model: str = str(llava.WEIGHTS)
    steps: int = 600  # of the query and the gates
    batch: int = 64  # mosaics a step
    learning_rate: float = 3e-3
    temperature: float = 0.5  # of the Gumbel trick
    prior_open: float = 0.25  # share of open gates that the prior expects
    prior_weight: float = 0.03  # of the divergence from it
    keep: tuple[int, ...] = (1, 3, 9, 18)  # tokens kept
    mosaics: int = 60  # of held-out photos
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/sparsity_study"


class Mosaics(NamedTuple):
    photos: Tensor  # (B,4), indices of photos
    asked: Tensor  # (B,), which of the four
    groups: Tensor  # (B,), index of the group asked for
    kinds: Tensor  # (B,), the right answer


def question(group):
    """Prompt that names a group of fruit."""
    return f"What kind of {list(GROUPS.values())[group]} is this?"


def kinds_of(fruit, group):
    """Kinds (indices) of a group."""
    return sorted({int(k) for k in fruit.fine[fruit.coarse == group]})


def draw_mosaics(fruit, among, count, random):
    """Mosaics of photos `among` these, of four different groups each -> Mosaics."""
    of_group = []
    for g in range(len(fruit.coarse_names)):
        of_group.append([i for i in among.tolist() if fruit.coarse[i] == g])
    photos = []
    for _ in range(count):
        groups = random.permutation(len(of_group))[:PHOTOS]
        photos.append([int(random.choice(of_group[g])) for g in groups])
    photos = torch.tensor(photos)
    # asked about one of a group that has several kinds
    several = torch.tensor([len(kinds_of(fruit, g)) > 1 for g in range(len(of_group))])
    asked = []
    for four in photos:
        asked.append(int(random.choice(several[fruit.coarse[four]].nonzero()[:, 0].numpy())))
    asked = torch.tensor(asked)
    chosen = photos.gather(1, asked[:, None])[:, 0]
    return Mosaics(photos, asked, fruit.coarse[chosen], fruit.fine[chosen])


def tokens_of(image_tokens, mosaics):
    """Image tokens of photos (P,9,E) by their numbers -> those of mosaics (B,36,E)."""
    return image_tokens[mosaics.photos].flatten(1, 2)


class Gates(nn.Module):
    """Query of a prompt, gates of patches, and a linear layer that tells kinds from open patches."""

    def __init__(self, dim, classes):
        super().__init__()
        self.query = sparsity.Query(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.bias = nn.Parameter(torch.tensor(0.0))
        self.read = nn.Linear(dim, classes)

    def chosen_by(self, words, mask):
        """Query vector of prompts (B,T,E)."""
        return self.query(words, mask)

    def probability(self, patches, words, mask):
        """p of the gate of each patch: (B,N)."""
        query = self.chosen_by(words, mask)
        return sparsity.gate_probability(self.norm(patches), query, self.scale, self.bias)

    def loss(self, patches, words, mask, kinds, cfg):
        """Cross-entropy of the kind, read from the mean of open patches, and divergence from the prior."""
        p = self.probability(patches, words, mask)
        logits = p.clamp(1e-6, 1 - 1e-6).logit()
        gates = sparsity.gumbel_sigmoid(logits, cfg.temperature)
        weights = gates / gates.sum(1, keepdim=True).clamp(min=1)
        found = self.read(torch.einsum("bn,bne->be", weights, self.norm(patches)))
        # Beta(a, b) with a mean of prior_open, as strong as the N gates themselves
        n = patches.shape[1]
        prior = sparsity.gate_loss(p, cfg.prior_open * n, (1 - cfg.prior_open) * n)
        return F.cross_entropy(found, kinds) + cfg.prior_weight * prior.mean(), p


def prompts_of(tokenizer, model):
    """Embeddings of the five prompts, padded: (5,T,E), mask (5,T)."""
    ids = [tokenizer(question(g)).input_ids for g in range(len(GROUPS))]
    longest = max(map(len, ids))
    table = model.language.get_input_embeddings()
    words = torch.zeros(len(ids), longest, table.weight.shape[1])
    mask = torch.zeros(len(ids), longest)
    for row, one in enumerate(ids):
        words[row, : len(one)] = table(torch.tensor(one)).detach().float()
        mask[row, : len(one)] = 1
    return words, mask


def train(gates, cfg, fruit, photos, image_tokens, prompts):
    """Train the query and the gates on mosaics of training photos; yields (loss, share of open gates)."""
    optimizer = torch.optim.AdamW(gates.parameters(), cfg.learning_rate)
    random = np.random.default_rng([cfg.seed, 13])
    words, mask = prompts
    for _ in range(cfg.steps):
        mosaics = draw_mosaics(fruit, photos, cfg.batch, random)
        patches = tokens_of(image_tokens, mosaics)
        about = words[mosaics.groups], mask[mosaics.groups]
        loss, p = gates.loss(patches, *about, mosaics.kinds, cfg)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield float(loss.detach()), float(p.detach().mean())


def choices(cfg, gates, patches, words, mask, generator):
    """Ways to choose tokens of one mosaic (1,N,E) -> {name: (1,M,E)}."""
    n = patches.shape[1]
    query = gates.chosen_by(words, mask)
    seen = gates.norm(patches)
    found = {"all": patches}
    for k in cfg.keep:
        indices = sparsity.top_k(seen, query, k)[1]
        found[f"top-k {k}"] = sparsity.take(patches, indices)
        drawn = torch.randperm(n, generator=generator)[:k].sort().values
        found[f"random {k}"] = patches[:, drawn]
        found[f"evenly spaced {k}"] = patches[:, sparsity.evenly_spaced(n, k)]
    # open gates, one at least
    p = gates.probability(patches, words, mask)
    is_open = (p > 0.5) | (p == p.max())
    found["gates"] = patches[:, is_open[0]]
    return found


@torch.no_grad()
def score(cfg, tokenizer, model, gates, fruit, mosaics, image_tokens, prompts):
    """Answers of the language model from each choice of tokens -> {name: accuracy, tokens, CPU
    seconds an answer}."""
    generator = torch.Generator().manual_seed(cfg.seed)
    patches = tokens_of(image_tokens, mosaics)
    found = {}
    for i in run.bar(range(len(patches)), len(patches), name="answers"):
        group = int(mosaics.groups[i])
        kinds = kinds_of(fruit, group)
        names = [fruit_photos.NAMES[fruit.fine_names[k]] for k in kinds]
        about = prompts[0][group : group + 1], prompts[1][group : group + 1]
        for name, kept in choices(cfg, gates, patches[i : i + 1], *about, generator).items():
            start = time.process_time()
            with run.autocast(kept.device):
                embeds = prompted_answers.embed_prompt(tokenizer, model, question(group), kept)
                log_p = prompted_answers.rank_answers(
                    tokenizer, model, embeds, names, question(group)
                )
            seconds = time.process_time() - start
            right = float(kinds[int(log_p[0].argmax())] == mosaics.kinds[i])
            found.setdefault(name, []).append((right, kept.shape[1], seconds))
    rows = {}
    for name, each in found.items():
        right, tokens, seconds = np.array(each).T
        rows[name] = {
            "accuracy": right.mean(), "tokens": tokens.mean(), "CPU s an answer": np.median(seconds),
        }  # fmt: skip
    return rows


def main(cfg: Config) -> dict:
    """Train query and gates on mosaics of training photos, let the LLaVA answer about held-out ones."""
    n = PHOTOS * 9
    ok = min(cfg.steps, cfg.batch, cfg.mosaics, *cfg.keep, 1) > 0 and max(cfg.keep, default=0) <= n
    check(ok and cfg.keep, f"all numbers must be above 0, and --keep at most {n}")
    check(0 < cfg.prior_open < 1, "--prior-open must be between 0 and 1")
    tokenizer, model = llava.load(cfg.model, run.device(cfg.device))
    check(
        model.count == 9 and not model.grids,
        "the model must have 9 tokens a picture, as the book's",
    )
    folder = run.output(cfg.out, cfg)
    run.seed(cfg.seed)
    # image tokens of all photos, training and held-out ones apart
    fruit = data.groceries(model.vision.size)
    learn, heldout = fruit_photos.split(fruit)
    features = tower.vision_features(model.vision, fruit.images)
    with torch.no_grad():
        image_tokens = torch.cat(
            [model.project(part.float()).float() for part in features.split(64)]
        )
    prompts = prompts_of(tokenizer, model)
    # query and gates
    gates = Gates(image_tokens.shape[-1], len(fruit.fine_names))
    history = list(train(gates, cfg, fruit, learn, image_tokens, prompts))
    losses, is_open = map(list, zip(*history))
    # held-out mosaics
    mosaics = draw_mosaics(fruit, heldout, cfg.mosaics, np.random.default_rng([cfg.seed, 14]))
    rows = score(cfg, tokenizer, model, gates.eval(), fruit, mosaics, image_tokens, prompts)
    with torch.no_grad():
        about = prompts[0][mosaics.groups], prompts[1][mosaics.groups]
        p = gates.probability(tokens_of(image_tokens, mosaics), *about)
    # share of the probability of open gates that lies in the photo asked for
    inside = p.view(-1, PHOTOS, 9).sum(2).gather(1, mosaics.asked[:, None])[:, 0] / p.sum(1)
    chance = [1 / len(kinds_of(fruit, int(g))) for g in mosaics.groups]
    metrics = rows | {"chance": float(np.mean(chance))}
    metrics |= {"gates in the photo asked for": float(inside.mean())}
    sparsity_figures.draw_curves(folder / "tokens.png", rows, losses, is_open)
    shown = min(4, cfg.mosaics)
    titles = [question(int(g)) for g in mosaics.groups[:shown]]
    images = fruit.images[mosaics.photos[:shown]]
    sparsity_figures.draw_gates(folder / "gates.png", images, p[:shown], titles)
    return run.report(folder, metrics)


if __name__ == "__main__":
    run.cli(main, Config)
