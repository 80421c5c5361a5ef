"""The blocks of a paged KV cache over time: who holds which, step by step.

Kwon et al. 2023, arXiv:2309.06180, Fig. 3 and 8. Shapes: N blocks, S steps.
"""

import numpy as np

from utils import figures


def owners(engine, requests):
    """Who holds each block: number of the request; -1 nobody, -2 nobody, and its content can be found
    again, -3 several."""
    found = np.full(len(engine.pool.holders), -1)
    # free, but found again by its content
    for block in engine.pool.key_of:
        found[block] = -2
    # held by one request, or shared
    for number, request in enumerate(requests):
        for block in request.table:
            found[block] = number if engine.pool.holders[block] == 1 else -3
    return found


def draw_figure(history, count):
    """Blocks (rows) over steps (columns), a colour for each of `count` requests -> figure."""
    import matplotlib.pyplot as plt

    held = np.stack(history, axis=1)
    # only blocks that were ever used
    held = held[(held != -1).any(axis=1)]
    # a colour for each request, grey and black for the rest
    colours = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, count))
    image = np.ones((*held.shape, 3))
    image[held == -2] = (0.88, 0.88, 0.88)
    image[held == -3] = (0.2, 0.2, 0.2)
    for number in range(count):
        image[held == number] = colours[number, :3]
    figure, ax = plt.subplots(figsize=(7, 4))
    ax.imshow(image, aspect="auto", interpolation="nearest")
    ax.set(xlabel="step", ylabel="block")
    meaning = "a colour for each request; grey: free, can be found again; black: shared"
    ax.set_title(meaning, fontsize=9)
    return figure


def draw(path, history, count):
    """The figure as a file -> its path."""
    return figures.close(draw_figure(history, count), path)
