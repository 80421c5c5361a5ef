"""Counters of the operating system and of NVML: what a command and its children use, as rates between two readings.

CPU time, memory and I/O are those of the tree of processes; the network's are the machine's, which has no count per
process. NVML (NVIDIA Management Library) is asked through `pynvml`, the package nvidia-ml-py, where there is one.

What each counter means, and does not mean:
cores            CPU seconds of all processes of the tree, per second
worker_cores     the part of processes that call themselves pt_data_worker: PyTorch's data-loader workers
queued           cores that threads wanted and did not get, because others had them (Linux schedstat); the part of
                 workers: worker_queued
system           the part of `cores` that the kernel spent on their behalf: copies of files, page faults
storage_read     bytes a second that came from disk; read_calls: those that read(2) returned, from the cache, too
gpu              share of the last NVML period in which any kernel ran, on however few cores: not MFU, not occupancy
gpu_memory       share of it in which device memory was being read or written: not a share of its bandwidth
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

WORKER = "pt_data_worker"  # the name that a data-loader worker gives itself (PyTorch 2.6 and later)
GONE = (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied)
TOTALS = ("cpu", "worker_cpu", "system", "storage_read", "storage_written", "read_calls")


def queued_seconds(pid):
    """Seconds that its threads were ready to run and no core was free; 0 where the kernel does not say."""
    nanoseconds = 0
    with suppress(OSError, IndexError, ValueError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(FileNotFoundError):  # it has just ended
                line = Path(f"/proc/{pid}/task/{thread}/schedstat").read_text("utf-8")
                nanoseconds += int(line.split()[1])
    return nanoseconds / 1e9


class ProcessTree:
    """A process and all that it started, also what outlives its own parent."""

    def __init__(self, root):
        self.root = root
        self.known = {root.pid: root}
        self.waited = {}  # process: seconds in the queue when it was last looked at
        self.queued = {"queued": 0.0, "worker_queued": 0.0}

    def members(self):
        """Living processes of the tree."""
        with suppress(*GONE):
            for child in self.root.children(recursive=True):
                self.known.setdefault(child.pid, child)
        self.known = {pid: p for pid, p in self.known.items() if p.is_running()}
        return list(self.known.values())

    def read(self):
        """-> sums over the tree since it began: seconds and bytes; and of now: rss, processes, blocked ones.

        A child that has ended is not lost: its parent's `children_user` and `children_system` have its time, and its
        bytes, too. Of its time in the queue they do not have the end.
        """
        found: dict[str, Any] = dict.fromkeys((*TOTALS, "rss", "processes", "blocked"), 0)
        for process in self.members():
            with suppress(*GONE), process.oneshot():
                times = process.cpu_times()
                system = times.system + times.children_system
                cpu = times.user + times.children_user + system
                found["cpu"] += cpu
                found["system"] += system
                worker = process.name() == WORKER
                found["worker_cpu"] += cpu if worker else 0
                self.wait(process, worker)
                found["rss"] += process.memory_info().rss
                found["blocked"] += process.status() == psutil.STATUS_DISK_SLEEP
                found["processes"] += 1
                # last: not everybody may read them, and macOS has none
                with suppress(AttributeError):
                    io = process.io_counters()
                    found["storage_read"] += io.read_bytes
                    found["storage_written"] += io.write_bytes
                    found["read_calls"] += getattr(io, "read_chars", 0)
        return found | self.queued

    def wait(self, process, worker):
        """Add what it has waited for a core since it was last looked at."""
        now = queued_seconds(process.pid)
        more = max(0.0, now - self.waited.get(process, 0.0))
        self.waited[process] = now
        self.queued["queued"] += more
        self.queued["worker_queued"] += more if worker else 0


class Gpus:
    """The visible GPUs through NVML; none if there is no driver or no pynvml."""

    def __init__(self):
        self.handles = []
        try:
            import pynvml  # pyright: ignore[reportMissingImports]

            pynvml.nvmlInit()
        except Exception:  # no package, no driver, no permission: there is nothing to ask
            return
        self.nvml = pynvml
        count = pynvml.nvmlDeviceGetCount()
        self.handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in visible(count)]

    def ask(self, name, handle, *more):
        """One question to NVML; None if this GPU does not answer it."""
        try:
            return getattr(self.nvml, name)(handle, *more)
        except Exception:  # NVMLError_NotSupported and the like
            return None

    def read(self):
        """-> a dict a GPU: shares between 0 and 1, bytes, watts; None for what it does not tell."""
        return [self.read_one(handle) for handle in self.handles]

    def read_one(self, handle):
        rates = self.ask("nvmlDeviceGetUtilizationRates", handle)
        memory = self.ask("nvmlDeviceGetMemoryInfo", handle)
        power = self.ask("nvmlDeviceGetPowerUsage", handle)
        limit = self.ask("nvmlDeviceGetEnforcedPowerLimit", handle)
        # KB a second, over the last 20 ms; received: from the host to the device
        counter = self.nvml.NVML_PCIE_UTIL_RX_BYTES
        received = self.ask("nvmlDeviceGetPcieThroughput", handle, counter)
        processes = self.ask("nvmlDeviceGetComputeRunningProcesses", handle)
        return {
            "gpu": None if rates is None else rates.gpu / 100,
            "gpu_memory": None if rates is None else rates.memory / 100,
            "memory_used": None if memory is None else memory.used,
            "power": None if power is None else power / 1000,
            "power_share": power / limit if power is not None and limit else None,
            "pcie_received": None if received is None else received * 1000,
            "processes": len(processes or ()),
        }


def visible(count):
    """Indices of the GPUs that CUDA_VISIBLE_DEVICES names by number; all of them if it names none, or by UUID."""
    words = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    chosen = [int(word) for word in words if word.strip().isdigit()]
    return [i for i in chosen if i < count] or list(range(count))


class Probe:
    """Readings of a tree of processes, the machine and its GPUs -> a sample: rates since the reading before."""

    def __init__(self, root, clock):
        self.tree = ProcessTree(root)
        self.gpus = Gpus()
        self.clock = clock
        self.before = self.read()

    def read(self):
        """Everything that is counted, with its time in seconds."""
        found = self.tree.read()
        found["t"] = self.clock()
        network = psutil.net_io_counters()
        found["received"] = network.bytes_recv if network else 0
        found["sent"] = network.bytes_sent if network else 0
        return found

    def sample(self):
        """-> {"t": end, "seconds": of the interval, rates, rss, ..., "gpus": [...]}; None of a tree that has ended."""
        now = self.read()
        before, self.before = self.before, now
        seconds = now["t"] - before["t"]
        if now["processes"] == 0 or seconds <= 0:
            return None

        def rate(name):
            # of a process that nobody waits for the count is lost: no rate is below 0
            return max(0.0, now[name] - before[name]) / seconds

        return {
            "t": now["t"],
            "seconds": seconds,
            "cores": rate("cpu"),
            "worker_cores": rate("worker_cpu"),
            "queued": rate("queued"),
            "worker_queued": rate("worker_queued"),
            "system": rate("system"),
            "storage_read": rate("storage_read"),
            "storage_written": rate("storage_written"),
            "read_calls": rate("read_calls"),
            "received": rate("received"),
            "sent": rate("sent"),
            "rss": now["rss"],
            "processes": now["processes"],
            "blocked": now["blocked"],
            "gpus": self.gpus.read(),
        }
