"""Scores of vision-language benchmarks by their official rules: POPE, VQA v2, A-OKVQA, ScienceQA,
top-k accuracy.

Li et al. 2023, arXiv:2305.10355 (POPE); Goyal et al. 2017, arXiv:1612.00837 (VQA v2; OK-VQA and
TextVQA are scored alike); Schwenk et al. 2022, arXiv:2206.01718 (A-OKVQA); Lu et al. 2022,
arXiv:2209.09513 (ScienceQA). A rule is what the published script does, even where it is odd: a
number by another rule cannot stand in the same table. Captions are in caption_metrics.py.

Rows are dictionaries of benchmark_files.py, one a question.
"""

from collections import defaultdict
from statistics import fmean

from utils.run import check
from vlm.answer_metrics import direct_answer_accuracy, vqa_accuracy


def says_yes(text):
    """POPE's reading of an answer: no if the first sentence has the word No, no or not; else yes.

    "NO" and "nope" are yes, and so is an empty answer: the rule of the official script.
    """
    first = text.split(".")[0].replace(",", "")
    return not {"No", "not", "no"} & set(first.split(" "))


def pope(answers, labels):
    """POPE: generated answers and labels "yes" or "no" -> accuracy, precision, recall, F1 of "yes",
    share of yes.

    All of them in 0..1; precision, recall and F1 are 0 where the official script divides by zero.
    Raises UserError for lists of different lengths, an empty one, or another label.
    """
    check(len(answers) == len(labels) > 0, "POPE needs one answer for each label, and at least one")
    check(set(labels) <= {"yes", "no"}, "labels of POPE are 'yes' or 'no'")
    said = [says_yes(text) for text in answers]
    truth = [label == "yes" for label in labels]
    # the four cells of the table
    true_yes = sum(s and t for s, t in zip(said, truth))
    false_yes = sum(s and not t for s, t in zip(said, truth))
    false_no = sum(t and not s for s, t in zip(said, truth))
    right = sum(s == t for s, t in zip(said, truth))
    precision = true_yes / max(true_yes + false_yes, 1)
    recall = true_yes / max(true_yes + false_no, 1)
    return {
        "accuracy": right / len(labels),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if true_yes else 0.0,
        "yes": sum(said) / len(said),
    }


def by_group(values, groups):
    """Means of values, of each group by its name: {group: mean}, in the order of the names."""
    members = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        members[group].append(value)
    return {group: fmean(members[group]) for group in sorted(members)}


def vqa(rows, answers):
    """VQA v2, OK-VQA, TextVQA: accuracy, and that of each type of answer and of question.

    answers: generated answers, one a row. Rows have "answers" of ten people, "answer_type" and
    "question_type"."""
    each = [vqa_accuracy(a, row["answers"]) for a, row in zip(answers, rows, strict=True)]
    found = {"accuracy": fmean(each)}
    # a data set without types has one group less
    for kind in ("answer_type", "question_type"):
        if all(row.get(kind) for row in rows):
            groups = by_group(each, [row[kind] for row in rows])
            found |= {f"{kind.replace('_', ' ')} {name}": value for name, value in groups.items()}
    return found


def aokvqa(rows, chosen, answers):
    """A-OKVQA in both settings: multiple choice (indices or None), direct answers (texts).

    Direct answers of questions that are marked as difficult to answer so are left out.
    """
    right = [
        c is not None and row["choices"][c] == row["choices"][row["right"]]
        for c, row in zip(chosen, rows, strict=True)
    ]
    easy = [(a, row) for a, row in zip(answers, rows, strict=True) if not row.get("difficult")]
    direct = [direct_answer_accuracy(a, row["answers"]) for a, row in easy]
    return {
        "multiple choice": fmean(right),
        "direct answer": fmean(direct) if direct else 0.0,
        "left out of direct answer": len(rows) - len(easy),
    }


def science_qa(rows, chosen):
    """ScienceQA: accuracies of its eight classes of questions, and of all.

    NAT, SOC, LAN: natural, social, language science. TXT: has a hint; IMG: has an image; NO: neither. G1-6,
    G7-12: grades. A question counts in several.
    """
    right = [c == row["right"] for c, row in zip(chosen, rows, strict=True)]
    members = {
        "NAT": lambda row: row["subject"] == "natural science",
        "SOC": lambda row: row["subject"] == "social science",
        "LAN": lambda row: row["subject"] == "language science",
        "TXT": lambda row: bool(row["hint"]),
        "IMG": lambda row: row["image"] is not None,
        "NO": lambda row: row["image"] is None and not row["hint"],
        "G1-6": lambda row: row["grade"] <= 6,
        "G7-12": lambda row: row["grade"] > 6,
    }
    found = {}
    for name, belongs in members.items():
        of_class = [r for r, row in zip(right, rows) if belongs(row)]
        if of_class:
            found[name] = fmean(of_class)
    return found | {"accuracy": fmean(right)}


def top_k(log_p, truth, k):
    """Share of images whose class is among the k most likely: log p (B,C), truth (B,)."""
    best = log_p.topk(min(k, log_p.shape[1]), dim=1).indices
    return float((best == truth[:, None]).any(1).float().mean())
