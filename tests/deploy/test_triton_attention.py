"""deploy/triton_attention.py: bytes are those that programs load and store, tiles fit, the study as a command."""

import json
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
import torch

from deploy import triton_attention, triton_attention_costs, triton_attention_figure, triton_offline
from deploy.triton_attention import Config, eager, kept, tensors
from deploy.triton_attention_builds import flash_builds
from deploy.triton_attention_costs import Shape
from deploy.triton_builds import compiled
from deploy.triton_flash import flash_attention
from deploy.triton_paged import paged_attention
from deploy.triton_tiles import TILES
from deploy.triton_traffic import counted
from tests.conftest import ROOT
from utils.run import UserError

SHAPES = {
    "causal": Shape(1, 4, 2, 200, 200, 64, True, 4),
    "last queries": Shape(2, 2, 1, 70, 150, 64, True, 4),
    "not causal": Shape(1, 2, 2, 150, 90, 128, False, 4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_bytes_are_those_that_programs_load_and_store(name, parity):
    shape = SHAPES[name]
    q, k, v = tensors(shape, "cpu", torch.float32)
    with counted() as forward:
        out = flash_attention(q, k, v, shape.causal)
    with counted() as backward:
        out.sum().backward()
    tiles = {key: by_size[shape.D][:2] for key, by_size in TILES.items()}
    predicted = {
        "forward": triton_attention_costs.forward_bytes(shape, tiles["forward"]),
        "backward": triton_attention_costs.backward_bytes(shape, tiles["dq"], tiles["dkdv"]),
    }
    found = {"forward": sum(forward.values()), "backward": sum(backward.values())}
    names = (
        "triton_attention_costs.forward_bytes, backward_bytes",
        "loads and stores in the interpreter",
    )
    parity("Triton attention", names[0], f"{names[1]}, {name}", predicted, found, 0)
    # no less than each number once
    assert found["forward"] >= triton_attention_costs.least_bytes(shape)


def test_one_tile_of_queries_loads_each_number_once():
    shape = Shape(2, 2, 2, 64, 64, 64, True)
    found = triton_attention_costs.forward_bytes(shape, (64, 64))
    assert found == triton_attention_costs.least_bytes(shape)


def test_bytes_of_a_decoding_step_are_those_that_are_loaded():
    """Beside block tables, lengths, and the parts: few bytes."""
    K, G, D, size, lengths = 2, 2, 64, 8, [100, 30]
    q = torch.randn(2, K * G, D)
    keys, values = torch.randn(2, 40, size, K, D)
    tables = torch.arange(26).view(2, 13)
    with counted() as found:
        paged_attention(q, keys, values, tables, torch.tensor(lengths))
    predicted = triton_attention_costs.decode_bytes(lengths, K, G, D, number=4)
    # each token's block number; parts written and read, a logsumexp a head, two lengths a head
    rest = 8 * K * sum(lengths) + 2 * 4 * q.numel() + 2 * 4 * 2 * K * G + 8 * 2 * K
    assert sum(found.values()) == predicted["paged"] + rest
    assert predicted["gathered"] > 3 * predicted["paged"]


def test_kept_for_the_backward_pass_is_measured(parity):
    shape = Shape(1, 4, 2, 60, 60, 64, False, 4)
    measured = kept(flash_attention, shape)
    predicted = triton_attention_costs.kept_bytes(shape, flash=True)
    names = "triton_attention_costs.kept_bytes", "torch saved_tensors_hooks"
    parity("Triton attention", *names, predicted, measured, 0)
    # eager attention keeps P, and its keys and values for each head of queries
    repeated = 4 * 2 * (shape.H - shape.K) * shape.S * shape.D
    predicted = triton_attention_costs.kept_bytes(shape, flash=False)
    assert kept(eager, shape) == predicted + repeated
    long = Shape(1, 32, 8, 8192, 8192, 128)
    ratio = [triton_attention_costs.kept_bytes(long, flash=flash) for flash in (False, True)]
    assert ratio[0] > 20 * ratio[1]


def test_eager_attention_is_that_of_the_kernels():
    shape = Shape(1, 4, 2, 20, 50, 64, True)
    q, k, v = tensors(shape, "cpu", torch.float32)
    torch.testing.assert_close(eager(q, k, v, True), flash_attention(q, k, v, True))


def test_flops_count_visible_pairs():
    mask = torch.ones(30, 50).tril(20)
    assert triton_attention_costs.forward_flops(Shape(2, 3, 1, 30, 50, 64)) == 2 * 3 * 4 * 64 * int(
        mask.sum()
    )
    assert triton_attention_costs.forward_flops(Shape(1, 1, 1, 30, 50, 64, False)) == 4 * 64 * 1500


@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("D", (64, 128))
def test_tiles_in_use_spill_no_registers_and_fit(D, arch):
    """99 KB is what the smallest of these GPUs (sm_86, sm_89) has for a block; sm_90 has 227 KB."""
    room = {80: 101376, 90: 232448}[arch]
    for name, by_arch in compiled(flash_builds(D, 4, True), [arch]).items():
        found = by_arch[arch]
        assert found["spills"] == 0 and found["mma"] > 0, name
        assert 0 < found["shared"] <= room, name


def test_four_warps_are_too_few_for_wide_heads():
    ((_, kernel, signature, about, _),) = flash_builds(128, 4, True)[:1]
    found = compiled([("forward", kernel, signature, about, 4)], [80])
    assert found["forward"][80]["spills"] > 100


def test_order_of_tiles_and_online_softmax():
    order = triton_attention_figure.tile_order(256, 256)
    assert order.tolist() == [[0, 1, -1, -1], [0, 1, 2, 3]]
    assert (triton_attention_figure.tile_order(130, 70, causal=False) >= 0).all()
    scores = torch.randn(150)
    most, sums = triton_attention_figure.running(scores, 64)
    ends = (64, 128, 150)
    wanted = [[float(scores[:end].max()), float(scores[:end].logsumexp(0))] for end in ends]
    torch.testing.assert_close(torch.stack([most, sums], 1), torch.tensor(wanted))
    figure = triton_attention_figure.draw_figure(Shape(1, 32, 8, 4096, 4096, 128))
    left, middle, right = figure.axes
    eager_line, programs, least = (line.get_ydata() for line in left.lines)
    assert all(a > b > c for a, b, c in list(zip(eager_line, programs, least))[3:])
    assert right.lines[-1].get_ydata()[0] == pytest.approx(right.lines[2].get_ydata()[-1])
    assert middle.images[0].get_array().mask.sum() == 56
    plt.close(figure)


def test_times_are_taken_of_all_ways(monkeypatch):
    """Without a GPU: what would be timed is called."""
    monkeypatch.setattr(triton_offline, "milliseconds", lambda call: call() is None or 1.0)
    cfg = Config(sequences=2, length=20, block_size=8)
    found = triton_attention.milliseconds(Shape(1, 2, 1, 20, 20, 64), cfg, torch.device("cpu"))
    ways = [
        f"{name}, {what}"
        for name in ("flash", "torch", "eager")
        for what in ("forward", "forward and backward")
    ]
    assert list(found) == [*ways, "decoding step, gathered", "decoding step, paged"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    cfg = Config(head_dim=64, length=1024, others=False, arch=(80,), out=str(out), device="cpu")
    return triton_attention.main(cfg), out


def test_the_study_says_what_its_parts_say(report):
    metrics, out = report
    assert (out / "triton_attention.png").is_file()
    assert json.loads((out / "metrics.json").read_text())["on a GPU, ms"] == "not measured"
    assert max(metrics["differences, interpreter, float32"].values()) < 1e-5
    assert min(metrics["differences, interpreter, float32"].values()) > 0
    shape = Shape(1, 32, 8, 1024, 1024, 64)
    row = metrics["forward, GB"]
    assert row["eager"] == triton_attention_costs.eager_bytes(shape) / 1e9
    assert row["flash, programs"] == triton_attention_costs.forward_bytes(shape, (128, 64)) / 1e9
    assert row["eager / programs"] == pytest.approx(row["eager"] / row["flash, programs"])
    small = metrics["kept, measured, small, bytes"]
    assert small["flash"] == small["flash, predicted"] < small["eager"]
    compiled_names = {name for name in metrics if name.endswith("sm_80")}
    assert compiled_names == {
        "forward 128x64, 8 warps, sm_80",
        "dq 64x64, 4 warps, sm_80",
        "dkdv 32x64, 8 warps, sm_80",
        "paged, blocks of 16, sm_80",
    }


def test_flags_that_fit_no_kernel(tmp_path):
    for flags, says in (
        ({"head_dim": 80}, "these kernels know 64 and 128"),
        ({"heads": 6, "kv_heads": 4}, "no multiple"),
        ({"length": 0}, "at least 1"),
        ({"arch": (70,)}, "--arch 70"),
    ):
        with pytest.raises(UserError, match=says):
            triton_attention.main(Config(**flags, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_help_needs_no_triton():
    hide = "import sys; sys.modules['triton'] = None; from deploy import triton_attention as t"
    done = subprocess.run([sys.executable, "-c", hide], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
