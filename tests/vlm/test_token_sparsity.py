"""vlm/token_sparsity.py: which vision features are kept, how many, in which order, and what learns from them."""

import pytest
import torch

from tests import eyes
from utils.run import UserError
from vlm import connector, token_sparsity
from vlm.token_sparsity import TokenSparsity

NAMES = ["pool3", "bilinear3", "topk_norm9", "random9"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_nine_tokens_are_left_of_49(name, training):
    plugin = TokenSparsity([name]).train(training)
    assert plugin(torch.randn(2, 49, 8)).shape == (2, 9, 8) and plugin.count(49) == 9
    assert not list(plugin.parameters()) and not plugin.state_dict()


def test_pooling_before_is_pooling_within(parity):
    """With a matrix of one behind them, plug-in and connector are the same, and both are torch's."""
    x = torch.randn(2, 49, 8)
    maps = x.transpose(1, 2).unflatten(2, (7, 7))
    modules = {
        "pool3": torch.nn.AdaptiveAvgPool2d(3),
        "bilinear3": torch.nn.Upsample(size=(3, 3), mode="bilinear"),
    }
    for name, module in modules.items():
        found = TokenSparsity([name])(x)
        torch_says = module(maps).flatten(2).transpose(1, 2)
        parity("Connector", f"token_sparsity {name}", "torch, the same call", found, torch_says)
        torch.testing.assert_close(connector.build(name, 8, 6).shrink(x), found, atol=0, rtol=0)


def test_topk_norm_keeps_the_longest_in_the_order_in_which_they_stood():
    """Tokens of lengths 3, 9, 1, 7 in one picture, 2, 4, 8, 6 in the other; the sign is no length."""
    lengths = torch.tensor([[3.0, -9, 1, 7], [2, 4, -8, 6]])
    x = torch.stack([lengths, torch.zeros(2, 4)], dim=-1)
    found = token_sparsity.topk_norm(x, 2)[..., 0]
    assert found.tolist() == [[-9, 7], [-8, 6]]
    assert token_sparsity.topk_norm(x, 3)[..., 0].tolist() == [[3, -9, 7], [4, -8, 6]]
    torch.testing.assert_close(token_sparsity.topk_norm(x, 4), x)
    # the length counts all numbers, not the first or their sum
    y = torch.tensor([[[4.0, -4], [5, 0], [0, -1]]])
    assert token_sparsity.topk_norm(y, 1).tolist() == [[[4.0, -4]]]


def test_only_kept_tokens_have_a_gradient():
    x = torch.randn(2, 49, 8, requires_grad=True)
    kept = TokenSparsity(["topk_norm9"])(x)
    kept.square().sum().backward()
    moved = x.grad.norm(dim=-1) > 0
    assert moved.sum(1).tolist() == [9, 9]
    torch.testing.assert_close(x[moved].view_as(kept), kept)
    shortest_kept = x.norm(dim=-1)[moved].view(2, 9).amin(1)
    longest_left = x.norm(dim=-1).masked_fill(moved, 0).amax(1)
    assert bool((shortest_kept >= longest_left).all())


def test_random_is_another_subset_for_each_picture_in_training():
    x = torch.arange(49.0).expand(64, 49)[..., None]
    plugin = TokenSparsity(["random9"]).train()
    found = plugin(x)[..., 0]
    # in order, none twice
    assert bool((found.diff(dim=1) > 0).all())
    assert len({tuple(row) for row in found.tolist()}) > 60
    assert not torch.equal(plugin(x)[..., 0], found)
    torch.manual_seed(3)
    first = plugin(x)
    torch.manual_seed(3)
    assert torch.equal(plugin(x), first)


def test_random_draws_every_place_equally_often():
    """9 of 49 tokens, 5000 times: each place 918 times; four standard errors are 109."""
    x = torch.arange(49.0).expand(5000, 49)[..., None]
    counts = token_sparsity.random_subset(x, 9, training=True).flatten().long().bincount()
    assert len(counts) == 49 and float((counts - 5000 * 9 / 49).abs().max()) < 109


def test_random_is_evenly_spaced_in_evaluation():
    x = torch.arange(49.0)[None, :, None]
    plugin = TokenSparsity(["random7"]).eval()
    assert plugin(x)[0, :, 0].tolist() == [3, 10, 17, 24, 31, 38, 45]  # the middle of each row of 7
    assert torch.equal(plugin(x), plugin(x))
    assert torch.equal(token_sparsity.random_subset(x, 49), x)
    for keep in range(1, 50):
        places = token_sparsity.random_subset(x, keep)[0, :, 0]
        assert len(places) == keep and len(set(places.tolist())) == keep
        # symmetric, within the rounding down
        assert bool(((places + places.flip(0) - 48).abs() <= 1).all())


def test_plugins_are_applied_in_the_order_given():
    x = torch.randn(2, 49, 8)
    found = TokenSparsity(["pool5", "topk_norm4"])(x)
    by_hand = token_sparsity.topk_norm(token_sparsity.pool(x, 5), 4)
    assert torch.equal(found, by_hand) and TokenSparsity(["pool5", "topk_norm4"]).count(49) == 4


@pytest.mark.parametrize("name", ["linear", "mlp2x_gelu", "perceiver"])
def test_a_connector_behind_plugins_counts_its_tokens(name):
    torch.manual_seed(5)
    alone = connector.build(name, 16, 24)
    torch.manual_seed(5)
    made = connector.build(name, 16, 24, sparsity_plugins=["pool5", "topk_norm20"])
    x = torch.randn(2, 49, 16)
    found = made(x)
    assert found.shape == (2, connector.tokens(made, 49), 24)
    assert connector.tokens(made, 49) == (16 if name == "perceiver" else 20)
    # the same weights behind the plug-ins
    shorter = token_sparsity.topk_norm(token_sparsity.pool(x, 5), 20)
    torch.testing.assert_close(found, alone(shorter), atol=0, rtol=0)
    assert {f"connector.{key}" for key in alone.state_dict()} == made.state_dict().keys()


def test_a_connector_learns_behind_plugins_and_so_does_the_encoder():
    made = eyes.shake(connector.build("mlp2x_gelu", 16, 24, sparsity_plugins=["random9"]))
    x = torch.randn(2, 49, 16, requires_grad=True)
    made.train()(x).square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in made.parameters())
    assert (x.grad.norm(dim=-1) > 0).sum(1).tolist() == [9, 9]


