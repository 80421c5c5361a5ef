"""What caption metrics see: real captions corrupted in known ways, scored by BLEU, ROUGE-L and CIDEr.

The metrics are in caption_metrics.py (Papineni et al. 2002; Lin 2004; Vedantam et al. 2015,
arXiv:1411.5726), those of short answers in answer_metrics.py (Antol et al. 2015, arXiv:1505.00468).
The captions are the names of emoji; each is its own only reference, so that the untouched captions
have the perfect score.

    python vlm/captions.py                         # corrupt real captions, and see which score sees it
    python vlm/captions.py --least-words 2         # names of emoji of two words and more
"""

from dataclasses import dataclass

import numpy as np

from utils import data, figures, run
from utils.run import check
from vlm import answer_metrics
from vlm.caption_metrics import rouge_l, scores, words


@dataclass(frozen=True)
class Config:
    """Corrupt real captions in known ways and see what each score makes of it."""

    # use the names of emoji that have so many words or more: four make one 4-gram
    least_words: int = 4
    draws: int = 5  # random corruptions that a point is the mean of
    seed: int = 0  # same seed, same numbers
    out: str = "outputs/captions"  # where the results go


# Corruption: words that say the same, words that say something else, and words that are lost.

SAME_OTHER = """man guy woman; woman lady man; boy lad girl; girl lass boy; child kid adult; person human cat;
cat kitty person; family household couple; smiling beaming crying; grinning smirking crying; angry furious smiling;
face visage hand; hand palm face; eyes peepers ears; open unclosed closed; closed shut open; raised lifted lowered;
lowered sunk raised; running sprinting kneeling; walking strolling kneeling; kneeling genuflecting running;
left leftward right; right rightward left; up upwards down; down downwards up; button knob box; rain drizzle sun;
islands isles territories; sun star moon; small little large; large big small; manual hand-driven motorized"""
OTHER_WORDS = {word: (same, other) for word, same, other in map(str.split, SAME_OTHER.split(";"))}


def reworded(caption, which):
    """The caption with one word exchanged (the first in the table): 0 for the same meaning, 1 for
    another."""
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


def corrupt(captions, how, share, rng):
    """Corrupted captions, each word hit with probability `share`: [str] -> [str]."""
    vocabulary = sorted({word for c in captions for word in words(c)})
    corrupted = []
    for caption in captions:
        tokens = words(caption)
        hit = rng.random(len(tokens)) < share
        corrupted.append(" ".join(how(tokens, hit, rng, vocabulary)))
    return corrupted


def corruptions(captions, rng):
    """{what was done: [str]}: corruptions that have no degree."""
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
    """Above: each score, as a share of the perfect one, against the share of words hit. Below:
    corruptions by name."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(8, 7.8))
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 2.1), hspace=0.27)
    perfect = table["nothing"]
    # a panel for each kind of corruption, a line for each score
    for i, (name, rows) in enumerate(curves.items()):
        axis = figure.add_subplot(grid[0, i])
        for score in perfect:
            line = [row[score] / perfect[score] for row in rows]
            axis.plot(shares, line, marker="o", markersize=3, label=score)
        axis.set(title=f"words {name}", xlabel="share of words", ylim=(-0.04, 1.04))
        axis.set_ylabel("share of the perfect score" if i == 0 else "")
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False, loc="lower left")
    # bars: corruptions that have no degree
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
    """Corrupt the names of the emoji, score them against the names; writes the table and the
    figure."""
    check(cfg.least_words >= 1 and cfg.draws >= 1, "--least-words and --draws must be at least 1")
    # captions: long enough, and with a word that has a synonym
    known = []
    for caption in data.emoji()[1]:
        tokens = words(caption)
        if len(tokens) >= cfg.least_words and set(tokens) & OTHER_WORDS.keys():
            known.append(caption)
    check(len(known) > 1, f"no two captions have {cfg.least_words} words; lower --least-words")
    run.seed(cfg.seed)
    folder = run.output(cfg.out, cfg)
    rng = np.random.default_rng(cfg.seed)
    references = [[c] for c in known]
    # corruptions without a degree
    corrupted = corruptions(known, rng)
    table = {name: scores(some, references) for name, some in corrupted.items()}
    # more and more words hit, means over random draws
    shares = [0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1]
    curves = {}
    for name, how in {"dropped": dropped, "replaced": replaced, "shuffled": shuffled}.items():
        curves[name] = []
        for share in shares:
            found = [scores(corrupt(known, how, share, rng), references) for _ in range(cfg.draws)]
            curves[name].append({k: float(np.mean([one[k] for one in found])) for k in found[0]})
    # figure, one caption as the example
    i = len(known) // 2
    examples = {name: some[i] for name, some in corrupted.items()}
    draw(folder / "captions.png", shares, curves, table, examples)
    # short answers
    people = ["two"] * 3 + ["2 dogs"] * 2 + ["dogs"] * 5  # how ten people answered "how many dogs?"
    answers = {}
    for answer in ("Two.", "the 2 dogs", "Dog"):
        answers[f"VQA accuracy of '{answer}'"] = answer_metrics.vqa_accuracy(answer, people)
    half = {f"{name} 0.45": rows[4] for name, rows in curves.items()}
    metrics = {"captions": len(known)} | table | half | answers
    return run.report(folder, metrics, f"open {folder}/captions.png")


if __name__ == "__main__":
    run.cli(main, Config)
