"""Every command in every README runs; every local link and figure is there; every excerpt of code is verbatim."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
import tyro

from tests.conftest import ROOT

READMES = [ROOT / "README.md", *sorted(ROOT.glob("[a-z]*/README.md"))]


def tiny_flags():
    """{script: flags} from the tables `| script | tiny flags |` of the chapters."""
    rows = [r for p in READMES for r in re.findall(r"^\| `(\w+/\w+\.py)` \| `([^`]*)` \|$", p.read_text(), re.M)]
    return {script: shlex.split(flags) for script, flags in rows}


def commands():
    """Every line of a ```bash block that begins with python, torchrun or deepspeed, once each."""
    lines = [
        line.split("   #")[0].strip()
        for p in READMES
        for block in re.findall(r"```bash\n(.*?)```", p.read_text(), re.S)
        for line in block.splitlines()
    ]
    return list(dict.fromkeys(x for x in lines if x.startswith(("python", "torchrun", "deepspeed"))))


OFFLINE = """
import runpy, socket, sys
def refuse(self, address, *rest):
    raise OSError(f"a socket was opened to {address}")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *a, **k: refuse(None, a)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("line", commands())
def test_command(line, tmp_path):
    """It runs without a network: whatever it needs was fetched before, by the tests of assets and data."""
    words = shlex.split(line)
    script = next((w for w in words if w.endswith(".py")), None)
    if words[0] == "torchrun":
        words = ["python", "-m", "torch.distributed.run", *words[1:]]
    if words[0] == "deepspeed":  # two of them at a time must not meet at one port
        words = ["python", "-m", "deepspeed.launcher.runner", f"--master_port={29900 + os.getpid() % 90}", *words[1:]]
    if script is not None:
        words += [*tiny_flags()[script], "--out", str(tmp_path)]
    if words[0] == "python" and script is not None and "-m" not in words:
        words = ["python", "-c", OFFLINE, *words[1:]]
    port = {"MASTER_PORT": str(29700 + os.getpid() % 200)}
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, env=os.environ | port)
    assert done.returncode == 0, done.stderr[-3000:]
    assert script is None or (tmp_path / "metrics.json").is_file()


@pytest.mark.parametrize("line", [line for line in commands() if ".py" in line])
def test_flags_of_the_line_itself_fit_together(line):
    """Tiny flags may hide a mistake in those that stand there: parse them, and build the network they ask for."""
    words = shlex.split(line)
    script = next(w for w in words if w.endswith(".py"))
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    cfg = tyro.cli(module.Config, args=words[words.index(script) + 1 :])
    draws = hasattr(cfg, "batch") and not hasattr(cfg, "judged")  # images, and not words about them
    if script.startswith("models/") and hasattr(module, "build") and draws:
        with torch.device("meta"):
            module.build(**{"latent": 4} | asdict(cfg))


def test_the_rule_covers_every_script_that_is_named():
    named = {w for line in commands() for w in shlex.split(line) if w.endswith(".py")}
    assert named == tiny_flags().keys()


def test_the_socket_block_blocks():
    fetch = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')"
    code = OFFLINE.replace('runpy.run_path(sys.argv[0], run_name="__main__")', fetch)
    done = subprocess.run([sys.executable, "-c", code, "x"], capture_output=True, text=True)
    assert done.returncode != 0 and "a socket was opened" in done.stderr


@pytest.mark.parametrize("path", READMES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    lost = [x for x in links if not x.startswith("http") and not (path.parent / x).exists()]
    assert not lost, f"{path.name} links to {lost}"


@pytest.mark.parametrize("path", READMES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_nothing_was_left_to_fill_in(path):
    assert not re.findall(r"@[A-Z_0-9]+@", path.read_text())


@pytest.mark.parametrize("path", READMES[1:], ids=lambda p: p.parent.name)
def test_excerpts_are_verbatim(path):
    """A block of Python in a chapter README consists of lines of the chapter's scripts."""
    lines = {line.strip() for p in path.parent.glob("*.py") for line in p.read_text().splitlines()}
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.S):
        for line in block.splitlines():
            assert line.strip() in lines | {"", "..."}, line
