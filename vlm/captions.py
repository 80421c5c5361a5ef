"""Caption and answer metrics: BLEU, ROUGE-L and CIDEr for sentences, soft accuracy for short answers.

A caption has many right wordings, so a candidate is compared with what people wrote: which runs of n words (n-grams)
do both have? The scores differ in what they count and in what a rare word is worth. Papineni et al. 2002 (BLEU), Lin
2004 (ROUGE-L), Vedantam et al. 2015, arXiv:1411.5726 (CIDEr); Antol et al. 2015, arXiv:1505.00468 and Goyal et al.
2017, arXiv:1612.00837 (VQA accuracy); Schwenk et al. 2022, arXiv:2206.01718 (A-OKVQA). Equation numbers are theirs.

Shapes: N images, one candidate each, any number of references each; scores are (N,), or one number for BLEU.
Differences from the papers: ROUGE-L and CIDEr are those of the COCO caption evaluation (beta 1.2; CIDEr-D with sigma 6,
without its stemming). Its tokeniser is a Java program; here a regular expression gives both sides the same words.

    python vlm/captions.py                         # spoil real captions, and see which score sees it
    python vlm/captions.py --least-words 2         # names of emoji of two words and more
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from utils import data, figures, run
from utils.run import check


@dataclass(frozen=True)
class Config:
    """Damage real captions in known ways and see what each score makes of it."""

    # use the names of emoji that have so many words or more: four make one 4-gram
    least_words: int = 4
    draws: int = 5  # random damages that a point is the mean of
    seed: int = 0  # same seed, same numbers
    out: str = "outputs/captions"  # where the results go


def words(text):
    """Lower-case words and numbers, with hyphens, apostrophes and points inside them: "It's 3.5 m!" -> it's 3.5 m."""
    return re.findall(r"\w+(?:['’.-]\w+)*", text.lower())


def ngrams(tokens, n):
    """How often each run of n words occurs."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def pairs(candidates, references):
    """Sentences -> [(words of the candidate, [words of each reference])], one entry an image."""
    check(
        len(candidates) == len(references) > 0,
        "one candidate and one list of references for each image",
    )
    check(
        not any(isinstance(r, str) for r in references),
        "the references of an image are a list, even if it is one",
    )
    check(all(references), "every image needs at least one reference")
    return [(words(c), [words(r) for r in rs]) for c, rs in zip(candidates, references)]


def bleu(candidates, references, n=4):
    """BLEU-1 ... BLEU-n of the whole corpus, (n,) in 0..1. Papineni et al. 2002; counts are added over the images."""
    match, total, length, reference_length = np.zeros(n), np.zeros(n), 0, 0
    for candidate, refs in pairs(candidates, references):
        for k in range(1, n + 1):
            counts, most = ngrams(candidate, k), Counter()
            for ref in refs:
                most |= ngrams(ref, k)  # the largest count in any one reference
            # clipped: "the the the" gets no more than is there. Sec. 2.1
            match[k - 1] += (counts & most).total()
            total[k - 1] += counts.total()
        length += len(candidate)
        # The closest, or shorter
        reference_length += min((abs(len(r) - len(candidate)), len(r)) for r in refs)[1]
    p = match / np.maximum(total, 1)
    # Sec. 2.2
    penalty = 1 if length > reference_length else math.exp(1 - reference_length / max(length, 1e-9))
    with np.errstate(divide="ignore"):  # log 0: one order without any match makes it 0
        # Sec. 2.3, uniform weights
        return penalty * np.exp(np.log(p).cumsum() / np.arange(1, n + 1))


def common(a, b):
    """Length of the longest common subsequence: words of both in the same order, gaps allowed."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = row
        row = [0]
        for j, y in enumerate(b):
            row.append(before[j] + 1 if x == y else max(before[j + 1], row[j]))
    return row[-1]


