"""Softmax, RMSNorm and AdamW in Triton's interpreter: equal to torch, gradients too; ragged sizes; bad input."""

import pytest
import torch
import torch.nn.functional as F

from deploy import triton_adamw, triton_rmsnorm, triton_softmax
from tests.conftest import gradients
from utils.run import UserError

WIDTHS = (1, 5, 16, 100)


def guarded(shape, dtype=torch.float32):
    """A tensor with a thousand in front of it and behind it, where no kernel may write -> tensor, its storage."""
    count = torch.Size(shape).numel()
    storage = torch.full((count + 128,), 1000.0, dtype=dtype)
    return storage[64 : 64 + count].view(shape), storage


def untouched(storage):
    return bool((storage[:64] == 1000).all() and (storage[-64:] == 1000).all())


@pytest.mark.parametrize("width", WIDTHS)
def test_softmax(parity, width):
    x = 5 * torch.randn(3, 2, width)
    mine, theirs = triton_softmax.softmax(x), F.softmax(x, -1)
    parity("Triton kernels", "triton_softmax.softmax", "torch.softmax", mine, theirs, 1e-6)


def test_softmax_of_large_values_and_of_masked_ones(parity):
    """exp(1000) overflows; -inf is a probability of zero, as attention masks want it."""
    x = torch.tensor([[1000.0, 999.0, -1000.0], [-torch.inf, 2.0, 1.0], [-1e4, -1e4, -1e4]])
    name = "triton_softmax.softmax, large and masked"
    parity("Triton kernels", name, "torch.softmax", triton_softmax.softmax(x), x.softmax(-1), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softmax_of_16_bits_is_computed_in_float32(dtype):
    x = (5 * torch.randn(4, 33)).to(dtype)
    found = triton_softmax.softmax(x)
    assert found.dtype == dtype
    # the interpreter cuts bfloat16 off where a GPU rounds: one step in the last place
    torch.testing.assert_close(found.float(), x.float().softmax(-1), rtol=2**-7, atol=1e-7)


def test_softmax_of_strided_rows_and_of_none():
    x = torch.randn(7, 6).T
    torch.testing.assert_close(triton_softmax.softmax(x), x.softmax(-1))
    assert triton_softmax.softmax(torch.zeros(0, 4)).shape == (0, 4)
    for width in (0, 65537):
        with pytest.raises(UserError, match=f"a row of {width}: one block holds 1 to 65536"):
            triton_softmax.softmax(torch.zeros(1, width))


def test_softmax_writes_inside_its_tensor():
    x, _ = guarded((3, 5))
    x.copy_(torch.randn(3, 5))
    y, storage = guarded((3, 5))
    triton_softmax.softmax_kernel[(3,)](x, y, 5, BLOCK=8)
    torch.testing.assert_close(y, x.softmax(-1))
    assert untouched(storage)


def test_warps_grow_with_the_row():
    assert [triton_softmax.warps_of(n) for n in (1, 512, 4096, 65536)] == [1, 1, 8, 16]


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_and_its_gradients(parity, width):
    """20 rows: one program of the backward pass has 16 of them, the last one 4."""
    theirs = torch.nn.RMSNorm(width, eps=1e-5)
    torch.nn.init.normal_(theirs.weight)
    x = torch.randn(4, 5, width)

    class Ours(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = torch.nn.Parameter(weight.detach().clone())
            self.x = torch.nn.Parameter(x.clone())

        def forward(self):
            return triton_rmsnorm.rms_norm(self.x, self.weight, 1e-5)

    ours = Ours(theirs.weight)
    theirs.register_parameter("x", torch.nn.Parameter(x.clone()))
    mine, wanted = ours(), theirs(theirs.x)
    name = "triton_rmsnorm.rms_norm"
    parity("Triton kernels", name, "torch.nn.RMSNorm", mine, wanted, 2e-6)
    pair = gradients(ours, mine), gradients(theirs, wanted)
    parity("Triton kernels", f"{name}, gradients", "torch.nn.RMSNorm", *pair, 2e-5)


def test_rms_norm_gradients_are_those_of_finite_differences():
    """In float32 to three digits: of x and of w, in a direction each."""
    x, w, dy = torch.randn(3, 6), torch.randn(6), torch.randn(3, 6)
    x.requires_grad_()
    w.requires_grad_()
    dx, dw = torch.autograd.grad(triton_rmsnorm.rms_norm(x, w), (x, w), dy)
    step = 1e-2
    for tensor, gradient in ((x, dx), (w, dw)):
        direction = torch.randn_like(tensor)
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                moved = [t + sign * step * direction if t is tensor else t for t in (x, w)]
                ends.append((triton_rmsnorm.rms_norm(*moved) * dy).sum())
        slope = float(ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=5e-3, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_of_16_bits_is_computed_in_float32(dtype):
    """300 squared overflows float16."""
    x = (300 * torch.randn(3, 40)).to(dtype).requires_grad_()
    w = torch.randn(40).to(dtype).requires_grad_()
    y = triton_rmsnorm.rms_norm(x, w)
    wanted = F.rms_norm(x.double(), (40,), w.double(), 1e-6)
    torch.testing.assert_close(y.double(), wanted, rtol=2**-7, atol=1e-3)
    dx, dw = torch.autograd.grad(y, (x, w), torch.ones_like(y))
    assert y.dtype == dx.dtype == dw.dtype == dtype
    theirs = torch.autograd.grad(wanted, (x, w), torch.ones_like(wanted))
    torch.testing.assert_close(dw, theirs[1], rtol=2**-6, atol=1e-2)
    torch.testing.assert_close(dx, theirs[0], rtol=2**-6, atol=1e-4)


def test_rms_norm_takes_strided_rows_and_gradients():
    x = torch.randn(6, 5).T.requires_grad_()
    w = torch.randn(12)[::2].requires_grad_()
    dy = torch.randn(6, 5).T
    mine = torch.autograd.grad(triton_rmsnorm.rms_norm(x, w), (x, w), dy)
    theirs = torch.autograd.grad(F.rms_norm(x, (6,), w, 1e-6), (x, w), dy)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_rms_norm_refuses_what_does_not_fit():
    for x, w, says in (
        (torch.zeros(2, 3), torch.zeros(4), "a weight of (4,) for rows of 3"),
        (torch.zeros(0, 3), torch.zeros(3), "no rows"),
        (torch.zeros(1, 65537), torch.zeros(65537), "a row of 65537"),
    ):
        with pytest.raises(UserError) as error:
            triton_rmsnorm.rms_norm(x, w)
        assert says in str(error.value)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adamw(parity, decay):
    """Ten steps on 1500 parameters, two programs; gradients of very different sizes, some exactly zero."""
    theirs = torch.nn.Parameter(torch.randn(30, 50))
    mine = theirs.detach().clone()
    moments = [torch.zeros_like(mine), torch.zeros_like(mine)]
    about = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": decay}
    optimizer = torch.optim.AdamW([theirs], **about)
    sizes = 10 ** torch.linspace(-6, 0, 50)
    for step in range(1, 11):
        theirs.grad = torch.randn(30, 50) * sizes
        theirs.grad[0] = 0
        optimizer.step()
        triton_adamw.adamw_step(mine, theirs.grad, *moments, step, **about)
    state = optimizer.state[theirs]
    found = [mine, *moments]
    wanted = [theirs, state["exp_avg"], state["exp_avg_sq"]]
    name = f"triton_adamw.adamw_step, decay {decay}"
    parity("Triton kernels", name, "torch.optim.AdamW, ten steps", found, wanted, 1e-5)


def test_adamw_defaults_are_those_of_torch():
    theirs = torch.nn.Parameter(torch.randn(9))
    mine = theirs.detach().clone()
    theirs.grad = torch.randn(9)
    torch.optim.AdamW([theirs]).step()
    triton_adamw.adamw_step(mine, theirs.grad, torch.zeros(9), torch.zeros(9), 1)
    torch.testing.assert_close(mine, theirs.detach(), rtol=1e-6, atol=0)


def test_adamw_of_bfloat16_weights_keeps_moments_in_float32():
    p = torch.randn(40).bfloat16()
    before = p.clone()
    m, v = torch.zeros(40), torch.zeros(40)
    g = torch.randn(40).bfloat16()
    triton_adamw.adamw_step(p, g, m, v, 1, lr=0.1, weight_decay=0.0)
    torch.testing.assert_close(m, 0.1 * g.float())
    # the first step is the learning rate long
    moved = (before.float() - p.float()).abs()
    assert p.dtype == torch.bfloat16 and ((moved - 0.1).abs() < 0.03).all()


def test_adamw_writes_inside_its_tensors():
    tensors = [guarded((5,)) for _ in range(4)]
    for tensor, _ in tensors:
        tensor.fill_(0.5)
    p, g, m, v = (tensor for tensor, _ in tensors)
    triton_adamw.adamw_step(p, g, m, v, 3)
    assert all(untouched(storage) for _, storage in tensors)
    assert (p != 0.5).all() and (g == 0.5).all()


def test_adamw_refuses_what_it_cannot_change_in_place():
    p = torch.zeros(4, 6)
    for change, says in (
        ({"step": 0}, "step 0: the first one is 1"),
        ({"g": torch.zeros(24)}, "gradient (24,) of (4, 6)"),
        ({"m": torch.zeros(6, 4).T}, "the first moment is not contiguous"),
        ({"v": torch.zeros(4, 6).double()}, "both moments are float32"),
        ({"p": torch.zeros(6, 4).T}, "the parameter is not contiguous"),
    ):
        usual = {name: torch.zeros_like(p) for name in "pgmv"} | {"step": 1}
        with pytest.raises(UserError) as error:
            triton_adamw.adamw_step(**usual | change)
        assert says in str(error.value)
