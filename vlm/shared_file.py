"""A file that several processes write into: locks on single bytes of it, and writes at a place."""

import fcntl
import os


def write_at(file, data, start):
    """All bytes of `data` at a place of an open file: one call may write fewer."""
    view = memoryview(data)
    while view:
        done = os.pwrite(file.fileno(), view, start)
        view = view[done:]
        start += done


def take(locks, number):
    """Lock a byte of a file; False if another process has it. The lock ends with its process."""
    try:
        fcntl.lockf(locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
    except (BlockingIOError, PermissionError):
        return False
    return True


def release(locks, number):
    fcntl.lockf(locks, fcntl.LOCK_UN, 1, number)
