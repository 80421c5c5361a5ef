"""Training of vlm/train.py is killed, runs out of disk, meets broken files: it goes on, or says so in one line."""

import errno
import io
import json
import math
import os
import random
import shutil
import signal
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vlm.test_lazy_data import lesson, rows_of  # noqa: F401  (lesson: a fixture)
from training import manifest
from utils import checkpoint, run
from utils.run import UserError
from vlm import checkpoints
from vlm import train as teach
from vlm.config import FSDPConfig
from vlm.config_file import with_file
from vlm.train_config import Config, changed, check_flags

POINTS = ("open", "half", "fsync", "rename", "renamed")


class Fault:
    """In place of `os` and `open` in utils/checkpoint.py: at one point of writing file number `write`, a kill or a
    full disk."""

    def __init__(self, write, point, kind):
        self.write = write
        self.point = point
        self.kind = kind
        self.written = 0

    def at(self, point):
        if point != self.point or self.written != self.write:
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, mode):
        self.written += 1
        self.at("open")
        return HalfWritten(path, mode, self)

    def fsync(self, number):
        self.at("fsync")
        os.fsync(number)

    def replace(self, old, new):
        self.at("rename")
        os.replace(old, new)
        self.at("renamed")


class HalfWritten(io.FileIO):
    """A file of whose bytes the first half is on the disk when the fault comes."""

    def __init__(self, path, mode, fault):
        super().__init__(path, mode)
        self.fault = fault

    def write(self, data):
        half = len(data) // 2
        super().write(data[:half])
        self.fault.at("half")
        return half + super().write(data[half:])