def rouge_l(candidates, references, beta=1.2):
    """ROUGE-L of each image, (N,) in 0..1; of several references the best recall and the best precision count."""
    scores = []
    for candidate, refs in pairs(candidates, references):
        found = [common(candidate, r) for r in refs]
        recall = max(f / max(len(r), 1) for f, r in zip(found, refs))  # Lin 2004, Eq. 2
        precision = max(found) / max(len(candidate), 1)  # Eq. 3
        # Eq. 4
        scores.append((1 + beta**2) * recall * precision / max(recall + beta**2 * precision, 1e-12))
    return np.array(scores)


def cider(candidates, references, n=4, sigma=6.0):
    """CIDEr-D of each image, (N,) in 0..10: the cosine of n-gram vectors in which what all images share weighs little.

    Raises UserError for fewer than two images: how rare an n-gram is, is counted over the references of all images.
    """
    corpus = pairs(candidates, references)
    check(len(corpus) > 1, "CIDEr counts in how many images an n-gram occurs: give at least two")
    scores = np.zeros(len(corpus))
    for k in range(1, n + 1):
        images = Counter(
            gram for _, refs in corpus for gram in set().union(*(ngrams(r, k) for r in refs))
        )
        idf = lambda gram: math.log(len(corpus) / max(images[gram], 1))  # noqa: B023, E731
        vector = lambda tokens: {gram: tf * idf(gram) for gram, tf in ngrams(tokens, k).items()}  # noqa: B023, E731  Eq. 1
        for i, (candidate, refs) in enumerate(corpus):
            g, score = vector(candidate), 0.0
            for ref in refs:
                r = vector(ref)
                # CIDEr-D
                clipped = sum(
                    min(weight, r.get(gram, 0)) * r.get(gram, 0) for gram, weight in g.items()
                )
                norm = math.hypot(*g.values()) * math.hypot(*r.values())
                length = math.exp(-((len(candidate) - len(ref)) ** 2) / (2 * sigma**2))  # CIDEr-D
                score += length * clipped / norm if norm else 0.0  # Eq. 2
            scores[i] += 10 * score / len(refs) / n  # Eq. 3: the mean over n
    return scores


def scores(candidates, references):
    """{"BLEU-1", "BLEU-4", "ROUGE-L" in 0..1, "CIDEr" in 0..10} of a corpus."""
    b = bleu(candidates, references)
    mean = {
        "ROUGE-L": rouge_l(candidates, references).mean(),
        "CIDEr": cider(candidates, references).mean(),
    }
    return {name: float(x) for name, x in ({"BLEU-1": b[0], "BLEU-4": b[3]} | mean).items()}


# Short answers. The tables are those of the official VQA evaluation.

