"""ControlNet equals diffusers'; untrained it is the U-Net exactly; what it trains on; edges of known pictures."""

import copy

import pytest
import torch

from models import control, controlnet, ddpm, edges, stable_diffuser
from models.unet import UNet
from tests.conftest import gradients
from tests.models.test_stable_diffuser import parts


def pair():
    """A tiny U-Net and a ControlNet whose every weight is random: zeros would hide what is wired wrongly."""
    unet = UNet(4, (16, 32), 1, (True, True), context_dim=24, head_dim=16).eval()
    unet.requires_grad_(False)
    net = controlnet.ControlNet(unet, (8, 8, 16, 16)).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return unet, net


def question():
    """xt, t, words, mask, edges."""
    every = torch.ones(2, 7, dtype=torch.bool)
    edge_map = (torch.rand(2, 1, 64, 64) < 0.1).float()
    return torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.randn(2, 7, 24), every, edge_map


def test_output_and_gradients_equal_diffusers(parity):
    from diffusers import ControlNetModel

    torch.manual_seed(1)
    unet, _, their_unet, _ = parts()
    unet.requires_grad_(False)
    net = controlnet.ControlNet(unet, (8, 8, 16, 16)).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs = ControlNetModel(
        in_channels=4, conditioning_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, cross_attention_dim=24, attention_head_dim=(1, 2),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        conditioning_embedding_out_channels=(8, 8, 16, 16),
    ).eval()  # fmt: skip
    theirs.load_state_dict(net.state_dict())
    their_unet.requires_grad_(False)
    xt, t, words, mask, edge_map = question()
    down, middle = theirs(xt, t, words, edge_map, 0.7, return_dict=False)
    expected = their_unet(
        xt, t, words, down_block_additional_residuals=down, mid_block_additional_residual=middle
    ).sample
    network = controlnet.controlled(unet, net, edge_map, 0.7)
    found = network(xt, t, words, mask)
    names = "controlnet.controlled", "diffusers.ControlNetModel, UNet2DConditionModel"
    parity("ControlNet", *names, found, expected, atol=1e-4)
    names = "controlnet.controlled, gradients", names[1]
    parity("ControlNet", *names, gradients(net, found), gradients(theirs, expected), atol=1e-3)


def test_an_untrained_control_is_the_unet_exactly():
    for patch in (1, 2):
        unet = UNet(4, (16, 32), 1, (True, True), context_dim=24, head_dim=16, patch=patch).eval()
        net = controlnet.ControlNet(unet)
        xt, t, words, mask, edge_map = question()
        edge_map = edge_map[..., ::patch, ::patch]
        found = controlnet.controlled(unet, net, edge_map)(xt, t, words, mask)
        assert torch.equal(found, unet(xt, t, words, mask))


def test_control_of_a_unet_with_pooled_text():
    """The frozen half and the copy both read the pooled text."""
    unet = UNet(4, (16, 32), 1, (True, True), context_dim=24, head_dim=16, pooled_text=True).eval()
    torch.nn.init.normal_(unet.text_embedding.weight)
    net = controlnet.ControlNet(unet)
    xt, t, words, mask, edge_map = question()
    network = controlnet.controlled(unet, net, edge_map)
    assert torch.equal(network(xt, t, words, mask), unet(xt, t, words, mask))
    # another projection in the copy alone: once its last layers are open, the answer changes
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    before = network(xt, t, words, mask)
    torch.nn.init.zeros_(net.text_embedding.weight)
    assert (network(xt, t, words, mask) - before).abs().max() > 1e-3
    assert not torch.equal(unet.text_embedding.weight, net.text_embedding.weight)


def test_zero_convolutions_learn_at_once_and_the_rest_a_step_later():
    """Eq. 6: the gradient of a zero convolution's weight is not zero, that of what stands before it is."""
    unet = UNet(4, (16, 32), 1, (True, True), context_dim=24, head_dim=16).eval()
    unet.requires_grad_(False)
    net = controlnet.ControlNet(unet)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    xt, t, words, mask, edge_map = question()

    def norms():
        optimizer.zero_grad()
        output = controlnet.controlled(unet, net, edge_map)(xt, t, words, mask)
        output.square().mean().backward()
        return {
            name: float(p.grad.norm()) for name, p in net.named_parameters() if p.grad is not None
        }

    first = norms()
    zero = [name for name in first if "controlnet_down" in name or "controlnet_mid" in name]
    assert all(first[name] > 0 for name in zero)
    assert all(first[name] == 0 for name in first if name not in zero)
    optimizer.step()
    second = norms()
    assert second["conv_in.weight"] > 0
    assert second["controlnet_cond_embedding.conv_out.weight"] > 0
    assert second["controlnet_cond_embedding.conv_in.weight"] == 0
    # the U-Net has learned nothing
    assert all(p.grad is None for p in unet.parameters())


def test_the_copy_is_the_encoders_and_its_own():
    unet, _ = pair()
    before = copy.deepcopy(unet.state_dict())
    net = controlnet.ControlNet(unet)
    for name, weight in net.conv_in.state_dict().items():
        assert torch.equal(weight, unet.conv_in.state_dict()[name])
    assert all(p.requires_grad for p in net.parameters())
    for parameter in net.parameters():
        torch.nn.init.ones_(parameter)
    assert all(torch.equal(unet.state_dict()[k], v) for k, v in before.items())


def test_edges_survive_seven_layers():
    """With torch's own initialisation the embedding is nearly the same for every edge map."""
    embedding = controlnet.EdgeEmbedding(8)
    torch.nn.init.normal_(embedding.conv_out.weight, std=0.02)
    maps = (torch.rand(8, 1, 64, 64) < 0.1).float()
    assert embedding(maps).std(0).mean() > 0.01


