"""utils/figures.py: the pictures hold what was asked for, and nothing stays open."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from utils import figures


def constant(*values, channels=1, size=4):
    """One image of a single grey a value."""
    return torch.tensor(values)[:, None, None, None].expand(-1, channels, size, size)


def test_tile_places_every_picture_row_by_row():
    picture = figures.tile(constant(-1.0, 0.0, 1.0), columns=2, pad=2)
    assert picture.shape == (10, 10, 3) and picture.dtype == np.uint8
    assert (
        (picture[:4, :4] == 0).all()
        and (picture[:4, 6:] == 128).all()
        and (picture[6:, :4] == 255).all()
    )
    # The empty place and the gap are ground
    assert (picture[6:, 6:] == 255).all() and (picture[4:6] == 255).all()


def test_tile_scales_clamps_and_keeps_colours():
    x = torch.stack([torch.full((2, 2), v) for v in (-9.0, 0.5, 9.0)])[None]
    picture = figures.tile(x, columns=1, pad=0, scale=3)
    assert picture.shape == (6, 6, 3) and picture[0, 0].tolist() == [0, 191, 255]


def test_tile_takes_half_precision_and_a_graph():
    assert (
        figures.tile(constant(1.0).bfloat16().clone().requires_grad_(), columns=1, pad=0).min()
        == 255
    )


def test_grid_is_a_lossless_picture_of_the_tiles(tmp_path):
    x = torch.rand(5, 3, 6, 6) * 2 - 1
    path = figures.grid(tmp_path / "grid.png", x, columns=3, scale=2)
    assert (np.asarray(Image.open(path)) == figures.tile(x, 3, scale=2)).all()


def test_rows_and_curves_are_written_and_closed(tmp_path):
    rows = figures.rows(
        tmp_path / "rows.png", {"black": constant(-1.0, -1.0), "white": constant(1.0)}, ["a", "b"]
    )
    lines = {"a": [3, 2, 1], "b": ([1, 10, 100], [1, 2, 3])}
    curves = figures.curves(tmp_path / "curves.png", lines, "x", "y", log="x")
    codes = (torch.randn(100, 3), torch.arange(100) % 10)
    panels = figures.panels(
        tmp_path / "panels.png", [{"map": torch.rand(9, 1, 4, 4), "codes": codes}]
    )
    for path in (rows, curves, panels):
        picture = np.asarray(Image.open(path).convert("L"))
        assert picture.size > 10_000 and picture.min() == 0 and picture.max() == 255
    assert not plt.get_fignums()


def test_show_draws_one_labelled_row_an_entry(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    # The second row is shorter
    rows = {"black": constant(-1.0, 0.0, -1.0), "white": constant(1.0, 0.5)}
    figures.show(rows, ["a", "b", "c"], "title")
    axes = plt.gcf().axes
    assert len(axes) == 2 and [axis.get_ylabel() for axis in axes] == ["black", "white"]
    assert [[label.get_text() for label in axis.get_xticklabels()] for axis in axes] == [
        ["a", "b", "c"],
        [],
    ]
    for axis, images in zip(axes, rows.values()):
        assert np.array_equal(axis.images[0].get_array(), figures.tile(images, 3))
    plt.close("all")


def test_curves_smooth_over_as_many_points(monkeypatch, tmp_path):
    drawn = {}

    def close(figure, path):
        drawn["line"] = figure.axes[0].lines[0].get_xydata()
        plt.close(figure)

    monkeypatch.setattr(figures, "close", close)
    figures.curves(tmp_path / "x.png", {"loss": [0.0, 1.0] * 20}, smooth=4)
    assert drawn["line"].shape == (37, 2) and np.allclose(drawn["line"][:, 1], 0.5)
    assert drawn["line"][0, 0] == 4  # a mean of steps 1 to 4 stands at the last of them
