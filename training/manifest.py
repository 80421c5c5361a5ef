"""Sharded checkpoints of many files and ranks: whole or not at all, with the sha256 of every file.

A library writes its files into a folder, one or more from each rank. What makes them a checkpoint is a list of their
hashes, written last, and then a file `latest` that names the folder. Whoever is killed before that has the old one.
A hash tells damage from health. It does not tell friend from foe: load only checkpoints that you or friends wrote.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from utils.run import UserError, check

LIST = "manifest.json"  # {"file": its sha256}, beside the files


def hashes(folder):
    """{path inside the folder: sha256} of every file but the list itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / LIST)
    found = {}
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # what is hashed is on the disk
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                file, "sha256"
            ).hexdigest()
    return found


def write(folder):
    """Write the list of hashes of a folder of finished files: from then on it is a checkpoint."""
    replace(Path(folder) / LIST, json.dumps(hashes(Path(folder)), indent=2))


def verify(folder):
    """Raises UserError, which names the first such file, if one was damaged, lost or added since `write`."""
    folder = Path(folder)
    try:
        listed, there = json.loads((folder / LIST).read_text("utf-8")), hashes(folder)
        check(
            isinstance(listed, dict) and listed,
            f"{folder / LIST} is not a list of hashes; train again",
        )
    except (OSError, ValueError):
        raise UserError(
            f"{folder} is no whole checkpoint: its {LIST} is missing or damaged; train again"
        ) from None
    wrong = [
        name for name in sorted(listed.keys() | there.keys()) if listed.get(name) != there.get(name)
    ]
    check(
        not wrong,
        f"{folder}/{wrong[0] if wrong else ''} is damaged, missing or foreign: take a copy or train again",
    )


def save(root, step, put):
    """Make the checkpoint of a step: put(folder) writes this rank's files. Call it on every rank.

    A kill at any moment leaves the checkpoint before or this one; those before go when this one is whole. Every rank
    must see the same folder: with more than one machine, a shared disk. Raises UserError if the disk is full.
    """
    root, first = Path(root), not dist.is_initialized() or dist.get_rank() == 0
    folder = root / f"step{step}"
    if newest(root) == folder:  # of an earlier run: never write over the only good one
        folder = root / f"step{step}-again"
    wait()
    try:
        if first:
            shutil.rmtree(folder, ignore_errors=True)  # half of one, from a kill
            folder.mkdir(parents=True)
        wait()
        put(folder)
        wait()
        if first:
            write(folder)
            replace(root / "latest", folder.name)
            for old in root.glob("step*"):
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot write {folder}: {reason}; the checkpoint before it is kept"
        ) from error
    wait()
    return folder


def newest(root):
    """The folder that `latest` names, unchecked, or None."""
    try:
        return Path(root) / (Path(root) / "latest").read_text("utf-8").strip()
    except (OSError, ValueError):
        return None


def load(root) -> Path:
    """-> the folder of the last whole checkpoint, after a look at every byte. Raises UserError if there is none."""
    folder: Any = newest(root)
    check(
        folder and folder.parent == Path(root),
        f"no checkpoint in {root} to go on from; leave out --resume",
    )
    verify(folder)
    return folder


def replace(path, text):
    """Write a small file whole or not at all."""
    # One writer: what a killed one left is written over
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    there = os.open(path.parent, os.O_RDONLY)
    os.fsync(there)  # the new name, too
    os.close(there)


def wait():
    """All ranks reach this line before one goes on."""
    if dist.is_initialized():
        dist.barrier()
