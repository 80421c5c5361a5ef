"""utils/checkpoint.py and utils/run.py: nothing is half-written, nothing damaged is read, runs go on bit for bit."""

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tests import fuzz, llamas
from utils import checkpoint, pretrained, run
from utils.run import UserError


def toy(width=8):
    """A small network and its optimizer."""
    model = nn.Sequential(
        nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 1)
    )
    return model, torch.optim.AdamW(model.parameters(), 1e-2, betas=(0.8, 0.9))


def steps(model, optimizer, n):
    """n steps on random data, with dropout: every one depends on the random state."""
    for _ in range(n):
        optimizer.zero_grad()
        loss = model(torch.randn(16, 4)).square().mean()
        loss.backward()
        optimizer.step()
        yield loss.item()


def same(a, b):
    """Equal types, keys and bits, however nested."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and a == b


def test_write_and_read_give_back_every_bit(tmp_path):
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(), "turned": torch.randn(4, 6).T, "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3), "nan": torch.tensor([torch.nan, torch.inf]), "bool": torch.tensor([True, False]),
    }  # fmt: skip
    meta = {"name": "é", "list": [1, 2.5, None, True]}
    path = checkpoint.write(tmp_path / "a" / "b.safetensors", tensors, meta)
    found, text = checkpoint.read(path)
    assert text == meta and found.keys() == tensors.keys()
    for k, x in tensors.items():
        assert found[k].dtype == x.dtype and torch.equal(found[k].nan_to_num(9), x.nan_to_num(9))
    assert [p.name for p in path.parent.iterdir()] == ["b.safetensors"]


def test_state_of_an_optimizer_keeps_its_integer_keys(tmp_path):
    model, optimizer = toy()
    list(steps(model, optimizer, 3))
    before = optimizer.state_dict()
    path = checkpoint.save_state(
        tmp_path / "s.safetensors", model=model, optimizer=optimizer, losses=[1.5, 2.0], step=3
    )
    other, fresh = toy()
    rest = checkpoint.load_state(path, model=other, optimizer=fresh)
    assert rest == {"losses": [1.5, 2.0], "step": 3}
    assert set(fresh.state_dict()["state"]) == set(range(6)) and same(
        model.state_dict(), other.state_dict()
    )
    assert same(before["state"], fresh.state_dict()["state"])
    assert fresh.param_groups[0]["betas"][0] == 0.8


def test_resume_goes_on_bit_for_bit(tmp_path):
    run.seed(3)
    model, optimizer = toy()
    first = list(steps(model, optimizer, 5))
    path = checkpoint.save_state(tmp_path / "s.safetensors", model=model, optimizer=optimizer)
    rest = list(steps(model, optimizer, 5))
    run.seed(99)
    other, fresh = toy()
    checkpoint.load_state(path, model=other, optimizer=fresh)
    assert list(steps(other, fresh, 5)) == rest and len(set(first + rest)) == 10
    assert same(model.state_dict(), other.state_dict())


def test_same_seed_same_numbers():
    runs = []
    for seed in (1, 1, 2):
        run.seed(seed)
        runs.append(list(steps(*toy(), 5)))
    assert runs[0] == runs[1] != runs[2]


def test_one_flipped_bit_is_noticed_wherever_it_is(tmp_path):
    path = checkpoint.write(
        tmp_path / "w.safetensors",
        {"a": torch.arange(64.0), "b": torch.ones(3).bfloat16()},
        {"steps": 10},
    )
    good = path.read_bytes()
    for i in range(len(good)):
        path.write_bytes(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :])
        with pytest.raises(UserError):
            checkpoint.read(path)
    path.write_bytes(good)
    assert checkpoint.read(path)[1] == {"steps": 10}


def test_a_file_cut_short_is_noticed(tmp_path):
    path = checkpoint.write(tmp_path / "w.safetensors", {"a": torch.arange(64.0)}, {"steps": 10})
    good = path.read_bytes()
    for n in (0, 1, 7, 8, 20, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:n])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            checkpoint.read(path)


def test_files_of_others_and_missing_files(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "theirs.safetensors")
    with pytest.raises(UserError, match="not written by this project"):
        checkpoint.read(tmp_path / "theirs.safetensors")
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.read(tmp_path / "none.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = checkpoint.write(tmp_path / "w.safetensors", {"a": torch.zeros(4)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.write(path, {"a": torch.ones(4)})
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    assert torch.equal(checkpoint.read(path)[0]["a"], torch.zeros(4))


def test_nowhere_to_write(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.write(tmp_path / "file" / "w.safetensors", {"a": torch.zeros(4)})
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.write(tmp_path / "folder", {"a": torch.zeros(4)})  # a folder of that name
    with pytest.raises(UserError, match="--out"):
        run.output(tmp_path / "file" / "run", Settings())
    assert (tmp_path / "file").read_text() == "in the way"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


KILLER = """
import itertools, os, random, signal, sys, time, torch
from utils import checkpoint
torch.set_num_threads(1)
path, end = sys.argv[1], time.monotonic() + 3
checkpoint.write(path, {"a": torch.zeros(200_000)}, 0)
while time.monotonic() < end:
    child = os.fork()
    if child == 0:
        for i in itertools.count(checkpoint.read(path)[1] + 1):
            checkpoint.write(path, {"a": torch.full((200_000,), float(i))}, i)
    time.sleep(random.uniform(0.01, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    tensors, i = checkpoint.read(path)
    assert (tensors["a"] == i).all()
    print(i)
"""


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    """A process is forked, writes in a loop and is killed, over and over for three seconds."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "w.safetensors")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = [int(line) for line in done.stdout.split()]
    assert len(written) >= 5 and written[-1] > 5 and written == sorted(written)


@pytest.mark.parametrize("parts", ["width", "depth", "name", "kind"])
def test_state_of_another_network_is_refused(tmp_path, parts):
    model, optimizer = toy()
    list(steps(model, optimizer, 1))
    path = checkpoint.save_state(
        tmp_path / "s.safetensors", model=model, optimizer=optimizer, losses=[1.0]
    )
    wanted = {
        "width": {"model": toy(9)[0]},
        "depth": {"model": nn.Linear(4, 8)},
        "name": {"ema": model},
        "kind": {"losses": model},
    }[parts]
    with pytest.raises(UserError, match="other settings"):
        checkpoint.load_state(path, **wanted)


@dataclass(frozen=True)
class Flags:
    lr: float = 0.1
    channels: tuple[int, ...] = (8, 16)
    steps: int = 5
    out: str = "here"


def test_a_resumed_run_learns_what_it_learned_before(tmp_path):
    """Where it writes and how far it goes may change; what it learns may not."""
    flags, layer = Flags(), torch.nn.Linear(2, 2)
    path = checkpoint.save_state(tmp_path / "state.safetensors", layer=layer, config=asdict(flags))
    checkpoint.load_state(path, replace(flags, out="there", steps=9), layer=layer)
    for other in (replace(flags, lr=0.2), replace(flags, channels=(8,))):
        with pytest.raises(UserError, match="--resume goes on with the flags"):
            checkpoint.load_state(path, other, layer=layer)


def test_load_model_builds_and_refuses_what_another_script_wrote(tmp_path):
    layer = torch.nn.Linear(3, 4)
    path = checkpoint.write(
        tmp_path / "a.safetensors", layer.bfloat16().state_dict(), {"inputs": 3, "lr": 0.1}
    )
    model, meta = checkpoint.load_model(path, lambda inputs, **_: torch.nn.Linear(inputs, 4))
    assert (
        meta["lr"] == 0.1 and model.weight.dtype == torch.float32 and not model.weight.requires_grad
    )
    for build in (
        lambda inputs, **_: torch.nn.Linear(inputs, 5),
        lambda channels, **_: torch.nn.Linear(channels, 4),
    ):
        with pytest.raises(UserError, match="another network"):
            checkpoint.load_model(path, build)


def test_ship_makes_small_weights_with_their_record(tmp_path):
    folder = tmp_path / "run"
    checkpoint.write(
        folder / "model.safetensors", {"w": torch.randn(10), "count": torch.tensor(3)}, {"width": 8}
    )
    for name in ("config", "metrics"):
        run.write_json(folder / f"{name}.json", {"what": name})
    (folder / "loss.png").write_bytes(b"png")
    with pytest.raises(UserError, match="no finished training"):  # what --pretrained leaves
        checkpoint.ship(checkpoint.Config(folder, tmp_path / "weights" / "toy"))
    assert not (tmp_path / "weights").exists()
    run.write_json(folder / "metrics.json", {"what": "metrics", "train_seconds": 1.0})
    checkpoint.ship(checkpoint.Config(folder, tmp_path / "weights" / "toy"))
    tensors, meta = checkpoint.read(tmp_path / "weights" / "toy.safetensors")
    assert (
        tensors["w"].dtype == torch.bfloat16
        and tensors["count"].dtype == torch.int64
        and meta == {"width": 8}
    )
    assert (
        json.loads((tmp_path / "weights" / "toy.json").read_text())["metrics"]["what"] == "metrics"
    )
    assert (tmp_path / "weights" / "toy_loss.png").exists()


def test_progress_saves_at_the_right_steps():
    saved, seen = [], []
    for loss in run.progress([0.5] * 7, total=7, every=3, save=lambda: saved.append(len(seen))):
        seen.append(loss)
    assert saved == [3, 6] and len(seen) == 7
    saved.clear()
    list(run.progress([0.5] * 3, total=6, start=3, every=3, save=lambda: saved.append(1)))
    assert saved == []  # the last one is the caller's


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_progress_stops_at_a_loss_that_is_no_number(bad):
    saved, seen = [], []
    with pytest.raises(UserError, match="at step 4"):
        for loss in run.progress(
            [1.0, 1.0, 1.0, bad], total=9, every=4, save=lambda: saved.append(1)
        ):
            seen.append(loss)
    assert len(seen) == 3 and saved == []


@dataclass(frozen=True)
class Settings:
    """A toy."""

    size: int = 3  # how many
    out: str = "outputs/toy"  # where


@dataclass(frozen=True)
class Trained:
    """A toy that can go on."""

    pretrained: bool = False  # skip the training
    resume: bool = False  # go on
    out: str = "outputs/toy"  # where


@pytest.mark.parametrize(
    "flags, state, line",
    [
        (["--resume"], False, "no checkpoint in"),
        (["--resume", "--pretrained"], True, "--resume trains, --pretrained does not"),
    ],
)
def test_a_resume_that_cannot_be_is_one_line_and_changes_nothing(
    tmp_path, monkeypatch, capsys, flags, state, line
):
    if state:
        (tmp_path / "state.safetensors").write_bytes(b"as it was")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(sys, "argv", ["toy.py", *flags, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        run.cli(lambda cfg: run.output(cfg.out, cfg), Trained)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith(f"error: {line}") and error.count("\n") == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_output_and_report(tmp_path, capsys):
    folder = run.output(tmp_path / "deep" / "er", Settings(size=5))
    assert json.loads((folder / "config.json").read_text()) == {"size": 5, "out": "outputs/toy"}
    assert run.report(folder, {"loss": 0.25}, then="python x.py") == {"loss": 0.25}
    written = json.loads((folder / "metrics.json").read_text())
    assert (
        written["loss"] == 0.25
        and written["command"].startswith("python ")
        and "CPU" in written["machine"]
    )
    text = capsys.readouterr().out
    assert "0.25" in text and "config.json, metrics.json" in text and "next: python x.py" in text


def test_report_names_what_this_run_wrote(tmp_path, capsys):
    (tmp_path / "old.png").write_text("of an earlier run")
    os.utime(tmp_path / "old.png", (1, 1))
    folder = run.output(tmp_path, Settings())
    (folder / "new.png").write_text("of this run")
    run.report(folder, {})
    line = [x for x in capsys.readouterr().out.splitlines() if x.startswith("written to")]
    assert line[0].endswith("config.json, metrics.json, new.png")


@pytest.mark.parametrize(
    "flags, code, line",
    [
        ([], 0, ""),
        (["--size", "0"], 2, "error: --size"),
        (["--size", "x"], 2, "size"),
        (["--sice", "1"], 2, "sice"),
    ],
)
def test_cli_exit_codes(monkeypatch, capsys, flags, code, line):
    def main(cfg):
        run.check(cfg.size > 0, "--size must be at least 1")
        return cfg.size

    monkeypatch.setattr(sys, "argv", ["toy.py", *flags])
    if code == 0:
        assert run.cli(main, Settings) == 3
        return
    with pytest.raises(SystemExit) as stopped:
        run.cli(main, Settings)
    text = capsys.readouterr().err
    assert stopped.value.code == code and line in text and "Traceback" not in text


def test_device():
    assert run.device("cpu").type == "cpu"
    for name in ("cuda:99", "abacus"):
        with pytest.raises(UserError, match=name):
            run.device(name)


def test_fuzz_checkpoints(tmp_path):
    """Whatever happened to the file: what is read is what was written, or nothing is."""
    tensors, meta = (
        {"a": torch.arange(9.0), "b": torch.ones(2, 2).bfloat16()},
        {"steps": 10, "name": "x"},
    )
    path = checkpoint.write(tmp_path / "w.safetensors", tensors, meta)
    for bad in fuzz.damaged(path.read_bytes(), 500):
        path.write_bytes(bad)
        found = fuzz.reads_or_refuses(lambda: checkpoint.read(path))
        assert found is None or (same(found[0], tensors) and found[1] == meta)


def test_fuzz_what_a_model_is_built_from(tmp_path):
    """A whole file whose record has other types in it: the network of the record, or a refusal."""
    layer = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    meta = {"sizes": [3, 4, 2], "bias": True, "scale": 1.0}

    def build(sizes, bias, scale):
        return nn.Sequential(*(nn.Linear(a, b, bias=bias) for a, b in zip(sizes, sizes[1:])))

    for bad in fuzz.retyped(meta, 300):
        path = checkpoint.write(tmp_path / "w.safetensors", layer.state_dict(), bad)
        found = fuzz.reads_or_refuses(lambda path=path: checkpoint.load_model(path, build))
        assert found is None or same(found[0].state_dict(), layer.state_dict())


def test_fuzz_states(tmp_path):
    model, optimizer = toy()
    list(steps(model, optimizer, 1))
    path = checkpoint.save_state(
        tmp_path / "s.safetensors", model=model, optimizer=optimizer, step=3
    )
    tensors, skeleton = checkpoint.read(path)
    for bad in fuzz.retyped(skeleton, 200):
        checkpoint.write(path, tensors, bad)
        other, fresh = toy()
        fuzz.reads_or_refuses(
            lambda other=other, fresh=fresh: checkpoint.load_state(
                path, model=other, optimizer=fresh
            )
        )


def test_lone_surrogates_are_written_and_come_back_readable(tmp_path):
    meta = {"prompt": "a\udcffb", "\udcff": 1}
    assert checkpoint.read(checkpoint.write(tmp_path / "w.safetensors", {}, meta))[1] == meta
    run.write_json(tmp_path / "a.json", {"prompt": "a\udcffé"})
    assert json.loads((tmp_path / "a.json").read_bytes().decode("utf-8")) == {"prompt": "a\ufffdé"}


def test_json_that_cannot_be_written_is_one_line_and_leaves_the_old(tmp_path, monkeypatch):
    run.write_json(tmp_path / "a.json", 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "replace", full)
    with pytest.raises(UserError, match="a.json: No space left on device"):
        run.write_json(tmp_path / "a.json", 2)
    assert [(p.name, p.read_text("utf-8")) for p in tmp_path.iterdir()] == [("a.json", "1\n")]


def test_an_argument_that_is_no_utf_8_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy.py", "--out", "x\udcff"])
    with pytest.raises(SystemExit) as stopped:
        run.cli(lambda cfg: pytest.fail("it ran"), Settings)
    text = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and text.startswith("error: 'x\ufffd' is not UTF-8")
        and text.count("\n") == 1
    )


def test_torchrun_learns_the_line_of_a_rank(monkeypatch, tmp_path, capsys):
    """Its report, which it adds to whatever a rank has said, then ends with our line instead of a riddle."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(sys, "argv", ["toy.py"])

    def main(cfg):
        raise UserError("--size must be at least 1")

    with pytest.raises(SystemExit):
        run.cli(main, Settings)
    assert capsys.readouterr().err == "error: --size must be at least 1\n"
    failure = ProcessFailure(0, 1, 2, str(tmp_path / "error.json"))
    assert (
        str(ChildFailedError("toy.py", {0: failure}))
        .strip("= \n")
        .endswith(": error: --size must be at least 1")
    )


def test_report_says_the_threads(tmp_path, capsys):
    run.report(tmp_path, {"loss": 0.5})
    assert (
        json.loads((tmp_path / "metrics.json").read_text("utf-8"))["threads"]
        == torch.get_num_threads()
    )
    assert f"threads  {torch.get_num_threads()}: the same seed" in capsys.readouterr().out


def test_a_seed_reaches_every_source_of_chance():
    drawn = []
    for value in (5, 5, 6):
        run.seed(value)
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert drawn[0] == drawn[1] and not set(drawn[0]) & set(drawn[2])


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_of_a_model_have_the_mode_of_the_umask(tmp_path, umask, mode):
    """The safetensors library writes 0600, which nobody else can read: a shared folder would be of no use."""
    before = os.umask(umask)
    try:
        model = llamas.tiny(layers=1)
        pretrained.save(model, llamas.tokenizer(), tmp_path / "deep/model")
        checkpoint.write(tmp_path / "deep/model/more.safetensors", {"x": torch.zeros(2)})
    finally:
        os.umask(before)
    files = list((tmp_path / "deep/model").iterdir())
    assert {"model.safetensors", "more.safetensors", "config.json"} <= {path.name for path in files}
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}


def test_every_writer_of_a_model_gives_its_files_the_mode_of_the_umask():
    """Whoever calls save_pretrained of a library calls shared_mode, or leaves both to pretrained.save."""
    root = Path(checkpoint.__file__).parent.parent
    writers = []
    for path in root.glob("*/*.py"):
        text = path.read_text("utf-8")
        if path.parent.name != "tests" and ".save_pretrained(" in text:
            writers.append(path)
            assert "shared_mode(" in text, path
    assert len(writers) > 5
