"""Scheduling of an inference engine: who takes part in the next step, and with how many tokens.

At every step, not for every batch (Yu et al. 2022, Orca, OSDI, Sec. 3.1): running requests first, then
those that wait while there is room. A prompt is read in chunks as large as the step allows (Agrawal et
al. 2023, arXiv:2308.16369). Blocks that hold the beginning of a request already are shared with it
(Kwon et al. 2023, arXiv:2309.06180, Sec. 4.4), and when none is left the last to come gives its own
back (Sec. 4.5).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deploy.logits_processors import argmax_token
from deploy.paged_cache import next_key


@dataclass(eq=False)
class Request:
    """A prompt and what has become of it."""

    prompt: list[int]
    max_new_tokens: int
    eos: tuple[int, ...] = ()  # ids that end the answer
    pick: Callable = argmax_token  # logits (1,V) -> token (1,)
    # image tokens: {place in the prompt: embedding (E,)}, {place: name of what it shows}
    embeds: dict[int, Any] = field(default_factory=dict)
    names: dict[int, Any] = field(default_factory=dict)
    new: list[int] = field(default_factory=list)  # tokens of the answer so far
    table: list[int] = field(default_factory=list)  # its blocks
    cached: int = 0  # tokens whose keys and values are in them
    keys: list[bytes] = field(default_factory=list)  # of its full blocks
    finished: str = ""  # "stop", "length" or "cancelled"

    @property
    def length(self):
        """Tokens of prompt and answer so far."""
        return len(self.prompt) + len(self.new)

    def tokens(self, start, end):
        """Ids of prompt and answer from place `start` to `end`."""
        first = len(self.prompt)
        return self.prompt[start:end] + self.new[max(0, start - first) : max(0, end - first)]

    def extend_keys(self, size):
        """Keys of all blocks of `size` tokens that are full by now. An image token counts by what it
        shows, not by its id, which is the same for all pictures."""
        while (len(self.keys) + 1) * size <= self.length:
            start = len(self.keys) * size
            ids = self.tokens(start, start + size)
            names = [self.names.get(start + i, token) for i, token in enumerate(ids)]
            before = self.keys[-1] if self.keys else b""
            self.keys.append(next_key(before, names))


class Scheduler:
    """The queue, the requests that run, and their blocks.

    pool: BlockPool; copy(source, target): copies the content of a block in the cache. max_batch: requests
    that run at once; max_tokens: new tokens of a step. policy: who is taken from the queue, the first to
    come (fcfs) or the one with the fewest tokens left (shortest).
    """

    def __init__(self, pool, copy, max_batch, max_tokens, policy, prefix_sharing):
        self.pool = pool
        self.copy = copy
        self.max_batch = max_batch
        self.max_tokens = max_tokens
        self.policy = policy
        self.prefix_sharing = prefix_sharing
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        # counters: tokens found in shared blocks, preemptions
        self.shared = 0
        self.preempted = 0

    def schedule(self):
        """Who takes part in the next step, with how many new tokens -> [(request, count)]."""
        parts = []
        budget = self.max_tokens
        # running requests, in the order of their arrival
        for request in list(self.running):
            if request not in self.running or budget == 0:
                continue
            count = min(request.length - request.cached, budget)
            # no block is left: the last to come gives its own back, in the end this one itself
            while request in self.running and not self.grow(request, count):
                self.preempt(self.running[-1])
            if request in self.running:
                self.remember(request, count)
                parts.append((request, count))
                budget -= count
        # those that wait, while there is room
        while self.waiting and len(self.running) < self.max_batch and budget > 0:
            request = self.next_waiting()
            self.find_prefix(request)
            count = min(request.length - request.cached, budget)
            if not self.grow(request, count):
                self.shared -= request.cached
                self.release(request)
                break
            self.waiting.remove(request)
            self.running.append(request)
            self.remember(request, count)
            parts.append((request, count))
            budget -= count
        return parts

    def next_waiting(self):
        """First come, first served; or the shortest job first."""
        if self.policy == "fcfs":
            return self.waiting[0]
        return min(self.waiting, key=lambda r: r.length + r.max_new_tokens - len(r.new))

    def grow(self, request, count):
        """Blocks for `count` more tokens of a request -> were there enough? If not, none is taken."""
        size = self.pool.size
        missing = -(-(request.cached + count) // size) - len(request.table)
        # the block that is written to next is held by others, too: copy on write
        first = request.cached // size
        shared = first < len(request.table) and self.pool.holders[request.table[first]] > 1
        if missing + shared > len(self.pool.free):
            return False
        if shared:
            own = self.pool.take()
            self.copy(request.table[first], own)
            self.pool.release(request.table[first])
            request.table[first] = own
        for _ in range(missing):
            request.table.append(self.pool.take())
        return True

    def find_prefix(self, request):
        """Prefix sharing: take the blocks that hold the beginning of a request already. One token at
        least is left to be read, for its logits."""
        if not self.prefix_sharing:
            return
        request.extend_keys(self.pool.size)
        most = (request.length - 1) // self.pool.size
        for key in request.keys[:most]:
            block = self.pool.by_key.get(key)
            if block is None:
                break
            self.pool.share(block)
            request.table.append(block)
            request.cached += self.pool.size
        self.shared += request.cached

    def remember(self, request, count):
        """Blocks that `count` more tokens of a request will fill can be found from now on: by others in
        the same step, too, for each layer stores all new keys and values before anybody attends."""
        if not self.prefix_sharing:
            return
        request.extend_keys(self.pool.size)
        first = request.cached // self.pool.size
        for number in range(first, (request.cached + count) // self.pool.size):
            self.pool.remember(request.table[number], request.keys[number])

    def fork(self, request, twin):
        """Parallel sampling: a twin with the same prompt holds the blocks of the prompt, too, and reads its
        last token again, for other draws. Raises ValueError if the prompt is not read yet."""
        last = len(request.prompt) - 1
        if request.cached <= last:
            raise ValueError("the prompt of a request that forks must be in the cache")
        for block in request.table[: last // self.pool.size + 1]:
            self.pool.share(block)
            twin.table.append(block)
        twin.cached = last
        self.running.append(twin)

    def preempt(self, request):
        """Recomputation: a request gives its blocks back and waits as the first. Its tokens are kept, and
        read again later. Kwon et al. 2023, Sec. 4.5."""
        self.running.remove(request)
        self.release(request)
        self.waiting.insert(0, request)
        self.preempted += 1

    def release(self, request):
        """Give back the blocks of a request, the last first: the beginning is worth keeping longest."""
        for block in reversed(request.table):
            self.pool.release(block)
        request.table = []
        request.cached = 0

    def remove(self, request, reason):
        """A request ends, wherever it is: its blocks are free at once."""
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        self.release(request)
        request.finished = reason
