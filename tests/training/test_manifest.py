"""Checkpoints of many files: a kill before every operation on the disk, and a thousand mutations."""

import json
import os
import random
import signal
import sys

import pytest

from training import manifest
from utils.run import UserError


def put(step, size=200_000):
    """What the ranks of a step write: three files that say which step it was."""

    def write(folder):
        for i in range(3):
            with open(folder / f"rank{i}.bin", "wb") as file:
                file.write(f"{step:08d}".encode() * (size // 16))
                file.flush()
                os.fsync(file.fileno())  # half of it is there
                file.write(f"{step:08d}".encode() * (size // 16))

    return write


def whole(root):
    """The step of the checkpoint that can be loaded; all its files are of one step."""
    folder = manifest.load(root)
    steps = {path.read_bytes()[:8] for path in folder.glob("rank*.bin")}
    assert len(steps) == 1 and len(list(folder.glob("rank*.bin"))) == 3
    return int(steps.pop())


def save_and_die(root, step, death):
    """In a process of its own: save, and be killed before operation number `death` on the disk -> was it killed?"""
    child = os.fork()
    if child == 0:
        operations = 0

        def operation(event, _=None):
            nonlocal operations
            if event in (
                "open",
                "os.mkdir",
                "os.rename",
                "os.remove",
                "os.rmdir",
                "os.scandir",
                "fsync",
            ):
                if operations == death:
                    os.kill(os.getpid(), signal.SIGKILL)
                operations += 1

        real = os.fsync
        os.fsync = lambda number: (operation("fsync"), real(number))  # python audits no fsync
        sys.addaudithook(operation)
        manifest.save(root, step, put(step))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """Before each operation of a save in turn; what a kill leaves behind is there when the next save begins."""
    manifest.save(tmp_path, 1, put(1))
    step, seen, halves, death = 1, [], 0, 0
    while save_and_die(tmp_path, step + 1, death):
        found = whole(tmp_path)
        seen.append(found - step)
        halves += len(list(tmp_path.glob("step*"))) > 1
        step, death = found, death + 1
    assert set(seen) == {0, 1} and len(seen) > 30
    assert halves > 20  # kills did hit half-made or half-removed folders
    assert whole(tmp_path) == step + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", f"step{step + 1}"]


def test_the_last_checkpoints_are_kept(tmp_path, capsys):
    for step in (2, 9, 10, 11):
        manifest.save(tmp_path, step, put(step), keep=3)
    names = ["latest", "step10", "step11", "step9"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert whole(tmp_path) == 11 and not capsys.readouterr().out
    # damaged: the newest whole one before it
    (tmp_path / "step11" / "rank0.bin").write_bytes(b"short")
    assert whole(tmp_path) == 10
    said = capsys.readouterr().out
    assert "step11/rank0.bin is damaged" in said and "going on from" in said and "step10" in said
    (tmp_path / "step10" / "manifest.json").unlink()
    assert whole(tmp_path) == 9
    # the steps are made again, and no damaged one is kept
    manifest.save(tmp_path, 10, put(10), keep=3)
    manifest.save(tmp_path, 11, put(11), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step10", "step11"]
    for step in (10, 11):
        manifest.verify(tmp_path / f"step{step}")
    # none is whole: what is said is of the newest
    for step in (10, 11):
        (tmp_path / f"step{step}" / "rank0.bin").unlink()
    with pytest.raises(UserError, match="step11/rank0.bin"):
        manifest.load(tmp_path)


def test_later_steps_of_an_earlier_run_go(tmp_path):
    for step in (4, 5):
        manifest.save(tmp_path, step, put(step), keep=3)
    manifest.save(tmp_path, 3, put(3), keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step3"]


def test_no_litter_after_a_restart(tmp_path):
    # Of a process that was killed between two system calls
    (tmp_path / ".latest").write_text("step")
    manifest.save(tmp_path, 1, put(1))
    (tmp_path / "step2").mkdir()
    manifest.save(tmp_path, 2, put(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step2"]


def mutate(data, dice):
    """A byte changed, a piece cut out, doubled, or the end lost."""
    data, at = bytearray(data), dice.randrange(len(data))
    kind = dice.randrange(4)
    if kind == 0:
        data[at] ^= 1 << dice.randrange(8)
    elif kind == 1:
        del data[at : at + dice.randrange(1, 50)]
    elif kind == 2:
        data[at:at] = data[at : at + dice.randrange(1, 50)] or b"x"
    else:
        del data[at:]
    return bytes(data)


def test_a_thousand_mutations_are_refused(tmp_path):
    dice = random.Random(0)
    folder = manifest.save(tmp_path, 7, put(7, 4096))
    files, refused = sorted(folder.iterdir()), 0
    for _ in range(1000):
        path = dice.choice(files)
        before = path.read_bytes()
        after = mutate(before, dice)
        while after == before or (path.name == manifest.LIST and same(after, before)):
            after = mutate(before, dice)
        path.write_bytes(after)
        with pytest.raises(UserError):
            manifest.load(tmp_path)
        refused += 1
        path.write_bytes(before)
    assert refused == 1000 and whole(tmp_path) == 7


def same(a, b):
    """A space more or less in a JSON file says the same."""
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_foreign_and_missing_files_are_refused(tmp_path):
    folder = manifest.save(tmp_path, 1, put(1))
    (folder / "more.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="more.bin"):
        manifest.load(tmp_path)
    (folder / "more.bin").unlink()
    (folder / "rank1.bin").unlink()
    with pytest.raises(UserError, match="rank1.bin"):
        manifest.load(tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "", "step9"])
def test_latest_must_name_a_checkpoint_here(tmp_path, name):
    manifest.save(tmp_path, 1, put(1))
    (tmp_path / "latest").write_text(name)
    with pytest.raises(UserError):
        manifest.load(tmp_path)


def test_a_failed_save_keeps_the_one_before(tmp_path):
    def full(folder):
        (folder / "rank0.bin").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    manifest.save(tmp_path, 1, put(1))
    with pytest.raises(UserError, match="kept"):
        manifest.save(tmp_path, 2, full)
    assert whole(tmp_path) == 1
    with pytest.raises(UserError, match="kept"):
        manifest.save(tmp_path, 1, full)  # a run that begins anew in the same folder
    assert whole(tmp_path) == 1
