"""The U-Net is diffusers' U-Net: the same names, the same numbers, the same gradients."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from models.unet import UNet, timestep_embedding
from tests.conftest import gradients
from utils.run import UserError


def test_unet_equals_diffusers(parity):
    ours = UNet(4, (16, 32), layers=2, attention=(False, True), head_dim=16)
    theirs = UNet2DModel(
        in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())  # every name and shape fits
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0, 17, 999])
    a, b = ours(x, t), theirs(x, t).sample
    parity("U-Net", "unet.UNet", "diffusers.UNet2DModel", a, b)
    both = gradients(ours, a), gradients(theirs, b)
    parity("U-Net", "unet.UNet, gradients", "diffusers.UNet2DModel", *both, atol=1e-4)


def test_unet_with_classes_equals_diffusers(parity):
    """Ten classes, and the eleventh for none."""
    ours = UNet(4, (16, 32), layers=1, attention=(False, True), head_dim=16, classes=10)
    theirs = UNet2DModel(
        in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16, num_class_embeds=11,
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 17, 999]), torch.tensor([0, 9, 10])
    a, b = ours(x, t, y=y), theirs(x, t, class_labels=y).sample
    parity("U-Net", "unet.UNet with classes", "diffusers.UNet2DModel", a, b)
    both = gradients(ours, a), gradients(theirs, b)
    name = "unet.UNet with classes, gradients"
    parity("U-Net", name, "diffusers.UNet2DModel", *both, atol=1e-4)


def test_conditional_unet_equals_diffusers(parity):
    ours = UNet(4, (16, 32), layers=1, attention=(True, True), context_dim=24, head_dim=16)
    theirs = UNet2DConditionModel(
        in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=24, attention_head_dim=(1, 2),
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    x, t, words = torch.randn(3, 4, 8, 8), torch.tensor([0, 17, 999]), torch.randn(3, 7, 24)
    mask = torch.arange(7) < torch.tensor([[3], [7], [1]])  # True where there is a word
    a, b = ours(x, t, words, mask), theirs(x, t, words, encoder_attention_mask=mask).sample
    parity("U-Net", "unet.UNet with text", "diffusers.UNet2DConditionModel", a, b)
    both = gradients(ours, a), gradients(theirs, b)
    parity(
        "U-Net",
        "unet.UNet with text, gradients",
        "diffusers.UNet2DConditionModel",
        *both,
        atol=1e-4,
    )


TEXT = dict(layers=1, attention=(True, True), context_dim=24, head_dim=16)


def test_pooled_text_equals_diffusers(parity):
    """Their class is then a vector, and they project what they are given: here the mean of each caption's words."""
    ours = UNet(4, (16, 32), **TEXT, pooled_text=True)
    for parameter in ours.text_embedding.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    theirs = UNet2DConditionModel(
        in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=24, attention_head_dim=(1, 2),
        class_embed_type="simple_projection", projection_class_embeddings_input_dim=24,
    )  # fmt: skip
    state = ours.state_dict()
    theirs.load_state_dict({k.replace("text_emb", "class_emb"): v for k, v in state.items()})
    x, t, words = torch.randn(3, 4, 8, 8), torch.tensor([0, 17, 999]), torch.randn(3, 7, 24)
    lengths = (3, 7, 1)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    pooled = torch.stack([row[:n].mean(0) for row, n in zip(words, lengths)])
    a = ours(x, t, words, mask)
    b = theirs(x, t, words, class_labels=pooled, encoder_attention_mask=mask).sample
    names = "unet.UNet with pooled text", "diffusers.UNet2DConditionModel, simple_projection"
    parity("U-Net", *names, a, b)
    mine, other = gradients(ours, a), gradients(theirs, b)
    other = {k.replace("class_emb", "text_emb"): v for k, v in other.items()}
    assert mine["text_embedding.weight"].abs().max() > 1e-2
    parity("U-Net", names[0] + ", gradients", names[1], mine, other, atol=1e-4)


def test_pooled_text_starts_as_the_network_without():
    torch.manual_seed(0)
    without = UNet(4, (16, 32), **TEXT)
    torch.manual_seed(0)
    pooled = UNet(4, (16, 32), **TEXT, pooled_text=True)
    new = pooled.state_dict().keys() - without.state_dict().keys()
    assert new == {"text_embedding.weight", "text_embedding.bias"}
    # the seed gives the others the same weights, and words of the same shape the same answer
    for name, weight in without.state_dict().items():
        assert torch.equal(weight, pooled.state_dict()[name])
    x, t, words = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 7, 24)
    assert torch.equal(without(x, t, words), pooled(x, t, words))


def test_pooled_text_needs_words():
    with pytest.raises(UserError, match="context_dim"):
        UNet(4, (16, 32), pooled_text=True)


@pytest.mark.parametrize("pooled_text", [False, True])
def test_masked_words_do_not_matter(pooled_text):
    model = UNet(4, (16, 32), **TEXT, pooled_text=pooled_text)
    if pooled_text:
        torch.nn.init.normal_(model.text_embedding.weight)
    x, t, words = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 7, 24)
    mask = torch.arange(7)[None] < 3
    other = words.clone()
    other[:, 3:] = 100.0
    torch.testing.assert_close(model(x, t, words, mask), model(x, t, other, mask))
    other[:, 2] = 100.0
    assert (model(x, t, words, mask) - model(x, t, other, mask)).abs().max() > 1e-3


def test_folding_pixels_is_the_same_network_on_folded_pixels():
    folded = UNet(1, (16, 32), layers=1, attention=(False, False), patch=2)
    plain = UNet(4, (16, 32), layers=1, attention=(False, False))
    plain.load_state_dict(folded.state_dict())
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([3, 4])
    y = plain(torch.nn.functional.pixel_unshuffle(x, 2), t)
    torch.testing.assert_close(folded(x, t), torch.nn.functional.pixel_shuffle(y, 2))


@pytest.mark.parametrize("dim", [16, 64])
def test_timestep_embedding_equals_diffusers(parity, dim):
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0, 1, 500, 999])
    theirs = get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    parity(
        "U-Net",
        "unet.timestep_embedding",
        "diffusers get_timestep_embedding",
        timestep_embedding(t, dim),
        theirs,
    )
