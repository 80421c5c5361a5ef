"""vlm/tile_resampler.py: against Idefics2's resampler a picture at a time, and without tiles; places, padding."""

import pytest
import torch

from papers.mae import sincos_2d
from tests import eyes
from tests.conftest import gradients
from tests.vlm.test_perceiver import copied, theirs
from utils.run import UserError
from vlm import anyres, connector, tile_resampler

OPTIONS = {"depth": 2, "latents": 5, "heads": 4, "kv_heads": 2, "head_dim": 6, "mlp_ratio": 4}
GRIDS = anyres.candidates(28, 4)
# cut into 2 x 2 tiles, 1 x 3, and 2 x 1 with bars at the sides
PICTURES = [(60, 60), (20, 60), (56, 20)]
COUNTS = [5, 4, 3]


@pytest.fixture
def made():
    """A resampler with weights of its own, features (12,16,24) of all crops of three pictures."""
    torch.manual_seed(0)
    resampler = eyes.shake(connector.build("tile_perceiver", 24, 24, **OPTIONS), 0.3)
    assert [anyres.count_tiles(size, 28, GRIDS) for size in PICTURES] == COUNTS
    return resampler, torch.randn(12, 16, 24)


def keys_by_hand(resampler, features):
    """Features and their codes, crop by crop, the padding left out -> a list of (keys,24)."""
    place = sincos_2d(24, 4, 4)
    found = []
    crops = list(features)
    for size in PICTURES:
        rows, columns = anyres.grid_shape(size, 28, GRIDS)
        above, beside = anyres.padding(size, (4 * rows, 4 * columns))
        keys = [crops.pop(0) + resampler.crops[0] + resampler.scale * place]
        for r in range(rows):
            for c in range(columns):
                code = resampler.crops[1 + r] + resampler.crops[17 + c]
                tile = crops.pop(0) + code + resampler.scale * place
                for n, key in enumerate(tile):
                    y, x = 4 * r + n // 4, 4 * c + n % 4
                    inside = above <= y < 4 * rows - above and beside <= x < 4 * columns - beside
                    keys += [key[None]] if inside else []
        found.append(torch.cat(keys))
    return found


def test_it_is_idefics2_resampler_over_the_coded_features_of_all_crops(made, parity):
    ours, x = made
    forward = copied(ours, theirs(24))
    mine = ours(x, (PICTURES, 28, GRIDS))
    keys = keys_by_hand(ours, x)
    # bars of the last picture: 4 of 8 rows, and half of the columns
    assert [len(k) for k in keys] == [80, 64, 48 - 2 * 8]
    other = torch.cat([forward(k[None]) for k in keys])
    name = "transformers Idefics2PerceiverResampler, a picture at a time, no padding"
    parity("Connector", "tile_resampler.TileResampler", name, mine, other)
    # gradients of the latents, codes and features that the other's weights do not hold
    inputs = torch.nn.ParameterDict({"x": x, "crops": ours.crops, "scale": ours.scale})
    both = []
    for batched in (True, False):
        if batched:
            found = ours(inputs["x"], (PICTURES, 28, GRIDS))
        else:
            found = torch.cat([forward(k[None]) for k in keys_by_hand(ours, inputs["x"])])
        both.append(gradients(inputs, found))
    assert all(value.abs().max() > 0 for value in both[0].values())
    parity("Connector", "tile_resampler.TileResampler, gradients", name, *both, 1e-4)


def test_of_one_crop_without_codes_it_is_the_perceiver_resampler(made, parity):
    ours, x = made
    with torch.no_grad():
        ours.crops.zero_()
        ours.scale.zero_()
    plain = connector.build("perceiver", 24, 24, **OPTIONS)
    weights = {k: v for k, v in ours.state_dict().items() if k not in ("crops", "scale")}
    plain.load_state_dict(weights)
    parity("Connector", "TileResampler of one crop", "PerceiverResampler", ours(x), plain(x), 0)


def test_without_codes_tiles_may_be_permuted_and_with_them_not(made):
    ours, x = made
    tiling = ([PICTURES[0]], 28, GRIDS)
    order = torch.tensor([0, 3, 1, 4, 2])
    assert (ours(x[:5], tiling) - ours(x[order], tiling)).abs().max() > 0.01
    # each of the codes alone tells tiles, or places in them, apart
    within = torch.randperm(16)
    with torch.no_grad():
        ours.crops.zero_()
    torch.testing.assert_close(ours(x[:5], tiling), ours(x[order], tiling))
    assert (ours(x[:5], tiling) - ours(x[:5, within], tiling)).abs().max() > 0.001
    with torch.no_grad():
        ours.scale.zero_()
    torch.testing.assert_close(ours(x[:5], tiling), ours(x[:5, within], tiling))


def test_rows_columns_and_the_whole_have_codes_of_their_own(made):
    ours, _ = made
    codes = ours.codes((2, 3), 16)
    assert codes.shape == (7, 16, 24)
    first = codes[:, 0]
    differences = torch.cdist(first, first) + 10 * torch.eye(7)
    assert differences.min() > 0.1
    # a tile of row 1, column 2, less one of row 0, column 2: rows 1 and 0
    torch.testing.assert_close(first[6] - first[3], ours.crops[2] - ours.crops[1])


def test_tokens_of_a_picture_are_the_same_alone_and_in_a_batch(made):
    ours, x = made
    together = ours(x, (PICTURES, 28, GRIDS))
    for one, size, part in zip(together, PICTURES, x.split(COUNTS)):
        torch.testing.assert_close(ours(part, ([size], 28, GRIDS))[0], one, atol=1e-6, rtol=1e-5)
    # and others for others
    assert (together[0] - together[1]).abs().max() > 0.1


def test_what_is_seen_is_what_unpad_leaves():
    """Features that are numbered: those of the large map that are left, by number."""
    for size in ((60, 60), (20, 60), (56, 20), (30, 90), (56, 40), (40, 56)):
        shape = rows, columns = anyres.grid_shape(size, 28, GRIDS)
        numbers = torch.arange(16.0 * rows * columns).view(-1, 16, 1)
        whole = torch.full((1, 16, 1), -1.0)
        left = anyres.pack(torch.cat([whole, numbers]), size, 28, GRIDS)[16:, 0]
        seen = tile_resampler.visible(size, shape, 4)
        assert seen[0].all() and seen.shape == (1 + rows * columns, 4, 4)
        assert numbers[seen[1:].flatten(1)].flatten().tolist() == sorted(left.tolist())


def test_it_refuses(made):
    ours, x = made
    with pytest.raises(UserError, match="11 tiles for pictures"):
        ours(x[:11], (PICTURES, 28, GRIDS))
    with pytest.raises(UserError, match="knows 16 rows and columns"):
        ours.codes((17, 1), 16)
    with pytest.raises(UserError, match="no multiple of 4"):
        connector.build("tile_perceiver", 24, 26)
