"""Evaluation of CLIP: recall@k of the search in both directions, zero-shot classification, the matrix of cosines.

Radford et al. 2021, arXiv:2103.00020, Sec. 3.1.

Shapes: N pictures and their texts as unit vectors of E numbers, K classes.
"""

import torch
import torch.nn.functional as F

from papers import photos
from papers.image_tower import image_features
from utils import data, figures

# Sec. 3.1.4: several are better
TEMPLATES = ("a photo of {}", "a photo of a pile of {}", "{}", "{} in a shop")


def recall(z, t, ks=(1, 5, 10)):
    """recall@k of pictures and their texts (N,E): the share whose own one is among the first k, in both directions."""
    found = {}
    for name, closeness in (("text finds picture", t @ z.T), ("picture finds text", z @ t.T)):
        own = closeness.diagonal()[:, None]
        place = (closeness > own).sum(1)
        found[name] = {f"recall@{k}": float((place < k).float().mean()) for k in ks}
    return found


def zero_shot(z, names, encode):
    """Pictures (N,E) and K names -> logits (N,K): a class is the mean of its sentences. Sec. 3.1.4."""
    classes = []
    for name in names:
        sentences = [template.format(name) for template in TEMPLATES]
        classes.append(F.normalize(encode(sentences).mean(0), dim=0))
    return z @ torch.stack(classes).T


def kind_names(fruit):
    """Names of the kinds; the group is added where the kind does not say it."""
    names = []
    for k, name in enumerate(fruit.fine_names):
        name = name.lower().replace("-", " ")
        group = fruit.coarse_names[fruit.coarse[fruit.fine == k][0]].lower()
        names.append(name if group.rstrip("s") in name else f"{name} {group}")
    return names


def classify(towers, embed, cfg, device):
    """Zero-shot accuracies on photos of fruit, by the names of 14 kinds and of 5 groups, beside two baselines."""
    fruit = data.groceries(224)
    learn, judge = photos.split(fruit)
    z = towers.encode_image(image_features(fruit.images, cfg.tower, device)[judge])

    def encode(texts):
        return towers.encode_text(embed(texts))

    groups = [name.lower() for name in fruit.coarse_names]
    right = {}
    for kind, names, y in (
        ("14 kinds", kind_names(fruit), fruit.fine),
        ("5 groups", groups, fruit.coarse),
    ):
        answer = zero_shot(z, names, encode).argmax(-1)
        right[kind] = float((answer == y[judge]).float().mean())
    return {
        "zero-shot photos": right,
        "by chance": {"14 kinds": 1 / 14, "5 groups": 1 / 5},
        "by majority": photos.majority(fruit, learn, judge),
    }


def matrix(path, images, captions, z, t):
    """Every picture against every caption: cosines, with the pictures themselves along the top."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 5.6))
    closeness = (t @ z.T).numpy()
    axis.imshow(closeness, cmap="viridis")
    # the number in each field
    for i, row in enumerate(closeness):
        for j, value in enumerate(row):
            text = f"{value:.2f}".lstrip("0")
            color = "black" if value > 0.6 * closeness.max() else "white"
            axis.text(j, i, text, ha="center", va="center", fontsize=6, color=color)
    # captions on the left, pictures along the top
    axis.set_yticks(range(len(captions)), captions, fontsize=7)
    axis.set_xticks([])
    for j, image in enumerate(images):
        corner = axis.inset_axes((j - 0.45, -1.5, 0.9, 0.9), transform=axis.transData)
        corner.imshow(image.permute(1, 2, 0).numpy())
        corner.axis("off")
    return figures.close(figure, path)
