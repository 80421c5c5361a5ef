"""Gateway: one address before several model workers, by OpenAI's protocol.

A request goes to the healthy worker with the fewest open requests (least connections). A worker that
refuses it, or is gone before the first byte, costs the client nothing: the next one is asked. After that
the bytes of the answer pass through as they come, server-sent events too; a worker that dies in the middle
becomes an error in the stream. Limits come first: key, rate of each client, bytes of a body and a picture.

    python vlm/serve/gateway.py --workers http://127.0.0.1:8001 http://127.0.0.1:8002
"""

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass
from typing import Any

from deploy.http_server import bind, is_loopback
from deploy.serve import KEY
from utils import run
from utils.run import check
from utils.text import printable
from vlm.serve.client import VISITOR
from vlm.serve.workers import RateLimit, Worker, metrics_text


@dataclass(frozen=True)
class Config:
    """One address before several model workers."""

    workers: tuple[str, ...] = ("http://127.0.0.1:8001",)
    host: str = "127.0.0.1"  # another one than loopback needs a key, in VLM_ACTION_API_KEY
    port: int = 8080  # 0: a free one
    insecure: bool = False  # serve others without a key
    # whose rate is counted: the header X-Visitor, if clients can be trusted with it (the page)
    trust_visitor: bool = False
    rate: int = 20  # requests a minute of a client
    body_bytes: int = 16 * 2**20  # of a request, at most
    image_bytes: int = 8 * 2**20  # of a picture
    images: int = 8  # of a request
    every: float = 2.0  # seconds between two health checks
    seconds: float = 300.0  # between two bytes of a worker
    out: str = "outputs/gateway"


class Gateway:
    """What the addresses share; key, body_bytes, body_seconds and metrics as deploy/endpoints.py wants them."""

    def __init__(self, cfg: Config, key=""):
        from deploy.protocol import Limits
        from deploy.server_metrics import Metrics

        self.cfg = cfg
        self.key = key
        self.workers = [Worker(url.rstrip("/")) for url in cfg.workers]
        self.rate = RateLimit(cfg.rate)
        self.limits = Limits(max_images=cfg.images, image_bytes=cfg.image_bytes)
        self.body_bytes = cfg.body_bytes
        self.body_seconds = 30.0
        self.metrics = Metrics()
        self.client: Any = None  # httpx.AsyncClient, while it serves

    def check_key(self, header):
        """Raises ProtocolError unless the header Authorization holds the key; in constant time."""
        import hmac

        from deploy.protocol_error import require

        given = header.removeprefix("Bearer ").encode()
        right = not self.key or hmac.compare_digest(given, self.key.encode())
        require(right, "missing or wrong API key", status=401, code="invalid_api_key")

    def visitor(self, request):
        """Whose rate is counted: the address of the client, or what a trusted one says."""
        named = request.headers.get(VISITOR, "") if self.cfg.trust_visitor else ""
        return named[:100] or (request.client.host if request.client else "")


async def chat(gateway, request):
    """/v1/chat/completions: limits, then a worker."""
    from deploy.endpoints import read_body
    from deploy.messages import conversation
    from deploy.protocol_error import require
    from deploy.responses import dump

    wait = gateway.rate.seconds_to_wait(gateway.visitor(request), time.monotonic())
    line = f"more than {gateway.cfg.rate} requests a minute: ask again in {wait:.0f} s"
    require(wait == 0, line, status=429, code="rate_limit_exceeded")
    body = await read_body(gateway, request)
    # pictures that are too large or too many, before a worker hears of them
    conversation(body, gateway.limits)
    return await forward(gateway, request, dump(body))


async def models(gateway, request):
    """/v1/models: what a worker has; they all have the same."""
    return await forward(gateway, request)


