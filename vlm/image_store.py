"""Pictures by name: files of a folder, members of tar shards, or web addresses; read when they are asked for.

A picture that is missing, damaged or too large is a UserError of one line; the collator puts another
sample in its place and counts it (vlm/collator.py).
"""

from pathlib import Path

from utils import images
from utils.run import UserError, check
from utils.text import printable
from vlm import conversations, image_download, tar_shards
from vlm.views import open_picture


class ImageStore:
    """Where the pictures of a data set are: `where` is a folder of files, a folder of .tar shards, or
    one .tar file; names that are web addresses are downloaded, if `download` says so.

    read(name) -> bytes; image(name, size) -> uint8 (3,size,size). A name never leads out of the
    folder. Raises UserError for a place that is not there, and for a picture that cannot be read.
    """

    def __init__(self, where, download=False, limits=None):
        self.where = Path(where)
        self.download = download
        self.limits = limits or image_download.Limits()
        check(self.where.exists(), f"--image_folder: there is no {printable(where)}")
        # A folder with shards may hold plain files beside them
        has_tars = self.where.is_file() or any(self.where.glob("*.tar"))
        self.shards = tar_shards.find_shards(where) if has_tars else []

    def find(self, name):
        """(shard, offset, size) of a picture in the shards. Raises UserError if it is in none."""
        # SHARD.tar/KEY
        first, tar, rest = name.partition(".tar/")
        for shard in self.shards:
            if tar and shard.path.name == f"{first}.tar" and (span := shard.find(rest)):
                return shard, *span
        # A bare key: the first shard that has it
        for shard in self.shards:
            if span := shard.find(name):
                return shard, *span
        raise UserError(f"there is no picture {printable(name)} in {printable(self.where)}")

    def is_file(self, name):
        """Is it a file of the folder, which may hold files beside its shards?"""
        return self.where.is_dir() and conversations.is_inside(self.where, name)

    def read(self, name):
        """Bytes of a picture."""
        # 1. An address of the web
        if image_download.is_address(name):
            return image_download.download(name, self.download, self.limits)
        # 2. A member of a shard, read in place by its offset
        if self.shards and not self.is_file(name):
            shard, offset, size = self.find(name)
            return shard.read(offset, size)
        # 3. A file of the folder, which no name leads out of
        nowhere = f"there is no {printable(name)} in {printable(self.where)}"
        check(self.is_file(name), nowhere)
        try:
            return images.whole_file(self.where / name, printable(name))
        except OSError as error:
            raise UserError(f"cannot read {printable(name)}: {error.strerror}") from None

    def stamp(self, name):
        """What changes with the content of a picture: its name, and size and time of change of the
        file that it is in; None for these where there is no file."""
        path = self.where / name
        if image_download.is_address(name):
            # Of a download: its copy in the cache
            path = image_download.place(name)
        elif self.shards and not self.is_file(name):
            try:
                shard, offset, size = self.find(name)
            except UserError:
                return name, None, None
            # Of a member: its place, and the shard's own stamp
            return name, offset, size, *shard.stamp
        try:
            found = path.stat()
        except (OSError, ValueError):
            return name, None, None
        return name, found.st_size, found.st_mtime_ns

    def image(self, name, size=0):
        """A picture, the middle square: uint8 (3,size,size); size 0: as it is. Raises UserError."""
        return open_picture(self, name, size)
