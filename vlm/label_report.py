"""What vlm/pseudo_label.py writes: tables of labels, a list for human review, figures; features of the student."""

import torch

from utils import data, figures, run
from vlm import confidence, label_files, tower


def features_of(vision, photos, device="cpu"):
    """Mean features (N,D) of photos, by a tower's name, for the student. Photos are read in pieces."""
    vision = tower.load(vision, on=run.device(device))
    found = []
    pieces = [photos[i : i + 64] for i in range(0, len(photos), 64)]
    for piece in run.bar(pieces, len(pieces), name="features"):
        images = torch.stack([data.read_image(photo.path, vision.size) for photo in piece])
        found.append(tower.encode(vision, images.split(4)).float().mean(1))
    return torch.cat(found)


def scores(before, sure, right, agreed, kept):
    """Of judged photos: confidence before and after the temperature, whether the label is right, all
    prompts agree, it is kept, (N,) each -> accuracies, calibration errors, coverage."""
    error = confidence.expected_calibration_error

    def accuracy(chosen):
        return float(right[chosen].float().mean()) if chosen.any() else None

    return {
        "judged": len(right),
        "teacher": accuracy(right >= 0),
        "all prompts agree": float(agreed.float().mean()),
        "accuracy where they agree": accuracy(agreed),
        "ECE": error(before, right),
        "ECE with temperature": error(sure, right),
        "coverage": float(kept.float().mean()),
        "accuracy of what is kept": accuracy(kept),
    }


def draw(path, before, after, right):
    """Reliability before and after the temperature, accuracy against coverage."""
    import matplotlib.pyplot as plt

    figure, (left, middle) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    left.plot([0, 1], [0, 1], color="gray", linewidth=0.8, linestyle=":")
    for name, sure in (("as it is", before), ("with temperature", after)):
        rows = confidence.reliability(sure, right)
        counts, means, accuracies = zip(*rows)
        left.plot(means, accuracies, label=name)
        # the more photos in a bin, the larger its point
        left.scatter(means, accuracies, [8 + 200 * n / len(right) for n in counts])
    left.set(xlabel="confidence", ylabel="accuracy", title="reliability", ylim=(0, 1.03))
    left.legend(frameon=False, fontsize=8)
    _, coverage, accuracy = confidence.coverage_curve(after, right)
    middle.plot(coverage, accuracy)
    middle.set(xlabel="coverage: share that is labelled", ylabel="accuracy of these", xlim=(0, 1))
    middle.set_title("abstention")
    return figures.close(figure, path)


def write_tables(folder, photos, names, p, agreed, kept, review):
    """pseudo_labels.csv: unlabelled photos that are `kept` (N,); review.csv: the least certain of all
    unlabelled ones, with an empty column for a person's answer. p (N,C), agreed (N,)."""
    best = p.topk(2, dim=-1)
    unlabelled = [n for n, photo in enumerate(photos) if photo.label < 0]
    # label and confidence of each, the second beside it
    rows = {}
    for n in unlabelled:
        first, second = (names[i] for i in best.indices[n].tolist())
        sure, next_sure = (f"{x:.4f}" for x in best.values[n].tolist())
        rows[n] = (photos[n].name, first, sure, f"{float(agreed[n]):.2f}", second, next_sure)
    header = ["photo", "label", "confidence", "prompts agree", "second", "its confidence"]
    keep = [rows[n] for n in unlabelled if kept[n]]
    label_files.write_table(folder / "pseudo_labels.csv", header, keep)
    # the least certain first
    order = sorted(unlabelled, key=lambda n: float(best.values[n, 0]))
    doubtful = [(*rows[n], "") for n in order[:review]]
    label_files.write_table(folder / "review.csv", [*header, "true label"], doubtful)
