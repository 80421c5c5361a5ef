"""What runs kernels is skipped, with the reason, where Triton is not installed: it is not among the requirements.

It goes by the name: tests in test_triton_*.py, commands and notebooks of scripts triton_*, and proofs whose topic
begins with "Triton". tests/conftest.py calls these functions; no test asks for itself.
"""

import re
from collections import Counter

import pytest

from deploy import triton_offline


def reason(name):
    """Why what has this name, of a file or of a test, must be skipped here; "" if nothing speaks against it."""
    kernels = re.search(r"(^|[ /\[]|test_)triton_\w+\.(py|ipynb)", name)
    return triton_offline.MISSING if kernels and not triton_offline.available() else ""


class Skipped(pytest.Module):
    """A file of tests that is not even imported."""

    def collect(self):
        pytest.skip(reason(self.path.name), allow_module_level=True)


def module(path, parent):
    """In place of a file of tests that needs Triton, one that says why it is skipped; None if nothing is missing."""
    return Skipped.from_parent(parent, path=path) if reason(path.name) else None


def skip(item):
    """Skip a test of a command or a notebook that needs Triton."""
    command = item.name.startswith(("test_command[", "test_notebook["))
    if command and reason(item.name):
        pytest.skip(reason(item.name))


def unlisted(rows):
    """Those rows of the table of proofs that cannot be proved here, and stay as they are."""
    left = not triton_offline.available()
    return [row for row in rows if left and row[0].startswith("Triton")]


def summary(reports):
    """[line] for each reason to skip: how many files or tests, and why."""
    counts = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports)
    return [f"skipped {count}: {why}" for why, count in counts.items()]