def command(out, flags, fault=None):
    """python vlm/train.py FLAGS --out OUT in a fork of this process -> exit code, standard error."""
    said = out.with_name(f"{out.name}.err")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # whatever hangs ends
            signal.alarm(120)
            where = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(where, 1)
            os.dup2(where, 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            if fault:
                module: Any = checkpoint
                module.os = fault
                module.open = fault.open
            sys.argv = ["train.py", *flags, "--out", str(out)]
            run.cli(teach.main, Config, expand=with_file)
            code = 0
        except SystemExit as error:
            code = error.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said.read_text("utf-8")


@pytest.fixture(scope="module")
def flags(lesson):  # noqa: F811
    """The lesson as a command line, without --out; LoRA with dropout: its draws are a part of the state."""
    folder = Path(lesson.data.paths[0]).parent
    text = f"""--vision {folder}/eye --text {folder}/speaker --connector pool2 --data {folder}/chat.json
        --image_folder {folder}/pictures --template chatml --lazy --precision fp32 --text_share 0 --views 2
        --batch_size 2 --warmup_steps 0 --lr_scheduler_type constant --lora.lora_dropout 0.1 --save_steps 1"""
    return text.split()


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run that nothing interrupts -> its folder."""
    out = tmp_path_factory.mktemp("whole") / "out"
    # in this process: its forks find everything imported
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["train.py", *flags, "--steps", "60", "--out", str(out)])
    run.cli(teach.main, Config, expand=with_file)
    patch.undo()
    return out


def states(out):
    """Checkpoints of a folder, the newest first."""
    found = [path for path in out.glob("state*.safetensors")]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def losses_of(path):
    """Losses in a checkpoint, which is read whole, with its hash."""
    _, meta = checkpoint.read(path)
    return dict(meta["dict"])["losses"]


def killed(flags, out, kills, losses, seed):
    """A run is killed so many times while it writes a file, and goes on each time; looked at after each."""
    draw = random.Random(seed)
    steps = 0
    points = []
    while len(points) < kills:
        point = POINTS[len(points) % len(POINTS)]
        again = ["--resume"] if states(out) else []
        fault = Fault(draw.randint(1, 2), point, "kill")
        code, said = command(out, [*flags, "--steps", "1000", *again], fault)
        assert code == -9, said
        points.append(point)
        if not states(out):
            continue
        # every checkpoint that is there is whole, and holds the losses of a run that nothing interrupts
        for path in states(out):
            found = losses_of(path)
            assert found == losses[: len(found)] and len(found) >= 1
        done = len(losses_of(states(out)[0]))
        assert done >= steps
        steps = done
    assert steps >= kills // 5
    return steps


def same_end(flags, out, whole):
    """The run goes on to its end, and is bit for bit the one that nothing interrupted."""
    code, said = command(out, [*flags, "--steps", "60", "--resume"])
    assert code == 0, said
    mine, theirs = (checkpoint.read(f / "model.safetensors")[0] for f in (out, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (out / "losses.json").read_text() == (whole / "losses.json").read_text()
    # what kills left half-written is gone
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.long
@pytest.mark.parametrize(
    "kills, more",
    [
        (30, []),
        (12, ["--save_total_limit", "3"]),
        (8, ["--dataloader_num_workers", "2"]),
    ],
    ids=["one checkpoint", "three checkpoints", "workers"],
)
def test_fifty_kills_while_saving(flags, whole, tmp_path, kills, more):
    flags = [*flags, *more]
    losses = json.loads((whole / "losses.json").read_text())
    out = tmp_path / "out"
    steps = killed(flags, out, kills, losses, seed=kills)
    assert steps < 60
    if "--save_total_limit" in flags:
        assert 3 <= len(states(out)) <= 4
    same_end(flags, out, whole)


@pytest.fixture
def three(flags, tmp_path):
    """A run of five steps that keeps three checkpoints -> its folder and flags."""
    out = tmp_path / "out"
    flags = [*flags, "--save_total_limit", "3"]
    code, said = command(out, [*flags, "--steps", "5"])
    assert code == 0, said
    return out, flags


def names(out):
    return sorted(path.name for path in states(out))


@pytest.mark.parametrize("point", ["open", "half", "fsync", "rename"])
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(flags, whole, tmp_path, point):
    out = tmp_path / "out"
    code, said = command(out, [*flags, "--steps", "5"], Fault(3, point, "full"))
    line = said.splitlines()[-1]
    assert code == 2 and "Traceback" not in said
    assert line.startswith("error: cannot write ") and "No space left on device" in line
    assert "untouched" in line
    assert len(losses_of(out / "state.safetensors")) == 2
    # nothing half-written takes up what is left of the disk
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("left", [0, 7, 1000, -1])
def test_a_checkpoint_cut_short_is_refused_in_one_line(flags, whole, tmp_path, left):
    out = tmp_path / "out"
    out.mkdir()
    content = (whole / "state.safetensors").read_bytes()
    (out / "state.safetensors").write_bytes(content[:left])
    code, said = command(out, [*flags, "--steps", "60", "--resume"])
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and "Traceback" not in said and len(errors) == 1
    assert "state.safetensors is not a whole safetensors file" in errors[0]
    assert [path.name for path in out.iterdir()] == ["state.safetensors"]


def test_the_last_checkpoints_are_kept_under_their_numbers(three):
    out, _ = three
    assert names(out) == [f"state-{step}.safetensors" for step in (3, 4, 5)]
    for step in (3, 4, 5):
        assert len(losses_of(out / f"state-{step}.safetensors")) == step


def test_resume_takes_the_newest_whole_checkpoint(three, whole):
    out, flags = three
    for step, content in ((5, b"half"), (4, (out / "state-4.safetensors").read_bytes()[:-1])):
        (out / f"state-{step}.safetensors").write_bytes(content)
    code, said = command(out, [*flags, "--steps", "6", "--resume"])
    assert code == 0, said
    assert "state-5.safetensors is not a whole" in said and "going on from " in said
    losses = json.loads((whole / "losses.json").read_text())
    assert json.loads((out / "losses.json").read_text()) == losses[:6]
    # those that were damaged are written again, or gone
    assert names(out) == [f"state-{step}.safetensors" for step in (4, 5, 6)]
    assert all(len(losses_of(path)) >= 4 for path in states(out))


def test_flags_of_another_run_are_refused_by_the_newest_checkpoint(three):
    out, flags = three
    code, said = command(out, [*flags, "--steps", "6", "--resume", "--lr", "0.5"])
    assert code == 2 and "--lr 0.001" in said and "state-5.safetensors" in said


def test_another_limit_takes_over_what_is_there(three):
    """A run goes on with fewer checkpoints, then with one without a number; one that begins anew drops later steps."""
    out, flags = three
    flags = flags[:-1]
    assert command(out, [*flags, "2", "--steps", "6", "--resume"])[0] == 0
    assert names(out) == ["state-5.safetensors", "state-6.safetensors"]
    assert command(out, [*flags, "0", "--steps", "7", "--resume"])[0] == 0
    assert names(out) == ["state.safetensors"] and len(losses_of(states(out)[0])) == 7
    assert command(out, [*flags, "2", "--steps", "8", "--resume"])[0] == 0
    assert names(out) == ["state-8.safetensors"]
    assert command(out, [*flags, "2", "--steps", "2"])[0] == 0
    assert names(out) == ["state-1.safetensors", "state-2.safetensors"]


@pytest.mark.parametrize("limit, kept", [(0, 1), (1, 1), (3, 3)])
def test_sharded_states_are_kept_by_the_same_limit(tmp_path, monkeypatch, limit, kept):
    """Under FSDP and DeepSpeed; what is left of four steps (that all ranks write: tests/training/test_manifest.py)."""
    monkeypatch.setattr(checkpoints.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(checkpoints.dist, "get_world_size", lambda: 2)
    shard = {"weight": torch.ones(2)}
    monkeypatch.setattr(
        checkpoints,
        "save_shards",
        lambda folder, engine: checkpoint.write(folder / "shard.safetensors", shard),
    )
    cfg = changed(Config(), fsdp=FSDPConfig(True), save_steps=1, save_total_limit=limit)
    cfg = changed(cfg, out=str(tmp_path))
    for step in range(1, 5):
        checkpoints.save(cfg, None, [1.0] * step)
    left = sorted(path.name for path in (tmp_path / "checkpoints").glob("step*"))
    assert left == [f"step{step}" for step in (1, 2, 3, 4)][-kept:]
    assert manifest.load(tmp_path / "checkpoints").name == "step4"


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"save_total_limit": -1, "save_steps": 1}, "--save_total_limit must be 0 or more"),
        ({"save_total_limit": 2}, "--save_total_limit goes with --save_steps"),
    ],
)
def test_limits_that_make_no_sense(flags, says):
    with pytest.raises(UserError, match=says):
        check_flags(changed(Config(), **flags))


def bomb(side=30000):
    """A PNG of a few bytes that says it has 900 megapixels."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_broken_pictures_never_stop_a_run(lesson, tmp_path, workers):  # noqa: F811
    """Cut short, a decompression bomb, missing: each replaced and counted, and all losses are numbers."""
    pictures = tmp_path / "pictures"
    shutil.copytree(lesson.data.image_folder, pictures)
    first, second, third, *_ = rows_of(lesson)
    whole_picture = (pictures / first["image"]).read_bytes()
    (pictures / first["image"]).write_bytes(whole_picture[: len(whole_picture) // 2])
    (pictures / second["image"]).write_bytes(bomb())
    (pictures / third["image"]).unlink()
    # one epoch: five steps of two conversations
    cfg = changed(lesson, image_folder=str(pictures), steps=5, out=str(tmp_path / "out"))
    found = teach.main(changed(cfg, dataloader_num_workers=workers))
    assert len(found["losses"]) == 5 and all(math.isfinite(value) for value in found["losses"])
    # a stand-in may be one of the broken ones, and counts too
    assert 3 <= found["broken pictures"] <= 9
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["broken pictures"] == found["broken pictures"]
