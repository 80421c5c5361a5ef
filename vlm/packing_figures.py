"""Figure of vlm/packing.py: batches as areas of tokens and padding."""

import numpy as np

from utils import figures


def draw(path, ways, titles, length):
    """The batches as pictures on one scale: rows are sequences, colours samples, grey is padding;
    the area is work."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(ways), figsize=(3.7 * len(ways), 4.6), sharex=True, sharey=True
    )
    # orange: samples with an image, blue: text alone
    shades = {
        True: plt.get_cmap("Oranges")(np.linspace(0.45, 0.75, 4)),
        False: plt.get_cmap("Blues")([0.4, 0.6, 0.8]),
    }
    for axis, (name, batches) in zip(axes, ways.items()):
        y = 0.0
        k = 0
        for rows in batches:
            widest = max(sum(len(s["ids"]) for s in row) for row in rows)
            for row in rows:
                # the padded row in grey, its samples over it
                axis.barh(y, widest, 0.84, color="0.88", align="edge")
                x = 0
                for s in row:
                    colours = shades[bool(s["images"])]
                    colour = colours[k % len(colours)]
                    axis.barh(y, len(s["ids"]), 0.84, left=x, color=colour, align="edge")
                    x += len(s["ids"])
                    k += 1
                y += 1
            y += 0.9  # a gap between batches
        axis.set_title(titles[name], fontsize=9, loc="left")
        axis.set(xlim=(0, length), xlabel="tokens", yticks=[])
        axis.spines[["left", "right", "top"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[0].set_ylabel("rows, batch by batch")
    named = {"with a picture": shades[True][2], "text alone": shades[False][1], "padding": "0.88"}
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in named.values()]
    axes[-1].legend(handles, named, fontsize=9, frameon=False, loc="lower right")
    figure.tight_layout()
    return figures.close(figure, path)
