"""HTTP by uvicorn: a server that drains at SIGTERM, and the socket that it listens at."""

import contextlib
import ipaddress
import socket
import time

from utils.run import UserError
from utils.text import printable


def make_server(made, drain_seconds=30.0, ready=None):
    """uvicorn.Server for the application that drains. ready: called when requests are taken."""
    import uvicorn

    service = made.state.service

    class DrainingServer(uvicorn.Server):
        """SIGTERM: no new requests (503), those that run finish, within a time; exit code 0."""

        draining = False
        until = 0.0  # when draining ends

        def handle_exit(self, sig, frame):
            # uvicorn records the signal and raises it again in the end, so that the exit code is not 0
            # a second one ends it at once
            if self.draining:
                self.should_exit = True
                self.force_exit = True
            self.draining = True
            self.until = time.monotonic() + drain_seconds
            service.draining = True

        async def startup(self, sockets=None):
            await super().startup(sockets)
            if ready:
                ready()

        async def on_tick(self, counter):
            """Ten times a second: whether to end."""
            if self.draining and time.monotonic() > self.until:
                service.engine_loop.abort("the server is shutting down")
                return True
            done = self.draining and not service.engine_loop.tickets
            return await super().on_tick(counter) or done

    config = uvicorn.Config(
        made, http="h11", log_level="warning", timeout_graceful_shutdown=5, server_header=False
    )
    return DrainingServer(config)


def is_loopback(host):
    """Whether only this machine can call the host."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def bind(host, port):
    """A socket that listens. Raises UserError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as error:
        line = f"cannot listen at {printable(host)}, port {port}: {error}; choose another --port"
        raise UserError(line) from None
    return listening
