"""Downloads from a server of our own: kept once, only if asked for, and refused in one line beyond the limits."""

import io
import os
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from utils.run import UserError
from vlm import image_download
from vlm.collator import Collator
from vlm.image_download import DownloadsOff, Limits
from vlm.image_store import ImageStore

FILE = io.BytesIO()
Image.new("RGB", (9, 7), (200, 30, 4)).save(FILE, "PNG")
PICTURE = FILE.getvalue()


class Web(BaseHTTPRequestHandler):
    """A server with every fault."""

    asked = []

    def log_message(self, *about):
        pass

    def answer(self, code=200, kind="image/png", body=PICTURE, length=None, **headers):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.asked.append(self.path)
        with suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, f"get_{self.path[1:].partition('.')[0]}")()

    def get_fine(self):
        self.answer()

    def get_missing(self):
        self.answer(404, body=b"")

    def get_page(self):
        self.answer(kind="text/html", body=b"<html>")

    def get_lies(self):
        self.answer(body=b"<html> no picture")

    def get_short(self):
        self.answer(body=PICTURE[:40], length=len(PICTURE))

    def get_huge(self):
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        for _ in range(10_000):
            self.wfile.write(bytes(2**16))

    def get_slow(self):
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        for byte in PICTURE:
            self.wfile.write(bytes([byte]))
            time.sleep(0.2)

    def get_silent(self):
        time.sleep(2)

    def get_moved(self):
        self.answer(302, body=b"", Location="/fine")

    def get_local(self):
        self.answer(302, body=b"", Location="file:///etc/hostname")

    def get_ftp(self):
        self.answer(302, body=b"", Location="ftp://127.0.0.1/a.png")

    def get_circle(self):
        self.answer(302, body=b"", Location="/circle")


@pytest.fixture(scope="module")
def server():
    found = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_address[1]}"
    found.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_ACTION_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Web.asked.clear()


LIMITS = Limits(megabytes=1, seconds=0.7)


def test_a_picture_is_downloaded_once_and_only_if_asked_for(server):
    with pytest.raises(DownloadsOff, match="/fine is not on this machine: --download") as found:
        image_download.download(f"{server}/fine", False)
    assert "\n" not in str(found.value) and not Web.asked
    for _ in range(2):
        assert image_download.download(f"{server}/fine", True, LIMITS) == PICTURE
    # it lies here now: no download is needed
    assert image_download.download(f"{server}/fine", False) == PICTURE
    assert Web.asked == ["/fine"]
    assert image_download.download(f"{server}/moved", True, LIMITS) == PICTURE


REFUSED = {
    "missing": "HTTP Error 404",
    "page": "it is text/html, no picture",
    "lies": "is not a readable image",
    "short": "IncompleteRead|not a readable image",
    "huge": "larger than 1 MB",
    "slow": "longer than 0.7 seconds",
    "silent": "longer than 0.7 seconds|timed out",
    "local": "Redirection to url 'file:///etc/hostname' is not allowed",
    "ftp": "redirected to ftp:",
    "circle": "HTTP Error 302",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_servers_do_is_one_line_and_not_asked_again(server, name, tmp_path):
    address = f"{server}/{name}"
    start = time.monotonic()
    with pytest.raises(UserError, match=f"cannot download {address}: .*({REFUSED[name]})") as found:
        image_download.download(address, True, LIMITS)
    assert time.monotonic() - start < 3 and not isinstance(found.value, DownloadsOff)
    asked = len(Web.asked)
    # for a day it is not asked again
    with pytest.raises(UserError, match=f"{REFUSED[name]}.*asked again after a day") as found:
        image_download.download(address, True, LIMITS)
    assert "\n" not in str(found.value) and len(Web.asked) == asked > 0
    # then it is
    marker = image_download.place(address).with_suffix(".failed")
    os.utime(marker, (1, 1))
    with pytest.raises(UserError, match="cannot download"):
        image_download.download(address, True, LIMITS)
    assert len(Web.asked) > asked
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert files == [marker]


def test_nobody_there_and_addresses_that_are_none(tmp_path):
    with pytest.raises(UserError, match="cannot download http://127.0.0.1:9/a.png: .*refused"):
        image_download.download("http://127.0.0.1:9/a.png", True, LIMITS)
    for address in ("http://", "http://[", "https://\0", "http://a b/\ud800"):
        with pytest.raises(UserError, match="cannot download") as found:
            image_download.download(address, True, LIMITS)
        str(found.value).encode()
    assert not any(map(image_download.is_address, ("file:///a.png", "ftp://a/b.png", "a.png", 3)))
    assert image_download.is_address("HTTPS://a/b.png")


def test_a_cache_that_cannot_be_written_is_one_line(server, tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("VLM_ACTION_CACHE", str(tmp_path / "a file"))
    with pytest.raises(UserError, match="cannot keep .*free some space"):
        image_download.download(f"{server}/fine", True, LIMITS)


def test_addresses_in_a_store_are_replaced_if_they_fail(server, tmp_path):
    """A picture that is gone is another sample; one that may not be fetched stops the run."""
    names = [f"{server}/fine.1", f"{server}/missing", "here.png", f"{server}/fine.2"]
    (tmp_path / "here.png").write_bytes(PICTURE)
    samples = [{"ids": [i], "labels": [i], "images": [name]} for i, name in enumerate(names)]
    store = ImageStore(tmp_path, download=True, limits=LIMITS)
    collate = Collator(lambda name: store.image(name, 4), samples, pad_id=9)
    batch = collate(samples)
    assert torch.equal(batch["images"], store.image("here.png", 4).expand(4, -1, -1, -1))
    assert collate.broken == 1 and 1 not in batch["ids"][:, 0]
    # the content that features are kept by is that of the file in the cache
    assert store.stamp(names[0])[1] == len(PICTURE) and store.stamp(names[1])[1] is None
    off = ImageStore(tmp_path)
    assert torch.equal(off.image(names[0], 4), store.image(names[0], 4))
    stopped = Collator(lambda name: off.image(name, 4), samples, pad_id=9)
    samples[1]["images"] = [f"{server}/fine.3"]
    with pytest.raises(DownloadsOff, match="--download"):
        stopped(samples)
    assert stopped.broken == 0
