"""models/step_profile.py: kinds of operators, shares of time and FLOPs, and variants that compute the same."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import step_profile
from models.unet import UNet
from models.unet_attention import AttentionBlock
from tests.conftest import gradients


def nested(*names):
    """An event of the profiler inside others: the outermost name first."""
    event = None
    for name in names:
        event = SimpleNamespace(name=name, cpu_parent=event)
    return event


@pytest.mark.parametrize(
    "name, kind",
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::convolution_backward", "convolution"),
        ("autograd::engine::evaluate_function: ConvolutionBackward0", "convolution"),
        ("aten::bmm", "attention"),
        ("SoftmaxBackward0", "attention"),
        ("aten::addmm", "linear layers"),
        ("aten::mm", "linear layers"),
        ("aten.mm", "linear layers"),
        ("aten::native_group_norm_backward", "GroupNorm, SiLU"),
        ("NativeGroupNormBackward0", "GroupNorm, SiLU"),
        ("aten::silu", "GroupNorm, SiLU"),
        ("aten::_to_copy", "copies, casts, upsampling"),
        ("aten::cat", "copies, casts, upsampling"),
        ("aten::add_", "additions"),
        ("Optimizer.step#AdamW.step", "optimizer"),
        ("aten::empty", None),
        ("aten::allocate", None),
    ],
)
def test_kind_of_name(name, kind):
    assert step_profile.kind_of_name(name) == kind


def test_kind_of_is_the_innermost_that_says_one():
    convolution = "aten::convolution"
    assert step_profile.kind_of(nested("aten::silu", convolution, "aten::empty")) == "convolution"
    copied = step_profile.kind_of(nested("aten::linear", "aten::clone", "aten::empty"))
    assert copied == "copies, casts, upsampling"
    assert step_profile.kind_of(nested("aten::empty")) == "other"
    # what the optimizer calls is the optimizer's, however deep
    deep = nested("Optimizer.step#AdamW.step", "aten::add_", "aten::copy_")
    assert step_profile.kind_of(deep) == "optimizer"


def test_time_shares_of_a_step_that_is_one_thing():
    a = torch.randn(512, 512)
    calls = []

    def step():
        calls.append(1)
        return a @ a

    shares = step_profile.time_shares(step, steps=3)
    assert len(calls) == 4  # the first is not measured
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["linear layers"] > 0.8
    assert list(shares)[-1] == "other" and min(shares.values()) >= 0


def test_time_shares_take_the_shortest_of_the_steps(monkeypatch):
    """A step in which another program had the processor says nothing."""
    steps = iter([{"aten::mm": 100.0, "aten::silu": 1.0}, {"aten::mm": 3.0, "aten::silu": 50.0}])

    class Profile:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def events(self):
            spent = next(steps).items()
            return [
                SimpleNamespace(name=n, cpu_parent=None, self_cpu_time_total=t) for n, t in spent
            ]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    shares = step_profile.time_shares(lambda: None, steps=2)
    assert shares["linear layers"] == 0.75 and shares["GroupNorm, SiLU"] == 0.25


def test_flop_shares_by_hand():
    """A multiplication and an addition for each weight and position; backward as much for each of two gradients."""
    convolution = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    linear = nn.Linear(5, 6, bias=False)
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    shares = step_profile.flop_shares(lambda: linear(convolution(x)).sum())
    of_convolution = 3 * 2 * 2 * 25 * 3 * 4 * 9
    of_linear = 3 * 2 * 2 * 4 * 5 * 5 * 6
    whole = of_convolution + of_linear
    expected = {"convolution": of_convolution / whole, "linear layers": of_linear / whole}
    assert shares == pytest.approx(expected)


def test_by_kind():
    times = {"linear layers": 0.1, "other": 0.2, "convolution": 0.7}
    rows = step_profile.by_kind(times, {"convolution": 0.9, "linear layers": 0.1}, 0.5)
    assert list(rows) == ["convolution", "other", "linear layers"]  # the slowest first
    assert rows["other"] == {"time": 0.2}
    # 0.9 of the FLOPs in 0.7 of the time
    expected = {"time": 0.7, "FLOPs": 0.9, "share_of_matmul_rate": 0.5 * 0.9 / 0.7}
    assert rows["convolution"] == pytest.approx(expected)
    # weighted by their time, the rates add up to that of the step
    rates = [row["time"] * row.get("share_of_matmul_rate", 0) for row in rows.values()]
    assert sum(rates) == pytest.approx(0.5)


def test_fused_attention_is_the_same_attention(parity):
    block = AttentionBlock(16, head_dim=8, groups=4)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 16, 3, 4)
    ours, fused = block(x), step_profile.fused_attention(block, x)
    names = "unet_attention.AttentionBlock", "torch scaled_dot_product_attention"
    parity("U-Net", *names, ours, fused, atol=1e-5)
    both = gradients(block, ours.square().sum()), gradients(block, fused.square().sum())
    parity("U-Net", names[0] + ", gradients", names[1], *both, atol=1e-3)


def test_variants_compute_the_same(monkeypatch):
    model = UNet(4, (16, 32), layers=1, attention=(False, True), head_dim=16)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 800])
    fused = []
    real = F.scaled_dot_product_attention

    def count(*heads):
        fused.append(1)
        return real(*heads)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    expected = model(x, t)
    variants = step_profile.variants(model, x)
    for name, (other, images, _) in variants.items():
        fused.clear()
        torch.testing.assert_close(other(images, t), expected, atol=1e-5, rtol=1e-5)
        # one block on each way, and one in the middle
        assert len(fused) == (4 if name == "fused attention" else 0)
        assert other is not model
    assert variants["fused AdamW"][2] == {"fused": True}
    last, images, _ = variants["channels last"]
    assert images.is_contiguous(memory_format=torch.channels_last)
    weight = last.down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    # the original is left as it was
    assert torch.equal(model(x, t), expected)
