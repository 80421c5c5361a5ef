"""The parity ledger: one fixture that proves our numbers equal to a production library's, and writes down how equal.

`parity(topic, ours, counterpart, mine, theirs)` asserts and records; after a run of the whole suite the records must
agree with the table of proofs in README.md. `pytest --write-proofs` writes that table.
"""

import json
import math
import os
import re
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two workers share two cores, and so do their commands
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
LEDGER = ROOT / "outputs" / "parity"


def pytest_addoption(parser):
    parser.addoption("--write-proofs", action="store_true", help="write the table of proofs into README.md")


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
    return [(*key, "equal" if e == 0 else f"< 1e{math.floor(math.log10(e)) + 1}") for key, e in sorted(worst.items())]


def table(rows):
    head = "| topic | ours | counterpart | largest difference |\n|---|---|---|---|\n"
    return head + "".join(f"| {t} | `{o}` | `{c}` | {b} |\n" for t, o, c, b in rows)


def pytest_sessionfinish(session, exitstatus):
    """The README's table names the proofs that ran, no more, no fewer; errors may differ a digit between machines."""
    whole = not session.config.args or {Path(a).name for a in session.config.args} <= {"tests", ROOT.name}
    chosen = session.config.option.keyword or session.config.option.markexpr
    if "PYTEST_XDIST_WORKER" in os.environ or exitstatus != 0 or not whole or chosen:
        return
    path, rows = ROOT / "README.md", proofs()
    text = path.read_text()
    old = re.search(r"(<!-- proofs -->\n)(.*?)(<!-- /proofs -->)", text, re.S)
    if session.config.option.write_proofs:
        path.write_text(text[: old.start(2)] + table(rows) + text[old.end(2) :])
    else:
        named = {tuple(re.sub(r"`", "", c.strip()) for c in line.split("|")[1:4]) for line in old[2].splitlines()[2:]}
        missing = named ^ {row[:3] for row in rows}
        if missing:
            print(f"\nREADME's table of proofs and the tests disagree on {sorted(missing)}; run pytest --write-proofs")
            session.exitstatus = 1
