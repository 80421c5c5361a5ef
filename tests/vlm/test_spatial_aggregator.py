"""vlm/spatial_aggregator.py: regions, attention against torch's with a mask, who reads what; channels."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.conftest import gradients
from utils.run import UserError
from vlm.spatial_aggregator import ChannelConcat, SpatialAggregator, SvaLayer, regions


def test_a_region_holds_its_own_places():
    x = torch.arange(36.0)[None, :, None]
    found = regions(x, 3)[0, :, :, 0]
    assert found.shape == (9, 4)
    assert found[0].tolist() == [0, 1, 6, 7] and found[5].tolist() == [16, 17, 22, 23]
    assert torch.equal(regions(x, 6)[0, :, 0, 0], torch.arange(36.0))
    with pytest.raises(UserError, match="6 x 6 does not fall into 4 x 4"):
        regions(x, 4)


@pytest.fixture
def made():
    torch.manual_seed(0)
    model = SpatialAggregator((5, 3), 8, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model, [torch.randn(2, 4, 5), torch.randn(2, 16, 3)]


def test_attention_is_that_of_torch_behind_a_mask(made, parity):
    """All queries over all places of both maps, masked to the region of each."""
    model, features = made
    layer = model.layers[0]
    assert isinstance(layer, SvaLayer)
    queries = torch.randn(2, 4, 8, requires_grad=True)
    mine = layer(queries, model.context(features))
    # torch: 4 queries, 4 + 16 places; which place lies in whose region
    projected = torch.cat([join(x) for join, x in zip(model.project, features)], 1)
    own = [torch.arange(4)]
    own.append(torch.tensor([2 * (y // 2) + x // 2 for y in range(4) for x in range(4)]))
    mask = torch.arange(4)[:, None] == torch.cat(own)[None]
    q = layer.query(layer.norm(queries))
    read = F.scaled_dot_product_attention(q, layer.key(projected), layer.value(projected), mask)
    x = queries + layer.out(read)
    theirs = x + layer.feed_forward(x)
    name = "torch scaled_dot_product_attention, masked"
    parity("Spatial aggregator", "SvaLayer", name, mine, theirs, 1e-5)
    (ours,) = torch.autograd.grad(mine.square().sum(), queries)
    (torchs,) = torch.autograd.grad(theirs.square().sum(), queries)
    parity("Spatial aggregator", "SvaLayer, gradient", name, ours, torchs, 1e-4)


def test_a_query_reads_its_region_of_every_encoder_and_nothing_else(made):
    model, features = made
    before = model(features)
    assert before.shape == (2, 4, 8)
    for k, (place, region) in enumerate([(3, 3), (6, 1)]):
        moved = [x.clone() for x in features]
        moved[k][:, place] += torch.randn(features[k].shape[-1])
        changed = (model(moved) - before).abs().amax((0, 2)) > 1e-6
        assert changed.tolist() == [n == region for n in range(4)]


def test_weights_add_up_and_hang_on_the_query(made):
    model, features = made
    context = model.context(features)
    assert context.shape == (2, 4, 5, 8)
    weights = model.layers[0].attention_weights(model.queries.expand(2, -1, -1), context)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4))
    other = model.layers[0].attention_weights(torch.randn(2, 4, 8), context)
    assert (weights - other).abs().max() > 1e-3


def test_a_loud_encoder_does_not_take_all_attention(made):
    model, features = made
    louder = [features[0], 50 * features[1]]
    assert torch.allclose(model(louder), model(features), atol=1e-3)


def test_every_part_learns(made):
    model, features = made
    found = gradients(model, model(features))
    assert all(g is not None and g.abs().sum() > 0 for g in found.values())


def test_channels_side_by_side(made, parity):
    _, features = made
    model = ChannelConcat((5, 3), 8, 2)
    pooled = F.avg_pool2d(
        F.layer_norm(features[1], (3,)).transpose(1, 2).unflatten(2, (4, 4)), 2
    ).flatten(2)
    both = torch.cat([F.layer_norm(features[0], (5,)), pooled.transpose(1, 2)], -1)
    assert isinstance(model.mlp, nn.Sequential)
    name = "torch avg_pool2d, cat"
    parity("Spatial aggregator", "ChannelConcat", name, model(features), model.mlp(both), 1e-5)
