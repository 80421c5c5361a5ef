"""Pictures at web addresses, downloaded only if that was asked for, each once, under limits of size, time and type.

What is downloaded lies in the cache under a hash of its address, and is not asked for again; nor is
what failed, for a day. Only http and https are spoken, after a redirect, too: a data set of others
must not read files of this machine. What arrives is a picture or is thrown away.
"""

import hashlib
import io
import os
import threading
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from utils import assets, images
from utils.run import UserError, check
from utils.text import printable

SCHEMES = ("http://", "https://")
PIECE = 2**16  # bytes that are read at a time
DAY = 86400  # seconds


class DownloadsOff(UserError):
    """A picture is at a web address, and downloads were not asked for: no picture is broken, the
    flags are wrong."""


@dataclass(frozen=True)
class Limits:
    """Of one download."""

    megabytes: float = 20
    seconds: float = 20  # from the first byte sent to the last one received
    failed_again: float = DAY  # seconds until an address that failed is asked again


class OnlyWeb(urllib.request.HTTPRedirectHandler):
    """Redirects to http and https, to nothing else."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        check(is_address(newurl), f"redirected to {printable(newurl)}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_address(name):
    """Is it the address of something on the web, and no file?"""
    return isinstance(name, str) and name.lower().startswith(SCHEMES)


def opener():
    """What speaks http and https, and nothing else: no file, no ftp."""
    # without the handlers for files and ftp that urllib adds by itself
    found = urllib.request.OpenerDirector()
    handlers = [
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        OnlyWeb(),
    ]
    for handler in handlers:
        found.add_handler(handler)
    found.addheaders = [("User-Agent", "vlm-action"), ("Accept", "image/*")]
    return found


def receive(address, limits):
    """Bytes of a picture at an address. Raises UserError for more bytes than the limit, another
    type, or what cannot be decoded."""
    most = int(limits.megabytes * 2**20)
    with opener().open(address, timeout=limits.seconds) as response:
        # what the server says of it
        kind = response.headers.get_content_type()
        check(kind.startswith("image/"), f"it is {printable(kind)}, no picture")
        # what it sends
        found = io.BytesIO()
        while piece := response.read1(PIECE):
            found.write(piece)
            check(found.tell() <= most, f"it is larger than {limits.megabytes:g} MB")
    # is it a picture
    images.open_image(io.BytesIO(found.getvalue()))
    return found.getvalue()


def receive_in_time(address, limits):
    """The same, within the limit of seconds altogether: a server that sends a byte a second is not
    waited for. Raises UserError, one line that names the address."""
    result = []

    def attempt():
        try:
            result.append((receive(address, limits), None))
        except UserError as error:
            result.append((None, str(error)))
        # what the network and the server do: timeouts, refused, cut off, 404, nonsense
        except Exception as error:
            result.append((None, printable(error) or type(error).__name__))

    # a thread that is not waited for: a socket's own limit starts anew with every byte
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(limits.seconds)
    data, why = result[0] if result else (None, f"it takes longer than {limits.seconds:g} seconds")
    check(data is not None, f"cannot download {printable(address)}: {why}")
    return data


def place(address):
    """Where a download lies in the cache."""
    name = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()
    return assets.cache() / "downloads" / name[:2] / name


def failure(path, limits):
    """Why it failed the last time, if that is not long ago; or None."""
    marker = path.with_suffix(".failed")
    with suppress(OSError):
        if time.time() - marker.stat().st_mtime < limits.failed_again:
            return marker.read_text("utf-8")
    return None


def keep(path, data):
    """Write a file of the cache whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot keep {path}: {error.strerror}; free some space") from None


def download(address, asked, limits=Limits()):  # noqa: B008  (it is frozen)
    """Bytes of the picture at an address, out of the cache if it is there.

    asked: whether the user asked for downloads. Raises DownloadsOff if not, UserError if it failed,
    now or less than a day ago.
    """
    # 1. in the cache, whether downloads are on or not
    path = place(address)
    if path.is_file():
        return Path(path).read_bytes()
    off = f"{printable(address)} is not on this machine: --download fetches such pictures"
    # 2. not there, and not asked for
    if not asked:
        raise DownloadsOff(off)
    # 3. failed not long ago: a dead server is not asked in every epoch
    why = failure(path, limits)
    check(why is None, f"{why} (it is asked again after a day)")
    try:
        # 4. now, and kept; a failure is kept, too
        data = receive_in_time(address, limits)
    except UserError as error:
        keep(path.with_suffix(".failed"), str(error).encode("utf-8", "replace"))
        raise
    keep(path, data)
    return data
