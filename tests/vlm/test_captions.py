"""vlm/caption_metrics.py, answer_metrics.py, captions.py: BLEU, ROUGE-L and CIDEr of COCO; VQA accuracy."""

import itertools
import json
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from utils import data
from utils.run import UserError
from vlm import answer_metrics, caption_metrics, captions


def corpus(images=40, references=3):
    """Names of emoji as references; candidates are spoiled ones, among them a copy, an empty and a strange one."""
    rng = random.Random(0)
    names = [
        " ".join(caption_metrics.words(c))
        for c in data.emoji()[1]
        if len(caption_metrics.words(c)) >= 3
    ]
    refs = [rng.sample(names, rng.randint(1, references)) for _ in range(images)]
    vocabulary = [w for rs in refs for r in rs for w in r.split()]
    made = []
    for rs in refs:
        words = rng.choice(rs).split() + rng.choices(vocabulary, k=rng.randint(0, 4))
        made.append(" ".join(w for w in words if rng.random() < 0.8))
    made[:3] = refs[0][0], "", "unheard of"
    return made, refs


def coco(scorer, made, refs):
    """The library's class on the same sentences, cut at spaces."""
    gts, res = dict(enumerate(refs)), {i: [c] for i, c in enumerate(made)}
    verbose = {"verbose": 0} if isinstance(scorer, Bleu) else {}
    return [torch.tensor(np.array(x)) for x in scorer.compute_score(gts, res, **verbose)]


@pytest.mark.parametrize("references", [1, 5])
def test_the_scores_are_those_of_the_coco_evaluation(parity, references):
    made, refs = corpus(references=references)
    assert [
        " ".join(caption_metrics.words(c)) for c in made
    ] == made  # both sides see the same words
    whole, _ = coco(Bleu(4), made, refs)
    assert whole.min() > 0.01
    parity(
        "Captions",
        "caption_metrics.bleu",
        "pycocoevalcap Bleu",
        torch.tensor(caption_metrics.bleu(made, refs)),
        whole,
    )
    mean, each = coco(Rouge(), made, refs)
    mine = torch.tensor(caption_metrics.rouge_l(made, refs))
    parity(
        "Captions",
        "caption_metrics.rouge_l",
        "pycocoevalcap Rouge",
        [mine.mean(), mine],
        [mean, each],
    )
    mean, each = coco(Cider(), made, refs)
    mine = torch.tensor(caption_metrics.cider(made, refs))
    assert mine.max() > 5 and mine.min() == 0
    parity(
        "Captions",
        "caption_metrics.cider",
        "pycocoevalcap Cider",
        [mine.mean(), mine],
        [mean, each],
    )


def test_no_4_gram_in_common_is_nought_where_the_library_says_nearly():
    made, refs = ["a red cat sits here", "two dogs"], [["a cat red here sits"], ["dogs two"]]
    assert caption_metrics.bleu(made, refs)[3] == 0
    assert 0 < coco(Bleu(4), made, refs)[0][3] < 1e-2


def test_bleu_of_the_papers_example():
    """Papineni et al. 2002, Sec. 2.1: seven times "the" has a clipped precision of 2/7."""
    refs = [["The cat is on the mat.", "There is a cat on the mat."]]
    assert caption_metrics.bleu(["the the the the the the the"], refs, 1)[0] == pytest.approx(2 / 7)


def test_a_short_candidate_pays_and_a_long_one_does_not():
    ref = [["a b c d e f"]]
    assert caption_metrics.bleu(["a b c"], ref, 1)[0] == pytest.approx(math.exp(1 - 6 / 3))
    assert caption_metrics.bleu(["a b c d e f"], ref, 4) == pytest.approx(np.ones(4))
    # the closest length counts, and of two as close the shorter one
    assert caption_metrics.bleu(["a b c d e"], [["a b c d e f g", "a b c"]], 1)[0] == 1
    assert caption_metrics.bleu(["a b c d e"], [["a b c d e f", "a"]], 1)[0] == pytest.approx(
        math.exp(1 - 6 / 5)
    )
    assert caption_metrics.bleu([""], ref, 4).tolist() == [0, 0, 0, 0]


def test_bleu_adds_counts_and_does_not_average_sentences():
    made, refs = ["a b c d", "x y"], [["a b c d"], ["p q"]]
    assert caption_metrics.bleu(made, refs, 1)[0] == pytest.approx(4 / 6)
    assert np.mean([caption_metrics.bleu([m], [r], 1)[0] for m, r in zip(made, refs)]) == 0.5


def test_the_longest_common_subsequence_is_that_of_trying_all():
    rng = random.Random(0)
    for _ in range(60):
        a, b = (rng.choices("xyz", k=rng.randint(0, 6)) for _ in range(2))
        parts = lambda s: {p for n in range(len(s) + 1) for p in itertools.combinations(s, n)}  # noqa: E731
        assert caption_metrics.lcs_length(a, b) == max(len(p) for p in parts(a) & parts(b))