async def forward(gateway, request, content=None):
    """The answer of a worker: a stream as it comes, or a whole body."""
    from starlette.responses import Response

    from deploy.answers import unless_left
    from vlm.serve.upstream import PassedStream, ask_workers, is_stream

    headers = {"Content-Type": "application/json"}
    if gateway.key:
        headers["Authorization"] = f"Bearer {gateway.key}"
    asking = ask_workers(gateway, request.method, request.url.path, headers, content)
    worker, answer = await unless_left(request, asking)
    if is_stream(answer):
        return PassedStream(worker, answer)
    worker.running -= 1
    return Response(answer.content, answer.status_code, media_type="application/json")


def app(gateway, hosts=("*",)):
    """-> the ASGI application. hosts: the names under which it may be called."""
    import httpx
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    from deploy.endpoints import endpoint
    from vlm.serve.upstream import watch

    def health(request):
        """200 while one worker takes requests."""
        ready = any(worker.healthy for worker in gateway.workers)
        return PlainTextResponse("", 200 if ready else 503)

    def metrics(request):
        text = metrics_text(gateway)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @contextlib.asynccontextmanager
    async def lifespan(made):
        timeout = httpx.Timeout(gateway.cfg.seconds, connect=2.0)
        limits = httpx.Limits(max_connections=None)
        # no proxy of the environment stands between gateway and workers
        async with httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False) as client:
            gateway.client = client
            watching = asyncio.create_task(watch(gateway))
            yield
            watching.cancel()

    def route(path, handler, method):
        return Route(path, endpoint(gateway, handler), methods=[method])

    return Starlette(
        routes=[
            route("/v1/chat/completions", chat, "POST"),
            route("/v1/models", models, "GET"),
            Route("/health", health),
            Route("/metrics", metrics),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        lifespan=lifespan,
    )


def make_server(made, ready=None):
    """uvicorn.Server that ends at SIGTERM: no new requests, those that run may finish."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame):
            # uvicorn would raise the signal again in the end, and the exit code would not be 0
            self.force_exit = self.should_exit
            self.should_exit = True

        async def startup(self, sockets=None):
            await super().startup(sockets)
            if ready:
                ready()

    config = uvicorn.Config(
        made, http="h11", log_level="warning", timeout_graceful_shutdown=30, server_header=False
    )
    return Server(config)


def main(cfg: Config) -> dict:
    """Serve until SIGTERM or Ctrl-C."""
    check(cfg.workers, "--workers: name at least one")
    web = all(url.startswith(("http://", "https://")) for url in cfg.workers)
    check(web, "--workers are addresses: http://host:port, without /v1")
    numbers = (cfg.rate, cfg.body_bytes, cfg.image_bytes, cfg.images)
    check(min(numbers) > 0, "--rate, --body-bytes, --image-bytes, --images: at least 1")
    check(min(cfg.every, cfg.seconds) > 0, "--every, --seconds: above 0")
    check(0 <= cfg.port < 2**16, "--port must be from 0 to 65535")
    key = os.environ.get(KEY, "")
    private = is_loopback(cfg.host)
    safe = private or key or cfg.insecure
    check(safe, f"--host {printable(cfg.host)} serves others: set {KEY}, or say --insecure")
    listening = bind(cfg.host, cfg.port)
    folder = run.output(cfg.out, cfg)
    gateway = Gateway(cfg, key)
    hosts = ("127.0.0.1", "localhost", cfg.host) if private else ("*",)
    host, port = listening.getsockname()[:2]

    def ready():
        print(f"listening at http://{host}:{port}/v1, {len(gateway.workers)} workers", flush=True)

    make_server(app(gateway, hosts), ready).run(sockets=[listening])
    counts = gateway.metrics.requests
    metrics = {
        "requests": sum(counts.values()),
        "retries": sum(worker.refused for worker in gateway.workers),
        "broken answers": sum(worker.broken for worker in gateway.workers),
    }
    return run.report(folder, metrics, then="vlm/demo.md")


if __name__ == "__main__":
    run.cli(main, Config)
