"""The feature file: written by chunks, after a kill and by several processes, mapped, and checked when it is read."""

import copy
import multiprocessing
import os
import shutil
import signal
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from utils.run import UserError
from vlm import feature_cache, shared_file
from vlm.feature_cache import FeatureFile
from vlm.views import MappedFeatures

SHAPE = (22, 3, 5)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 4 pictures: 22 pictures are 5 chunks and a half."""
    monkeypatch.setattr(feature_cache, "CHUNK_BYTES", 4 * 2 * 3 * 5)
    monkeypatch.setattr(feature_cache, "WAIT", 0.01)


def truth(first, last):
    """Features of a picture: numbers that say which it is."""
    rows = torch.arange(first, last).view(-1, 1, 1) * 15 + torch.arange(15).view(3, 5)
    return (rows / 8).bfloat16()


class Tower:
    """Computes chunks, and writes down which."""

    def __init__(self, log, kill_at=None, pace=0.0):
        self.log = log
        self.kill_at = kill_at
        self.pace = pace

    def __call__(self, first, last):
        if first == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.pace)
        with open(self.log, "a") as file:
            file.write(f"{first}-{last} ")
        return truth(first, last), [number not in (5, 21) for number in range(first, last)]

    def computed(self):
        return sorted(self.log.read_text().split(), key=len) if self.log.exists() else []


ALL = sorted(["0-4", "4-8", "8-12", "12-16", "16-20", "20-22"], key=len)


def filled(folder, **about):
    tower = Tower(folder / "log", **about)
    file = FeatureFile(folder / "features" / "view.bin", SHAPE, tower)
    file.fill()
    return file, tower


def test_features_are_computed_once_and_read_back(tmp_path, monkeypatch):
    file, tower = filled(tmp_path)
    assert tower.computed() == ALL and file.chunk == 4
    # what is finished needs no room on the disk
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    again, _ = filled(tmp_path)
    assert tower.computed() == ALL
    for one in (file, again):
        assert torch.equal(one.read(range(22)), truth(0, 22))
        assert torch.equal(one.read([21, 3, 3]), truth(0, 22)[[21, 3, 3]])
        assert one.unreadable() == [5, 21]
    for number in (-1, 22):
        with pytest.raises(IndexError):
            file.read([number])
    # no pictures: nothing to compute
    assert FeatureFile(tmp_path / "none", (0, 3, 5)).chunks == 0


def test_a_chunk_is_whole_batches_of_the_tower(monkeypatch):
    monkeypatch.setattr(feature_cache, "CHUNK_BYTES", 16 * 2**20)
    assert feature_cache.chunk_pictures(576, 1024, 4) == 12  # CLIP-336: 14 MB
    assert feature_cache.chunk_pictures(49, 1280, 4) == 132
    assert feature_cache.chunk_pictures(10_000, 4096, 4) == 4


def in_process(run, *about):
    process = multiprocessing.get_context("fork").Process(target=run, args=about)
    process.start()
    return process


def test_after_a_kill_only_the_rest_is_computed(tmp_path):
    process = in_process(lambda: filled(tmp_path, kill_at=12))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    tower = Tower(tmp_path / "log")
    assert tower.computed() == ["0-4", "4-8", "8-12"]
    file, tower = filled(tmp_path)
    assert tower.computed() == ALL and torch.equal(file.read(range(22)), truth(0, 22))


def test_several_processes_share_the_chunks(tmp_path):
    """Each chunk is computed once, by one of three; the first to be killed leaves its chunk to the others."""
    doomed = in_process(lambda: filled(tmp_path, kill_at=8, pace=0.02))
    others = [in_process(lambda: filled(tmp_path, pace=0.02)) for _ in range(2)]
    for process in (doomed, *others):
        process.join()
    assert [process.exitcode for process in others] == [0, 0]
    file, tower = filled(tmp_path)
    assert tower.computed() == ALL and torch.equal(file.read(range(22)), truth(0, 22))


def test_a_chunk_that_another_process_computes_is_waited_for(tmp_path):
    file = FeatureFile(tmp_path / "features" / "view.bin", SHAPE, Tower(tmp_path / "log"))

    def slow():
        with open(f"{file.path}.lock", "a+b") as locks, open(file.path, "r+b") as mine:
            assert shared_file.take(locks, 2)
            (tmp_path / "ready").touch()
            time.sleep(0.5)
            file.write(mine, 2)

    process = in_process(slow)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    with open(f"{file.path}.lock", "a+b") as locks:
        assert not shared_file.take(locks, 2) and shared_file.take(locks, 1)
    file.fill()
    process.join()
    assert file.compute.computed() == ALL


def spoil(file, number, where=0):
    """Flip a bit in the features of a picture."""
    with open(file.path, "r+b") as opened:
        opened.seek(file.data_at + number * file.bytes_a_picture + where)
        byte = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([byte[0] ^ 1]))


def test_damage_is_found_when_it_is_read_and_computed_anew(tmp_path, capsys):
    file, tower = filled(tmp_path)
    spoil(file, 9, 7)
    assert torch.equal(file.read([3]), truth(3, 4)) and len(tower.computed()) == 6
    assert torch.equal(file.read([8]), truth(8, 9))  # its neighbour in the chunk was damaged
    assert sorted(tower.computed()) == sorted([*ALL, "8-12"])
    assert "damaged at pictures 8 to 11" in capsys.readouterr().out
    # a flag that says a picture could not be read is under the checksum, too
    with open(file.path, "r+b") as opened:
        opened.seek(file.flags_at + 1)
        opened.write(b"\1")
    fresh, _ = filled(tmp_path)
    fresh.read([0])
    assert fresh.unreadable() == [5, 21] and tower.computed().count("0-4") == 2


def test_a_worker_does_not_compute_it_leaves_it_to_the_next_start(tmp_path, monkeypatch):
    file, tower = filled(tmp_path)
    spoil(file, 0)
    # to another process goes neither the map nor the tower
    file.read([9])
    other = copy.copy(file)
    assert other.map is None and torch.equal(other.read([9]), truth(9, 10))
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(id=0))
        for one in (file, other):
            with pytest.raises(UserError, match="pictures 0 to 3: start again") as found:
                one.read([0])
            assert "\n" not in str(found.value)
    again, _ = filled(tmp_path)
    assert torch.equal(again.read([0]), truth(0, 1)) and tower.computed().count("0-4") == 2


@pytest.mark.parametrize("damage", ["cut", "header", "gone"])
def test_a_file_of_another_kind_is_begun_anew(tmp_path, damage):
    file, tower = filled(tmp_path)
    whole = file.path.read_bytes()
    if damage == "cut":
        file.path.write_bytes(whole[:-1])
    if damage == "header":
        file.path.write_bytes(b"x" + whole[1:])
    if damage == "gone":
        file.path.unlink()
    again, _ = filled(tmp_path)
    assert torch.equal(again.read(range(22)), truth(0, 22)) and len(tower.computed()) == 12


def test_a_disk_that_is_full_or_read_only_is_one_line(tmp_path, monkeypatch):
    file = FeatureFile(tmp_path / "view.bin", SHAPE, Tower(tmp_path / "log"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=600))
        with pytest.raises(UserError, match="vision features need 0.0 GB.*VLM_ACTION_CACHE"):
            file.fill()
    assert not (tmp_path / "log").exists()

    def full(*about):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            UserError, match="cannot write .*No space left.*VLM_ACTION_CACHE"
        ) as found:
            file.fill()
    assert "\n" not in str(found.value)
    # nothing counts as finished that had not reached the disk
    file.fill()
    assert file.compute.computed().count("0-4") == 2
    (tmp_path / "a file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        FeatureFile(tmp_path / "a file" / "view.bin", SHAPE)


def test_views_and_pictures_are_looked_up_as_in_a_tensor(tmp_path):
    files = []
    for view in range(3):

        def compute(first, last, view=view):
            return truth(first, last) + view, [True] * (last - first)

        files.append(FeatureFile(tmp_path / f"{view}.bin", SHAPE, compute))
        files[-1].fill()
    features = MappedFeatures(files)
    inside = features.tensor()
    assert features.shape == inside.shape == (3, *SHAPE) and len(features) == 3
    assert torch.equal(inside[2], truth(0, 22) + 2) and features.unreadable() == []
    view, number = torch.tensor([2, 0, 2, 1]), torch.tensor([21, 4, 0, 4])
    for index in (
        (view, number),
        (1, 7),
        (1, number),
        (view, 3),
        (view.view(2, 2), number.view(2, 2)),
    ):
        assert torch.equal(features[index], inside[index])
    assert torch.equal(features[view, number].float(), inside[view, number].float())


def test_memory_stays_flat_while_all_is_read(tmp_path, monkeypatch):
    """120 MB of features, written and read: private memory grows by a few chunks of 1 MB."""
    monkeypatch.setattr(feature_cache, "CHUNK_BYTES", 2**20)
    process = psutil.Process()

    def private():
        found = process.memory_info()
        return (found.rss - found.shared) / 2**20

    def compute(first, last):
        return torch.full((last - first, 64, 128), float(first)).bfloat16(), [True] * (last - first)

    before = private()
    file = FeatureFile(tmp_path / "view.bin", (7680, 64, 128), compute)
    file.fill()
    assert file.size > 120e6
    for first in range(0, 7680, 64):
        assert file.read(range(first, first + 64))[0, 0, 0] == float(first)
    assert private() - before < 30
