"""A real server in a thread, for tests: uvicorn, a tiny random Llama with the tokenizer of SmolLM2, real sockets."""

import socket
import threading
import time
from contextlib import contextmanager

from deploy import serve
from deploy.engine import Engine
from deploy.http_server import bind, make_server


@contextmanager
def running(model, tokenizer, engine=None, drain_seconds=5.0, buffer=None, **about):
    """-> an object with address, service and server, while it runs; it ends by draining. buffer: bytes that
    the system keeps for a client that does not read."""
    made = serve.app(model, tokenizer, engine or Engine(model, blocks=200), **about)
    listening = bind("127.0.0.1", 0)
    if buffer:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    port = listening.getsockname()[1]
    ready = threading.Event()
    server = make_server(made, drain_seconds, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    assert ready.wait(120)
    server.address = f"http://127.0.0.1:{port}/v1"
    server.root = f"http://127.0.0.1:{port}"
    server.port = port
    server.service = made.state.service
    try:
        yield server
    finally:
        server.handle_exit(0, None)
        thread.join(120)
        assert not thread.is_alive()


def is_idle(service):
    """Nothing is left of any request: no ticket, no owner, no request in the engine, all blocks free."""
    engine = service.engine
    left = [service.engine_loop.tickets, service.engine_loop.owner]
    left += [engine.scheduler.running, engine.scheduler.waiting]
    free = len(engine.pool.free) == len(engine.pool.holders)
    return not any(left) and free


def becomes_idle(service, seconds=10):
    """Whether that happens soon."""
    until = time.monotonic() + seconds
    while not is_idle(service) and time.monotonic() < until:
        time.sleep(0.01)
    return is_idle(service)


def send_raw(port, data, shut=False, buffer=None):
    """Bytes to the port -> the socket, to read from or to leave. buffer: bytes that it receives unread."""
    connection = socket.socket()
    connection.settimeout(20)
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect(("127.0.0.1", port))
    connection.sendall(data)
    if shut:
        connection.shutdown(socket.SHUT_WR)
    return connection


def post(path, body, *headers):
    """The bytes of a request with a JSON body."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    lines += [*headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body
