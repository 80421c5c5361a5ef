"""Accuracy of a student against the share of true labels: true ones alone, and with pseudo-labels for the rest.

661 photos of fruit that the teacher was not trained on are drawn in two halves: a pool to learn from,
of which a share has true labels and the teacher labels the rest, and photos to be judged by. Which
photos have true labels and which are in which half is drawn anew for every seed.

Pseudo-labels are used in three ways: all of them, the surest half, the surest half of each
pseudo-class (as Noisy Student balances its classes; Xie et al. 2020, arXiv:1911.04252, Sec. 2).

    python vlm/pseudo_label_study.py                                              # 9 CPU min
    python vlm/pseudo_label_study.py --labels outputs/pseudo_label/labels.jsonl   # 1, with that one's labels
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils import figures, run
from utils.run import check
from vlm import confidence, label_files, label_report, probe, pseudo_label

WAYS = ("true alone", "and all", "and the surest half", "and the surest half of each class")


@dataclass(frozen=True)
class Config(pseudo_label.Config):
    """Draw the curve of a student's accuracy against the share of true labels."""

    shares: tuple[float, ...] = (0.0, 0.05, 0.2, 0.5, 1.0)  # of the pool, with true labels
    seeds: int = 20  # draws
    labels: str = ""  # of the teacher, what lacks is added; empty: labels.jsonl of --out
    out: str = "outputs/pseudo_label_study"


def halves(truth, random):
    """All photos in two halves, of each class as many: indices of the pool, and of the judged ones."""
    pool = []
    judge = []
    for kind in truth.unique():
        own = random.permutation(torch.nonzero(truth == kind)[:, 0].numpy())
        middle = len(own) // 2
        pool += own[:middle].tolist()
        judge += own[middle:].tolist()
    return torch.tensor(pool), torch.tensor(judge)


def surest(sure, chosen):
    """The half of the photos `chosen` of the highest confidence."""
    order = sure[chosen].argsort(descending=True)
    return chosen[order[: len(chosen) // 2]]


def surest_of_each(sure, label, chosen):
    """The same for each pseudo-class by itself, rounded up."""
    found = []
    for kind in label[chosen].unique():
        own = chosen[label[chosen] == kind]
        order = sure[own].argsort(descending=True)
        found.append(own[order[: -(-len(own) // 2)]])
    return torch.cat(found) if found else chosen


def ways(sure, label, rest):
    """Photos `rest` without a true label -> {way: those whose pseudo-label is learned}."""
    kept = [rest[:0], rest, surest(sure, rest), surest_of_each(sure, label, rest)]
    return dict(zip(WAYS, kept))


def curve(cfg, x, p, truth):
    """{share: {way: accuracies of all seeds}}; p (N,C) of the teacher, features x (N,D)."""
    sure, label = p.max(-1)
    found = {share: {way: [] for way in WAYS} for share in cfg.shares}
    for seed in run.bar(range(cfg.seeds), cfg.seeds, name="seeds"):
        random = np.random.default_rng([seed, 16])
        pool, judge = halves(truth, random)
        pool = pool[torch.from_numpy(random.permutation(len(pool)))]
        for share in cfg.shares:
            # the first ones of the pool have true labels: a larger share has those of a smaller one
            known = pool[: round(share * len(pool))]
            rest = pool[len(known) :]
            mixed = label.clone()
            mixed[known] = truth[known]
            for way, chosen in ways(sure, label, rest).items():
                learn = torch.cat([known, chosen])
                if len(learn) > 1:  # of one photo no feature has a spread
                    score = pseudo_label.student_accuracy(x, mixed, learn, truth, judge)
                    found[share][way].append(score)
    return found


def mean_and_error(values):
    """Mean over the seeds, and half of its 95 % interval (normal)."""
    values = np.asarray(values, float)
    spread = values.std(ddof=1) if len(values) > 1 else float("nan")
    return float(values.mean()), float(1.96 * spread / len(values) ** 0.5)


def summary(found):
    """Rows of the table: mean and half interval of each way, and of its gain over true labels alone, paired
    by seed."""
    rows = {}
    for share, by_way in found.items():
        name = f"{100 * share:g} % true"
        rows[name] = {}
        gains = {}
        for way, values in by_way.items():
            if not values:
                continue
            rows[name][way], rows[name][f"± {way}"] = mean_and_error(values)
            if way != WAYS[0] and by_way[WAYS[0]]:
                differences = np.subtract(values, by_way[WAYS[0]])
                gains[way], gains[f"± {way}"] = mean_and_error(differences)
        if gains:
            rows[f"{name}, gain"] = gains
    return rows


def teacher_scores(p, answers, right):
    """Of the teacher on all photos, nothing fitted: accuracy, calibration error, its surest half, and what
    the agreement of all prompts tells."""
    sure, label = p.max(-1)
    _, coverage, accuracy = confidence.coverage_curve(sure, right)
    agreed = confidence.agreement(answers, label) == 1
    return {
        "accuracy": probe.share(right),
        "ECE": confidence.expected_calibration_error(sure, right),
        "surest half": float(accuracy[coverage >= 0.5][0]),
        "all prompts agree": probe.share(agreed),
        "right where they agree": probe.share(right[agreed]),
        "right where not": probe.share(right[~agreed]),
    }


def draw(path, found, teacher):
    """Accuracy against the share of true labels, with intervals; the teacher as a line."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for n, way in enumerate(WAYS):
        shares = [share for share in found if found[share][way]]
        both = [mean_and_error(found[share][way]) for share in shares]
        places = [i + 0.06 * (n - 1.5) for i in range(len(found)) if list(found)[i] in shares]
        means, errors = zip(*both)
        axis.errorbar(places, means, errors, fmt="o-", markersize=4, capsize=2, label=way)
    axis.axhline(teacher, color="gray", linewidth=0.8, linestyle=":", label="teacher")
    axis.set_xticks(range(len(found)), [f"{100 * share:g} %" for share in found])
    axis.set(xlabel="true labels in the pool", ylabel="accuracy of the student")
    axis.legend(frameon=False, fontsize=8)
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Label all photos, draw the curve."""
    pseudo_label.check_flags(cfg)
    fits = cfg.seeds > 0 and cfg.shares and all(0 <= share <= 1 for share in cfg.shares)
    check(fits, "--seeds: at least 1; --shares: between 0 and 1")
    check(not cfg.folder, "the study is about photos of fruit: leave out --folder")
    folder = run.output(cfg.out, cfg)
    path = Path(cfg.labels or folder / "labels.jsonl")
    # photos whose labels are all known, and the teacher's
    photos, names = label_files.read_folder(label_files.fruit_folder(1.0))
    photos = label_files.some(photos, cfg.photos, cfg.seed)
    rows = pseudo_label.teach(cfg, photos, names, path)
    p, answers = pseudo_label.probabilities(rows, len(names))
    truth = torch.tensor([photo.label for photo in photos])
    teacher = p.argmax(-1) == truth
    x = label_report.features_of(cfg.vision, photos, cfg.device)
    found = curve(cfg, x, p, truth)
    draw(folder / "pseudo_label.png", found, probe.share(teacher))
    run.write_json(folder / "curve.json", found)
    metrics = {"photos": len(photos), "teacher": teacher_scores(p, answers, teacher)}
    return run.report(folder, metrics | summary(found))


if __name__ == "__main__":
    run.cli(main, Config)
