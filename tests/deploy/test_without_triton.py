"""Where Triton is missing: one line instead of a traceback, tests skipped with the reason, proofs left as they are."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from deploy import triton_offline
from tests import optional
from tests.conftest import ROOT
from utils.run import UserError

# A Python that cannot import Triton, whatever is installed
HIDDEN = "import sys; sys.modules['triton'] = None; "


def python(code, *words):
    command = [sys.executable, "-c", HIDDEN + code, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def missing(monkeypatch):
    monkeypatch.setattr(triton_offline, "available", lambda: False)


def test_one_line_says_what_to_install(missing):
    with pytest.raises(UserError, match="pip install 'triton>=3.6'"):
        triton_offline.prepare()


def test_tests_are_skipped_with_the_reason():
    run = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    flags = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib")
    done = python(run, *flags, "tests/deploy/test_triton_offline.py")
    # 5: no test ran
    assert done.returncode == 5, done.stdout + done.stderr
    assert f"skipped 1: {triton_offline.MISSING}" in done.stdout


@pytest.mark.parametrize(
    "name, kernels",
    [
        ("test_triton_softmax.py", True),
        ("test_command[python deploy/triton_kernels.py --out x]", True),
        ("test_notebook[deploy/triton_kernels.ipynb]", True),
        ("test_without_triton.py", False),
        ("test_command[python deploy/quantize.py]", False),
        ("test_notebook[deploy/quantize.ipynb]", False),
    ],
)
def test_what_runs_kernels_is_known_by_its_name(name, kernels, missing):
    assert bool(optional.reason(name)) == kernels


def test_nothing_is_skipped_where_triton_is(monkeypatch):
    monkeypatch.setattr(triton_offline, "available", lambda: True)
    rows = [("Triton kernels", "a", "b", "equal")]
    assert not optional.reason("test_triton_softmax.py") and not optional.unlisted(rows)


def test_commands_and_notebooks_of_kernels_are_skipped_and_checks_of_their_pages_are_not(missing):
    for test in ("test_command", "test_notebook"):
        with pytest.raises(pytest.skip.Exception, match="needs Triton"):
            optional.skip(SimpleNamespace(name=f"{test}[python deploy/triton_kernels.py]"))
    for test in ("test_help_is_quick", "test_flags_of_the_line_itself_fit_together"):
        optional.skip(SimpleNamespace(name=f"{test}[python deploy/triton_kernels.py]"))


def test_proofs_of_kernels_stay_in_the_table(missing):
    rows = [("Triton kernels", "a", "b", "equal"), ("Quantisation", "a", "b", "equal")]
    assert optional.unlisted(rows) == rows[:1]


def test_the_summary_counts_by_reason():
    reports = [SimpleNamespace(longrepr=("f.py", 1, f"Skipped: {why}")) for why in "aba"]
    assert optional.summary(reports) == ["skipped 2: a", "skipped 1: b"]


def test_no_module_but_those_of_kernels_imports_triton():
    """At its top: inside a function it may, after `prepare`."""
    for path in ROOT.glob("[a-z]*/*.py"):
        if re.search(r"^(import|from) triton", path.read_text("utf-8"), re.M):
            assert path.name.startswith("triton_"), path
            assert "__main__" not in path.read_text("utf-8"), path
