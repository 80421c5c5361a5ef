"""Baselines of easy-VQA: what is reached without a model that sees and speaks.

The majority class; the most frequent training answer to the same words, without the picture (Goyal et
al. 2017, arXiv:1612.00837, Sec. 4); and a linear probe of the vision features (Alain & Bengio 2016,
arXiv:1610.01644), whose colour and shape answer every question by rule.

Shapes: features (P,N,D) of P pictures.
"""

from collections import Counter

import torch

from vlm import easy_vqa_data, probe, views
from vlm.easy_vqa_data import COLOURS, SHAPES


def majority_class(train, listed):
    """Majority-class baseline: the most frequent training answer, to every question."""
    ((answer, _),) = Counter(question.answer for question in train).most_common(1)
    return [answer] * len(listed)


def question_only(train, listed):
    """Question-only baseline: the most frequent training answer to the same words, no picture."""
    counts = {}
    for question in train:
        counts.setdefault(question.text, Counter())[question.answer] += 1
    (fallback,) = majority_class(train, [None])
    return [counts[q.text].most_common(1)[0][0] if q.text in counts else fallback for q in listed]


def known_scenes(listed):
    """{picture: (colour, shape)} of pictures that their own questions and answers settle."""
    turns = {}
    for question in listed:
        turns.setdefault(question.image, []).append((question.text, question.answer))
    scenes = {image: easy_vqa_data.scenes_of(asked) for image, asked in turns.items()}
    return {image: found[0] for image, found in scenes.items() if len(found) == 1}


def picture_features(vision_tower, split, numbers):
    """Vision features of pictures of a split -> bf16 (len(numbers),N,D), kept for the next time."""
    paths = [easy_vqa_data.picture(split, i) for i in numbers]
    return views.features(vision_tower, paths).tensor()[0]


def linear_probe(x, scenes, heldout):
    """Linear probe: features (P,D) of pictures of known scenes -> scenes of the held-out ones."""
    parts = []
    for names, own in ((COLOURS, 0), (SHAPES, 1)):
        y = torch.tensor([names.index(scene[own]) for scene in scenes])
        best = probe.probe(x, y, heldout).argmax(-1).tolist()
        parts.append([names[i] for i in best])
    return list(zip(*parts))


def probe_answers(vision_tower, train, listed, images):
    """Answers of the linear probe: it tells colour and shape of each picture, a rule the rest."""
    # training pictures of known scenes, among the first so many
    numbers = range(min(images, 1 + max(question.image for question in train)))
    known = known_scenes(train)
    x = picture_features(vision_tower, "train", numbers).float().mean(1)
    kept = [i for i in numbers if i in known]
    # pictures that are asked about
    asked = sorted({question.image for question in listed})
    heldout = picture_features(vision_tower, "test", asked).float().mean(1)
    scenes = linear_probe(x[kept], [known[i] for i in kept], heldout)
    scene = dict(zip(asked, scenes))
    return [easy_vqa_data.answer_for(q.text, scene[q.image]) for q in listed]
