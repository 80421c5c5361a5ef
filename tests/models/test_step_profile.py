"""models/step_profile.py: time of operators by kind, shares of time and FLOPs, and variants that compute the same."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from models import step_profile
from models.unet import UNet
from models.unet_attention import AttentionBlock
from tests.conftest import gradients


def spin(seconds):
    """Keep the processor busy."""
    start = time.thread_time()
    while time.thread_time() - start < seconds:
        pass


def kinds_of(step):
    """Kinds of operators that took any time in one step."""
    timer = step_profile.OperatorTimer()
    with timer:
        step()
    return {kind for kind, seconds in timer.seconds.items() if seconds > 0}


def test_kinds_of_operators():
    """Forward and backward; autograd calls the latter under the same mode."""
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    norm, convolution = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3)
    assert kinds_of(lambda: convolution(x)) == {"convolution"}
    assert kinds_of(lambda: F.silu(norm(x))) >= {"GroupNorm, SiLU"}
    assert kinds_of(lambda: F.interpolate(x, scale_factor=2)) == {"upsampling"}
    assert kinds_of(lambda: torch.cat([x, x])) == {"copies, casts"}
    assert kinds_of(lambda: x + x) == {"additions"}
    tokens = torch.randn(2, 5, 4)
    assert "linear layers" in kinds_of(lambda: nn.Linear(4, 3)(tokens))
    assert kinds_of(lambda: tokens @ tokens.mT) - {"other"} == {"attention"}
    assert kinds_of(lambda: tokens.softmax(-1)) == {"attention"}
    y = convolution(x).sum()
    assert "convolution" in kinds_of(y.backward)


def test_what_the_optimizer_calls_is_the_optimizers():
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1)
    layer(torch.randn(3, 4)).sum().backward()
    # besides, torch marks the step in its own profile
    assert kinds_of(optimizer.step) - {"other"} == {"optimizer"}
    # and nothing after it, nor when the timer is gone
    hooks = _global_optimizer_pre_hooks
    timer = step_profile.OperatorTimer()
    with timer:
        assert len(hooks) == 1
        optimizer.step()
        before = timer.seconds["optimizer"]
        torch.add(torch.ones(3), 1)
    assert timer.seconds["optimizer"] == before and timer.seconds["additions"] > 0
    assert len(hooks) == 0


def test_timer_leaves_the_numbers_alone():
    model = UNet(4, (16, 32), layers=1, attention=(False, True), head_dim=16)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 800])
    expected = model(x, t)
    with step_profile.OperatorTimer():
        assert torch.equal(model(x, t), expected)


def test_time_shares_of_a_step_that_is_one_thing():
    a = torch.randn(512, 512)
    calls = []

    def step():
        calls.append(1)
        return a @ a

    shares = step_profile.time_shares(step, steps=4)
    assert (
        len(calls) == 9
    )  # the first is not measured; each of the others with the timer and without
    assert sum(shares.values()) == pytest.approx(1)
    assert 0.5 < shares["linear layers"] < 1.5
    assert list(shares)[-1] == "other"


def test_time_between_operators_is_other():
    a = torch.randn(256, 256)

    def step():
        spin(0.02)
        return a @ a

    assert step_profile.time_shares(step, steps=3)["other"] > 0.6


def test_time_shares_are_those_of_a_step_without_the_timer(monkeypatch):
    """A second for each reading of the clock: a step without the timer takes 1, its only operator 1 as well."""
    readings = iter(range(1000))
    monkeypatch.setattr(step_profile.time, "thread_time", lambda: float(next(readings)))
    a = torch.randn(4, 4)
    shares = step_profile.time_shares(lambda: a @ a, steps=5)
    assert shares["linear layers"] == 1 and shares["other"] == 0


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
