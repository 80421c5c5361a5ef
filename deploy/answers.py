"""The answers of one request as they come from the engine: whole, or as server-sent events.

Each token becomes text that can be shown (text_stream.py), and chunks of the protocol (responses.py). A client
that leaves, an answer that takes too long and a reader that does not read end it here.
"""

import asyncio
import logging
import time
from contextlib import suppress

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from deploy import responses
from deploy.protocol_error import ProtocolError
from deploy.text_stream import TextStream

log = logging.getLogger("deploy.serve")
SLOW = "the time of this request is over"


class Answers:
    """The answers of one request, as they come."""

    def __init__(self, service, asked, ticket, began, prompt_tokens):
        self.service = service
        self.asked = asked
        self.ticket = ticket
        self.began = began
        self.deadline = began + service.request_seconds
        self.prompt_tokens = prompt_tokens
        self.new_tokens = 0
        pieces = service.token_bytes() if asked.logprobs is not None else None
        self.writer = responses.Writer(asked.kind, service.name, service.tokenizer, pieces)
        self.streams = [TextStream(service.tokenizer, asked.stop) for _ in range(ticket.places)]
        self.last: dict[int, float] = {}  # when the last token of each answer came
        self.finished = False

    async def next_event(self):
        """The next event of the engine. Raises ProtocolError when the time is over, or the engine fails."""
        try:
            left = self.deadline - time.monotonic()
            event = await asyncio.wait_for(self.ticket.events.get(), max(left, 0))
        except TimeoutError:
            raise ProtocolError(SLOW, status=504, code="timeout") from None
        if event.finished == "error":
            raise ProtocolError(event.step, status=503)
        return event

    def measure(self, choice):
        """Times of a token: to the first, or since the last one."""
        now = time.monotonic()
        metrics = self.service.metrics
        before = self.last.get(choice)
        if before is None:
            metrics.first_token.observe(now - self.began)
        else:
            metrics.between_tokens.observe(now - before)
        self.last[choice] = now
        metrics.generated_tokens += 1
        self.new_tokens += 1

    async def pieces(self):
        """What is new of each answer, as soon as it can be shown: (answer, text, steps, finish reason)."""
        going = set(range(len(self.streams)))
        while going:
            event = await self.next_event()
            # tokens behind a stop string
            if event.choice not in going:
                continue
            self.measure(event.choice)
            stream = self.streams[event.choice]
            finished = event.finished
            # the token that ends an answer is none of its letters
            text = "" if finished == "stop" else stream.push(event.token, event.step)
            if finished:
                text += stream.finish()
            if stream.stopped:
                finished = "stop"
                self.service.cancel(self.ticket, event.choice)
            if finished:
                going.discard(event.choice)
            if text or finished:
                steps = stream.take() if self.asked.logprobs is not None else []
                yield event.choice, text, steps, finished
        self.finished = True
        self.service.metrics.request_seconds.observe(time.monotonic() - self.began)

    async def whole(self):
        """-> the object of the whole answer."""
        texts = [""] * len(self.streams)
        steps = [[] for _ in self.streams]
        reasons = [""] * len(self.streams)
        async for number, text, new, finished in self.pieces():
            texts[number] += text
            steps[number] += new
            reasons[number] = finished
        rows = zip(range(len(texts)), texts, steps, reasons)
        choices = [self.writer.choice(*row) for row in rows]
        return self.writer.answer(choices, self.prompt_tokens, self.new_tokens)

    async def events(self):
        """Server-sent events."""
        if self.asked.kind == "chat":
            for number in range(len(self.streams)):
                yield responses.event(self.writer.opening(number))
        try:
            async for piece in self.pieces():
                yield responses.event(self.writer.piece(*piece))
        # the status was sent long ago: an error is an event
        except ProtocolError as error:
            yield responses.event(error.body())
            return
        if self.asked.include_usage:
            about = responses.usage(self.prompt_tokens, self.new_tokens)
            yield responses.event(self.writer.chunk([], about))
        yield responses.DONE


class EventStream(StreamingResponse):
    """A stream that closes its ticket at its end, whatever that is: written, client gone, reader too slow."""

    def __init__(self, answers):
        super().__init__(answers.events(), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self.answers = answers

    async def __call__(self, scope, receive, send):
        answers = self.answers
        service = answers.service
        try:
            # a client that does not read holds its ticket a little longer than the time it has
            async with asyncio.timeout(answers.deadline + 1 - time.monotonic()):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.warning("a client that does not read was left")
        finally:
            service.engine_loop.close(answers.ticket)
            if not answers.finished:
                service.metrics.cancelled += 1


async def unless_left(request, work):
    """What `work`, a coroutine, returns. Raises ClientDisconnect as soon as the client has gone."""

    async def watch():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(watch())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, watcher):
            one.cancel()
            with suppress(asyncio.CancelledError, ProtocolError):
                await one
