"""From the gateway to its workers: health checks, retries before the first byte, bytes passed through."""

import asyncio
import logging

from starlette.responses import StreamingResponse

from deploy.protocol_error import ProtocolError
from deploy.responses import event
from vlm.serve.workers import least_busy

log = logging.getLogger("vlm.serve.gateway")
# full, draining, or the proxy before it has no worker: another one may take the request
ELSEWHERE = (429, 502, 503, 504)


async def watch(gateway):
    """Ask each worker's /health again and again, all at once."""
    while True:
        await asyncio.gather(*(look(gateway, worker) for worker in gateway.workers))
        await asyncio.sleep(gateway.cfg.every)


async def look(gateway, worker):
    """Is the worker there, and does it take requests?"""
    import httpx

    try:
        answer = await gateway.client.get(f"{worker.url}/health", timeout=2.0)
        healthy = answer.status_code == 200
    except (httpx.HTTPError, OSError):
        healthy = False
    if healthy != worker.healthy:
        log.warning("worker %s is %s", worker.url, "back" if healthy else "gone")
    worker.healthy = healthy


def is_stream(answer):
    """Server-sent events, or a whole body?"""
    return answer.headers.get("content-type", "").startswith("text/event-stream")


async def ask_workers(gateway, method, path, headers, content=None):
    """-> the worker that takes the request, which counts as open, and its answer: a stream whose headers
    were read, or a whole body. Raises ProtocolError if nobody takes it: 429 if a worker is full, else 503."""
    import httpx

    tried = []
    full = False
    while worker := least_busy(gateway.workers, tried):
        tried.append(worker)
        request = gateway.client.build_request(
            method, f"{worker.url}{path}", headers=headers, content=content
        )
        worker.running += 1
        answer = None
        taken = False
        try:
            answer = await gateway.client.send(request, stream=True)
            if answer.status_code not in ELSEWHERE:
                if not is_stream(answer):
                    await answer.aread()
                taken = True
                worker.answered += 1
                return worker, answer
            full = full or answer.status_code == 429
            # who drains takes nothing more; who is full has not failed
            worker.healthy = answer.status_code == 429
        except httpx.HTTPError as error:
            log.warning("worker %s: %s", worker.url, type(error).__name__)
            worker.healthy = False
        finally:
            # refused, gone, or the client has left meanwhile
            if not taken:
                worker.running -= 1
                if answer is not None:
                    await answer.aclose()
        worker.refused += 1
    if full:
        line = "all workers are full; try again later"
        raise ProtocolError(line, status=429, code="queue_full")
    raise ProtocolError("no worker takes requests now; try again later", status=503)


async def events(worker, answer):
    """Yields whole events of a stream as they come; a worker that dies in the middle becomes an error in it."""
    import httpx

    held = b""
    try:
        async for piece in answer.aiter_raw():
            # an event ends with an empty line; half of one could never be taken back
            whole, end, held = (held + piece).rpartition(b"\n\n")
            if end:
                yield whole + end
        yield held
    except httpx.HTTPError as error:
        log.warning("worker %s: %s in an answer", worker.url, type(error).__name__)
        worker.healthy = False
        worker.broken += 1
        found = ProtocolError("the worker broke off in the middle of its answer", status=502)
        yield event(found.body())


class PassedStream(StreamingResponse):
    """The stream of a worker; at its end, whatever that is, the worker has one open request less."""

    def __init__(self, worker, answer):
        # proxies on the way must not collect events
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        kind = "text/event-stream"
        super().__init__(events(worker, answer), answer.status_code, headers, kind)
        self.worker = worker
        self.answer = answer

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            # a client that has left: the worker stops, too
            self.worker.running -= 1
            await self.answer.aclose()
