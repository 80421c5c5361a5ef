"""What a gateway knows of its workers and of its clients: open requests, health, rates; metrics."""

from collections import deque
from dataclasses import dataclass

from deploy.server_metrics import PREFIX
from utils.text import printable


@dataclass
class Worker:
    """A model worker: its address without /v1, and what the gateway counts of it."""

    url: str
    healthy: bool = True  # until it is found otherwise: the first request finds out
    running: int = 0  # open requests
    answered: int = 0
    refused: int = 0  # requests that went to another worker then
    broken: int = 0  # answers that broke off


def least_busy(workers, tried):
    """The healthy worker with the fewest open requests of those that were not asked yet, or None."""
    left = [worker for worker in workers if worker.healthy and worker not in tried]
    return min(left, key=lambda worker: worker.running, default=None)


class RateLimit:
    """At most `most` requests of a client in any `span` seconds: a sliding window of their times."""

    def __init__(self, most, span=60.0, clients=10_000):
        self.most = most
        self.span = span
        self.clients = clients  # that are remembered at most
        self.times: dict[str, deque] = {}

    def seconds_to_wait(self, client, now):
        """0.0: this request is counted; else seconds until it would be."""
        # a client that was not seen for a while is forgotten; the dictionary is in the order of last requests
        times = self.times.pop(client, deque(maxlen=self.most))
        self.times[client] = times
        while self.times:
            oldest = next(iter(self.times))
            past = self.times[oldest]
            idle = not past or past[-1] <= now - self.span
            if oldest == client or not (idle or len(self.times) > self.clients):
                break
            del self.times[oldest]
        if len(times) == self.most and times[0] > now - self.span:
            return times[0] + self.span - now
        times.append(now)
        return 0.0


def metrics_text(gateway):
    """Prometheus' text format, version 0.0.4."""
    found = []

    def add(name, kind, about, rows):
        full = f"{PREFIX}_gateway_{name}"
        found.append(f"# HELP {full} {about}")
        found.append(f"# TYPE {full} {kind}")
        found.extend(f"{full}{{{labels}}} {value}" for labels, value in rows)

    counts = sorted(gateway.metrics.requests.items())
    rows = [(f'path="{path}",status="{status}"', n) for (path, status), n in counts]
    add("requests_total", "counter", "Responses by path and status.", rows)
    gauges = {"healthy": "1: it takes requests.", "running": "Open requests."}
    counters = {
        "answered": "Requests that it answered.",
        "refused": "Requests that went to another worker then.",
        "broken": "Answers that broke off.",
    }
    for name, about in (gauges | counters).items():
        kind = "gauge" if name in gauges else "counter"
        rows = []
        for worker in gateway.workers:
            label = printable(worker.url).replace("\\", "").replace('"', "")
            rows.append((f'worker="{label}"', int(getattr(worker, name))))
        add(f"worker_{name}" + ("_total" if name in counters else ""), kind, about, rows)
    return "\n".join(found) + "\n"
