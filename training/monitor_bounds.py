"""What a command is bound by, from samples of counters: compute, memory, overhead, data, or nothing (idle).

Williams, Waterman, Patterson 2009, "Roofline": a kernel is bound by arithmetic or by the memory's bandwidth. He 2022,
"Making Deep Learning Go Brrrr From First Principles": a program is, too, by overhead, while the device waits for
Python. Data is ours: the loader, the disk, the copy to the device. The thresholds are conventions, and stand here.
"""

COMPUTE = "compute-bound"
MEMORY = "memory-bound"
OVERHEAD = "overhead-bound"
DATA = "waiting for data"
IDLE = "idle"
BOUNDS = (COMPUTE, MEMORY, OVERHEAD, DATA, IDLE)

BUSY_CORES = 0.5  # cores: from here on the CPU works; one thread that never waits has 1.0
BUSY_GPU = 0.7  # share of the time in which a kernel ran
BUSY_MEMORY = 0.5  # share of the time in which device memory was read or written
BUSY_PCIE = 5e9  # bytes a second from host to device
BUSY_STORAGE = 5e6  # bytes a second from disk, or network, of a process that hardly computes
BUSY_CALLS = 1e8  # bytes a second that read(2) returned
KERNEL_SHARE = 0.5  # of the CPU time; with many bytes read, it is copying, not computing


def device(sample):
    """Means over the GPUs that some process computes on -> {"gpu", "gpu_memory", "pcie_received"}; None without."""
    used = [gpu for gpu in sample["gpus"] if gpu["processes"] and gpu["gpu"] is not None]
    if not used:
        return None
    names = ("gpu", "gpu_memory", "pcie_received")
    return {name: sum(gpu[name] or 0 for gpu in used) / len(used) for name in names}


def host(sample):
    """Of the CPU alone. Memory-bound cannot be told from compute-bound here: a core that waits for memory counts
    as busy."""
    # What they used, and what they would have used on an idle machine
    workers = sample["worker_cores"] + sample["worker_queued"]
    computing = sample["cores"] + sample["queued"] - workers
    # 1. Bytes copied by the kernel, out of its cache of files
    copies = sample["system"] >= KERNEL_SHARE * sample["cores"]
    if copies and sample["read_calls"] >= BUSY_CALLS:
        return DATA
    # 2. Work
    if computing >= BUSY_CORES:
        return COMPUTE
    # 3. Somebody else prepares data: workers, disk, network
    arriving = max(sample["storage_read"], sample["received"])
    if workers >= BUSY_CORES or sample["blocked"] or arriving >= BUSY_STORAGE:
        return DATA
    return IDLE


def classify(sample):
    """What bounds it in this interval: one of BOUNDS."""
    gpu = device(sample)
    if gpu is None:
        return host(sample)
    # Kernels run nearly all the time: do they calculate, or move numbers?
    if gpu["gpu"] >= BUSY_GPU:
        return MEMORY if gpu["gpu_memory"] >= BUSY_MEMORY else COMPUTE
    # They do not: what is the device waiting for?
    if gpu["pcie_received"] >= BUSY_PCIE:
        return DATA
    # A busy host does not feed it in time: Python, launches of small kernels
    found = host(sample)
    return OVERHEAD if found == COMPUTE else found


def shares(samples):
    """{bound: share of the time}, those that occur, the largest first."""
    total = sum(sample["seconds"] for sample in samples)
    found = {}
    for sample in samples:
        found[sample["bound"]] = found.get(sample["bound"], 0) + sample["seconds"]
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return {bound: seconds / total for bound, seconds in ordered}


def segments(samples):
    """Neighbours of one bound together -> [{"bound", "from", "to"}] in seconds."""
    found = []
    for sample in samples:
        start = sample["t"] - sample["seconds"]
        if found and found[-1]["bound"] == sample["bound"]:
            found[-1]["to"] = sample["t"]
        else:
            found.append({"bound": sample["bound"], "from": start, "to": sample["t"]})
    return found


def mean(samples, name):
    """Of a rate, over time."""
    total = sum(sample["seconds"] for sample in samples)
    return sum(sample[name] * sample["seconds"] for sample in samples) / total