NUMBERS = {
    word: str(i)
    for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
NUMBERS["none"] = "0"
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
SHORT = {  # ending: the words that take it
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "'ve": "could might must not should they we what where who would you",
    "'d've": "he it she somebody someone something there they we who you",
    "": "ma'am o'clock 'ow's'at 'twas y'all y'all'll y'all'd've",
}
WHOLE = [word + ending for ending, stems in SHORT.items() for word in stems.split()]
# A word that lacks one of its apostrophes gets it back: dont -> don't, couldnt've -> couldn't've.
CONTRACTIONS = {w[:i] + w[i + 1 :]: w for w in WHOLE for i in range(len(w)) if w[i] == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # a slip of the official table, kept: it is the measure


def normalise(answer):
    """An answer as the VQA evaluation compares it: "Two dogs." -> "2 dogs", "the t-shirt" -> "t shirt"."""
    text = re.sub(r"[\n\t]", " ", answer).strip()
    number, out = re.search(r"\d,\d", text), text
    # It goes where it stands beside a space or a number has a comma, else becomes a space
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    out = re.sub(r"\.(?!\d)", "", out)  # the point of 3.5 stays
    found = [NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in found if word not in ARTICLES)


def vqa_accuracy(answer, answers):
    """0..1: right if three people said so. Mean over leaving each person out of min(others who agree / 3, 1).

    Ten people: 0, 0.3, 0.6, 0.9, 1 for 0, 1, 2, 3, 4 and more who gave this answer. Both sides are normalised; the
    official code changes only the punctuation of the people's answers, and only if they differ.
    """
    check(
        len(answers) > 1, "VQA accuracy leaves one of the people out: it needs two answers or more"
    )
    same = [normalise(a) == normalise(answer) for a in answers]
    return sum(min((sum(same) - own) / 3, 1) for own in same) / len(same)


def direct_answer_accuracy(answer, answers):
    """A-OKVQA without choices, 0..1: min(people who said exactly this / 3, 1), nobody left out."""
    return min(sum(a == answer for a in answers) / 3, 1)


def likeliest(log_p, lengths=None):
    """Index of the choice with the highest log-likelihood; with lengths (in tokens), of the highest mean per token."""
    return int(
        np.argmax(np.asarray(log_p, float) / (1 if lengths is None else np.asarray(lengths)))
    )


NEGATIONS = {"not", "no", "nor", "neither", "never", "without", "cannot"}


def match_choice(text, choices):
    """Index of the choice that a free text names, or None, which counts as wrong.

    It names a choice by being it, by its letter, "(b)", or by its words anywhere; of several the longest, if no other
    is as long. What the text denies it does not name: "not a cat, a dog" is the dog.
    """
    same = [i for i, c in enumerate(choices) if c.strip().lower() == text.strip().lower()]
    if len(same) == 1:
        return same[0]
    letter = re.fullmatch(r"\(?([a-z])[).:]?", text.strip().lower())
    if letter and ord(letter[1]) - ord("a") < len(choices):
        return ord(letter[1]) - ord("a")
    said = f" {normalise(text)} "
    wanted = [f" {normalise(c)} " for c in choices]
    inside = sorted(
        (-len(c), i)
        for i, c in enumerate(wanted)
        if c.strip() and c in said and not denied(text, c)
    )
    return (
        None if not inside or (len(inside) > 1 and inside[0][0] == inside[1][0]) else inside[0][1]
    )


def denied(text, choice):
    """Does a negation stand before the choice in every clause that has it? Clauses end at , . ; : ! ? and "but"."""
    clauses = [f" {normalise(part)} " for part in re.split(r"[,.;:!?](?:\s|$)|\bbut\b", text)]
    before = [clause.partition(choice)[0].split() for clause in clauses if choice in clause]
    return bool(before) and all(
        any(w in NEGATIONS or w.endswith("n't") for w in words) for words in before
    )


# Damage: words that say the same, words that say something else, and words that are lost.

SAME_OTHER = """man guy woman; woman lady man; boy lad girl; girl lass boy; child kid adult; person human cat;
cat kitty person; family household couple; smiling beaming crying; grinning smirking crying; angry furious smiling;
face visage hand; hand palm face; eyes peepers ears; open unclosed closed; closed shut open; raised lifted lowered;
lowered sunk raised; running sprinting kneeling; walking strolling kneeling; kneeling genuflecting running;
left leftward right; right rightward left; up upwards down; down downwards up; button knob box; rain drizzle sun;
islands isles territories; sun star moon; small little large; large big small; manual hand-driven motorized"""
OTHER_WORDS = {word: (same, other) for word, same, other in map(str.split, SAME_OTHER.split(";"))}


def reworded(caption, which):
    """The caption with one word exchanged (the first in the table): 0 for the same meaning, 1 for another."""
    tokens = words(caption)
    i = next(i for i, word in enumerate(tokens) if word in OTHER_WORDS)
    return " ".join(tokens[:i] + [OTHER_WORDS[tokens[i]][which]] + tokens[i + 1 :])


def dropped(tokens, hit, rng, vocabulary):
    return [word for word, gone in zip(tokens, hit) if not gone]


def replaced(tokens, hit, rng, vocabulary):
    return [str(rng.choice(vocabulary)) if gone else word for word, gone in zip(tokens, hit)]


def shuffled(tokens, hit, rng, vocabulary):
    """The words that were hit change places among themselves."""
    moved = iter(rng.permutation([word for word, gone in zip(tokens, hit) if gone]).tolist())
    return [next(moved) if gone else word for word, gone in zip(tokens, hit)]


def damage(captions, how, share, rng):
    """Each word is hit with probability `share`: [str] -> [str]."""
    vocabulary = sorted({word for c in captions for word in words(c)})
    spoiled = (
        how(tokens := words(c), rng.random(len(tokens)) < share, rng, vocabulary) for c in captions
    )
    return [" ".join(tokens) for tokens in spoiled]


def whole_captions(captions, rng):
    """{what was done: [str]}: damages that have no degree."""
    references = [[c] for c in captions]
    typical = max(captions, key=lambda c: rouge_l([c] * len(captions), references).mean())
    return {
        "nothing": captions,
        "one word, same meaning": [reworded(c, 0) for c in captions],
        "one word, other meaning": [reworded(c, 1) for c in captions],
        "words backwards": [" ".join(words(c)[::-1]) for c in captions],
        "first half": [" ".join(words(c)[: -(-len(words(c)) // 2)]) for c in captions],
        "said twice": [f"{c} {c}" for c in captions],
        "another image's": list(np.roll(rng.permutation(captions), 1)),
        "the same for all": [typical] * len(captions),
    }


def draw(path, shares, curves, table, examples):
    """Above: each score, as a share of that of the untouched captions, against the damage. Below: damages by name."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(8, 7.8))
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 2.1), hspace=0.27)
    perfect = table["nothing"]
    for i, (name, rows) in enumerate(curves.items()):
        axis = figure.add_subplot(grid[0, i])
        for score in perfect:
            axis.plot(
                shares,
                [row[score] / perfect[score] for row in rows],
                marker="o",
                markersize=3,
                label=score,
            )
        axis.set(title=f"words {name}", xlabel="share of words", ylim=(-0.04, 1.04))
        axis.set_ylabel("share of the perfect score" if i == 0 else "")
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False, loc="lower left")
    axis = figure.add_subplot(grid[1, :])
    for j, score in enumerate(perfect):
        at = [i + 0.18 * (j - 1.5) for i in range(len(table))]
        axis.barh(at, [row[score] / perfect[score] for row in table.values()], height=0.17)
    axis.set_yticks(range(len(table)), [f"{name}\n{examples[name]}" for name in table], fontsize=8)
    axis.tick_params(left=False)
    axis.invert_yaxis()
    axis.set(xlabel="share of the perfect score", xlim=(0, 1.01))
    figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Damage the names of the emoji, score them against the names; writes the table and the figure."""
    check(cfg.least_words >= 1 and cfg.draws >= 1, "--least-words and --draws must be at least 1")
    known = [
        c
        for c in data.emoji()[1]
        if len(words(c)) >= cfg.least_words and set(words(c)) & OTHER_WORDS.keys()
    ]
    check(len(known) > 1, f"no two captions have {cfg.least_words} words; lower --least-words")
    run.seed(cfg.seed)
    folder, rng = run.output(cfg.out, cfg), np.random.default_rng(cfg.seed)
    references = [[c] for c in known]
    spoiled = whole_captions(known, rng)
    table, i = {name: scores(some, references) for name, some in spoiled.items()}, len(known) // 2
    shares, curves = [0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1], {}
    for name, how in {"dropped": dropped, "replaced": replaced, "shuffled": shuffled}.items():
        draws = [
            [scores(damage(known, how, s, rng), references) for _ in range(cfg.draws)]
            for s in shares
        ]
        curves[name] = [
            {k: float(np.mean([d[k] for d in some])) for k in some[0]} for some in draws
        ]
    draw(
        folder / "captions.png",
        shares,
        curves,
        table,
        {name: some[i] for name, some in spoiled.items()},
    )
    people = ["two"] * 3 + ["2 dogs"] * 2 + ["dogs"] * 5  # how ten people answered "how many dogs?"
    answers = {
        f"VQA accuracy of '{a}'": vqa_accuracy(a, people) for a in ("Two.", "the 2 dogs", "Dog")
    }
    half = {f"{name} 0.45": rows[4] for name, rows in curves.items()}
    return run.report(
        folder, {"captions": len(known)} | table | half | answers, f"open {folder}/captions.png"
    )


if __name__ == "__main__":
    run.cli(main, Config)
