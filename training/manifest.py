"""Sharded checkpoints of many files and ranks: whole or not at all, with the sha256 of every file.

A library writes its files into a folder, one or more from each rank. What makes them a checkpoint
is a list of their hashes, written last, and then a file `latest` that names the folder. Whoever is
killed before that has the old one. A hash tells damage from health. It does not tell friend from
foe: load only checkpoints that you or friends wrote.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from training import ranks
from utils.run import UserError, check

LIST = "manifest.json"  # {"file": its sha256}, beside the files


def hashes(folder):
    """{path inside the folder: sha256} of every file but the list itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / LIST)
    found = {}
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # what is hashed is on the disk
            digest = hashlib.file_digest(file, "sha256")
        found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return found


def write(folder):
    """Write the list of hashes of a folder of finished files: from then on it is a checkpoint."""
    replace(Path(folder) / LIST, json.dumps(hashes(Path(folder)), indent=2))


def verify(folder):
    """Raises UserError, naming the first file that was damaged, lost or added since `write`."""
    folder = Path(folder)
    try:
        listed = json.loads((folder / LIST).read_text("utf-8"))
        there = hashes(folder)
        filled = isinstance(listed, dict) and listed
        check(filled, f"{folder / LIST} is not a list of hashes; train again")
    except (OSError, ValueError):
        said = f"its {LIST} is missing or damaged; train again"
        raise UserError(f"{folder} is no whole checkpoint: {said}") from None
    # Every file that is listed or there must be both, with the same hash.
    for name in sorted(listed.keys() | there.keys()):
        same = listed.get(name) == there.get(name)
        said = "is damaged, missing or foreign: take a copy or train again"
        check(same, f"{folder}/{name} {said}")


def save(root, step, put, keep=1):
    """Make the checkpoint of a step: put(folder) writes this rank's files. Call it on every rank.

    A kill at any moment leaves the checkpoint before or this one; when this one is whole, those
    before go, all but the last of `keep` together. Every rank must see the same folder: with more
    than one machine, a shared disk. Raises UserError if the disk is full.
    """
    root = Path(root)
    rank, _ = ranks.rank_and_world_size()
    # Never over a checkpoint that counts
    folder = root / f"step{step}"
    if newest(root) == folder:  # of an earlier run, the only good one
        folder = root / f"step{step}-again"
    wait()
    try:
        # The first rank makes the folder, then all write.
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # half of one, from a kill
            folder.mkdir(parents=True)
        wait()
        put(folder)
        wait()
        # All files are there: hash them, name the folder, and only then drop the old ones.
        if rank == 0:
            write(folder)
            replace(root / "latest", folder.name)
            kept = [old for old in newest_first(root) if old != folder and step_of(old) < step]
            for old in root.glob("step*"):
                if old != folder and old not in kept[: keep - 1]:
                    shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        said = f"cannot write {folder}: {reason}; the checkpoint before it is kept"
        raise UserError(said) from error
    wait()
    return folder


def newest(root):
    """The folder that `latest` names, unchecked, or None."""
    try:
        return Path(root) / (Path(root) / "latest").read_text("utf-8").strip()
    except (OSError, ValueError):
        return None


def step_of(folder):
    """Step of a folder "step12" or "step12-again"; -1 for another one."""
    number = folder.name.removeprefix("step").removesuffix("-again")
    return int(number) if number.isdecimal() else -1


def newest_first(root):
    """Folders of checkpoints, whole or not, those of late steps first."""
    folders = [path for path in Path(root).glob("step*") if step_of(path) >= 0]
    return sorted(folders, key=step_of, reverse=True)


def load(root) -> Path:
    """-> the folder of the last whole checkpoint, every byte verified: the one that `latest` names,
    or, if that is damaged, one before it that was kept. Raises UserError."""
    folder: Any = newest(root)
    inside = folder and folder.parent == Path(root)
    check(inside, f"no checkpoint in {root} to go on from; leave out --resume")
    try:
        verify(folder)
        return folder
    except UserError as error:
        before = whole_before(folder) if folder.exists() else None
        if before is None:
            raise
        if ranks.rank_and_world_size()[0] == 0:
            print(f"{error}; going on from {before}", flush=True)
        return before


def whole_before(folder):
    """The newest whole checkpoint of a step before that of the folder, or None."""
    for old in newest_first(folder.parent):
        if step_of(old) >= step_of(folder):
            continue
        try:
            verify(old)
            return old
        except UserError:
            pass
    return None


def replace(path, text):
    """Write a small file whole or not at all."""
    # One writer: what a killed one left is written over
    temporary = path.with_name(f".{path.name}")
    # The bytes are on the disk before the name is
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    # The new name is on the disk, too
    there = os.open(path.parent, os.O_RDONLY)
    os.fsync(there)
    os.close(there)


def wait():
    """All ranks reach this line before one goes on."""
    if dist.is_initialized():
        dist.barrier()
