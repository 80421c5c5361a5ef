"""Times of several ways to compute the same: CPU time, and how much of the wall time a process only waits.

Busy is the time in which a core computes for this process (CPU time), idle what is left of the wall
time. With one thread on a CPU nothing is waited for: an idle fraction says that another process had the
core. On a GPU the same question is asked of the device: kernels run by themselves, and where Python is
slower in launching them than the device in finishing them, the device is idle.
"""

import time


def measure(ways, rounds):
    """{name: function} -> {name: {"ms": least CPU time, "idle fraction": 1 - busy / wall of its quickest round}}.

    All of them once a round, in turn: what disturbs the machine disturbs them all.
    """
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            wall = time.perf_counter()
            busy = time.process_time()
            way()
            busy = time.process_time() - busy
            seconds[name].append((time.perf_counter() - wall, busy))
    rows = {}
    for name, found in seconds.items():
        # least CPU time and least wall time may be of two rounds
        least = min(busy for _, busy in found)
        wall, busy = min(found)
        rows[name] = {"ms": 1000 * least, "idle fraction": max(0.0, 1 - busy / wall)}
    return rows
