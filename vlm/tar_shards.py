"""Tar shards in webdataset's layout: pictures and texts of a sample are members of one key, read by seek.

Members 000017.jpg and 000017.json (a row of LLaVA's format, with or without "image"), or 000017.txt
(a caption), are sample 000017. Nothing is unpacked: where each member begins is found once, by its
header, and kept in the cache: some 90 bytes a sample, so that millions of them fit. A picture is
called by its member, by its key, or, where shards number their samples alike, by SHARD.tar/KEY.
"""

import os
import tarfile
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils import data
from utils.images import IMAGE_SUFFIXES, MEGABYTES
from utils.run import UserError, check
from utils.text import decode, printable
from vlm import conversations
from vlm.lazy_rows import cache_file, checked, parse, stamp

TEXTS = (".json", ".txt")
QUESTION = "Describe the image concisely."  # of a caption; LLaVA, Table 11


def key_and_suffix(name):
    """webdataset's key: the name up to the first dot of its last part; and the rest, in small
    letters."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()


def name_hash(name):
    """64 bits of a name, as a signed number: what members are looked up by."""
    digest = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def members(path):
    """Plain files of a tar archive: yields (name, offset, size). Raises UserError for what is no
    uncompressed tar, or is cut short."""
    name = printable(path)
    archive: Any
    try:
        with tarfile.open(path, "r:") as archive:
            while member := archive.next():
                # tarfile would keep all of them
                archive.members = []
                if member.isfile() and not member.issparse():
                    yield member.name.removeprefix("./"), member.offset_data, member.size
    except (tarfile.TarError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or printable(error)
        raise UserError(f"{name} is no uncompressed tar, or is cut short: {reason}") from None


class Shard:
    """One tar file: where its members are. Raises UserError as `members` does, and for two of one
    name."""

    def __init__(self, path):
        self.path = Path(path)
        self.name = printable(path)
        self.stamp = stamp(path)
        tensors, _ = data.cached(cache_file("shard", self.stamp), self.scan)
        # what the archive has none of is not kept
        kept = {name: x.numpy() for name, x in tensors.items()}
        self.hashes = kept.get("hashes", np.zeros(0, dtype=np.int64))
        self.spans = kept.get("spans", np.zeros((0, 2), dtype=np.int64))
        self.texts = kept.get("texts", np.zeros((0, 4), dtype=np.int64))
        self.keys = kept.get("keys", np.zeros(0, dtype=np.uint8))

    def scan(self):
        """Pictures sorted by the hash of their names; spans and keys of the texts, in the archive's
        order."""
        # flat arrays of numbers: a Python object for each of a million members would not fit
        hashes = array("q")
        spans = array("q")
        texts = array("q")
        keys = bytearray()
        for name, offset, size in members(self.path):
            key, suffix = key_and_suffix(name)
            # a picture is found by its name, and by its key alone
            if suffix in IMAGE_SUFFIXES:
                hashes.extend((name_hash(name), name_hash(key)))
                spans.extend((offset, size, offset, size))
            if suffix in TEXTS:
                keys += key.encode("utf-8", "surrogateescape")
                texts.extend((offset, size, len(keys), suffix == ".json"))
        # sorted by hash, so that a name is found by bisection
        unsorted = np.array(hashes, dtype=np.int64)
        order = np.argsort(unsorted, kind="stable")
        alone = (np.diff(unsorted[order]) != 0).all()
        check(alone, f"{self.name} holds two pictures of one key: give each its own")
        found = {
            "hashes": unsorted[order],
            "spans": np.array(spans, dtype=np.int64).reshape(-1, 2)[order],
            "texts": np.array(texts, dtype=np.int64).reshape(-1, 4),
            "keys": np.frombuffer(bytes(keys), dtype=np.uint8).copy(),
        }
        # an empty tensor has no bytes to be hashed
        return {key: torch.from_numpy(x) for key, x in found.items() if x.size}, None

    def key(self, number):
        """The key of a text, by its number in the archive."""
        start = self.texts[number - 1, 2] if number else 0
        found = self.keys[start : self.texts[number, 2]].tobytes()
        return found.decode("utf-8", "surrogateescape")

    def find(self, name):
        """(offset, size) of the picture of this name or key, or None."""
        # bisection in the sorted hashes
        hashed = name_hash(name)
        place = np.searchsorted(self.hashes, hashed)
        if place < len(self.hashes) and self.hashes[place] == hashed:
            return tuple(self.spans[place].tolist())
        return None

    def read(self, offset, size):
        """Bytes of a member. Raises UserError if the archive is no longer the one that was scanned."""
        # a header that claims terabytes is refused before anything is read
        most = MEGABYTES * 2**20
        check(size <= most, f"{self.name}: a member is larger than {MEGABYTES} MB")
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                file.seek(offset)
                text = file.read(size)
        except OSError as error:
            raise UserError(f"cannot read {self.name}: {error.strerror}") from None
        same = (found.st_size, found.st_mtime_ns) == self.stamp[1:]
        check(same, f"{self.name} has changed while it was being read: start again")
        return text

    def row(self, number):
        """The row of a text, by its number in the archive. Raises UserError, which names both."""
        at = f"{self.name}: text {number}"
        offset, size, _, is_json = self.texts[number].tolist()
        key = self.key(number)
        text = self.read(offset, size)
        # a caption answers a question; a row of JSON without "image" has the picture of its key
        if is_json:
            one = parse(text, at)
        else:
            check(self.find(key), f"{at}: a caption without a picture")
            one = conversations.row(key, key, [(QUESTION, decode(text, at).strip())])
        if isinstance(one, dict):
            image = one.get("image")
            named = key if image is None else image
            # the picture of this shard, if others use the name, too
            if isinstance(named, str) and self.find(named):
                one = one | {"image": f"{self.path.name}/{named}"}
        return checked(one, at, self.path)


def find_shards(where):
    """Tar files of a folder, or one tar file -> Shards, by name. Raises UserError if there are
    none."""
    where = Path(where)
    paths = sorted(where.glob("*.tar")) if where.is_dir() else [where]
    check(paths, f"there is no .tar file in {printable(where)}")
    return [Shard(path) for path in paths]


class TarRows(Sequence):
    """Rows of the texts in shards: rows[i], len(rows), read when they are asked for.

    A .json member is a row of LLaVA's format; without "image" it has the picture of its key, if
    there is one. A .txt member is a caption: the answer to QUESTION. Raises UserError, one line that
    names the archive and the number of the text in it.
    """

    def __init__(self, where):
        self.shards = find_shards(where)
        # where each shard's texts end in the numbering of all
        self.ends = np.cumsum([len(shard.texts) for shard in self.shards])
        check(self.ends[-1], f"no .json or .txt member in {printable(where)}")

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, number):
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        number = int(number) % len(self)
        # the shard, and the text in it
        which = int(np.searchsorted(self.ends, number, side="right"))
        shard = self.shards[which]
        number -= int(self.ends[which]) - len(shard.texts)
        return shard.row(number)
