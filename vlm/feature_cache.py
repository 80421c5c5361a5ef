"""Frozen feature cache on disk: vision features in one file, written chunk by chunk, read through a memory map.

665 000 pictures through CLIP-336 are 785 GB of bf16 features, for every view; no rank can hold them.
The file has its final size from the start (holes take no room on the disk). A chunk is written, then
its checksum: a chunk with a checksum is finished, so after a kill only the others are computed.
Several processes compute together: each takes a chunk that no other one holds a lock on, and all
wait until the last is there; locks of a process that died are free. A chunk is checked against its
sha256 when a process reads of it for the first time, and computed anew if it is damaged.

Layout: header, 4096 bytes of JSON | checksums, 32 bytes a chunk | readable or not, 1 byte a picture |
up to a multiple of 4096 | features, bf16 (pictures, N, D). Shapes: N tokens of width D.
"""

import hashlib
import json
import mmap
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from utils import run
from utils.run import UserError, check
from vlm.shared_file import release, take, write_at

VERSION = 1  # of the layout
PAGE = 4096
CHECKSUM = 32  # bytes of a sha256
CHUNK_BYTES = 16 * 2**20  # of features, about: what is hashed when one picture of it is read
UNREADABLE = 1  # in the byte of a picture; 0: it was read
WAIT = 0.1  # seconds between two looks at what other processes compute


