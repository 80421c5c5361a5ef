"""vlm/anyres.py: resolutions, tiles and features put together again, as transformers' LlavaNext has them."""

import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from utils.run import UserError
from vlm import anyres


def sizes(count=300):
    draw = random.Random(0)
    for _ in range(count):
        size = draw.randint(5, 900), draw.randint(5, 900)
        yield size, anyres.candidates(draw.choice([14, 56, 224]), draw.choice([2, 4, 6]))


def test_resolutions_are_those_of_transformers(parity):
    mine, theirs, fits, their_fits = [], [], [], []
    for size, candidates in sizes():
        mine.append(anyres.select_best_resolution(size, candidates))
        theirs.append(best := select_best_resolution(size, candidates))
        fits.append(anyres.fitted(size, best))
        their_fits.append(
            get_patch_output_size(np.zeros((3, *size), np.uint8), best, ChannelDimension.FIRST)
        )
    parity(
        "LLaVA-1.6",
        "anyres.select_best_resolution",
        "transformers.select_best_resolution",
        mine,
        theirs,
        0,
    )
    parity("LLaVA-1.6", "anyres.fitted", "transformers.get_patch_output_size", fits, their_fits, 0)


def test_heights_come_first():
    """A tall picture gets tall tiles: the classic mistake is (width, height)."""
    assert anyres.select_best_resolution((400, 200), [(28, 56), (56, 28)]) == (56, 28)
    assert anyres.select_best_resolution((200, 400), [(28, 56), (56, 28)]) == (28, 56)


def test_unpadded_features_are_those_of_transformers(parity):
    mine, theirs = [], []
    for size, candidates in sizes(100):
        features = torch.randn(
            2, *(x // 7 for x in anyres.select_best_resolution(size, candidates))
        )
        mine.append(anyres.unpad(features, size))
        theirs.append(unpad_image(features, size))
        if not mine[-1].numel():  # of a picture thinner than a cell nothing is left, there and here
            assert mine.pop().shape == theirs.pop().shape
    parity("LLaVA-1.6", "anyres.unpad", "transformers unpad_image", mine, theirs, 0)


@pytest.mark.parametrize("size", [(50, 37), (37, 90), (20, 20), (120, 200)])
def test_tiles_are_those_of_transformers(size, parity):
    """The whole picture squeezed and its pieces: the same order, place, padding and interpolation, but for rounding.

    The picture is noise of middle contrast (nothing overshoots 0 or 255, where PIL cuts between its two passes):
    bilinear samples, or none of antialiasing, are tens of grey levels away.
    """
    image = torch.randint(64, 192, (3, *size), dtype=torch.uint8)
    candidates = [(28, 56), (56, 28), (56, 56), (84, 28)]
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_normalize=False, do_rescale=False,
        image_grid_pinpoints=[list(c) for c in candidates],
    )(images=image.numpy(), input_data_format="channels_first", return_tensors="pt")["pixel_values"][0]  # fmt: skip
    mine = anyres.tiles(image, 28, candidates)
    name = "transformers.LlavaNextImageProcessorPil, grey levels as parts of 255"
    ours = "anyres.tiles, with the whole picture"
    parity("LLaVA-1.6", ours, name, mine / 255, torch.as_tensor(theirs) / 255, 1.01 / 255)


def test_a_row_of_the_large_picture_is_a_row_of_tokens():
    """Features that say where they come from: after packing they stand row by row, each ended by the newline."""
    rows, columns = 2, 1
    where = torch.tensor(
        [[10 * y + x for y in range(4 * r, 4 * r + 4) for x in range(4)] for r in range(rows)]
    )
    features = torch.cat([torch.full((1, 16), -1.0), where.float()])[..., None]
    found = anyres.pack(features, (56, 28), 28, [(28 * rows, 28 * columns)], torch.tensor([99.0]))[
        :, 0
    ]
    assert found[:16].eq(-1).all()
    table = found[16:].view(8, 5)
    assert table[:, 4].eq(99).all() and torch.equal(
        table[:, :4], 10 * torch.arange(8.0)[:, None] + torch.arange(4.0)
    )


def test_image_tokens_are_counted_as_transformers_counts_them(parity):
    """Before anything is decoded, from the size alone; and as many as `pack` gives."""
    mine, theirs, packed = [], [], []
    for size, candidates in sizes(100):
        side = min(min(c) for c in candidates)
        g = 4
        shown = SimpleNamespace(image_grid_pinpoints=candidates)
        processor = SimpleNamespace(image_processor=shown, patch_size=side / g)
        processor.num_additional_image_tokens = 0
        processor._get_unpadded_features = partial(LlavaNextProcessor._get_unpadded_features, None)
        count = LlavaNextProcessor._get_number_of_features(processor, *size, side, side)
        theirs.append(int(count))
        mine.append(anyres.count_tokens(size, side, g, candidates))
        tiles = anyres.count_tiles(size, side, candidates)
        features = torch.zeros(tiles, g * g, 2)
        packed.append(len(anyres.pack(features, size, side, candidates, torch.zeros(2))))
    name = "transformers.LlavaNextProcessor, places of <image>"
    parity("LLaVA-1.6", "anyres.count_tokens", name, mine, theirs, 0)
    assert packed == mine


def test_pictures_are_packed_one_after_the_other():
    grids = anyres.candidates(28)
    shapes = [(50, 37), (30, 90), (20, 22)]
    counts = [anyres.count_tiles(size, 28, grids) for size in shapes]
    features = torch.randn(sum(counts), 16, 3)
    newline = torch.randn(3)
    parts = features.split(counts)
    alone = [anyres.pack(part, size, 28, grids, newline) for part, size in zip(parts, shapes)]
    assert torch.equal(anyres.pack_all(features, shapes, 28, grids, newline), torch.cat(alone))
    with pytest.raises(UserError, match="tiles for pictures"):
        anyres.pack_all(features[:-1], shapes, 28, grids, newline)


def test_bad_input_is_one_line():
    with pytest.raises(UserError, match="no resolution"):
        anyres.select_best_resolution((3, 3), [])
    with pytest.raises(UserError, match="features"):
        anyres.pack(torch.zeros(4, 16, 2), (56, 28), 28, [(56, 28)])
