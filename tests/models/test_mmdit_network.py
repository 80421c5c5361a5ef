"""MMDiT is diffusers' SD3 transformer, block by block: names, numbers, gradients; and what masks and zeros must do."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock

from models.mmdit_network import CrossDiT, JointBlock, MMDiT, mean_word
from tests.conftest import gradients

SMALL = dict(channels=4, side=16, depth=3, width=64, heads=4, features=24)


def shaken(model):
    """All weights random: fresh ones are the identity, which any block would be."""
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return model


@pytest.mark.parametrize("last", [False, True])
def test_block_equals_diffusers(last, parity):
    ours = shaken(JointBlock(64, 4, last))
    theirs = JointTransformerBlock(64, 4, 16, context_pre_only=last)
    theirs.load_state_dict(ours.state_dict())  # every name and shape fits
    x, words, c = torch.randn(2, 9, 64), torch.randn(2, 5, 64), torch.randn(2, 64)
    a, a_words = ours(x, words, c)
    b_words, b = theirs(x, words, c)
    assert (a_words is None) == (b_words is None) == last
    mine, other = ([a], [b]) if last else ([a, a_words], [b, b_words])
    name = "mmdit_network.JointBlock" + (", last" if last else "")
    parity("MMDiT", name, "diffusers JointTransformerBlock", mine, other)


def test_network_equals_diffusers(parity):
    ours = shaken(MMDiT(**SMALL))
    theirs = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=64, pooled_projection_dim=24,
        pos_embed_max_size=8,
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    x, t, words = torch.randn(2, 4, 16, 16), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 24)
    pooled = torch.randn(2, 24)
    a = ours(x, t, words, pooled=pooled)
    b = theirs(x, words, pooled, t).sample
    parity("MMDiT", "mmdit_network.MMDiT", "diffusers.SD3Transformer2DModel", a, b)
    both = gradients(ours, a), gradients(theirs, b)
    name = "mmdit_network.MMDiT, gradients"
    parity("MMDiT", name, "diffusers.SD3Transformer2DModel", *both, atol=1e-4)


@pytest.mark.parametrize("network", [MMDiT, CrossDiT])
def test_padding_does_not_matter_and_words_do(network):
    model = shaken(network(**SMALL))
    x, t, words = torch.randn(1, 4, 16, 16), torch.tensor([5.0]), torch.randn(1, 7, 24)
    mask = torch.arange(7)[None] < 3
    other = words.clone()
    other[:, 3:] = 100.0
    torch.testing.assert_close(model(x, t, words, mask), model(x, t, other, mask))
    torch.testing.assert_close(model(x, t, words, mask), model(x, t, words[:, :3]))
    # through attention, not the pooled text alone
    other = words.clone()
    other[:, 2] = words[:, 2] + 3
    pooled = mean_word(words, mask)
    before = model(x, t, words, mask, pooled)
    assert (before - model(x, t, other, mask, pooled)).abs().max() > 1e-3
    assert (before - model(x, t, words, mask, pooled + 1)).abs().max() > 1e-3


def test_words_change_in_one_network_and_not_in_the_other():
    x, words, c = torch.randn(1, 9, 64), torch.randn(1, 5, 64), torch.randn(1, 64)
    _, changed = shaken(MMDiT.block(64, 4))(x, words, c)
    _, other = shaken(MMDiT.block(64, 4))(x + 1, words, c)
    assert not torch.equal(changed, words) and not torch.equal(changed, other)
    _, kept = shaken(CrossDiT.block(64, 4))(x, words, c)
    assert kept is words


@pytest.mark.parametrize("network", [MMDiT, CrossDiT])
def test_blocks_are_the_identity_and_the_output_is_zero_at_first(network):
    model = network(**SMALL)
    x, words, c = torch.randn(1, 9, 64), torch.randn(1, 5, 64), torch.randn(1, 64)
    for block in model.transformer_blocks[:-1]:
        a, b = block(x, words, c)
        assert torch.equal(a, x) and torch.equal(b, words)
    xt = torch.randn(1, 4, 16, 16)
    assert not model(xt, torch.tensor([5.0]), torch.randn(1, 5, 24)).any()


def test_mean_word_leaves_padding_out():
    words = torch.tensor([[[1.0], [3.0], [100.0]], [[5.0], [7.0], [9.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert mean_word(words, mask).flatten().tolist() == [2, 7]
    assert mean_word(words).flatten().tolist() == [pytest.approx(104 / 3), 7]


def test_patches_go_where_they_came_from():
    """A change of one patch reaches that place only, in blocks that do nothing."""
    model = MMDiT(**SMALL)
    torch.nn.init.normal_(model.proj_out.weight)
    x, t, words = torch.randn(1, 4, 16, 16), torch.tensor([5.0]), torch.randn(1, 5, 24)
    other = x.clone()
    other[:, :, 2:4, 6:8] += 1
    changed = (model(x, t, words) != model(other, t, words)).any(dim=(0, 1))
    assert changed[2:4, 6:8].all() and changed.sum() == 4
