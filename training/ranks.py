"""Ranks: start the processes of a group, and count what each of them holds and sends.

A rank is one process with its share of the work and, on a cluster, a GPU of its own. Every script
of this chapter runs in three ways: `python x.py` starts its ranks itself on this machine, `torchrun
x.py` and `deepspeed x.py` have started them already. On a CPU the ranks talk through gloo, on GPUs
through NCCL; the code that they run is the same.
"""

import multiprocessing.forkserver
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before a group: its defaults would keep the group for ever
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from utils.run import UserError, check

# a rank that waits longer than this for the others gives up, with an error
TIMEOUT = timedelta(minutes=5)
# By the fork server
PRELOADED = ["torch.distributed", "transformers.models.llama.modeling_llama", "training.ranks"]


def launch(worker, cfg, ranks, timeout=TIMEOUT) -> Any:
    """Run worker(cfg) on every rank -> [what each returned, by rank]; None but on rank 0.

    worker: a function of a module, not a lambda; what it returns is made of numbers, strings, lists
    and dicts. ranks: how many to start here; under torchrun or deepspeed their number counts.
    Raises UserError if one does.
    """
    # A launcher has started this process: join the others, and gather what each returns
    if "RANK" in os.environ:
        begin(timeout=timeout)
        found = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(found, worker(cfg))
        except UserError:
            dist.destroy_process_group()  # without the others, which wait in vain: torchrun ends them
            raise
        finish()
        return found if os.environ["RANK"] == "0" else None
    # Nobody has: start them here, a GPU each if there are GPUs
    check(ranks > 0, "--ranks must be at least 1")
    gpus = torch.cuda.device_count()
    hint = "CUDA_VISIBLE_DEVICES= takes the CPU"
    check(not gpus or ranks <= gpus, f"--ranks {ranks}: there are {gpus} GPUs; {hint}")
    method = start_method()
    queue = mp.get_context(method).SimpleQueue()
    found = {}
    # Start the ranks, which meet at a file, and take their results as they come
    with tempfile.TemporaryDirectory() as folder:
        meet = f"file://{folder}/meet"
        about = (dict(os.environ), worker, cfg, ranks, meet, timeout, queue)
        started: Any = mp.start_processes(_enter, about, ranks, join=False, start_method=method)
        try:
            done = False
            while not (done and queue.empty()):
                done = done or started.join(0.1)
                while not queue.empty():
                    rank, result = queue.get()
                    check(rank is not None, result)
                    found[rank] = result
        finally:
            for process in started.processes:
                process.kill()
    return [found[rank] for rank in range(ranks)]


def start_method():
    """How ranks are started: "forkserver", forks with torch loaded, or "spawn", from nothing.

    The server only imports: no thread of a kernel runs in it and CUDA is not initialised, for
    neither outlives a fork. Where there are GPUs, ranks begin from nothing all the same, and where
    a fork of loaded libraries is not safe.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return "spawn"
    multiprocessing.set_forkserver_preload(PRELOADED)  # nothing, if it runs already
    return "forkserver"


def _forget_server():
    """After a fork, in the child: the server is the parent's, and the child may not wait for it."""
    multiprocessing.forkserver._forkserver.__init__()  # pyright: ignore[reportAttributeAccessIssue]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_server)


def count(ranks):
    """How many ranks there will be: torchrun's or deepspeed's number counts before ours."""
    check(ranks > 0, "--ranks must be at least 1")
    return int(os.environ.get("WORLD_SIZE", ranks))


def _enter(rank, environment, worker, cfg, ranks, meet, timeout, queue):
    """What a started process does. A UserError goes to the parent, which stops the others.

    environment: the parent's; the fork server has that of the moment in which it was started.
    """
    os.environ.clear()
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= environment | own
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all of them are on this machine
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    try:
        begin(meet, timeout)
        queue.put((rank, worker(cfg)))
        finish()
    except UserError as error:
        queue.put((None, str(error)))


def begin(meet="env://", timeout=TIMEOUT):
    """Join the other ranks, as the environment says where and how many. Nothing if joined."""
    if dist.is_initialized():
        return
    rank = int(os.environ["RANK"])
    ranks = int(os.environ["WORLD_SIZE"])
    backend, gpu = ("nccl", device()) if torch.cuda.is_available() else ("gloo", None)
    dist.init_process_group(backend, meet, timeout, rank=rank, world_size=ranks, device_id=gpu)


def finish():
    """Leave together: a rank that ends early would take the meeting point from under the others.

    Threads of gloo drop the tensors of their last work, for which they need the interpreter: if it
    has ended by then, the process aborts. They end with the last reference to the group.
    """
    dist.barrier()
    dist.destroy_process_group()
    # Caches of DTensor hold the group for ever: give its threads the time to drop what they have
    time.sleep(0.1)


def rank_and_world_size():
    """-> (this rank, how many there are); (0, 1) without a process group."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def device():
    """The device of this rank: a GPU of its own, or the CPU that all share."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def hushed():
    """Nothing reaches stderr, not even from C++: the profiler tells there of its start and end."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def allocated(action):
    """Call it -> bytes of tensors at its peak, beyond what was there before: by the profiler."""
    # A GPU counts for itself
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    # On a CPU: every allocation and release, in the order of time, added up
    with hushed(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        action()
    results: Any = trace.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    in_order = sorted(events, key=lambda e: e.start_ns())
    curve = np.cumsum([e.nbytes() for e in in_order])
    return int(curve.max(initial=0))


def held(*tensors):
    """Bytes of the storages of tensors, shared ones counted once; of a DTensor, the local part."""
    local = [x.to_local() if hasattr(x, "to_local") else x for x in tensors]
    storages = [x.untyped_storage() for x in local]
    sizes = {storage._cdata: storage.nbytes() for storage in storages}
    return sum(sizes.values())


def states(model, optimizer=None):
    """Bytes that this rank holds: {"weights", "gradients", "optimizer"}."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    moments = []
    if optimizer:
        for state in optimizer.state.values():
            # Not the count of steps
            moments += [x for x in state.values() if isinstance(x, torch.Tensor) and x.dim()]
    return {
        "weights": held(*model.parameters(), *model.buffers()),
        "gradients": held(*gradients),
        "optimizer": held(*moments),
    }


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends in the block: {"all_gather": bytes, ...}.

    As with rings, which NCCL builds: gathering or reduce-scattering M bytes over N ranks sends
    (N-1)/N M from each, an all-reduce is both, 2 (N-1)/N M. Patarasuk & Yuan 2009, "Bandwidth
    optimal all-reduce algorithms". Seen are those of NAMES, over all ranks, and not what
    DistributedDataParallel sends from C++.
    """

    NAMES = {  # of operator -> what we call it, and which of its tensors is the whole: its position
        "allreduce_": ("all_reduce", 2, 0),
        "_allgather_base_": ("all_gather", 1, 0),
        "_reduce_scatter_base_": ("reduce_scatter", 1, 1),
        "broadcast_": ("broadcast", 1, 0),
    }

    def __init__(self):
        super().__init__()
        self.sent = {}
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = func.__name__.split(".")[0]
        if func.namespace == "c10d" and kind in self.NAMES:
            name, times, whole = self.NAMES[kind]
            x = args[whole]
            tensors = x if isinstance(x, (list, tuple)) else [x]
            size = sum(t.numel() * t.element_size() for t in tensors)
            # Round the ring: all parts but one leave this rank
            ranks = dist.get_world_size()
            sent = times * size * (ranks - 1) / ranks
            self.sent[name] = self.sent.get(name, 0) + sent
            self.calls += 1
        return func(*args, **(kwargs or {}))
