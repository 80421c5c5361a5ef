"""The parity ledger: one fixture that proves our numbers equal to a production library's, and writes down how equal.

`parity(topic, ours, counterpart, mine, theirs)` asserts and records; after a run of the whole suite the records must
agree with the table in docs/PROOFS.md. `pytest --write-proofs` writes that table; with the file of one topic behind it
writes the rows of that topic.
"""

import json
import math
import os
import re
from pathlib import Path

# Before torch: two workers share two cores, and so do their commands
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before Triton, which a library may import: its kernels run in the interpreter
os.environ.setdefault("TRITON_INTERPRET", "1")

import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests import optional, warm  # noqa: E402

ROOT = Path(__file__).parent.parent
LEDGER = ROOT / "outputs" / "parity"
PROOFS = ROOT / "docs" / "PROOFS.md"
# Modules whose tests share nothing: any worker takes any of them
SPREAD = ("test_pages", "notebooks")
costs: dict[str, float] = {}  # test -> CPU seconds, fixtures included
left_out = pytest.StashKey[int]()
began = pytest.StashKey[float]()


def pytest_addoption(parser):
    parser.addoption(
        "--write-proofs", action="store_true", help="write the table of docs/PROOFS.md"
    )
    parser.addoption(
        "--times",
        type=int,
        default=0,
        metavar="N",
        help="show the N slowest tests and sums per chapter",
    )
    parser.addoption(
        "--base-url",
        default="",
        metavar="URL",
        help="server that tests/deploy/test_client.py asks, such as http://127.0.0.1:8000/v1",
    )
    parser.addoption(
        "--served-model", default="", metavar="NAME", help="its model; default: the first"
    )


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def parity():
    """parity(topic, ours, counterpart, mine, theirs, atol): tensors, or lists and dicts of tensors, are equal."""

    def check(topic, ours, counterpart, mine, theirs, atol=1e-5):
        pairs = list(flatten(mine, theirs))
        assert pairs, "nothing was compared"
        for a, b in pairs:
            assert a.shape == b.shape and a.isfinite().all()
            torch.testing.assert_close(a, b, atol=atol, rtol=1e-5, check_dtype=False)
        error = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
        record = {"topic": topic, "ours": ours, "counterpart": counterpart, "error": error}
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        with open(LEDGER / f"{worker}.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    return check


def flatten(a, b):
    """Pairs of tensors out of two equally nested structures."""
    if isinstance(a, torch.Tensor):
        yield a.detach(), b.detach()
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        for k in a:
            yield from flatten(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            yield from flatten(x, y)
    else:
        yield torch.tensor(float(a)), torch.tensor(float(b))


def gradients(model, output):
    """{name: gradient} of a scalar made from the output, the same for every model with the same output."""
    weight = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    model.zero_grad()
    (output * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def cpu_seconds():
    """Of this process and of all that it started, ended ones included."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The tests of a module share its fixtures, so one worker takes them all; those of SPREAD go where there is room.

    This is --dist loadgroup with a group per module: that option is without effect under pytest 9.2 and xdist 3.8.
    """
    from xdist.scheduler import LoadScopeScheduling

    class PerModule(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            module = nodeid.split("::")[0]
            return nodeid if Path(module).stem in SPREAD else module

    return PerModule(config, log)


def pytest_pycollect_makemodule(module_path, parent):
    return optional.module(module_path, parent)


def pytest_deselected(items):
    if items:
        stash = items[0].session.config.stash
        stash[left_out] = stash.get(left_out, 0) + len(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    item.stash[began] = cpu_seconds()
    optional.skip(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "teardown":
        report.cpu = max(0.0, cpu_seconds() - item.stash.get(began, 0.0))
    return report


def pytest_runtest_logreport(report):
    if report.when == "teardown":
        costs[report.nodeid] = getattr(report, "cpu", 0.0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """A worker of xdist has ended: every worker left out the same tests."""
    node.config.stash[left_out] = getattr(node, "workeroutput", {}).get("left_out", 0)


def chapter(nodeid):
    """The chapter that a test is about: by its folder, or that of its notebook."""
    if "notebooks.py" in nodeid:
        return "notebooks/" + nodeid.split("[")[-1].split("/")[0]
    folder = Path(nodeid.split("::")[0]).parent.name
    return "pages, house" if folder == "tests" else folder


def pytest_terminal_summary(terminalreporter, config):
    """What was skipped and why; the ten slowest tests, CPU seconds per chapter, how much of the whole this run was."""
    write = terminalreporter.write_line
    for line in optional.summary(terminalreporter.stats.get("skipped", [])):
        write(line)
    if not config.option.times:
        return
    terminalreporter.section("CPU seconds, fixtures included")
    for name, cost in sorted(costs.items(), key=lambda item: -item[1])[: config.option.times]:
        write(f"{cost:8.1f}  {name}")
    sums: dict[str, float] = {}
    for name, cost in costs.items():
        sums[chapter(name)] = sums.get(chapter(name), 0.0) + cost
    for name, cost in sorted(sums.items(), key=lambda item: -item[1]):
        write(f"{cost:8.1f}  {name}")
    write(f"{sum(costs.values()):8.1f}  together")
    skipped = config.stash.get(left_out, 0)
    rest = f"; `make test-all` runs the other {skipped}, too" if skipped else ""
    write(
        f"{len(costs)} of {len(costs) + skipped} tests ran, with {len(proofs())} of the {listed()} proofs{rest}"
    )


def listed():
    """How many proofs the table names."""
    text = PROOFS.read_text("utf-8")
    return len(re.search(r"<!-- proofs -->\n(.*?)<!-- /proofs -->", text, re.S)[1].splitlines()) - 2


def pytest_sessionstart(session):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        LEDGER.mkdir(parents=True, exist_ok=True)
        for old in LEDGER.glob("*.jsonl"):
            old.unlink()


def proofs():
    """[(topic, ours, counterpart, bound)], bound the smallest power of ten that the largest error stays below."""
    worst = {}
    for file in sorted(LEDGER.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            r = json.loads(line)
            key = (r["topic"], r["ours"], r["counterpart"])
            worst[key] = max(worst.get(key, 0.0), r["error"])
    return [
        (*key, "equal" if e == 0 else f"< 1e{math.floor(math.log10(e)) + 1}")
        for key, e in sorted(worst.items())
    ]


def table(rows):
    head = "| topic | ours | counterpart | largest difference |\n|---|---|---|---|\n"
    return head + "".join(f"| {t} | `{o}` | `{c}` | {b} |\n" for t, o, c, b in rows)


def pytest_sessionfinish(session, exitstatus):
    """The table of docs/PROOFS.md names the proofs that ran, no more, no fewer; errors may differ by a digit."""
    warm.stop()
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(left_out, 0)
    wanted = session.config.option.write_proofs
    if "PYTEST_XDIST_WORKER" in os.environ or not (wanted or is_whole(session.config)):
        return
    if exitstatus != 0:
        print("\ndocs/PROOFS.md was not looked at: a test failed" if wanted else "")
        return
    rows = proofs()
    text = PROOFS.read_text("utf-8")
    old = re.search(r"(<!-- proofs -->\n)(.*?)(<!-- /proofs -->)", text, re.S)
    cells = [re.sub("`", "", line).split("|")[1:5] for line in old[2].splitlines()[2:]]
    listed_rows = [tuple(cell.strip() for cell in row) for row in cells]
    # Those of kernels stay where Triton is missing
    made = {row[:3] for row in rows}
    rows += [row for row in optional.unlisted(listed_rows) if row[:3] not in made]
    if wanted:
        # A part of the tests knows of its own rows only: the others stay
        if not is_whole(session.config):
            rows = sorted({*rows, *(row for row in listed_rows if row[:3] not in made)})
            print(f"\ndocs/PROOFS.md: {len(made)} rows written, {len(rows) - len(made)} kept")
        PROOFS.write_text(text[: old.start(2)] + table(sorted(rows)) + text[old.end(2) :])
        return
    different = {row[:3] for row in listed_rows} ^ {row[:3] for row in rows}
    if different:
        print(f"\ndocs/PROOFS.md and the tests disagree on {sorted(different)}; ", end="")
        print("run pytest -n 2 --write-proofs")
        session.exitstatus = 1


def is_whole(config):
    """Whether all tests were asked for: no path, no -k, -m, --ignore, --deselect or --lf, and none was left out."""
    asked = {Path(path).name for path in config.args}
    option = config.option
    parts = [option.keyword, option.markexpr, option.ignore, option.ignore_glob, option.deselect]
    parts += [getattr(option, "lf", False), config.stash.get(left_out, 0)]
    return asked <= {"tests", ROOT.name} and not any(parts)
