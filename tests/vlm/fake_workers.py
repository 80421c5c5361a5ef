"""Workers for tests of the gateway: HTTP servers of a few lines that answer, refuse, stall or die as they are told."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deploy.http_server import bind
from vlm.serve import gateway, upstream

WORDS = ["A ", "melon ", "on ", "a ", "table."]


class FakeWorker(ThreadingHTTPServer):
    """how: "ok", a status that it refuses with, or "dies" after two words; pause: seconds between words."""

    daemon_threads = True

    def __init__(self, name="one", how="ok", pause=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.name = name
        self.how = how
        self.pause = pause
        self.bodies = []
        self.headers = []
        self.sent = 0  # words
        self.left = 0  # clients that left in the middle
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that leaves is no error here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeWorker

    def log_message(self, *about):
        pass

    def whole(self, status, content, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        if self.path == "/health":
            refuses = self.server.how == 503
            return self.whole(503 if refuses else 200, b"", "text/plain")
        self.whole(200, json.dumps({"data": [{"id": self.server.name}]}).encode())

    def do_POST(self):
        how = self.server.how
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.headers.append(dict(self.headers.items()))
        if isinstance(how, int):
            return self.whole(how, b'{"error": {"message": "no", "type": "x"}}')
        if not body.get("stream"):
            text = "".join(WORDS)
            message = {"role": "assistant", "content": f"{self.server.name}: {text}"}
            content = json.dumps({"choices": [{"message": message}]}).encode()
            if how == "dies":
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[:9])
                self.close_connection = True
                return None
            time.sleep(self.server.pause)
            return self.whole(200, content)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for i, word in enumerate(WORDS):
                if how == "dies" and i == 2:
                    # the half of an event, and no last chunk
                    self.chunk(b'data: {"choi')
                    self.close_connection = True
                    return None
                choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
                self.chunk(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
                self.server.sent += 1
                time.sleep(self.server.pause)
            self.chunk(b"data: [DONE]\n\n")
            self.chunk(b"")
        except OSError:
            self.server.left += 1

    def chunk(self, content):
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        self.wfile.flush()


def closed_worker():
    """An address where nobody listens."""
    one = FakeWorker()
    one.shutdown()
    one.server_close()
    return one


async def nobody_looks(gateway, worker):
    """In the place of a health check."""


@contextmanager
def running(workers, key="", watched=True, **about):
    """A gateway before these workers, in a thread -> the gateway, with `address` and `root`. watched: it asks for their
    health; else what it knows of it comes from requests alone."""
    about = {"workers": tuple(one.url for one in workers), "every": 0.1} | about
    made = gateway.Gateway(gateway.Config(**about), key)
    listening = bind("127.0.0.1", 0)
    patch = pytest.MonkeyPatch()
    if not watched:
        patch.setattr(upstream, "look", nobody_looks)
    ready = threading.Event()
    server = gateway.make_server(gateway.app(made, ("127.0.0.1",)), ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    assert ready.wait(60)
    made.root = f"http://127.0.0.1:{listening.getsockname()[1]}"
    made.address = f"{made.root}/v1"
    try:
        yield made
    finally:
        server.handle_exit(0, None)
        thread.join(60)
        patch.undo()
        assert not thread.is_alive()
        for one in workers:
            one.shutdown()
            one.server_close()


def until(condition, seconds=10):
    """Whether it becomes true soon."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
