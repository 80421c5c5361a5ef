"""The study of Triton's kernels: cases that agree, builds as they are launched, times, the table, wrong flags."""

import json

import matplotlib.pyplot as plt
import pytest
import torch

from deploy import (
    triton_builds,
    triton_cases,
    triton_kernels,
    triton_matmul,
    triton_offline,
    triton_speed,
    triton_traffic,
)
from utils.run import UserError

SMALL = triton_cases.Sizes(**triton_kernels.SMALL)
CASES = triton_cases.CASES
R, N = SMALL.rows, SMALL.columns


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A run for one architecture, and its folder."""
    out = tmp_path_factory.mktemp("study")
    about = {"rows": 64, "columns": 96, "parameters": 512, "size": 128, "tokens": 2, "group": 32}
    cfg = triton_kernels.Config(**about, arch=(80,), wave=8, device="cpu", out=str(out))
    return triton_kernels.main(cfg), out


@pytest.mark.parametrize("name", CASES)
def test_the_three_ways_of_a_case_are_equal(name, parity):
    case = CASES[name]
    given = case.inputs(SMALL, torch.float32, "cpu")
    fused, library, eager = (
        triton_cases.tensors(call(*(x.clone() for x in given)))
        for call in (case.fused, case.library, case.eager)
    )
    topic = "Triton kernels"
    parity(topic, f"triton_cases, {name}", "torch", fused, library, 2e-5)
    parity(topic, f"triton_cases, {name}, eager", "torch", eager, library, 2e-5)
    wanted = max(float((a.double() - b.double()).abs().max()) for a, b in zip(fused, library))
    torch.manual_seed(0)
    assert triton_cases.difference(case, SMALL) == pytest.approx(wanted, abs=2e-5)


def test_a_wrong_kernel_has_a_difference():
    case = triton_cases.Case(
        triton_cases.adamw_inputs,
        lambda p, m, v, g: (p, m, v + 1),
        lambda p, m, v, g: (p, m, v),
        None,
        None,
    )
    assert triton_cases.difference(case, SMALL) == pytest.approx(1)


def launches(monkeypatch, kernel, call):
    """Keyword arguments of each launch of a kernel during call()."""
    seen = []
    original = type(kernel).run

    def watch(self, *args, **kwargs):
        if self is kernel:
            seen.append(dict(zip(kernel.arg_names, args)) | kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(kernel), "run", watch)
    call()
    return seen


@pytest.mark.parametrize("name", ["softmax", "RMSNorm, backward", "AdamW", "matmul", "int4 matmul"])
def test_kernels_are_compiled_as_they_are_launched(name, monkeypatch):
    """Constants, warps, and the types of all arguments."""
    chosen = {build[0].split(", 2 ")[0]: build for build in triton_builds.builds(N, 2, 32)}
    _, kernel, signature, constants, warps = chosen[name]
    case = CASES.get(name, CASES["RMSNorm and gradients"])
    sizes = triton_cases.Sizes(**{**triton_kernels.SMALL, "tokens": 2})
    given = case.inputs(sizes, torch.float16, "cpu")
    launch = launches(monkeypatch, kernel, lambda: case.fused(*given))[0]
    assert launch.get("num_warps", 4) == warps
    assert signature.keys() | constants.keys() == set(kernel.arg_names)
    for argument, value in constants.items():
        # in the interpreter, and only there, tiles are multiplied in float32
        assert launch[argument] == (value or argument == "WIDEN"), argument
    types = {torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8", int: "i32"}
    for argument, kind in signature.items():
        value = launch[argument]
        found = value.dtype if isinstance(value, torch.Tensor) else type(value)
        assert kind.split(":")[0] == types.get(found, "fp32"), argument


def test_times_of_three_ways(monkeypatch):
    given = []

    def milliseconds(call):
        given.append(call())
        return float(len(given))

    monkeypatch.setattr(triton_offline, "milliseconds", milliseconds)
    case = CASES["softmax"]
    found = triton_speed.times(case, SMALL, "cpu", compiler=lambda call: call)
    assert list(found)[:3] == ["Triton ms", "torch ms", "torch.compile ms"]
    assert list(found.values())[:3] == [1, 2, 3]
    torch.testing.assert_close(given[1:], given[:1] * 2, rtol=1e-3, atol=1e-4)
    # bytes over a millisecond
    assert found["Triton GB/s"] == pytest.approx(4 * R * N / 1e-3 / 1e9)


def test_nothing_is_timed_without_a_gpu():
    assert set(triton_speed.rows(SMALL, "cpu").values()) == {"not measured"}


def test_the_study_counts_compiles_and_draws(study):
    metrics, out = study
    assert (out / "triton_kernels.png").is_file()
    written = json.loads((out / "metrics.json").read_text("utf-8"))
    assert written.keys() >= metrics.keys()
    for name in CASES:
        assert metrics[name]["difference"] < 1e-4
        assert metrics[name]["eager / least"] >= 1
        assert metrics[f"{name}, on a GPU"] == "not measured"
    assert metrics["softmax"]["least MB"] == 2 * 2 * 64 * 96 / 1e6
    assert metrics["softmax"]["roofline us"] == pytest.approx(2 * 2 * 64 * 96 / 2e12 * 1e6)
    assert metrics["softmax"]["counted / least, small"] == 1
    assert metrics["bands of A and B, 8 programs"]["group 8"] == 9


def test_products_use_tensor_cores_and_nothing_spills(study):
    metrics, _ = study
    rows = {name: row for name, row in metrics.items() if name.endswith("sm_80")}
    assert len(rows) == 8
    for name, row in rows.items():
        assert row["spills"] == 0 and "ptx" not in row
        assert (row["mma"] > 0) == ("matmul" in name)
    # unknown addresses: two bytes at a time
    assert rows["matmul, sm_80"]["wide"] > 0 and rows["matmul, sm_80"]["narrow"] == 0
    unknown = rows["matmul, no divisibility, sm_80"]
    assert unknown["wide"] == 0 and unknown["narrow"] > 50


def test_the_figure_shows_bytes_and_the_first_wave(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(triton_kernels.figures, "close", lambda figure, path: drawn.append(figure))
    rows = {"a": {"eager MB": 8.0, "least MB": 2.0, "eager / least": 4.0}}
    tiles = {"order": triton_traffic.order(4, 4, 2), "other": triton_traffic.order(4, 4, 1)}
    triton_kernels.draw(tmp_path / "x.png", rows, tiles, 4)
    bars, first, _ = drawn[0].axes
    assert [patch.get_width() for patch in bars.patches] == [8, 2]
    assert bars.texts[0].get_text() == " 4.0 x"
    shown = first.images[0].get_array()
    assert shown[:2, :2].tolist() == [[0, 0], [0, 0]] and shown[3, 3] == 3
    assert first.lines[0].get_xydata().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    plt.close(drawn[0])


def test_wrong_flags_are_one_line(tmp_path):
    for flags, says in (
        ({"rows": 0}, "sizes and --wave must be at least 1"),
        ({"columns": 65537}, "--columns must be at most 65536"),
        ({"size": 40}, "--size must be a multiple of 16"),
        ({"size": 96, "group": 64}, "--group 64: a multiple of 16 that divides --size 96"),
        ({"group": -16}, "--group -16"),
        ({"arch": (80, 70)}, "--arch 70: there are 80, 86, 89, 90"),
        ({"bandwidth": 0.0}, "--bandwidth and --peak must be more than 0"),
    ):
        with pytest.raises(UserError, match=says):
            triton_kernels.main(triton_kernels.Config(**flags, out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


def test_warps_of_a_tile():
    assert triton_matmul.warps_of_tile((128, 128, 32)) == 8
    assert triton_matmul.warps_of_tile((64, 128, 32)) == 4
