"""Pictures at web addresses, downloaded only if that was asked for, each once, under limits."""

from utils.run import UserError


class DownloadsOff(UserError):
    """A picture is at a web address, and downloads were not asked for: no picture is broken, the
    flags are wrong."""
