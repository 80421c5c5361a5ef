"""Every command of every page runs; every local link and figure is there; every excerpt of code is verbatim."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import asdict
from functools import cache

import pytest
import torch
import tyro

from tests import warm
from tests.conftest import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted(p for p in ROOT.glob("[a-z]*/*.md") if p.parent.name != "outputs"),
]
# What a script starts by the name `python` is the Python of the tests
PYTHON = {"PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}"}
OF_CHAPTERS = [p for p in PAGES if (p.parent / "__init__.py").is_file()]


# They listen on loopback and ask themselves: no other address is open to them
SERVERS = ("deploy/serve.py", "deploy/load.py", "vlm/serve/worker.py", "vlm/demo.py")


@cache
def tiny_flags():
    """{script: flags} that make a run take seconds, from tests/tiny_flags.toml."""
    chapters = tomllib.loads((ROOT / "tests/tiny_flags.toml").read_text("utf-8"))
    return {
        f"{c}/{name}.py": shlex.split(flags)
        for c, scripts in chapters.items()
        for name, flags in scripts.items()
    }


def commands():
    """Every line of a ```bash block that begins with python, torchrun or deepspeed, once each."""
    lines = [
        line.split("   #")[0].strip()
        for p in PAGES
        for block in re.findall(r"```bash\n(.*?)```", p.read_text("utf-8"), re.S)
        for line in block.splitlines()
    ]
    return list(
        dict.fromkeys(x for x in lines if x.startswith(("python", "torchrun", "deepspeed")))
    )


def tiny(line):
    """The words of a command as the tests run it: with the tiny flags of its script, which win over its own."""
    words = shlex.split(line)
    script = next((w for w in words if w.endswith(".py")), None)
    flags = tiny_flags().get(script, [])  # a script without them fails a test of its own
    if "--" not in words:
        return words + flags
    # A wrapper, such as monitor.py: behind its -- stands a command with tiny flags of its own
    at = words.index("--")
    return [*words[:at], *flags, "--", *tiny(shlex.join(words[at + 1 :]))]


def meaning(words):
    """Two lines are the same command if this is the same: of flags given twice, the last ones count."""
    script = next((i for i, w in enumerate(words) if w.endswith(".py")), len(words))
    flags = {"": []}
    name = ""
    for word in words[script + 1 :]:
        if re.match(r"--[a-z]", word):
            name, *value = word.replace("_", "-").split("=", 1)
            flags[name] = value
        else:
            flags[name].append(word)
    return tuple(words[: script + 1]), tuple(
        sorted((name, tuple(values)) for name, values in flags.items())
    )


def different():
    """The lines of the pages, those left out that tiny flags make equal to an earlier one."""
    return list({meaning(tiny(line)): line for line in reversed(commands())}.values())[::-1]


def plain_script(words):
    """Whether it is `python script.py ...`: no launcher, no module."""
    return words[0] == "python" and words[1].endswith(".py")


def firsts():
    """The first line of every script and every launcher: what `make test` runs of the pages."""
    found = {}
    for line in different():
        words = shlex.split(line)
        found.setdefault(words[1] if plain_script(words) else words[0], line)
    return set(found.values())


def chosen():
    """All lines, those marked as long that `make test` leaves out."""
    first = firsts()
    return [
        pytest.param(line, marks=[] if line in first else pytest.mark.long, id=line)
        for line in different()
    ]


@pytest.mark.parametrize("line", chosen())
def test_command(line, tmp_path, request):
    """It runs without a network: whatever it needs was fetched before, by the tests of assets and data.

    In a fork of a process that has the libraries. Where all tests run, the first line of every script has a process of
    its own: the fork might hide that an import is missing.
    """
    words = tiny(line)
    script = next((w for w in words if w.endswith(".py")), None)
    if "--" in words:
        at = words.index("--")
        words = [*words[:at], "--out", str(tmp_path), *words[at:], "--out", str(tmp_path / "inner")]
    elif script is not None:
        words += ["--out", str(tmp_path)]
    forked = plain_script(words) and (line not in firsts() or request.config.option.markexpr)
    more = {warm.LOOPBACK: "1"} if script in SERVERS else {}
    done = warm.run(words[1:], env=PYTHON | more) if forked else fresh(words, more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert script is None or (tmp_path / "metrics.json").is_file()


def fresh(words, more=None):
    """The command in a process of its own, the launchers as modules; without a network where that can be had."""
    if words[0] == "torchrun":
        words = ["python", "-m", "torch.distributed.run", *words[1:]]
    if words[0] == "deepspeed":  # two of them at a time must not meet at one port
        words = [
            "python",
            "-m",
            "deepspeed.launcher.runner",
            f"--master_port={29900 + os.getpid() % 90}",
            *words[1:],
        ]
    if plain_script(words):
        words = ["python", "-c", warm.OFFLINE, *words[1:]]
    port = {"MASTER_PORT": str(29700 + os.getpid() % 200)}
    return subprocess.run(
        [sys.executable, *words[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | port | PYTHON | (more or {}),
    )


def cpu_seconds(words):
    """CPU seconds of a command, over all its processes."""
    before = os.times()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0, done.stderr[-3000:]
    return (
        after.children_user + after.children_system - before.children_user - before.children_system
    )


@pytest.fixture(scope="module")
def import_torch():
    """CPU seconds of the one import that every script needs: the measure of all others."""
    return min(cpu_seconds(["-c", "import torch"]) for _ in range(2))


@pytest.mark.long
@pytest.mark.parametrize("script", sorted(tiny_flags()))
def test_help_is_quick(script, import_torch):
    """Heavy libraries are imported where they are used: --help costs less than two imports of torch (1.3 s here)."""
    ratio = cpu_seconds([script, "--help"]) / import_torch
    # the machine may be busier than it was: the two again, one right after the other
    for _ in range(3):
        if ratio > 2:
            import_torch = cpu_seconds(["-c", "import torch"])
            ratio = min(ratio, cpu_seconds([script, "--help"]) / import_torch)
    slow = f"{script} --help costs {ratio:.1f} imports of torch"
    assert ratio <= 2, f"{slow}; import what is heavy in the function that uses it"


@pytest.mark.parametrize("line", [line for line in commands() if ".py" in line])
def test_flags_of_the_line_itself_fit_together(line):
    """Tiny flags may hide a mistake in those that stand there: parse them, and build the network they ask for."""
    words = shlex.split(line)
    script = next(w for w in words if w.endswith(".py"))
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    expand = getattr(module, "with_file", list)  # --config FILE
    cfg = tyro.cli(module.Config, args=expand(words[words.index(script) + 1 :]))
    draws = hasattr(cfg, "batch") and not hasattr(cfg, "judged")  # images, and not words about them
    if script.startswith("models/") and hasattr(module, "build") and draws:
        with torch.device("meta"):
            module.build(**{"latent": 4} | asdict(cfg))


def test_the_rule_covers_every_script_that_is_named():
    named = {w for line in commands() for w in shlex.split(line) if w.endswith(".py")}
    missing = named ^ tiny_flags().keys()
    assert not missing, f"in a page or in tests/tiny_flags.toml, not in both: {missing}"


def test_the_socket_block_blocks():
    fetch = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')"
    done = subprocess.run(
        [sys.executable, "-c", f"{warm.REFUSE}\n{fetch}"], capture_output=True, text=True
    )
    assert done.returncode != 0 and "a socket was opened" in done.stderr


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text("utf-8"))
    lost = [x for x in links if not x.startswith("http") and not (path.parent / x).exists()]
    assert not lost, f"{path.name} links to {lost}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_was_left_to_fill_in(path):
    assert not re.findall(r"@[A-Z_0-9]+@", path.read_text("utf-8"))


def test_pages_are_short():
    """A map has at most 200 lines, the root page 150, the page of a topic 160."""
    for path in PAGES:
        limit = 150 if path.parent == ROOT else 200 if path.name == "README.md" else 160
        lines = len(path.read_text("utf-8").splitlines())
        assert lines <= limit or path.parent.name == "docs", (
            f"{path.relative_to(ROOT)} has {lines} lines"
        )


@pytest.mark.parametrize("path", OF_CHAPTERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_excerpts_are_verbatim(path):
    """A block of Python in a page consists of lines of the chapter's scripts."""
    lines = {line.strip() for p in path.parent.rglob("*.py") for line in p.read_text().splitlines()}
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.S):
        for line in block.splitlines():
            known = line.strip() in lines | {"", "..."}
            assert known, f"no script of the chapter has this line: {line.strip()}"


@cache
def words_of(chapter):
    """Every name and every string of the scripts of a chapter."""
    found = set()
    for path in (ROOT / chapter).rglob("*.py"):
        found.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            found |= {
                getattr(node, kind)
                for kind in ("name", "id", "attr", "arg", "value")
                if hasattr(node, kind)
            }
    return {word for word in found if isinstance(word, str)}


@pytest.mark.parametrize("path", OF_CHAPTERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_function_beside_an_equation_exists(path):
    """In tables whose last column is headed "function": each name in it stands in a script of the chapter."""
    in_table = False
    for line in path.read_text("utf-8").splitlines():
        cell = line.strip().strip("|").split("|")[-1]
        if not line.startswith("|"):
            in_table = False
        elif in_table:
            names = [
                name
                for name in re.findall(r"`([A-Za-z_][\w.]*)`", cell)
                if not name.endswith(".py")
            ]
            lost = [
                part
                for name in names
                for part in name.split(".")
                if part not in words_of(path.parent.name)
            ]
            assert not lost, f"{lost}: {line}"
        else:
            in_table = "function" in cell


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("notebooks/*/*.ipynb")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_of_notebooks_lead_somewhere(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    lost = [
        link
        for link in links
        if not link.startswith(("http", "attachment:")) and not (path.parent / link).exists()
    ]
    assert not lost, f"{path.name} links to {lost}"