def test_rouge_l_leans_to_recall():
    # F of 1 and 1/2, and of 1/2 and 1
    short, long = caption_metrics.rouge_l(["a b", "a b c d e f g h"], [["a b c d"]] * 2)
    assert short == pytest.approx(2.44 * 0.5 / (0.5 + 1.44)) and long == pytest.approx(
        2.44 * 0.5 / (1 + 1.44 * 0.5)
    )
    assert long > short


def test_cider_of_copies_is_ten_and_common_words_weigh_nothing():
    refs = [["a red cat sits here"], ["a big dog runs away"], ["a small bird flies off"]]
    assert caption_metrics.cider([r[0] for r in refs], refs) == pytest.approx(np.full(3, 10))
    # It stands in every image's reference
    assert caption_metrics.cider(["a", "a", "a"], refs).tolist() == [0, 0, 0]
    again = caption_metrics.cider(["cat cat cat cat cat", "", ""], refs)[0]
    # Repeating a rare word gains little
    assert again < caption_metrics.cider(["a red cat sits here", "", ""], refs)[0] / 5


def test_a_length_apart_by_sigma_costs_as_the_gaussian_says():
    refs = [["p q r s t u v"], ["x y z"]]
    cut, whole = (caption_metrics.cider(["p q r s t", ""], refs, sigma=s)[0] for s in (2.0, 1e9))
    assert cut / whole == pytest.approx(math.exp(-0.5))


def test_words_are_cut_as_the_docstring_says():
    assert caption_metrics.words("It's 3.5 m, two-hump CAMEL!") == [
        "it's",
        "3.5",
        "m",
        "two-hump",
        "camel",
    ]
    assert caption_metrics.words("woman’s hat...") == ["woman’s", "hat"]


@pytest.mark.parametrize("made, refs", [([], []), (["a"], []), (["a"], ["a b"]), (["a"], [[]])])
def test_bad_input_is_said_in_one_line(made, refs):
    with pytest.raises(UserError):
        caption_metrics.bleu(made, refs)


def test_cider_of_one_image_is_refused():
    with pytest.raises(UserError, match="at least two"):
        caption_metrics.cider(["a cat"], [["a cat"]])


NORMAL = {
    "Two dogs.": "2 dogs", "The T-shirt": "t shirt", "a cat and an apple": "cat and apple", "none": "0",
    "dont know": "don't know", "1,000": "1000", "3.5": "3.5", "a/c": "c", "yes , sir": "yes sir", "Mr. T": "mr t",
    "couldntve": "couldntve", "couldnt've": "couldn't've", "it's": "it's", " white\nand\tred ": "white and red",
    "black&white": "black&white", "o'clock": "o'clock", "10 oclock": "10 o'clock", "": "", "?": "", "eleven": "eleven",
    "t-shirt, blue-ish": "t shirt blue ish", "1,000 t-shirts": "1000 tshirts", "somebody'd": "somebodyd", "U.S.": "us",
}  # fmt: skip


@pytest.mark.parametrize("answer, expected", NORMAL.items())
def test_known_answers_are_normalised(answer, expected):
    assert answer_metrics.normalise(answer) == expected


def second_normaliser(answer):
    """The same rules told another way: letter by letter, then word by word with the apostrophes put back by search."""
    text = " ".join(answer.replace("\t", "\n").split("\n")).strip()
    neighbours = list(zip(text, text[1:]))
    glued = any(
        a.isdigit() and b == "," and c.isdigit() for a, b, c in zip(text, text[1:], text[2:])
    )
    out = []
    for letter in text:
        if letter in answer_metrics.PUNCTUATION:
            out.append(
                "" if glued or (letter, " ") in neighbours or (" ", letter) in neighbours else " "
            )
        else:
            out.append(letter)
    flat = "".join(out)
    flat = "".join(
        "" if x == "." and not flat[i + 1 : i + 2].isdigit() else x for i, x in enumerate(flat)
    )
    done = []
    for word in flat.lower().split():
        digits = "zero one two three four five six seven eight nine ten".split()
        word = "0" if word == "none" else str(digits.index(word)) if word in digits else word
        lacking = [
            w
            for w in answer_metrics.WHOLE
            if any(w[:i] + w[i + 1 :] == word for i, x in enumerate(w) if x == "'")
        ]
        word = "somebodyd" if word == "somebody'd" else lacking[0] if lacking else word
        done += [] if word in ("a", "an", "the") else [word]
    return " ".join(done)


def test_a_second_normaliser_says_the_same_of_random_answers():
    rng = random.Random(0)
    parts = [
        *answer_metrics.CONTRACTIONS,
        *answer_metrics.NUMBERS,
        "a",
        "an",
        "The",
        "cat",
        "T",
        "3.5",
        "1,000",
        "x",
        "e.g.",
        "10",
    ]
    parts += [*answer_metrics.PUNCTUATION, ".", "'", " ", "\n", "\t"]
    for _ in range(3000):
        answer = "".join(
            rng.choice(parts) + rng.choice(["", " "]) for _ in range(rng.randint(0, 6))
        )
        assert answer_metrics.normalise(answer) == second_normaliser(answer), repr(answer)


