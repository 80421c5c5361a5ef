"""Roofline and MFU: known answers, FLOPs and bytes of the operators against PyTorch's counter, bad input."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from training import flops, roofline
from utils.run import UserError


def test_roof_is_the_lower_of_two_limits():
    """A machine of 100 FLOP/s and 10 B/s: the ridge is at 10 FLOPs per byte."""
    assert [flops.attainable(i, 100, 10) for i in (1, 9, 10, 11, 1000)] == [10, 90, 100, 100, 100]


@pytest.mark.parametrize(
    "count, size, seconds, bound, share",
    [
        (2000, 10, 20, "compute", 1.0),
        (2000, 10, 100, "overhead", 0.2),
        (20, 10, 2, "memory", 0.5),
        (20, 10, 10, "overhead", 0.1),
    ],
)
def test_limit_of_an_operator(count, size, seconds, bound, share):
    found = roofline.row(count, size, seconds, 100, 10)
    assert found["bound"] == bound and found["share"] == pytest.approx(share)
    assert found["FLOPs/byte"] == count / size
    assert found["GFLOP/s"] == pytest.approx(count / seconds / 1e9)


def test_flops_of_products_are_those_that_torch_counts(parity):
    for name, action, count, size in roofline.operators(64, torch.device("cpu")):
        with FlopCounterMode(display=False) as counter:
            found = action()
        if "matrix" in name:
            kind = name.split(",")[0]
            counted = counter.get_total_flops()
            parity("Roofline", f"operators, {kind}", "FlopCounterMode", count, counted, atol=0)
        else:
            # a FLOP a number; read and written once
            assert count == found.numel() and size == 8 * found.numel()


def test_mfu_of_known_numbers():
    """Half the peak; twice as long is half of that."""
    assert flops.mfu(1e12, 2.0, 1e12) == 0.5
    assert flops.mfu(1e12, 4.0, 1e12) == 0.25
    for seconds, peak in ((0, 1), (1, 0), (-1, 1)):
        with pytest.raises(UserError, match="above 0"):
            flops.mfu(1, seconds, peak)


def test_large_products_reach_more_of_the_peak_than_small_sums(tmp_path):
    found = roofline.main(roofline.Config(repeats=3, width=256, device="cpu", out=str(tmp_path)))
    rate = {name.split(",")[0]: float(x.split()[0]) for name, x in found.items() if "," in name}
    assert found["add, 64 numbers"].endswith("overhead")
    assert rate["matrix product"] > 10 * rate["add"] > 0
    assert (tmp_path / "roofline.png").stat().st_size > 5000


@pytest.mark.parametrize("flags", [{"repeats": 0}, {"width": 8}])
def test_flags_that_make_no_sense(flags):
    with pytest.raises(UserError, match="--"):
        roofline.main(roofline.Config(**flags))
