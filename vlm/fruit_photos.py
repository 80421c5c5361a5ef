"""The fruit photos of this chapter: names of the classes, train and held-out split, groups, figures.

2054 photos of 14 kinds in 5 groups (`utils.data.groceries`); the data set's own test photos are
held out.
"""

import textwrap

import numpy as np
import torch

from utils import figures

QUESTION = "What fruit is this?"

NAMES = {  # of the kinds of fruit in the photos, as one would say them
    "Anjou": "Anjou pear", "Cantaloupe": "cantaloupe melon", "Conference": "Conference pear", "Kaiser": "Kaiser pear",
    "Galia-Melon": "Galia melon", "Golden-Delicious": "Golden Delicious apple", "Granny-Smith": "Granny Smith apple",
    "Honeydew-Melon": "honeydew melon", "Orange": "orange", "Pink-Lady": "Pink Lady apple", "Satsumas": "satsuma",
    "Red-Delicious": "Red Delicious apple", "Royal-Gala": "Royal Gala apple", "Watermelon": "watermelon",
}  # fmt: skip
GROUPS = {
    "Apple": "apple",
    "Melon": "melon",
    "Orange": "orange",
    "Pear": "pear",
    "Satsumas": "satsuma",
}


def name_of(fruit, i):
    """What photo i of the groceries shows, in words."""
    return NAMES[fruit.fine_names[fruit.fine[i]]]


def split(fruit, judged=0, seed=0):
    """The data set's own split: indices of the training photos, and of the held-out ones, or
    `judged` of these."""
    part = np.array(fruit.split)
    train = np.flatnonzero(part != "test")
    heldout = np.flatnonzero(part == "test")
    if judged:
        heldout = np.sort(np.random.default_rng([seed, 9]).permutation(heldout)[:judged])
    return torch.from_numpy(train), torch.from_numpy(heldout)


def truths(fruit):
    return {"14 kinds": fruit.fine, "5 groups": fruit.coarse}


def grouped(log_p, fruit):
    """Scores of 14 kinds -> the group whose kinds have the most probability together: (B,)."""
    # the group of each kind, and the probabilities of its kinds added up
    group = torch.stack([fruit.coarse[fruit.fine == k][0] for k in range(len(fruit.fine_names))])
    each = torch.zeros(len(log_p), len(fruit.coarse_names)).index_add_(1, group, log_p.softmax(-1))
    return each.argmax(-1)


def one_of_each(fruit, order):
    """The photos `order`, so that the first 14 are of 14 kinds, then the next."""
    # how many photos of its kind stand before each
    before = []
    for n, i in enumerate(order[:200]):
        before.append(sum(fruit.fine[j] == fruit.fine[i] for j in order[:n]))
    # the first of each kind, then the second of each
    return [i for _, i in sorted(zip(before, order[:200]), key=lambda pair: int(pair[0]))]


def spread(chosen, count=8):
    """Some of the photos, from the first to the last: neighbours in the data set are of one
    kind."""
    return chosen[torch.linspace(0, len(chosen) - 1, min(count, len(chosen))).long()]


def draw(path, images, answers, truths, prompt):
    """Photos, the generated answers, and what they are."""
    import matplotlib.pyplot as plt

    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.2 * columns, 2.55 * rows), squeeze=False, layout="constrained"
    )
    for ax in axes.flat:
        ax.axis("off")
    below = {"fontsize": 7, "color": "gray", "ha": "center", "va": "top"}
    for ax, image, answer, truth in zip(axes.flat, images, answers, truths):
        ax.imshow(image.permute(1, 2, 0))
        # the answer above, green if it names what it is; that below
        right = truth and truth.lower() in answer.lower()
        ax.set_title(textwrap.fill(answer, 32), fontsize=9, color="tab:green" if right else "black")
        ax.text(0.5, -0.02, truth, transform=ax.transAxes, **below)
    figure.suptitle(prompt, fontsize=10)
    return figures.close(figure, path)


def confusion(path, log_p, fruit, chosen):
    """Confusion matrix: rows what it is, columns the most probable name, sorted by group."""
    import matplotlib.pyplot as plt

    # kinds, sorted by group
    kinds = range(len(fruit.fine_names))
    order = sorted(kinds, key=lambda k: (int(fruit.coarse[fruit.fine == k][0]), k))
    names = [NAMES[fruit.fine_names[k]] for k in order]
    # counts, each row a fraction of its photos
    table = torch.zeros(len(order), len(order))
    for truth, found in zip(fruit.fine[chosen], log_p.argmax(-1)):
        table[order.index(int(truth)), order.index(int(found))] += 1
    table /= table.sum(1, keepdim=True).clamp(min=1)
    # figure
    figure, ax = plt.subplots(figsize=(6.4, 5.4))
    ax.imshow(table, cmap="Blues", vmin=0, vmax=1)
    text = {"ha": "center", "va": "center", "fontsize": 6}
    for i in kinds:
        for j in kinds:
            if table[i, j] >= 0.05:
                colour = "white" if table[i, j] > 0.5 else "black"
                ax.text(j, i, f"{100 * table[i, j]:.0f}", color=colour, **text)
    ax.set_xticks(kinds, names, rotation=60, ha="right", fontsize=7)
    ax.set_yticks(kinds, names, fontsize=7)
    ax.set(xlabel="most probable answer", ylabel="what it is (rows add up to 100 %)")
    return figures.close(figure, path)
