"""deploy/export_onnx.py, export_int8.py, export_times.py: any batch, static int8, and what is timed."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from deploy import export_int8, export_onnx, export_times
from utils.run import UserError


class Scaled(nn.Module):
    """A depthwise convolution whose output channels differ by a factor of a thousand, and a bias for each picture."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(4, 4, 3, groups=4)
        with torch.no_grad():
            scale = torch.tensor([1e-2, 1.0, 3.0, 10.0]).view(4, 1, 1, 1)
            self.conv.weight.mul_(scale)
            self.conv.bias.zero_()
        self.eval().requires_grad_(False)

    def forward(self, x, shift):
        return self.conv(x) + shift[:, None, None, None]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """-> module, path of its file."""
    module = Scaled()
    path = tmp_path_factory.mktemp("batched") / "scaled.onnx"
    args = (torch.randn(2, 4, 6, 6), torch.randn(2))
    return module, export_onnx.write_batched(module, args, path, ["x", "shift"], ["y"])


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_one_file_takes_any_batch(exported, parity, batch):
    module, path = exported
    again = export_onnx.OnnxModule(path)
    args = (torch.randn(batch, 4, 6, 6), torch.randn(batch))
    about = f"export_onnx.write_batched, batch {batch}"
    parity("Export", about, "torch.nn.Conv2d", again(*args), module(*args), 1e-5)
    assert again.inputs == ["x", "shift"]
    with pytest.raises(ValueError):
        again(args[0])


def test_an_example_of_one_would_be_a_constant(tmp_path):
    args = (torch.randn(1, 4, 6, 6), torch.randn(1))
    with pytest.raises(UserError, match="torch.export cannot follow"):
        export_onnx.write_batched(Scaled(), args, tmp_path / "x.onnx", ["x", "shift"], ["y"])


def error(path, module, args):
    """Largest error of each output channel, as a fraction of the largest value of that channel."""
    wanted = module(*args)
    off = (export_onnx.OnnxModule(path)(*args) - wanted).abs().amax((0, 2, 3))
    return off / wanted.abs().amax((0, 2, 3))


def test_a_scale_for_each_channel_keeps_small_channels(exported, tmp_path):
    """With one scale for the whole weight, that of the largest channel, the smallest one is rounded to nothing."""
    module, path = exported
    args = (torch.randn(4, 4, 6, 6), torch.zeros(4))
    batches = [{"x": args[0], "shift": args[1]}]
    largest = {}
    for each in (True, False):
        target = export_int8.write_static(path, tmp_path / f"{each}.onnx", batches, each)
        graph = onnx.load(target).graph
        codes = [x for x in graph.initializer if x.name == "conv.weight_quantized"]
        codes = onnx.numpy_helper.to_array(codes[0])
        assert codes.dtype == np.int8
        largest[each] = np.abs(codes).max((1, 2, 3)).tolist()
        assert error(target, module, args)[3] < 0.02
    assert largest[True] == [127] * 4
    assert largest[False][0] == 0 and largest[False][3] == 127
    ops = [node.op_type for node in graph.node]
    assert "QuantizeLinear" in ops and "DynamicQuantizeLinear" not in ops


def test_static_ranges_are_those_of_all_calibration_batches(exported, tmp_path):
    """What lies beyond what calibration saw is cut off."""
    module, path = exported
    small, large = torch.rand(2, 4, 6, 6), 10 * torch.rand(2, 4, 6, 6)
    shift = torch.zeros(2)
    batches = [{"x": x, "shift": shift} for x in (small, large)]
    both = export_int8.write_static(path, tmp_path / "both.onnx", batches)
    first = export_int8.write_static(path, tmp_path / "first.onnx", batches[:1])
    args = (large, shift)
    assert error(both, module, args)[3] < 0.1 < 0.5 < error(first, module, args)[3]
    # unsigned inputs, signed weights
    kinds = {x.name: x.data_type for x in onnx.load(both).graph.initializer}
    zero = [kinds[name] for name in kinds if name.startswith("x_zero_point")]
    assert zero == [onnx.TensorProto.UINT8]
    with pytest.raises(UserError, match="calibration batches"):
        export_int8.write_static(path, tmp_path / "none.onnx", [])


def test_measure_takes_least_cpu_time_and_the_idle_share_of_the_quickest_round(monkeypatch):
    """A clock of our own: each call says how long the process is busy, and how long it takes by the wall."""
    now = {"wall": 0.0, "busy": 0.0}
    monkeypatch.setattr(export_times.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(export_times.time, "process_time", lambda: now["busy"])
    asked = []

    def way(name, rounds):
        rounds = iter(rounds)

        def call():
            asked.append(name)
            wall, busy = next(rounds)
            now["wall"] += wall
            now["busy"] += busy

        return call

    ways = {
        "waits": way("waits", [(8.0, 1.0), (4.0, 3.0)]),
        "works": way("works", [(2.0, 2.0)] * 2),
    }
    found = export_times.measure(ways, 2)
    assert asked == ["waits", "works", "waits", "works"]
    assert found["waits"] == {"ms": 1000.0, "idle fraction": 0.25}
    assert found["works"] == {"ms": 2000.0, "idle fraction": 0.0}
