"""Pseudo-labels: a vision-language model labels photos, a small student learns from them.

Lee 2013 (ICML workshop) trained a network on its own most probable classes; in Noisy Student (Xie et
al. 2020, arXiv:1911.04252) a teacher labels, what it is unsure of is left out, and a student learns from
true and pseudo-labels. Here the teacher is a LLaVA or any model behind OpenAI's protocol, asked by several
prompts, and the student a linear probe on a tower's features (probe.py). Confidence is calibrated on
photos with true labels, and the threshold of abstention is chosen there (confidence.py).

The labelled photos fall into three parts: to learn from, to calibrate on, to be judged by. Differences
from the papers: the student is small and is given no noise, and labels are hard.

    python vlm/pseudo_label.py                                     # photos of fruit: 8 CPU min
    python vlm/pseudo_label.py --folder weather --prompts "What is the weather?" --endpoint http://127.0.0.1:8001/v1 \\
        --model NAME --dry-run

A folder has a sub-folder for each class; photos in `unlabelled`, or in the folder itself, have no label.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils import run
from utils.run import check
from vlm import (
    confidence,
    label_endpoint,
    label_files,
    label_report,
    label_teacher,
    llava,
    probe,
)

PROMPTS = ("What fruit is this?", "Which fruit is in the photo?", "What kind of fruit do you see?")


@dataclass(frozen=True)
class Config:
    """Let a teacher label a folder of photos, and a student learn from its labels."""

    folder: str = ""  # of photos; empty: photos of fruit that the teacher was not trained on
    classes: tuple[str, ...] = ()  # names of the classes; empty: the sub-folders
    photos: int = 0  # at most so many, drawn at random; 0: all
    prompts: tuple[str, ...] = PROMPTS  # the same question in other words
    model: str = str(llava.WEIGHTS)  # teacher: weights, a folder, or the endpoint's name of it
    endpoint: str = ""  # address of OpenAI's protocol; empty: the teacher runs here
    parallel: int = 4  # requests at a time
    retries: int = 5  # tries after the first one
    side: int = 448  # longest side of a photo that is sent
    photo_tokens: int = 255  # tokens of a photo, to guess the cost
    price_in: float = 0.0  # per million tokens that the endpoint reads
    price_out: float = 0.0  # per million that it writes
    dry_run: bool = False  # count photos, requests, tokens and cost, and ask nothing
    check: float = 0.5  # share of the labelled photos to calibrate on and to be judged by
    accuracy: float = 0.9  # wanted of the pseudo-labels that are kept; sets the threshold
    threshold: float = 0.0  # confidence below which the teacher abstains; 0: chosen
    review: int = 20  # least certain photos that a person should look at
    vision: str = "efficientnet"  # tower of the student
    fresh: bool = False  # label anew, whatever was labelled before
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/pseudo_label"


def check_flags(cfg):
    """Raises UserError for flags out of range."""
    check(cfg.prompts and all(p.strip() for p in cfg.prompts), "--prompts: one question at least")
    least = min(cfg.parallel, cfg.side, cfg.photo_tokens)
    check(least > 0, "--parallel, --side, --photo-tokens: at least 1")
    least = min(cfg.photos, cfg.retries, cfg.review, cfg.price_in, cfg.price_out)
    check(least >= 0, "--photos, --retries, --review and the prices: at least 0")
    check(0 < cfg.check < 1 and 0 < cfg.accuracy <= 1, "--check and --accuracy: between 0 and 1")
    check(0 <= cfg.threshold <= 1, "--threshold: between 0 and 1")
    check(cfg.endpoint or not cfg.dry_run, "--dry-run goes with --endpoint")
    named = cfg.model != str(llava.WEIGHTS)
    check(named or not cfg.endpoint, "--endpoint: name its --model")


def settings_of(cfg, names):
    """What the labels in a file hang on."""
    teacher = {"endpoint": cfg.endpoint, "model": cfg.model, "side": cfg.side}
    if not cfg.endpoint:
        teacher = label_teacher.settings_of(cfg.model)
    return teacher | {"prompts": list(cfg.prompts), "classes": list(names)}


def lacking(photos, rows):
    """Photos that have no row yet."""
    return [photo for photo in photos if label_files.digest(photo.path) not in rows]


def teach(cfg, photos, names, path):
    """Labels of all photos, those of the file `path` and those that lack there -> a row for each."""
    settings = settings_of(cfg, names)
    left = lacking(photos, label_files.read_labels(path, settings))
    with label_files.appending(path, settings) as append:
        if left and cfg.endpoint:
            label_endpoint.label(cfg, left, names, append)
        elif left:
            label_teacher.label(cfg.model, left, cfg.prompts, names, append, cfg.device)
    rows = label_files.read_labels(path, settings)
    return [rows[label_files.digest(photo.path)] for photo in photos]


def probabilities(rows, classes):
    """Rows of labels, in the order of the photos -> p (N,C), answers of the prompts (P,N).

    Raises UserError for rows that were not written by a teacher."""
    kind = "answers" if "answers" in rows[0] else "log_p"
    try:
        table = torch.tensor([row[kind] for row in rows])
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError):
        table = torch.empty(0)
    fits = len(table) and table.isfinite().all()
    if kind == "answers":
        fits = fits and table.dim() == 2 and table.min() >= -1 and table.max() < classes
    else:
        fits = fits and table.dim() == 3 and table.shape[2] == classes
    check(fits, "the file of labels is damaged; --fresh labels anew")
    if kind == "answers":
        answers = table.long().T
        return confidence.votes(answers, classes), answers
    # likelihood of each name, normalised over the names
    p = table.transpose(0, 1).softmax(-1)
    return confidence.consensus(p), p.argmax(-1)


def parts(truth, share, seed=0):
    """Labelled photos -> indices to learn from, to calibrate on, to be judged by; `share` of them are the
    two last ones, half each."""
    labelled = torch.nonzero(truth >= 0)[:, 0]
    order = np.random.default_rng([seed, 15]).permutation(labelled.numpy())
    tested = round(share * len(order))
    chosen = torch.from_numpy(order)
    return chosen[tested:], chosen[: tested // 2], chosen[tested // 2 : tested]


def student_accuracy(x, label, learn, truth, judge):
    """Accuracy on the photos `judge` of a linear probe of x (N,D) that learned `label` (N,) of the
    photos `learn`."""
    return probe.share(probe.probe(x[learn], label[learn], x[judge]).argmax(-1) == truth[judge])


def main(cfg: Config) -> dict:
    """Label, calibrate, abstain, teach a student."""
    check_flags(cfg)
    # what cannot be labelled, or was labelled by another teacher, is refused before anything is written
    photos, names = label_files.read_folder(cfg.folder or label_files.fruit_folder(), cfg.classes)
    photos = label_files.some(label_files.without_duplicates(photos), cfg.photos, cfg.seed)
    path = Path(cfg.out) / "labels.jsonl"
    if cfg.fresh:
        path.unlink(missing_ok=True)
    rows = label_files.read_labels(path, settings_of(cfg, names))
    truth = torch.tensor([photo.label for photo in photos])
    split = parts(truth, cfg.check, cfg.seed)
    # better said before labels are paid for
    known = "without labelled photos no threshold can be chosen: set --threshold"
    check(cfg.dry_run or cfg.threshold or len(split[1]), known)
    if cfg.folder and cfg.prompts == Config.prompts:
        print("the questions are about fruit: ask about your photos with --prompts")
    folder = run.output(cfg.out, cfg)
    if cfg.dry_run:
        left = lacking(photos, rows)
        return run.report(folder, label_endpoint.estimate(cfg, left, names))
    run.seed(cfg.seed)
    # labels of all photos: those with a true one say how good the teacher is
    rows = teach(cfg, photos, names, path)
    p, answers = probabilities(rows, len(names))
    found = {"photos": len(photos), "unlabelled": int((truth < 0).sum())}
    if cfg.endpoint:
        used = [sum(row[key] for row in rows) for key in ("tokens_in", "tokens_out")]
        found |= label_endpoint.cost(cfg, *used)
    metrics = finish(cfg, folder, photos, names, p, answers, truth, split)
    return run.report(folder, found | metrics, f"look at {folder}/review.csv")


def finish(cfg, folder, photos, names, p, answers, truth, split):
    """Calibrate the probabilities p (N,C), abstain, write the tables, teach the student -> metrics."""
    learn, calibrate, judge = split
    label = p.argmax(-1)
    right = label == truth
    metrics = {}
    # temperature and threshold, on photos with true labels
    sure = p
    threshold = cfg.threshold
    if len(calibrate):
        metrics["temperature"] = confidence.fit_temperature(p[calibrate], truth[calibrate])
        sure = confidence.scale(p, metrics["temperature"])
    confident = sure.max(-1).values
    if not threshold:
        known = (confident[calibrate], right[calibrate])
        threshold = confidence.choose_threshold(*known, cfg.accuracy)
    kept = confident >= threshold
    agreed = confidence.agreement(answers, label)
    metrics |= {"threshold": threshold, "prompts agree": float(agreed.mean())}
    label_report.write_tables(folder, photos, names, sure, agreed, kept, cfg.review)
    # scores on photos that nothing was chosen on
    if len(judge):
        before = p.max(-1).values[judge]
        about = (confident[judge], right[judge], agreed[judge] == 1, kept[judge])
        metrics |= label_report.scores(before, *about)
        label_report.draw(folder / "confidence.png", before, *about[:2])
        metrics["student"] = students(cfg, photos, label, kept, truth, learn, judge)
    return metrics


def students(cfg, photos, label, kept, truth, learn, judge):
    """Accuracies of students that learn from true labels, pseudo-labels, and both."""
    x = label_report.features_of(cfg.vision, photos, cfg.device)
    every = torch.nonzero(truth < 0)[:, 0]
    sure = torch.nonzero((truth < 0) & kept)[:, 0]
    mixed = torch.where(truth < 0, label, truth)
    arms = {
        "true labels": learn,
        "pseudo-labels": every,
        "pseudo-labels kept": sure,
        "true and pseudo-labels": torch.cat([learn, every]),
        "true and kept": torch.cat([learn, sure]),
    }
    found = {}
    for name, chosen in arms.items():
        if len(chosen) > 1:  # of one photo no feature has a spread
            found[name] = student_accuracy(x, mixed, chosen, truth, judge)
    return found


if __name__ == "__main__":
    run.cli(main, Config)
