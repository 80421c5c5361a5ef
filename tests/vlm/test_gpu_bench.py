"""vlm/gpu_bench.py: every row runs in small on a CPU; steps learn; the table and its place; wrong flags."""

import pytest
import torch

from models import ddpm, digit_unet
from utils.run import UserError
from vlm import gpu_bench

CPU = torch.device("cpu")
TINY = gpu_bench.Config(rounds=1, steps=1, compile=False, tiny=True, device="cpu")


@pytest.mark.long
def test_every_row_runs_in_small(tmp_path):
    cfg = gpu_bench.Config(**vars(TINY) | {"out": str(tmp_path)})
    rows = gpu_bench.main(cfg)
    networks = [name for name in rows if name.endswith("eager")]
    assert networks == ["U-Net, eager", "DiT-tiny/2, eager"]
    for name in networks:
        assert rows[name]["images a second"] == pytest.approx(2e3 / rows[name]["ms a step"])
    # memory as predicted, of four ways to train
    steps = [row for name, row in rows.items() if name.startswith("smollm2-135m, ")]
    assert len(steps) == 4
    for row in steps:
        assert row["measured GB"] == pytest.approx(row["predicted GB"], rel=0.02)
    assert steps[2]["measured GB"] < 0.6 * steps[0]["measured GB"]
    assert steps[1]["measured GB"] < steps[0]["measured GB"]
    served = [row for name, row in rows.items() if name.startswith("engine")]
    assert len(served) == 2 and all(row["new tokens a second"] > 0 for row in served)
    assert rows["Triton kernels"] == "not measured: no GPU"
    text = (tmp_path / "table.md").read_text("utf-8")
    assert text.startswith("`python vlm/gpu_bench.py --tiny`, CPU, torch ")
    assert all(f"| {name} | " in text for name in rows)


def test_a_training_step_learns_with_and_without_labels():
    torch.manual_seed(0)
    schedule = ddpm.Schedule(kind="cosine")
    images = torch.zeros(4, 1, 28, 28)
    seen = []

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = digit_unet.build((8, 16), 1)

        def forward(self, x, t, y=None):
            seen.append(y)
            return self.unet(x, t)

    for labels in (None, torch.arange(4)):
        model = Network()
        before = [p.clone() for p in model.parameters()]
        gpu_bench.training_step(model, schedule, images, labels)()
        moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before)]
        assert all(moved)
    assert seen[0] is None and seen[1].tolist() == [0, 1, 2, 3]


def test_seconds_are_those_of_the_fastest_round_after_warming_up(monkeypatch):
    """Three calls to warm up, a slow round of two calls, a quick one."""
    clock = [0.0]
    calls = []

    def action():
        calls.append(0)
        clock[0] += 5.0 if len(calls) <= 5 else 1.0

    monkeypatch.setattr(gpu_bench.time, "perf_counter", lambda: clock[0])
    cfg = gpu_bench.Config(rounds=2, steps=2)
    assert gpu_bench.seconds_each(action, cfg, CPU) == 1
    assert len(calls) == 7


def test_the_table_replaces_the_last_one_between_its_marks(tmp_path):
    rows = {"U-Net": {"ms a step": 12.345, "images a second": 4321.4}, "qlora": "not measured: x"}
    text = gpu_bench.table(rows, "a GPU", "python x.py")
    assert text.splitlines()[0] == "`python x.py`, a GPU:"
    assert text.splitlines()[-2:] == [
        "| U-Net | ms a step 12.3, images a second 4321 |",
        "| qlora | not measured: x |",
    ]
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- gpu -->\nold\n<!-- /gpu -->\nbelow\n", "utf-8")
    gpu_bench.write_table(text, page)
    assert page.read_text("utf-8") == f"above\n<!-- gpu -->\n{text}\n<!-- /gpu -->\nbelow\n"
    page.write_text("no marks\n", "utf-8")
    with pytest.raises(UserError, match="page.md lacks the lines <!-- gpu --> and <!-- /gpu -->"):
        gpu_bench.write_table(text, page)
    assert page.read_text("utf-8") == "no marks\n"
    # the page of the book has its place
    written = gpu_bench.BENCHMARKS.read_text("utf-8")
    assert all(written.count(f"\n{mark}\n") == 1 for mark in gpu_bench.MARKS)


def test_kernels_are_not_measured_where_triton_is_missing(monkeypatch):
    monkeypatch.setattr(gpu_bench.triton_offline, "available", lambda: False)
    rows = gpu_bench.kernel_rows(TINY, torch.device("cuda"))
    assert rows == {"Triton kernels": "not measured: pip install triton"}


def test_wrong_flags_are_refused(tmp_path):
    out = str(tmp_path / "x")
    for flags, message in (
        ({"only": ("magic",)}, "--only magic: there are unet, dit, memory, engine, kernels"),
        ({"steps": 0}, "--rounds and --steps must be at least 1"),
        ({"tiny": True, "write": True}, "not for --write"),
        ({"device": "cpu"}, "--device cpu is no GPU"),
    ):
        with pytest.raises(UserError, match=message):
            gpu_bench.main(gpu_bench.Config(**flags, out=out))
    assert not (tmp_path / "x").exists()
