"""Memory tracker: every allocation of a training step, on real or fake tensors, as the profiler sees it.

PyTorch calls a TorchDispatchMode for every operator, so also for fake tensors, which have shapes and types and storages
of a size, but no memory behind them.
"""

import weakref

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Tracker(TorchDispatchMode):
    """Writes down every allocation and release of the block: events (entry, +-bytes), entries {"tag": what it is for}.

    A tensor is seen when an operator returns it. Its storage is counted once, until nobody holds it any more.
    """

    def __init__(self, *there):
        super().__init__()
        self.events, self.entries, self.known, self.tag, self.at = [], [], {}, "weights", {}
        for x in there:
            self.see(x)

    def see(self, x):
        storage = getattr(x, "_local_tensor", x).untyped_storage()  # of a DTensor, what is here
        key = storage._cdata
        if key not in self.known:
            entry = len(self.entries)
            self.entries.append(self.tag)
            self.events.append((entry, storage.nbytes()))
            self.known[key] = (
                entry,
                weakref.ref(storage, lambda _: self.gone(key)),
                storage.nbytes(),
            )

    def gone(self, key):
        entry, _, size = self.known.pop(key)
        self.events.append((entry, -size))

    def resized(self, storage):
        """A storage may lose its bytes and get them back (ZeRO-3): no operator tells."""
        if storage._cdata in self.known:
            entry, alive, size = self.known[storage._cdata]
            self.events.append((entry, storage.nbytes() - size))
            self.known[storage._cdata] = entry, alive, storage.nbytes()

    def mark(self, tensors, tag):
        """Say afterwards what these tensors were for."""
        for x in tensors:
            if x.untyped_storage()._cdata in self.known:
                self.entries[self.known[x.untyped_storage()._cdata][0]] = tag

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.see(x)
        return result

    def __enter__(self):
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
        return int(self.curve().max(initial=0))

    def alive(self, moment):
        """{tag: bytes} after event number `moment`."""
        found = {}
        for entry, size in self.events[: moment + 1]:
            found[self.entries[entry]] = found.get(self.entries[entry], 0) + size
        return found
