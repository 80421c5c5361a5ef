"""The figure of the exported formats: what 8-bit inputs cost by kind of layer, time against perplexity."""

from utils import figures

# name of a format, and where its label stands: points right and up from the point, alignment
LABELS = {
    "eager": ("eager, fp32", (0, 15), "right"),
    "onnx, fp32": ("ONNX, fp32", (14, -3), "left"),
    "int8": ("dynamic int8", (9, 6), "left"),
    "int8_channels": ("a scale per channel", (10, 6), "left"),
    "int8_chosen": ("chosen layers", (9, 9), "left"),
    "step_8bit": ("8-bit blocks", (0, -19), "center"),
    "step_4bit": ("4-bit blocks", (9, 6), "left"),
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
    for name, row in rows.items():
        place = row["ms a token"], row["perplexity"]
        right.scatter(*place, s=0.6 * row["MB"] + 12, alpha=0.6, edgecolor="0.2", linewidth=0.6)
        label, shift, side = LABELS[name]
        about = {"textcoords": "offset points", "fontsize": 8, "ha": side}
        right.annotate(f"{label}, {row['MB']:.0f} MB", place, shift, **about)
    right.set(xlabel="CPU ms a token", ylabel="perplexity of held-out text", title="formats")
    right.set_xlim(left=0)
    right.margins(y=0.15)
    figure.tight_layout()
    return figure


def save(path, lost, tolerance, rows):
    """The figure as a file -> its path."""
    return figures.close(draw(lost, tolerance, rows), path)
