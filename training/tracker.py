"""Memory tracker: every allocation of a training step, on real or fake tensors, as the profiler
sees it.

PyTorch calls a TorchDispatchMode for every operator, so also for fake tensors, which have shapes
and types and storages of a size, but no memory behind them.
"""

import weakref

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Tracker(TorchDispatchMode):
    """Writes down every allocation and release of the block: events (entry, +-bytes), entries
    {"tag": what it is for}.

    A tensor is seen when an operator returns it. Its storage is counted once, until nobody holds it
    any more.
    """

    def __init__(self, *there):
        super().__init__()
        self.events = []
        self.entries = []
        self.known = {}  # storage's number: (entry, weak reference, bytes), while it is alive
        self.tag = "weights"  # what the next storages are for
        self.at = {}  # {phase: number of its last event}, for those who name phases
        # What was there before the block.
        for x in there:
            self.see(x)

    def see(self, x):
        """Count the storage of a tensor, unless it is known."""
        storage = getattr(x, "_local_tensor", x).untyped_storage()  # of a DTensor, what is here
        key = storage._cdata
        if key in self.known:
            return
        # An allocation; the weak reference tells of the release.
        entry = len(self.entries)
        size = storage.nbytes()
        self.entries.append(self.tag)
        self.events.append((entry, size))
        self.known[key] = (entry, weakref.ref(storage, lambda _: self.released(key)), size)

    def released(self, key):
        """Nobody holds the storage any more."""
        entry, _, size = self.known.pop(key)
        self.events.append((entry, -size))

    def resized(self, storage):
        """A storage may lose its bytes and get them back (ZeRO-3): no operator tells."""
        key = storage._cdata
        if key in self.known:
            entry, reference, size = self.known[key]
            self.events.append((entry, storage.nbytes() - size))
            self.known[key] = (entry, reference, storage.nbytes())

    def mark(self, tensors, tag):
        """Say afterwards what these tensors were for."""
        for x in tensors:
            key = x.untyped_storage()._cdata
            if key in self.known:
                entry = self.known[key][0]
                self.entries[entry] = tag

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Every operator comes through here; its results may have storages of their own.
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.see(x)
        return result

    def __enter__(self):
        # Operators do not tell of resize_: it is wrapped as long as the block runs.
        self.resize = torch.UntypedStorage.resize_

        def resize(storage, size):
            done = self.resize(storage, size)
            self.resized(storage)
            return done

        torch.UntypedStorage.resize_ = resize  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def curve(self):
        """Bytes alive after each event."""
        return np.cumsum([size for _, size in self.events])

    def peak(self):
        """Bytes at the highest moment."""
        return int(self.curve().max(initial=0))

    def alive(self, moment):
        """{tag: bytes} after event number `moment`."""
        # Allocations less releases, by what they were for.
        found = {}
        for entry, size in self.events[: moment + 1]:
            found[self.entries[entry]] = found.get(self.entries[entry], 0) + size
        return found
