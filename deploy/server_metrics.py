"""Metrics of a server in Prometheus' text format: counters, gauges and histograms.

The names follow vLLM's, with another prefix: what a dashboard of a language model shows is the time to the
first token, the time between tokens, and how many requests wait.
"""

from bisect import bisect_left

PREFIX = "vlm_action"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Histogram:
    """Counts of values up to each bound, their sum and their number."""

    def __init__(self, bounds=SECONDS):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value):
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name):
        """Each bucket holds all before it, too; the last one is without bound."""
        total = 0
        written = []
        for bound, count in zip([*self.bounds, "+Inf"], self.counts):
            total += count
            written.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*written, f"{name}_sum {self.sum}", f"{name}_count {total}"]


class Metrics:
    """What the server counts by itself; what the engine knows is read when it is asked for."""

    def __init__(self):
        self.requests: dict[tuple[str, int], int] = {}  # (path, status) -> how many
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.cancelled = 0  # requests whose client left
        self.first_token = Histogram()
        self.between_tokens = Histogram()
        self.request_seconds = Histogram()

    def count(self, path, status):
        """One more response."""
        key = (path, status)
        self.requests[key] = self.requests.get(key, 0) + 1

    def text(self, engine, taken):
        """Prometheus' text format, version 0.0.4. taken: answers that wait or run."""
        scheduler = engine.scheduler
        found = []

        def add(name, kind, about, lines):
            full = f"{PREFIX}_{name}"
            found.append(f"# HELP {full} {about}")
            found.append(f"# TYPE {full} {kind}")
            found.extend(line.replace("NAME", full, 1) for line in lines)

        rows = sorted(self.requests.items())
        lines = [f'NAME{{path="{path}",status="{status}"}} {n}' for (path, status), n in rows]
        add("requests_total", "counter", "Responses by path and status.", lines)
        counters = {
            "prompt_tokens_total": ("Tokens of prompts.", self.prompt_tokens),
            "generation_tokens_total": ("Tokens that were generated.", self.generated_tokens),
            "cancelled_total": ("Requests whose client left.", self.cancelled),
            "preemptions_total": ("Requests that gave their blocks back.", scheduler.preempted),
            "prefix_cache_hits_total": ("Tokens found in shared blocks.", scheduler.shared),
            "engine_steps_total": ("Forward passes.", engine.steps),
        }
        for name, (about, value) in counters.items():
            add(name, "counter", about, [f"NAME {value}"])
        blocks = len(engine.pool.holders)
        gauges = {
            "num_requests_running": ("Answers in the batch.", len(scheduler.running)),
            "num_requests_waiting": ("Answers in the queue.", len(scheduler.waiting)),
            "num_requests_open": ("Answers that hold a place.", taken),
            "kv_cache_blocks": ("Blocks of the cache.", blocks),
            "kv_cache_blocks_free": ("Blocks that nobody holds.", len(engine.pool.free)),
        }
        for name, (about, value) in gauges.items():
            add(name, "gauge", about, [f"NAME {value}"])
        histograms = {
            "time_to_first_token_seconds": ("From request to first token.", self.first_token),
            "inter_token_latency_seconds": ("From one token to the next.", self.between_tokens),
            "e2e_request_latency_seconds": ("From request to last token.", self.request_seconds),
        }
        for name, (about, histogram) in histograms.items():
            add(name, "histogram", about, histogram.lines("NAME"))
        return "\n".join(found) + "\n"
