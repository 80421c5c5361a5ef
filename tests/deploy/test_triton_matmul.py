"""Matrix products in Triton's interpreter, of tiles and of int4 weights: equal to torch, ragged, in any order."""

import pytest
import torch
import triton
import triton.language as tl

from deploy import quantizers, triton_int4, triton_traffic
from deploy.quantized_model import QuantizedLinear, pack
from deploy.triton_matmul import grouped_tile, matmul
from utils.run import UserError

SMALL = (16, 32, 16)


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (16, 32, 16), (50, 70, 40), (129, 33, 17)])
def test_matmul(parity, m, n, k):
    a, b = torch.randn(m, k), torch.randn(k, n)
    mine = matmul(a, b, SMALL, group=2)
    parity("Triton kernels", "triton_matmul.matmul", "torch.matmul", mine, a @ b, 1e-4)


def test_matmul_with_the_default_tiles(parity):
    a, b = torch.randn(150, 40), torch.randn(40, 130)
    name = "triton_matmul.matmul, default tiles"
    parity("Triton kernels", name, "torch.matmul", matmul(a, b), a @ b, 1e-4)


def test_matmul_takes_any_strides():
    a = torch.randn(30, 20).T
    b = torch.randn(30, 80)[:, ::2]
    torch.testing.assert_close(matmul(a, b, SMALL), a @ b, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(matmul(b.T, a.T, SMALL), b.T @ a.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matmul_of_16_bits_adds_up_in_float32(dtype):
    """4000 products of 1 and 1: a sum in float16 stops at 2048, one in bfloat16 at 256."""
    ones = torch.ones(2, 4000, dtype=dtype)
    found = matmul(ones, ones.T, (16, 16, 64))
    assert found.dtype == dtype and (found.float() - 4000).abs().max() < 32
    a, b = torch.randn(40, 50).to(dtype), torch.randn(50, 30).to(dtype)
    wanted = a.float() @ b.float()
    torch.testing.assert_close(matmul(a, b, SMALL).float(), wanted, rtol=2**-7, atol=2e-3)


@triton.jit
def order_kernel(found, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Each program writes where its tile is, (programs, 2)."""
    program = tl.program_id(0)
    row, column = grouped_tile(program, tiles_m, tiles_n, GROUP)
    tl.store(found + 2 * program, row)
    tl.store(found + 2 * program + 1, column)


def tiles_of(tiles_m, tiles_n, group):
    """[(row, column)] of the tile of each program, as programs find it."""
    found = torch.full((tiles_m * tiles_n, 2), -1)
    order_kernel[(tiles_m * tiles_n,)](found, tiles_m, tiles_n, group)
    tiles = [tuple(pair) for pair in found.tolist()]
    # outside of a kernel the function says the same
    assert tiles == triton_traffic.order(tiles_m, tiles_n, group)
    return tiles


@pytest.mark.parametrize("tiles_m, tiles_n, group", [(4, 5, 2), (5, 3, 2), (1, 4, 8), (7, 2, 3)])
def test_grouped_order_visits_every_tile_once(tiles_m, tiles_n, group):
    order = tiles_of(tiles_m, tiles_n, group)
    assert sorted(order) == [(i, j) for i in range(tiles_m) for j in range(tiles_n)]
    # a band is finished before the next one begins
    bands = [row // group for row, _ in order]
    assert bands == sorted(bands)


def test_grouped_order_goes_down_before_it_goes_on():
    assert tiles_of(3, 3, 2) == [
        *[(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)],
        *[(2, 0), (2, 1), (2, 2)],
    ]
    # bands of one row: row after row
    assert tiles_of(2, 3, 1) == [(i, j) for i in range(2) for j in range(3)]


def test_the_order_changes_no_number():
    a, b = torch.randn(70, 20), torch.randn(20, 90)
    first = matmul(a, b, SMALL, group=1)
    assert all(torch.equal(matmul(a, b, SMALL, group=g), first) for g in (2, 3, 8))


def test_matmul_refuses_what_does_not_fit():
    a = torch.zeros(4, 6)
    for other, about, says in (
        (torch.zeros(5, 4), {}, "times"),
        (torch.zeros(6, 4).half(), {}, "both must be of one type"),
        (torch.zeros(6, 4), {"block": (16, 24, 16)}, "powers of two"),
        (torch.zeros(6, 4), {"block": (8, 16, 16)}, "16 or more"),
        (torch.zeros(6, 4), {"group": 0}, "bands of 1 or more"),
    ):
        with pytest.raises(UserError, match=says):
            matmul(a, other, **about)
    with pytest.raises(UserError, match="tiles of torch.int32: there are float16"):
        matmul(a.int(), a.int().T)
    assert matmul(torch.zeros(0, 3), torch.zeros(3, 5)).shape == (0, 5)
    assert matmul(torch.ones(2, 0), torch.ones(0, 3)).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("group, inputs", [(0, 50), (16, 64), (32, 96), (64, 128), (80, 160)])
@pytest.mark.parametrize("rows", [1, 37])
def test_int4_matmul(parity, group, inputs, rows):
    weight = torch.randn(41, inputs)
    codes, scales, zeros = quantizers.rtn(weight, 4, group)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).contiguous()
    x = torch.randn(rows, inputs)
    mine = triton_int4.int4_matmul(x, packed, scales, zeros)
    theirs = x @ quantizers.dequantize(codes, scales, zeros).T
    name = "triton_int4.int4_matmul"
    parity("Triton kernels", name, "torch.matmul, dequantised", mine, theirs, 1e-4)


@pytest.mark.parametrize("method", ["rtn", "hqq"])
@pytest.mark.parametrize("bias", [True, False])
def test_int4_linear_reads_a_layer_of_the_quantiser_as_it_is_stored(parity, method, bias):
    """Zero points of RTN are bytes, those of HQQ real numbers; channel scales are those of AWQ."""
    weight = torch.randn(40, 96)
    grid = getattr(quantizers, method)(weight, 4, 32)
    channels = 0.5 + torch.rand(96)
    layer = QuantizedLinear(*grid, 4, channels, torch.randn(40) if bias else None)
    assert layer.zeros.dtype == (torch.uint8 if method == "rtn" else torch.float16)
    x = torch.randn(2, 5, 96)
    name = f"triton_int4.int4_linear, {method}"
    mine = triton_int4.int4_linear(layer, x)
    parity("Triton kernels", name, "quantized_model.QuantizedLinear", mine, layer(x), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int4_matmul_of_16_bits(dtype):
    weight = torch.randn(33, 64)
    codes, scales, zeros = quantizers.rtn(weight, 4, 32)
    packed = pack(codes.flatten(), 4).view(33, 32)
    x = torch.randn(3, 64).to(dtype)
    found = triton_int4.int4_matmul(x, packed, scales, zeros)
    # weights are rounded to the type of x, as tensor cores want them
    wanted = x.float() @ quantizers.dequantize(codes, scales, zeros).T
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.1)


def test_a_step_stays_in_one_group():
    for rows, size, whole, wanted in (
        (1, 64, False, (16, 32, 64)),
        (16, 32, False, (16, 32, 32)),
        (17, 48, False, (64, 64, 16)),
        (17, 50, True, (64, 64, 64)),
    ):
        assert triton_int4.tile(rows, size, whole) == wanted


def test_int4_refuses_what_does_not_fit():
    x, packed = torch.zeros(2, 64), torch.zeros(8, 32, dtype=torch.uint8)
    grid = torch.ones(8, 2)
    for change, says in (
        ({"packed": packed[:, :16]}, "packed codes (8, 16) for 64 inputs, 8 outputs"),
        ({"packed": packed.int()}, "codes are bytes, not torch.int32"),
        ({"zeros": grid[:, :1]}, "zeros (8, 1), scales (8, 2)"),
        ({"scales": grid[:, :1].repeat(1, 3), "zeros": grid[:, :1].repeat(1, 3)}, "3 groups do"),
        ({"scales": torch.ones(8, 8), "zeros": torch.ones(8, 8)}, "groups of 8: a multiple of 16"),
        ({"x": x.double()}, "tiles of torch.float64"),
    ):
        usual = {"x": x, "packed": packed, "scales": grid, "zeros": grid}
        with pytest.raises(UserError) as error:
            triton_int4.int4_matmul(**usual | change)
        assert says in str(error.value)
    codes = torch.zeros(8, 64, dtype=torch.uint8)
    for bits, activations in ((8, 16), (4, 8)):
        layer = QuantizedLinear(
            codes, torch.ones(8, 1), torch.ones(8, 1), bits, None, None, activations
        )
        with pytest.raises(UserError, match="4 and 16"):
            triton_int4.int4_linear(layer, x)
