"""Few-shot accuracy of a Flamingo on classes it never learned, with controls, similar examples, and true sentences.

Two classes, some examples of each, one more picture: which of both names is likelier? With nonsense
names the examples are all there is to know them from. Two controls must not help: examples whose
names are shuffled, and examples that are pictures of other classes.

RICES, retrieval-based in-context example selection (Yang et al. 2021, arXiv:2109.05014; Alayrac et
al. 2022, arXiv:2204.14198, Sec. 2.5): the examples are the pictures most similar to the one asked
about, by the cosine of pooled vision features, the most similar last.

Shapes: features (P,N,D), pooled (P,D).
"""

import numpy as np
import torch
import torch.nn.functional as F

from vlm import flamingo_data, probe
from vlm.flamingo_episodes import evaluate, interval, name_scores, padded

EACH = (0, 1, 2)  # examples of each of two classes
CONTROLS = ("shuffled names", "other pictures")


def shots_table(model, chunks, start_id, heldout, words, cfg, on):
    """{(source, names, examples): right (trials,)} for two ways; names: nonsense, true, or a control."""
    rows = {}
    for source in ("emoji", "fruit"):
        about = (model, chunks, start_id, heldout.features, heldout.of(source), words, 2)
        # kinds of names, numbers of examples, controls
        asked = [("nonsense", each) for each in EACH] + [("true", each) for each in EACH]
        asked += [(control, 2) for control in CONTROLS]
        for names, each in asked:
            control = names if names in CONTROLS else ""
            more = {"true_names": names == "true", "control": control, "seed": cfg.seed}
            rows[source, names, 2 * each] = evaluate(*about, each, on, cfg.trials, **more)
    return rows


def numbers(rows):
    """The table as metrics: accuracy and 95 % interval, and the gain of four examples over none, paired."""
    found = {}
    for (source, names, shots), right in rows.items():
        found[f"{source}, {names}, {shots} examples"] = interval(right)
    for source in ("emoji", "fruit"):
        for names in ("nonsense", "true"):
            gain = probe.paired(rows[source, names, 4], rows[source, names, 0])
            found[f"{source}, {names}, 4 examples against 0"] = gain
    return found


def most_similar(query, pool, count):
    """RICES: rows of pool (P,D) most similar to query (D,) by cosine, the most similar last -> (count,)."""
    similarity = F.normalize(pool, dim=-1) @ F.normalize(query, dim=-1)
    return similarity.topk(count).indices.flip(0)


def centred(features, mean):
    """Pooled vision features (P,N,D) -> (P,D), from their mean: what all pictures share says nothing."""
    return features.float().mean(1) - mean


def rices(model, chunks, start_id, heldout, vision_tower, words, cfg, on, shots=4):
    """Seven kinds of fruit that never learned, nonsense names: accuracy with random examples and with similar ones, of
    other photos of the same kinds."""
    features, classes = flamingo_data.fruit_classes(vision_tower, True, limit=cfg.photos)
    known = [(k, int(i)) for k, c in enumerate(classes) for i in c.pictures]
    rows = torch.tensor([i for _, i in known])
    mean = features[rows].float().mean((0, 1))
    pool = centred(features[rows], mean)
    asked = [(k, int(i)) for k, c in enumerate(heldout.of("fruit")) for i in c.pictures]
    random = np.random.default_rng([cfg.seed, 5])
    right = {"random": [], "RICES": [], "1 nearest neighbour": []}
    for n in random.permutation(len(asked))[: cfg.trials // 2]:
        truth, picture = asked[n]
        query = centred(heldout.features[[picture]], mean)[0]
        names = [[int(i)] for i in random.choice(words, len(classes), replace=False)]
        similar = most_similar(query, pool, shots).tolist()
        drawn = random.choice(len(known), shots, replace=False).tolist()
        right["1 nearest neighbour"].append(known[similar[-1]][0] == truth)
        for way, examples in (("random", drawn), ("RICES", similar)):
            # one text for each name
            shown = [chunks.chunk("", names[known[i][0]], False) for i in examples]
            chains = [[*shown, chunks.chunk("", name)] for name in names]
            photos = torch.cat([features[rows[examples]], heldout.features[[picture]]])
            scores = name_scores(
                model, *padded(chains, start_id), photos[None].expand(len(names), -1, -1, -1), on
            )
            right[way].append(int(scores.argmax()) == truth)
    return {
        f"7 kinds, {shots} examples, {way}": interval(torch.tensor(found))
        for way, found in right.items()
    }


def facts(model, chunks, start_id, heldout, training_names, cfg, on):
    """Accuracy without examples of true sentences about held-out pictures, among all their ends in training.

    training_names: {beginning: ends}.
    """
    found = {}
    random = np.random.default_rng([cfg.seed, 6])
    for source, before in (
        ("shapes", flamingo_data.COLOUR),
        ("shapes", flamingo_data.SHAPE),
        ("emoji", flamingo_data.COLOUR),
    ):
        asked = [
            (c.facts[before], int(c.pictures[0])) for c in heldout.of(source) if before in c.facts
        ]
        if source == "shapes":
            asked = [(c.facts[before], int(i)) for c in heldout.of(source) for i in c.pictures]
        asked = [asked[i] for i in random.permutation(len(asked))[: cfg.trials // 2]]
        ends = training_names[before]
        right = []
        for answer, picture in asked:
            chains = [[chunks.chunk(before, name)] for name in ends]
            features = heldout.features[[picture]][None].expand(len(ends), -1, -1, -1)
            scores = name_scores(model, *padded(chains, start_id), features, on)
            right.append(ends[int(scores.argmax())] == answer)
        found[f"{source}, {before}"] = interval(torch.tensor(right))
    return found
