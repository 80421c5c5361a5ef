"""Classes of pictures that teach a Flamingo: emoji in several views, coloured shapes, half of the kinds of fruit.

A class has pictures, a name, and facts: the beginning of a sentence, and how it ends (`the color is`,
`red`). Held out, with all their pictures: the emoji of the Unicode block "Transport and Map Symbols",
and every second kind of fruit; of the shapes, easy-VQA's own test pictures.

Shapes: features (P,49,D) of P pictures, images uint8 (n,3,H,W).
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from utils import data
from vlm import easy_vqa_data, fruit_photos, tower

HELDOUT_BLOCK = range(0x1F680, 0x1F700)
NAME, COLOUR, SHAPE = "this is", "the color is", "the shape is"
SHAPE_PICTURES = {"train": 500, "test": 200}  # of easy-VQA, the first so many
# Hues in degrees, up to which a saturated pixel has this colour
HUES = {
    15: "red",
    40: "orange",
    65: "yellow",
    165: "green",
    195: "teal",
    255: "blue",
    300: "purple",
    345: "pink",
    361: "red",
}


class PictureClass(NamedTuple):
    """What pictures have in common."""

    source: str  # emoji, shapes or fruit
    name: str
    pictures: np.ndarray  # rows of the features
    facts: dict  # beginning of a sentence: its end


class PictureSet(NamedTuple):
    features: torch.Tensor  # bf16 (P,49,D)
    classes: list  # of PictureClass

    def of(self, source):
        return [c for c in self.classes if c.source == source]


def affine_view(images, view, rows, seed=0):
    """A view of some pictures on white: rows of images uint8 (n,3,s,s) -> uint8 (rows,3,224,224).

    View 0 is the picture, enlarged; others are turned by up to 22 degrees, moved, made smaller or
    larger, half of them mirrored, all in a coloured light. A row's view does not depend on the others.
    """
    count = len(images)
    theta = torch.eye(2, 3).repeat(count, 1, 1)
    light = torch.ones(count, 3, 1, 1)
    if view:
        random = torch.Generator().manual_seed(1000 * seed + view)
        angle, zoom, mirror, dx, dy = torch.rand(5, count, generator=random)
        # places of the view -> places of the picture
        angle = math.pi / 8 * (2 * angle - 1)
        zoom = 0.9 + 0.7 * zoom
        side = zoom * (mirror < 0.5).float().mul(2).sub(1)
        theta[:, 0, 0] = side * angle.cos()
        theta[:, 0, 1] = -zoom * angle.sin()
        theta[:, 1, 0] = side * angle.sin()
        theta[:, 1, 1] = zoom * angle.cos()
        theta[:, 0, 2] = 0.3 * (2 * dx - 1)
        theta[:, 1, 2] = 0.3 * (2 * dy - 1)
        light = 0.7 + 0.3 * torch.rand(count, 3, 1, 1, generator=random)
    found = []
    for part in torch.as_tensor(rows).split(64):
        grid = F.affine_grid(theta[part], [len(part), 3, 224, 224], align_corners=False)
        # darkness is moved, so that what comes in from outside is white
        dark = F.grid_sample(1 - images[part].float() / 255, grid, align_corners=False)
        found.append(((1 - dark) * light[part] * 255).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(found)


def dominant_colour(image):
    """The colour of most of a picture that stands on white, uint8 (3,H,W) -> a word, or None if none has half."""
    # hue in degrees, saturation and value of each pixel that is not white
    rgb = image.reshape(3, -1).float() / 255
    rgb = rgb[:, rgb.min(0).values < 0.94]
    high, low = rgb.max(0).values, rgb.min(0).values
    r, g, b = rgb
    spread = (high - low).clamp(min=1e-6)
    sixths = torch.where(high == g, 2 + (b - r) / spread, 4 + (r - g) / spread)
    sixths = torch.where(high == r, (g - b) / spread, sixths)
    hue = 60 * sixths % 360
    # a word for each pixel
    words = np.full(len(hue), "red", dtype=object)
    for limit in sorted(HUES, reverse=True):
        words[(hue < limit).numpy()] = HUES[limit]
    warm = (hue < 45).numpy() | (hue > 345).numpy()
    words[warm & (high < 0.7).numpy() & (high - low < 0.5).numpy()] = "brown"
    words[(spread / high.clamp(min=1e-6) < 0.25).numpy()] = "gray"
    words[(high < 0.27).numpy()] = "black"
    # the most frequent one
    found, counts = np.unique(words, return_counts=True)
    if not len(found) or counts.max() < 0.5 * counts.sum():
        return None
    return str(found[counts.argmax()])


def emoji_classes(vision_tower, views, heldout, limit=0, seed=0):
    """Emoji, each a class with its views: those of the held-out block, or all others -> features, classes.

    limit: so many of them, drawn at random; 0: all.
    """
    images, names, codes = data.emoji(72)
    first = [int(code.split("-")[0], 16) for code in codes]
    rows = [i for i, code in enumerate(first) if (code in HELDOUT_BLOCK) == heldout]
    if limit:
        rows = sorted(np.random.default_rng([seed, 7]).permutation(rows)[:limit].tolist())
    parts = []
    for view in range(views):
        make = partial(affine_view, images, view, rows, seed)
        key = ("emoji", 2, view, seed, [codes[i] for i in rows])
        parts.append(tower.vision_features(vision_tower, make, key=key))
    classes = []
    for n, i in enumerate(rows):
        facts = {NAME: names[i]}
        colour = dominant_colour(images[i])
        if colour:
            facts[COLOUR] = colour
        pictures = n + len(rows) * np.arange(views)
        classes.append(PictureClass("emoji", names[i], pictures, facts))
    return torch.cat(parts), classes


def shape_classes(vision_tower, split, limit=0):
    """The 24 scenes of easy-VQA, a shape in a colour: features of the first pictures, classes.

    limit: 24 times so many pictures; 0: SHAPE_PICTURES.
    """
    count = 24 * limit or SHAPE_PICTURES[split]
    images = data.easy_vqa(split).images[:count]
    # what its questions give away
    turns = [[] for _ in range(count)]
    for question in easy_vqa_data.questions(split):
        if question.image < count:
            turns[question.image].append((question.text, question.answer))
    scenes = [easy_vqa_data.scenes_of(asked) for asked in turns]
    classes = []
    for colour, shape in easy_vqa_data.SCENES:
        pictures = [i for i, found in enumerate(scenes) if found == [(colour, shape)]]
        facts = {NAME: f"{colour} {shape}", COLOUR: colour, SHAPE: shape}
        classes.append(PictureClass("shapes", facts[NAME], np.array(pictures), facts))
    return tower.vision_features(vision_tower, images), [c for c in classes if len(c.pictures)]


def fruit_classes(vision_tower, heldout, test=False, limit=0):
    """Kinds of fruit, every second one or the others: features of training or test photos, classes.

    limit: at most so many photos of each kind; 0: all.
    """
    fruit = data.groceries(vision_tower.size)
    part = fruit_photos.split(fruit)[int(test)]
    rows = []
    classes = []
    for kind, known_as in enumerate(fruit.fine_names):
        if (kind % 2 == 1) == heldout:
            found = part[fruit.fine[part] == kind][: limit or None]
            name = fruit_photos.NAMES[known_as]
            pictures = len(rows) + np.arange(len(found))
            classes.append(PictureClass("fruit", name, pictures, {NAME: name}))
            rows += found.tolist()
    return tower.vision_features(vision_tower, fruit.images[rows]), classes


def together(*parts):
    """Parts (features, classes) -> one PictureSet; rows of later parts are counted on."""
    classes = []
    before = 0
    for features, found in parts:
        classes += [c._replace(pictures=c.pictures + before) for c in found]
        before += len(features)
    return PictureSet(torch.cat([features for features, _ in parts]), classes)


def training_set(vision_tower, cfg):
    """All that is learned from."""
    return together(
        emoji_classes(vision_tower, cfg.views, False, cfg.emoji, cfg.seed),
        shape_classes(vision_tower, "train", cfg.photos),
        fruit_classes(vision_tower, False, limit=cfg.photos),
    )


def heldout_set(vision_tower, cfg):
    """Classes that were never trained on; of the shapes, pictures that were not."""
    return together(
        emoji_classes(vision_tower, cfg.views, True, cfg.emoji, cfg.seed),
        shape_classes(vision_tower, "test", cfg.photos),
        fruit_classes(vision_tower, True, test=True, limit=cfg.photos),
    )


def ends_of_sentences():
    """{beginning: all ends that training has}, for colours and shapes."""
    colours = {*HUES.values(), "brown", "gray", "black", *easy_vqa_data.COLOURS}
    return {COLOUR: sorted(colours), SHAPE: list(easy_vqa_data.SHAPES)}
