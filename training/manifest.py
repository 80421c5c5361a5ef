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


def save(root, step, put):
    """Make the checkpoint of a step: put(folder) writes this rank's files. Call it on every rank.

    A kill at any moment leaves the checkpoint before or this one; those before go when this one is
    whole. Every rank must see the same folder: with more than one machine, a shared disk. Raises
    UserError if the disk is full.
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
            for old in root.glob("step*"):
                if old != folder:
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


def load(root) -> Path:
    """-> the folder of the last whole checkpoint, every byte verified. Raises UserError."""
    folder: Any = newest(root)
    inside = folder and folder.parent == Path(root)
    check(inside, f"no checkpoint in {root} to go on from; leave out --resume")
    verify(folder)
    return folder


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
