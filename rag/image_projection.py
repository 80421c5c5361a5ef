"""Linear projection of image features into the text embedding space: ridge regression or InfoNCE.

The image network and the text encoder stay frozen; the matrix W and the bias b are all that is
learned. Ridge regression (Hoerl & Kennard 1970) finds them in closed form; CLIP's symmetric
contrastive loss (Radford et al. 2021, arXiv:2103.00020, Fig. 3; van den Oord et al. 2018,
arXiv:1807.03748, Eq. 4) by gradient descent. `multimodal_rag.py` searches with the result.

Shapes: N images, D features of an image, E numbers of a text, B pairs of a batch.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import checkpoint, run
from utils.run import check

DROPOUT = 0.5  # of the features, in a step of InfoNCE: there are few pairs


class Space(NamedTuple):
    """Joint embedding space: what projects image features, and perhaps texts, into it."""

    mean: Tensor  # (D,) of the training features
    scale: Tensor  # (D,)
    W: Tensor  # (D,E)
    b: Tensor  # (E,)
    text: Tensor | None = None  # (L,E) projects texts as well; None: the space is that of the texts


def project(space, x):
    """Features (N,D) -> unit vectors (N,E), to be compared with those of texts."""
    standardised = (x - space.mean) / space.scale
    return F.normalize(standardised @ space.W + space.b, dim=-1)


def project_text(space, t):
    """Unit vectors of texts (N,L) -> unit vectors (N,E)."""
    if space.text is None:
        return t
    return F.normalize(t @ space.text, dim=-1)


def load_space(folder):
    """A Space that papers/clip.py saved.

    Raises UserError if there is none, or if it is for other towers.
    """
    tensors, towers = checkpoint.read(Path(folder) / "space.safetensors")
    wanted = {"image": "efficientnet", "text": "minilm"}
    message = f"{folder} is a space for {towers}; what looks and reads here is {wanted}"
    check(towers == wanted, message)
    return Space(*(tensors[name] for name in Space._fields))


def ridge(x, y, weight):
    """Ridge regression: argmin |x W + b - y|^2 + weight |W|^2 for (N,D), (N,E) -> W (D,E), b (E,).

    W = (x'x + weight I)^-1 x'y of centred x and y.
    """
    x = x.double()
    y = y.double()
    # Centre both, so that b, which costs nothing, takes no part in the penalty
    x_mean = x.mean(0)
    y_mean = y.mean(0)
    x = x - x_mean
    y = y - y_mean
    # Normal equations
    gram = x.T @ x + weight * torch.eye(x.shape[1], dtype=x.dtype)
    W = torch.linalg.solve(gram, x.T @ y)
    b = y_mean - x_mean @ W
    return W.float(), b.float()


def info_nce(z, t, temperature, same=None):
    """Symmetric contrastive (InfoNCE) loss of unit vectors of images (B,E) and texts (B,E).

    CLIP, Fig. 3. same (B,B): pairs of equal caption. CLIP calls each wrong for the other; here
    they are left out.
    """
    logits = t @ z.T / temperature  # (B,B), row: a text among all images
    # Pairs of equal caption are no negatives; each pair stays its own positive
    if same is not None:
        equal_captions = same & ~torch.eye(len(z), dtype=torch.bool)
        logits = logits.masked_fill(equal_captions, -torch.inf)
    # Cross-entropy of the diagonal, over the rows and over the columns
    text_to_image = logits.diagonal() - logits.logsumexp(1)
    image_to_text = logits.diagonal() - logits.logsumexp(0)
    return -(text_to_image.mean() + image_to_text.mean()) / 2


def train(W, b, x, t, cfg):
    """Minimise InfoNCE over W and b in place; yields the loss.

    x (N,D): standardised features of the images; t (N,E): vectors of their texts.
    """
    weights = [W.requires_grad_(), b.requires_grad_()]
    optimizer = torch.optim.AdamW(weights, cfg.lr, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.steps)
    for _ in range(cfg.steps):
        # A batch of pairs
        pick = torch.randperm(len(x))[: cfg.batch]
        same = t[pick] @ t[pick].T > 0.9999
        # Project the images, with dropout on their features
        z = F.normalize(F.dropout(x[pick], DROPOUT) @ W + b, dim=-1)
        loss = info_nce(z, t[pick], cfg.temperature, same=same)
        # Update
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        yield loss.item()


def fit(x, t, cfg, how=None, name="train"):
    """Fit the Space to image features (N,D) and vectors (N,E) of their captions.

    `how`: ridge, infonce, or both, which starts InfoNCE from the ridge solution.
    """
    how = how or cfg.space
    torch.manual_seed(cfg.seed)
    # Standardise the features by the training images
    mean = x.mean(0)
    scale = x.std(0) + 1e-6
    z = (x - mean) / scale
    # Initial weights: random for InfoNCE alone, else the closed form
    if how == "infonce":
        W = 0.01 * torch.randn(x.shape[1], t.shape[1])
        b = t.mean(0)
    else:
        W, b = ridge(z, t, cfg.ridge)
    # Contrastive training, unless the closed form is all that was asked for
    if how != "ridge":
        losses = run.bar(train(W, b, z, t, cfg), cfg.steps, name=name)
        for loss in losses:
            message = f"the loss is {loss}; try a lower --lr or a higher --temperature"
            check(np.isfinite(loss), message)
            losses.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    return Space(mean, scale, W.detach(), b.detach())