def chunk_pictures(tokens, width, batch):
    """Pictures a chunk: about CHUNK_BYTES, and whole batches of the tower, so that each picture is
    in the same batch as if all were computed at once."""
    return max(1, CHUNK_BYTES // (2 * tokens * width) // batch) * batch


class FeatureFile:
    """Features of one view, bf16 (pictures, N, D): `fill` computes what is not there, `read` reads.

    compute(first, last) -> features bf16 (last - first, N, D) of these pictures, and which could be
    read, bool (last - first,). Raises UserError if the disk is full or cannot be written.
    """

    def __init__(self, path, shape, compute=None, batch=4):
        self.path = Path(path)
        self.shape = tuple(shape)
        self.compute: Any = compute
        # places of the parts in the file
        pictures, tokens, width = self.shape
        self.bytes_a_picture = 2 * tokens * width
        self.chunk = chunk_pictures(tokens, width, batch)
        self.chunks = -(-pictures // self.chunk)
        self.flags_at = PAGE + CHECKSUM * self.chunks
        self.data_at = -(-(self.flags_at + pictures) // PAGE) * PAGE
        self.size = self.data_at + pictures * self.bytes_a_picture
        # chunks that this process has checked, and the memory map, opened when it is first read
        self.checked = bytearray(self.chunks)
        self.map: Any = None
        try:
            self.create()
        except OSError as error:
            raise self.failure(error) from None

    def __getstate__(self):
        """To another process goes where the file is: neither the map nor the tower."""
        return self.__dict__ | {"map": None, "compute": None, "checked": bytearray(self.chunks)}

    def failure(self, error):
        moves = "VLM_ACTION_CACHE moves the cache"
        return UserError(f"cannot write {self.path}: {error.strerror}; free some space, or {moves}")

    def header(self):
        about = {"version": VERSION, "shape": self.shape, "chunk": self.chunk, "dtype": "bfloat16"}
        return json.dumps(about).encode().ljust(PAGE)

    def create(self):
        """The file in its final size, without any chunk, unless it is there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.create"):
            # the same shape and version: whatever chunks it has are kept
            if self.path.is_file() and self.path.stat().st_size == self.size:
                with open(self.path, "rb") as file:
                    if file.read(PAGE) == self.header():
                        return
            # a sparse file: only what is written takes space
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            with open(temporary, "wb") as file:
                file.write(self.header())
                file.truncate(self.size)
            temporary.replace(self.path)

    # chunks

    def bounds(self, number):
        """The first picture of a chunk, and the one after its last."""
        first = number * self.chunk
        return first, min(first + self.chunk, self.shape[0])

    def parts(self, number):
        """(offset, length) of the flags of a chunk, and of its features."""
        # flags of all pictures stand before the features of all
        first, last = self.bounds(number)
        start = self.data_at + first * self.bytes_a_picture
        return (self.flags_at + first, last - first), (start, (last - first) * self.bytes_a_picture)

    def checksum(self, file, number):
        """The checksum that the file says a chunk has; zeros: it is not finished."""
        return os.pread(file.fileno(), CHECKSUM, PAGE + CHECKSUM * number)

    def is_done(self, file, number):
        return any(self.checksum(file, number))

    def is_whole(self, file, number):
        """Are the bytes of a chunk those that were written?"""
        found = hashlib.sha256()
        for start, length in self.parts(number):
            found.update(os.pread(file.fileno(), length, start))
        return found.digest() == self.checksum(file, number)

    def write(self, file, number):
        """Compute a chunk; its bytes go to the disk first, its checksum after them."""
        # 1. features, and which pictures could be read
        first, last = self.bounds(number)
        features, readable = self.compute(first, last)
        check(features.shape == (last - first, *self.shape[1:]), "features of another shape")
        # 2. both as bytes, bf16 as its bits
        flags = bytes(0 if fine else UNREADABLE for fine in readable)
        data = features.contiguous().view(torch.int16).numpy().tobytes()
        for (start, _), part in zip(self.parts(number), (flags, data)):
            write_at(file, part, start)
        # 3. the checksum last: a chunk with one is whole
        os.fsync(file.fileno())
        digest = hashlib.sha256(flags + data).digest()
        write_at(file, digest, PAGE + CHECKSUM * number)

    def fill(self):
        """Compute all chunks that are not finished; several processes share the work."""
        try:
            with open(self.path, "r+b") as file, open(f"{self.path}.lock", "a+b") as locks:
                # 1. chunks without a checksum, by whoever takes their lock first
                undone = [c for c in range(self.chunks) if not self.is_done(file, c)]
                self.check_space(len(undone))
                shown = run.bar(undone, len(undone), name="look", delay=1)
                for number in shown:
                    self.fill_one(file, locks, number)
                # those that other processes computed meanwhile; one may have died over its chunk
                while undone := [c for c in undone if not self.is_done(file, c)]:
                    time.sleep(WAIT)
                    for number in undone:
                        self.fill_one(file, locks, number)
                os.fsync(file.fileno())
        except OSError as error:
            raise self.failure(error) from None

    def fill_one(self, file, locks, number):
        """Compute a chunk, unless it is finished or another process is at it."""
        if not take(locks, number):
            return
        try:
            # it may have been finished while we waited for the lock
            if not self.is_done(file, number):
                self.write(file, number)
        finally:
            release(locks, number)

    def check_space(self, chunks):
        """Raises UserError if so many chunks do not fit on the disk."""
        # before the work, not after hours of it
        needed = chunks * self.chunk * self.bytes_a_picture
        free = shutil.disk_usage(self.path.parent).free
        check(
            needed <= free,
            f"vision features need {needed / 1e9:.1f} GB in {self.path.parent}, {free / 1e9:.1f} are "
            "free: take fewer --views, or move the cache with VLM_ACTION_CACHE",
        )

    # reading

    def ensure(self, number):
        """Check a chunk the first time; a damaged one is computed anew.

        Raises UserError where it cannot be: in a worker of a DataLoader, which has no GPU.
        """
        if self.checked[number]:
            return
        with open(self.path, "rb") as file:
            whole = self.is_whole(file, number)
        if not whole:
            self.mend(number)
        self.checked[number] = True

    def mend(self, number):
        """Forget the checksum of a damaged chunk, and compute it anew."""
        first, last = self.bounds(number)
        try:
            with open(self.path, "r+b") as file:
                write_at(file, bytes(CHECKSUM), PAGE + CHECKSUM * number)
        except OSError as error:
            raise self.failure(error) from None
        # a worker has no tower: it can only say so
        here = self.compute is not None and torch.utils.data.get_worker_info() is None
        what = f"{self.path} is damaged at pictures {first} to {last - 1}"
        check(here, f"{what}: start again, they are computed anew")
        print(f"{what}: they are computed anew", flush=True)
        self.fill()

    def mapped(self):
        """The features as a read-only memory map: int16 (pictures, N * D)."""
        if self.map is None:
            with open(self.path, "rb") as file:
                whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            flat = np.frombuffer(whole, dtype=np.int16, offset=self.data_at)
            self.map = flat.reshape(self.shape[0], -1)
        return self.map

    def read(self, numbers):
        """Features of pictures, a list of numbers -> a copy, bf16 (len, N, D)."""
        numbers = np.asarray(numbers, dtype=np.int64)
        inside = ((numbers >= 0) & (numbers < self.shape[0])).all()
        if not inside:
            raise IndexError(f"there are {self.shape[0]} pictures")
        # each chunk that is touched is checked once
        for number in np.unique(numbers // self.chunk):
            self.ensure(int(number))
        # a fancy index copies: the map itself is read-only
        rows = torch.from_numpy(self.mapped()[numbers])
        return rows.view(torch.bfloat16).view(len(numbers), *self.shape[1:])

    def unreadable(self):
        """Numbers of the pictures that could not be read when the features were computed."""
        with open(self.path, "rb") as file:
            flags = os.pread(file.fileno(), self.shape[0], self.flags_at)
        return np.flatnonzero(np.frombuffer(flags, dtype=np.uint8) == UNREADABLE).tolist()
