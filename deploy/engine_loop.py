"""An engine in a thread of its own: requests go in by a queue, tokens come back to the event loop.

Only this thread touches the engine and the model. Whoever wants something of it puts a job into the queue;
jobs are done between two forward passes. Tokens go the other way by `call_soon_threadsafe`. The number of
answers that wait or run is bounded (back pressure): a server that takes every request makes all of them late.
"""

import asyncio
import logging
import queue
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from deploy.engine import Engine
from deploy.logprobs import LogprobRecorder
from deploy.scheduler import Request

log = logging.getLogger("deploy.serve")


@dataclass(frozen=True)
class Event:
    """What happened to one answer: a token, or its end without one."""

    choice: int  # which answer of its HTTP request
    token: int | None
    finished: str  # "" while it goes on; "stop", "length", "error"
    step: Any = None  # of LogprobRecorder


@dataclass(eq=False)
class Ticket:
    """What one HTTP request has in the engine: its answers, and what happened to them."""

    places: int  # answers
    requests: list[Request] = field(default_factory=list)
    events: asyncio.Queue = field(default_factory=asyncio.Queue)


class EngineLoop:
    """engine: what the thread drives. places: answers that wait or run at once, of all tickets."""

    def __init__(self, engine: Engine, places: int):
        self.engine = engine
        self.places = places
        self.tickets: set[Ticket] = set()
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        # of the thread alone: whose answer a request of the engine is
        self.owner: dict[Request, tuple[Ticket, int]] = {}
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)
        self.loop: Any = None

    # What the event loop calls

    def start(self):
        """Begin; called in the event loop that the tokens go to."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self):
        """End the thread; what is still running ends with "error"."""
        self.inbox.put(None)
        self.thread.join()

    def abort(self, reason):
        """End everything that waits or runs with "error"."""
        self.inbox.put(lambda: self.fail(reason))

    def taken(self):
        """Answers that wait or run."""
        return sum(ticket.places for ticket in self.tickets)

    def open(self, places):
        """Places for so many answers -> Ticket, or None if there are not enough."""
        if self.taken() + places > self.places:
            return None
        ticket = Ticket(places)
        self.tickets.add(ticket)
        return ticket

    def close(self, ticket):
        """Give the places back; what is still running is cancelled, and its blocks are free. May be called
        again."""
        self.tickets.discard(ticket)
        self.inbox.put(lambda: self.cancel(ticket.requests))

    async def run(self, function, *arguments):
        """Call a function in the thread of the engine, between two steps -> what it returns or raises."""
        future = self.loop.create_future()

        def settle(method, value):
            # whoever waited may be gone
            if not future.done():
                getattr(future, method)(value)

        def job():
            try:
                self.tell(settle, "set_result", function(*arguments))
            except Exception as error:
                self.tell(settle, "set_exception", error)

        self.inbox.put(job)
        return await future

    def submit(self, ticket, wanted):
        """Put answers into the engine: [(prompt, max_new_tokens, further fields of Request)]. Called in the
        thread, by `run`. Raises UserError for one that never fits."""
        # the ticket was closed while the prompt was prepared
        if ticket not in self.tickets:
            return
        for choice, (prompt, new, about) in enumerate(wanted):
            request = self.engine.add(prompt, new, **about)
            ticket.requests.append(request)
            self.owner[request] = (ticket, choice)

    def cancel(self, requests):
        """Called in the thread: their blocks are free, nothing more is told of them."""
        for request in requests:
            self.engine.cancel(request)
            self.owner.pop(request, None)

    # What the thread does

    def tell(self, function, *arguments):
        """Call a function in the event loop, if that still runs."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *arguments)

    def work(self):
        """Jobs, then one step, again and again; waits for a job when there is nothing to do."""
        scheduler = self.engine.scheduler
        while True:
            # all jobs that are there; with nothing to decode, wait for one
            idle = not scheduler.running and not scheduler.waiting
            with suppress(queue.Empty):
                while True:
                    job = self.inbox.get(block=idle)
                    if job is None:
                        self.fail("the server is shutting down")
                        return
                    job()
                    idle = False
            self.step()

    def step(self):
        """One forward pass; its tokens go to the event loop, all together."""
        try:
            said = self.engine.step()
        except Exception:
            log.exception("a step of the engine failed")
            self.fail("a step of the engine failed")
            # blocks that were promised in this step hold nothing
            self.engine.pool.forget()
            return
        # tokens of this step, each for the ticket that asked
        events = []
        for request, token in said:
            ticket, choice = self.owner[request]
            pick = request.pick
            step = pick.steps[-1] if isinstance(pick, LogprobRecorder) else None
            events.append((ticket, Event(choice, token, request.finished, step)))
            if request.finished:
                del self.owner[request]
        if events:
            self.tell(deliver, events)

    def fail(self, reason):
        """All answers end."""
        events = []
        for ticket, choice in self.owner.values():
            events.append((ticket, Event(choice, None, "error", reason)))
        self.cancel(list(self.owner))
        self.tell(deliver, events)


def deliver(events):
    """In the event loop: [(ticket, event)], each to its ticket."""
    for ticket, event in events:
        ticket.events.put_nowait(event)