def test_scale_zero_is_the_unet_and_half_is_not():
    unet, net = pair()
    xt, t, words, mask, edge_map = question()
    plain = unet(xt, t, words, mask)
    without = controlnet.controlled(unet, net, edge_map, 0.0)(xt, t, words, mask)
    assert torch.equal(without, plain)
    half = controlnet.controlled(unet, net, edge_map, 0.5)(xt, t, words, mask)
    assert not torch.allclose(half, plain, atol=1e-3)


def test_both_halves_of_guidance_follow_the_same_edges():
    unet, net = pair()
    xt, t, words, mask, edge_map = question()
    network = controlnet.controlled(unet, net, edge_map)
    twice = network(xt.repeat(2, 1, 1, 1), t.repeat(2), words.repeat(2, 1, 1), mask.repeat(2, 1))
    expected = network(xt, t, words, mask).repeat(2, 1, 1, 1)
    torch.testing.assert_close(twice, expected, atol=1e-5, rtol=1e-5)


def test_noisy_steps_are_drawn_more_often():
    """t = (1 - u^3) T: its mean is 3/4 T, and t < T/2 where u^3 > 1/2."""
    t = control.cubic_timesteps(ddpm.Schedule(), 20_000, "cpu")
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() == 999
    assert float(t.float().mean()) == pytest.approx(750, abs=10)
    assert float((t < 500).float().mean()) == pytest.approx(1 - 0.5 ** (1 / 3), abs=0.02)


def test_training_pairs_each_picture_with_its_edges_and_words(monkeypatch):
    """Latents, edges and words all hold the number of their picture; half of the captions are dropped."""
    seen = []

    def spied(network, schedule, z0, words, mask, t, eps):
        seen.append((network, z0[:, 0, 0, 0], words[:, 0, 0], t))
        return torch.ones((), requires_grad=True).square()

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

    number = torch.arange(1.0, 9.0)
    monkeypatch.setattr(stable_diffuser, "loss", spied)
    monkeypatch.setattr(control, "controlled", lambda unet, net, edges: edges[:, 0, 0, 0])
    latents = number[:, None, None, None].expand(8, 4, 2, 2)
    words = number[:, None, None].expand(8, 7, 24)
    empty = (-torch.ones(1, 7, 24), torch.ones(1, 7, dtype=torch.bool))
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    cfg = control.Config(steps=40, batch=4, lr=0.5, drop_text=0.5)
    learn = (latents, latents[:, :1], words, torch.ones(8, 7, dtype=torch.bool), empty)
    schedule = ddpm.Schedule(kind="cosine")
    assert list(control.train(None, net, optimizer, schedule, *learn, cfg)) == [1.0] * 40
    dropped = 0
    assert torch.cat([t for *_, t in seen]).float().mean() > 650
    for edge_number, z0, w, _ in seen:
        assert torch.equal(edge_number, z0) and len(z0.unique()) == 4
        assert ((w == z0) | (w == -1)).all()
        dropped += int((w == -1).sum())
    assert 50 < dropped < 110
    assert optimizer.param_groups[0]["lr"] == ddpm.learning_rate(cfg, 39)


def test_canny_finds_the_border_of_a_square_and_nothing_in_a_plain_picture():
    image = -torch.ones(1, 3, 32, 32)
    assert not edges.canny(image).any()
    image[:, 1, 8:24, 8:24] = 1.0  # one colour is enough
    found = edges.canny(image)[0, 0]
    assert not found[:6].any() and not found[10:22, 10:22].any()
    # one line, a pixel wide, along each side
    for line in (found[16, 6:11], found[16, 21:26], found[6:11, 16], found[21:26, 16]):
        assert line.sum() == 1


def test_sobel_and_blur_equal_scipy(parity):
    from scipy import ndimage

    x = torch.randn(1, 1, 9, 11, dtype=torch.float32)
    dx, dy = edges.sobel(x)
    plane = x[0, 0].numpy()
    theirs = [torch.from_numpy(ndimage.sobel(plane, axis, mode="nearest")) for axis in (1, 0)]
    parity("ControlNet", "edges.sobel", "scipy.ndimage.sobel", [dx[0, 0], dy[0, 0]], theirs)
    smooth = ndimage.gaussian_filter(plane, 1.0, mode="nearest", truncate=3.0)
    names = "edges.gaussian_blur", "scipy.ndimage.gaussian_filter"
    parity("ControlNet", *names, edges.gaussian_blur(x)[0, 0], torch.from_numpy(smooth))


def test_weak_edges_count_beside_strong_ones_only():
    image = torch.zeros(1, 3, 16, 32)
    image[..., 16:] = 0.17  # weak all the way
    assert not edges.canny(image).any()
    image[:, :, 7:9, 16:] = 0.4  # strong in the middle: two neighbours on each side come with it
    found = edges.canny(image)[0, 0].any(1)
    assert 4 <= found.sum() < 14 and found[7] and not found[1]


def test_f1_forgives_one_pixel_and_counts_both_ways():
    wanted = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    wanted[..., 8] = True
    for shift, score in ((0, 1.0), (1, 1.0), (2, 0.0)):
        assert float(edges.f1(wanted.roll(shift, 3), wanted)) == pytest.approx(score)
    twice = wanted | wanted.roll(5, 3)
    assert float(edges.f1(twice, wanted)) == pytest.approx(2 / 3)
    assert float(edges.f1(wanted, twice)) == pytest.approx(2 / 3)
    assert float(edges.f1(torch.zeros_like(wanted), wanted)) == 0
