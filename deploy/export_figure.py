"""The figure of the exported formats: what 8-bit inputs cost by kind of layer, time against perplexity."""

from utils import figures

LABELS = {
    "eager": "eager, fp32",
    "onnx, fp32": "ONNX, fp32",
    "int8": "dynamic int8",
    "int8_channels": "a scale per channel",
    "int8_chosen": "chosen layers",
    "step_8bit": "8-bit blocks",
    "step_4bit": "4-bit blocks",
}


def draw(lost, tolerance, rows):
    """lost {kind: nats a token}; rows {format: {"ms a token", "perplexity", "MB"}} -> figure."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(2, 3))
    # what each kind costs alone; a logarithmic axis has no place for gains
    kinds = list(lost)
    nats = [max(lost[kind], 1e-4) for kind in kinds]
    colours = ["C1" if lost[kind] > tolerance else "C0" for kind in kinds]
    left.barh(kinds, nats, color=colours)
    left.axvline(tolerance, color="0.4", linestyle="--", linewidth=1)
    left.invert_yaxis()
    left.set(xscale="log", xlabel="nats a token", title="8-bit inputs of one kind of layers")
    # what each file is worth
    most = max(row["ms a token"] for row in rows.values())
    for name, row in rows.items():
        place = row["ms a token"], row["perplexity"]
        right.scatter(*place, s=0.6 * row["MB"] + 12, alpha=0.6, edgecolor="0.2", linewidth=0.6)
        # labels of points on the right stand left of them
        side = "right" if place[0] > 0.7 * most else "left"
        shift = (-9, 9) if side == "right" else (9, 9)
        text = f"{LABELS[name]}, {row['MB']:.0f} MB"
        right.annotate(text, place, shift, textcoords="offset points", fontsize=8, ha=side)
    right.set(xlabel="CPU ms a token", ylabel="perplexity of held-out text", title="formats")
    right.set_xlim(left=0)
    right.margins(y=0.15)
    figure.tight_layout()
    return figure


def save(path, lost, tolerance, rows):
    """The figure as a file -> its path."""
    return figures.close(draw(lost, tolerance, rows), path)