def test_modes_reach_the_plugins():
    made = connector.build("linear", 8, 8, sparsity_plugins=["random9"])
    x = torch.randn(1, 49, 8)
    assert torch.equal(made.eval()(x), made(x))
    assert not torch.equal(made.train()(x), made(x))


def test_places_are_known_to_be_lost():
    assert connector.has_places(connector.build("mlp2x_gelu", 8, 8))
    assert connector.has_places(connector.build("pool3", 8, 8, sparsity_plugins=["bilinear5"]))
    assert not connector.has_places(connector.build("perceiver", 8, 8))
    assert not connector.has_places(connector.build("linear", 8, 8, sparsity_plugins=["random9"]))
    behind = connector.build("perceiver", 8, 8, sparsity_plugins=["pool3"])
    assert not connector.has_places(behind)


def test_no_plugin_is_the_plain_connector():
    made = connector.build("linear", 8, 8, sparsity_plugins=[])
    assert isinstance(made, torch.nn.Linear)


UNKNOWN = ["", "pool", "pool0", "topk9", "random-3", "norm_topk9", "pool3 ", "9", "pool3x"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_plugins_are_one_line(name):
    with pytest.raises(UserError, match="there is no sparsity plug-in .*known are pool<number>"):
        TokenSparsity([name])


def test_what_needs_a_grid_is_refused_behind_a_subset():
    """16 tokens of largest norm are no picture of 4 x 4, though 16 is a square."""
    with pytest.raises(UserError, match="pool3 needs a grid .*leaves none"):
        TokenSparsity(["topk_norm16", "pool3"])
    for name in ("pool2", "bilinear2", "concat4"):
        with pytest.raises(UserError, match=f"{name} needs a grid .*random16 leaves none"):
            connector.build(name, 8, 8, sparsity_plugins=["random16"])
        connector.build(name, 8, 8, sparsity_plugins=["pool4"])


@pytest.mark.parametrize("name", ["pool8", "bilinear8", "topk_norm50", "random50"])
def test_plugins_that_would_add_tokens_are_refused(name):
    plugin = TokenSparsity([name])
    with pytest.raises(UserError, match=f"{name} keeps .* tokens, there are 49"):
        plugin(torch.randn(1, 49, 8))
    with pytest.raises(UserError, match="there are 49"):
        connector.tokens(connector.build("linear", 8, 8, sparsity_plugins=[name]), 49)
    with pytest.raises(UserError, match="there are 4"):
        TokenSparsity(["pool2", name]).count(49)
