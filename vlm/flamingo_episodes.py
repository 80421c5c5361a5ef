"""Episodes: chains of pictures whose names are drawn anew for each chain, so that only the examples tell them.

Matching networks train as they are tested (Vinyals et al. 2016, arXiv:1606.04080, Sec. 2.2); with
nonsense names for a language model that reads pictures, it is fast binding: Tsimpoukelli et al. 2021,
arXiv:2106.13884, Sec. 4.3. In an episode of W ways each of W classes has a word as its name, `dax` or
`wug`; the name of a picture is a target from the second picture of its class on.

RICES puts the examples in front that look most like the picture asked about: Yang et al. 2021,
arXiv:2109.05014, Sec. 2.

Shapes: B chains of J pictures, ids (B,T), features (B,J,N,D), scores (B,W).
"""

import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils import run
from vlm import easy_vqa_score, few_shot, flamingo_data

NAMES = ("", "", "this is a")  # what stands before a name: two of three times nothing
NEIGHBOURS = 20  # emoji of similar code points look alike: hard negatives
WORDS = re.compile("[a-z]{3,9}")


def nonsense_names(tokenizer, heldout=False, seed=5):
    """English words of one token each, as names for pictures that have nothing to do with them -> list of ids.
    400 are held out from training."""
    known = sorted(tokenizer.get_vocab().items())
    space = tokenizer.tokenize(" a")[0][0]
    found = [i for text, i in known if text[:1] == space and WORDS.fullmatch(text[1:])]
    order = np.random.default_rng(seed).permutation(found)
    return order[:400] if heldout else order[400:4400]


