"""Bytes of formulas and of kernels, as counted and by hand; the roofline; tiles that a wave of programs needs."""

import pytest
import torch

from deploy import triton_cases, triton_kernels, triton_traffic

SMALL = triton_cases.Sizes(**triton_kernels.SMALL)
CASES = triton_cases.CASES
R, N, P = SMALL.rows, SMALL.columns, SMALL.parameters
IN, OUT, T, G = SMALL.inputs, SMALL.outputs, SMALL.tokens, SMALL.inputs // SMALL.group
WEIGHT = OUT * IN
GRID = OUT * G


@pytest.mark.parametrize(
    "name, halves, floats, bytes_",
    [
        # x; y
        ("softmax", 2 * R * N, 0, 0),
        # x, w; y
        ("RMSNorm", 2 * R * N + N, 0, 0),
        # x, w, dy; y, dx, dw
        ("RMSNorm and gradients", 4 * R * N + 2 * N, 0, 0),
        # p, g, m, v; p, m, v
        ("AdamW", 0, 7 * P, 0),
        ("matmul", R * IN + WEIGHT + R * OUT, 0, 0),
        # x, scales, y; packed codes, zeros
        ("int4 matmul", T * IN + GRID + T * OUT, 0, WEIGHT // 2 + GRID),
    ],
)
def test_bytes_at_least(name, halves, floats, bytes_):
    wanted = 2 * halves + 4 * floats + bytes_
    assert triton_traffic.least_bytes(CASES[name], SMALL) == wanted


@pytest.mark.parametrize(
    "name, elements, size",
    [
        # x to its largest; x, largest to x - largest; exp; sum; quotient
        ("softmax", 8 * R * N + 4 * R, 2),
        # square, mean, + eps, rsqrt, times 1 / rms, times w
        ("RMSNorm", 7 * R * N + 6 * R + N, 2),
        ("matmul", R * IN + WEIGHT + R * OUT, 2),
    ],
)
def test_bytes_of_an_operation_at_a_time(name, elements, size):
    assert triton_traffic.eager_bytes(CASES[name], SMALL) == size * elements


def test_views_move_nothing_and_expanded_tensors_what_they_hold():
    x = torch.zeros(4, 6, device="meta")
    with triton_traffic.Traffic() as traffic:
        y = x.T.unsqueeze(0)[:, 1:]
        assert traffic.bytes == 0
        y.exp()
    assert traffic.bytes == 4 * (20 + 20)
    assert triton_traffic.size(torch.zeros(3, 1).expand(3, 100)) == 12


def test_what_kernels_load_is_counted():
    """Each row once; the weight of RMSNorm by each program; A by each column of tiles, B by each row of them."""
    for name, wanted in (
        ("softmax", 2 * 2 * R * N),
        ("RMSNorm", 2 * (3 * R * N) + 4 * R),
        ("AdamW", 4 * 7 * P),
        ("matmul", 2 * (2 * R * IN + 2 * WEIGHT + R * OUT)),
    ):
        assert triton_traffic.kernel_bytes(CASES[name], SMALL) == wanted, name
    # nothing is counted any more
    with triton_traffic.counted() as found:
        pass
    CASES["softmax"].fused(torch.zeros(2, 3))
    assert found == {"loaded": 0, "stored": 0}


def test_the_backward_pass_of_rms_norm_has_a_part_of_dw_for_sixteen_rows():
    """Forward; then x, dy, 1 / rms of each row once, w and a part of dw once a program."""
    programs = -(-R // 16)
    forward = 2 * 3 * R * N + 4 * R
    backward = 2 * 3 * R * N + 4 * R + programs * (2 * N + 4 * N)
    case = CASES["RMSNorm and gradients"]
    assert triton_traffic.kernel_bytes(case, SMALL) == forward + backward


def test_roofline():
    assert triton_traffic.roofline_seconds(2e9, 1e9, 1e12, 1e14) == 2e-3
    assert triton_traffic.roofline_seconds(2e9, 1e12, 1e12, 1e14) == 1e-2
    assert CASES["matmul"].flops(SMALL) == 2 * R * IN * OUT
    assert CASES["int4 matmul"].flops(SMALL) == 2 * T * IN * OUT


def test_bands_that_a_wave_needs():
    """32 programs of 16 x 16 tiles: two rows and all columns, or eight rows and four columns."""
    found = [triton_traffic.bands_of_a_wave(triton_traffic.order(16, 16, g), 32) for g in (1, 8)]
    assert found == [18, 12]
    # the last wave may be smaller
    assert triton_traffic.bands_of_a_wave([(0, 0), (0, 1), (5, 5)], 2) == (3 + 2) / 2