def test_the_table_of_contractions_has_the_size_and_the_ends_of_the_official_one():
    """120 entries there; four begin with a capital, which no lower-case word can match, and two change nothing."""
    assert len(answer_metrics.CONTRACTIONS) == 120 - 4 - 2
    assert (
        answer_metrics.CONTRACTIONS["aint"] == "ain't"
        and answer_metrics.CONTRACTIONS["youve"] == "you've"
    )
    assert (
        answer_metrics.CONTRACTIONS["'ow'sat"] == "'ow's'at"
        and answer_metrics.CONTRACTIONS["yall'd've"] == "y'all'd've"
    )
    assert (
        not {"were", "well", "its", "shed", "shell", "ill", "id", "wed", "hell"}
        & answer_metrics.CONTRACTIONS.keys()
    )


@pytest.mark.parametrize("agree, expected", enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]))
def test_soft_accuracy_of_ten_people(agree, expected):
    """The closed form of the official metric, and the mean over all ten groups of nine."""
    people = ["red"] * agree + ["blue"] * (10 - agree)
    nines = list(itertools.combinations(people, 9))
    by_hand = sum(min(Fraction(group.count("red"), 3), 1) for group in nines) / len(nines)
    assert (
        answer_metrics.vqa_accuracy("Red.", people)
        == pytest.approx(expected)
        == pytest.approx(float(by_hand))
    )


def test_soft_accuracy_normalises_both_sides():
    assert answer_metrics.vqa_accuracy("two", ["2", "The two", "2.", "two!"] + ["x"] * 6) == 1
    with pytest.raises(UserError):
        answer_metrics.vqa_accuracy("two", ["two"])


def test_a_okvqa():
    assert answer_metrics.direct_answer_accuracy("cat", ["cat", "cat", "dog"]) == pytest.approx(
        2 / 3
    )
    assert answer_metrics.direct_answer_accuracy("cat", ["cat"] * 10) == 1
    assert answer_metrics.likeliest([-3.0, -1.0, -2.0]) == 1
    assert answer_metrics.likeliest([-3.0, -1.0], lengths=[6, 1]) == 0
    choices = ["ice", "ice cream", "a lake", "two"]
    found = {
        "(b)": 1,
        "D.": 3,
        "ice": 0,
        "It is ice cream!": 1,
        "The lake.": 2,
        "2": 3,
        "snow": None,
        "mice": None,
    }
    assert {text: answer_metrics.match_choice(text, choices) for text in found} == found
    assert answer_metrics.match_choice("red or tan", ["red", "tan"]) is None
    assert answer_metrics.match_choice("z", choices) is None


@pytest.mark.parametrize("text, choices, expected", [
    ("not a cat", ["cat", "dog"], None), ("It is not a cat but a dog.", ["cat", "dog"], 1),
    ("neither a cat nor a dog", ["cat", "dog"], None), ("I don't think it is a cat", ["cat", "dog"], None),
    ("No, it is a cat.", ["cat", "dog"], 0), ("no", ["yes", "no"], 1), ("There is no cat", ["cat", "no cat"], 1),
    ("Not the cat, the dog!", ["cat", "dog"], 1), ("It is a cat, not a dog", ["cat", "dog"], 0),
    ("without a hat: a cat", ["hat", "cat"], 1), ("black, white", ["black, white", "white"], 0),
    ("a", ["b", "a"], 1), ("B", ["b", "a"], 0), ("b", ["an apple", "b", "c"], 1), ("(b)", ["b", "a"], 1),
    ("a", ["cat", "dog"], 0), ("two", ["one", "two", "two"], None),
])  # fmt: skip
def test_a_choice_is_named_by_what_is_said_and_not_by_what_is_denied(text, choices, expected):
    assert answer_metrics.match_choice(text, choices) == expected


def test_no_choice_is_named_by_an_empty_text():
    assert answer_metrics.match_choice("", ["a", "the"]) is None


def test_main_shows_what_the_scores_do_not_see(tmp_path):
    cfg = captions.Config(draws=1, least_words=5, out=str(tmp_path))
    found = captions.main(cfg)
    assert found["nothing"]["CIDEr"] == pytest.approx(10)
    same, other = found["one word, same meaning"], found["one word, other meaning"]
    assert same["BLEU-4"] == other["BLEU-4"] < 0.8 and same["ROUGE-L"] == other["ROUGE-L"]
    assert found["words backwards"]["BLEU-1"] == 1 > 0.5 > found["words backwards"]["ROUGE-L"]
    assert found["another image's"]["CIDEr"] < 1.5
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "metrics.json", "captions.png"}
    assert json.loads((tmp_path / "metrics.json").read_text())["captions"] == found["captions"]


@pytest.mark.parametrize("flags", [{"least_words": 0}, {"draws": 0}, {"least_words": 9}])
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, flags):
    with pytest.raises(UserError):
        captions.main(captions.Config(**flags, out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()