class Chunks:
    """`<image> TEXT NAME<|endofchunk|>` as ids, and which of them are the name and the end; kept once tokenized."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.image_id, self.end_id = tokenizer.convert_tokens_to_ids([few_shot.IMAGE, few_shot.END])
        self.known = {}

    def ids(self, text):
        """Text behind a space -> ids; "" has none."""
        if text not in self.known:
            written = f" {text}" if text else ""
            self.known[text] = self.tokenizer(written, add_special_tokens=False).input_ids
        return self.known[text]

    def chunk(self, before, name, is_target=True):
        """Text, name (text or ids) -> ids, and whether each is a target."""
        words = [self.image_id, *self.ids(before)]
        answer = [*(self.ids(name) if isinstance(name, str) else name), self.end_id]
        return words + answer, [False] * len(words) + [is_target] * len(answer)


def padded(chains, start_id):
    """Chains of chunks -> ids (B,T), which are supervised (B,T); padding on the right."""
    ids = [torch.tensor([start_id] + sum((c[0] for c in chain), [])) for chain in chains]
    supervised = [torch.tensor([False] + sum((c[1] for c in chain), [])) for chain in chains]
    rows = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=start_id)
    targets = nn.utils.rnn.pad_sequence(supervised, batch_first=True, padding_value=False)
    return rows, targets


def draw_classes(random, classes, ways):
    """`ways` classes of one source: fruit now and then; emoji half of the time neighbours by code point."""
    source = "fruit" if random.random() < 0.25 else "emoji"
    pool = [c for c in classes if c.source == source]
    if source == "emoji" and random.random() < 0.5:
        at = random.integers(len(pool) - NEIGHBOURS)
        pool = pool[at : at + NEIGHBOURS]
    return [pool[i] for i in random.choice(len(pool), ways, replace=False)]


def episode_batch(random, chunks, start_id, classes, words, count, length, most_ways):
    """Episodes to learn from -> ids (B,T), supervised (B,T), pictures (B,J).

    Three of four chains have nonsense names, the fourth true ones. A name is a target where its class
    was in the chain before: there the examples tell it.
    """
    chains = []
    photos = np.zeros((count, length), int)
    for b in range(count):
        ways = random.integers(2, most_ways + 1)
        shown = draw_classes(random, classes, ways)
        # a name for each class of this chain, and a sentence that it ends
        names = [[int(i)] for i in random.choice(words, ways, replace=False)]
        before = NAMES[random.integers(len(NAMES))]
        if random.random() < 0.25:
            names = [c.name for c in shown]
        # pictures in any order
        chain = []
        seen = set()
        for j in range(length):
            k = int(random.integers(ways))
            photos[b, j] = random.choice(shown[k].pictures)
            chain.append(chunks.chunk(before, names[k], k in seen))
            seen.add(k)
        chains.append(chain)
    return *padded(chains, start_id), torch.from_numpy(photos)


def caption_batch(random, chunks, start_id, classes, count):
    """Facts to learn: `count` pictures with a true sentence each, in chains of one to four -> ids, supervised,
    pictures (B,J). Targets are the ends of the sentences."""
    length = int(random.integers(1, 5))
    sources = {
        name: [c for c in classes if c.source == name] for name in ("emoji", "shapes", "fruit")
    }
    chains = []
    photos = np.zeros((count // length, length), int)
    for b in range(len(photos)):
        chain = []
        for j in range(length):
            pool = sources[random.choice(list(sources), p=(0.5, 0.25, 0.25))]
            shown = pool[random.integers(len(pool))]
            photos[b, j] = random.choice(shown.pictures)
            before = list(shown.facts)[random.integers(len(shown.facts))]
            name = shown.facts[before]
            # a name may stand alone
            alone = before == flamingo_data.NAME and random.random() < 0.3
            chain.append(chunks.chunk("" if alone else before, name))
        chains.append(chain)
    return *padded(chains, start_id), torch.from_numpy(photos)


@torch.no_grad()
def name_scores(model, ids, supervised, features, on):
    """log p of the supervised tokens together, of each text (B,T) with features (B,J,N,D) -> (B,)."""
    with run.autocast(on):
        states = model.states(ids.to(on), model.resample(features.float().to(on)))
        # the state of a token predicts the next one
        is_target = supervised[:, 1:]
        logits = model.head(states[:, :-1][is_target.to(on)]).float().cpu()
    log_p = -F.cross_entropy(logits, ids[:, 1:][is_target], reduction="none")
    of_text = is_target.nonzero()[:, 0]
    return torch.zeros(len(ids)).index_add_(0, of_text, log_p)


def draw_trial(random, classes, words, ways, each, true_names, control):
    """One question: names of W classes, examples (class, picture) in any order, the class and picture asked about.

    control: "shuffled names", each example has any of the names; "other pictures", the examples are
    pictures of classes that are not asked about.
    """
    pick = random.choice(len(classes), 2 * ways, replace=False) if control else None
    if pick is None:
        pick = random.choice(len(classes), ways, replace=False)
    shown = [classes[i] for i in pick]
    names = [c.name for c in shown[:ways]]
    if not true_names:
        names = [[int(i)] for i in random.choice(words, ways, replace=False)]
    asked = int(random.integers(ways))
    # no picture is there twice
    query, *_ = random.permutation(shown[asked].pictures)
    examples = []
    for k in range(ways):
        source = shown[ways + k] if control == "other pictures" else shown[k]
        for picture in random.permutation(source.pictures[source.pictures != query])[:each]:
            name = random.integers(ways) if control == "shuffled names" else k
            examples.append((int(name), int(picture)))
    order = random.permutation(len(examples))
    return names, [examples[i] for i in order], asked, int(query)


def evaluate(
    model,
    chunks,
    start_id,
    features,
    classes,
    words,
    ways,
    each,
    on,
    trials=300,
    true_names=False,
    control="",
    seed=0,
):
    """W-way accuracy with `each` examples of each class, among the W names by likelihood -> right (trials,).

    0 examples: the names are all that there is; with nonsense names that is chance, 1 / W.
    """
    random = np.random.default_rng([seed, 3])
    right = []
    for start in range(0, trials, 25):
        chains = []
        photos = []
        answers = []
        # a text for each possible name
        for _ in range(min(25, trials - start)):
            names, examples, asked, query = draw_trial(
                random, classes, words, ways, each, true_names, control
            )
            shown = [chunks.chunk("", names[k], False) for k, _ in examples]
            chains += [[*shown, chunks.chunk("", name)] for name in names]
            photos += [[picture for _, picture in examples] + [query]] * ways
            answers.append(asked)
        ids, supervised = padded(chains, start_id)
        scores = name_scores(model, ids, supervised, features[torch.tensor(photos)], on)
        right += (scores.view(-1, ways).argmax(1) == torch.tensor(answers)).tolist()
    return torch.tensor(right)


def interval(right):
    """Accuracy of answers, right or wrong (trials,), and its 95 % interval (Wilson's)."""
    accuracy = float(right.float().mean())
    low, high = easy_vqa_score.wilson(accuracy, len(right))
    return {"accuracy": accuracy, "low": low, "high": high}
