"""The warm helper gives a command what a fresh process gives it."""

import os
import subprocess
import sys

import pytest

from tests import warm

SCRIPT = """
import os, socket, sys
print(sys.argv[1:], os.getcwd(), __name__, sys.path[0], os.environ.get("OMP_NUM_THREADS"), sys.stdin.read(), flush=True)
print("to stderr", file=sys.stderr)
match sys.argv[1]:
    case "error": raise ValueError("what went wrong")
    case "two": sys.exit(2)
    case "text": sys.exit("one line")
    case "none": sys.exit()
    case "kill": os.kill(os.getpid(), 9)
    case "socket": socket.create_connection(("127.0.0.1", 9))
    case "state": print("earlier" in sys.modules); sys.modules["earlier"] = sys
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("warm") / "script.py"
    path.write_text(SCRIPT, "utf-8")
    return path


@pytest.mark.parametrize(
    "word", ["nothing", "error", "two", "text", "none", "kill", "--flag=a b", "\ufffd ä 😀"]
)
def test_as_a_fresh_process(script, word, tmp_path):
    words = [str(script), word]
    pipes = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    theirs = subprocess.run([sys.executable, *words], cwd=tmp_path, **pipes)
    mine = warm.run(words, cwd=tmp_path)
    assert (mine.returncode, mine.stdout) == (theirs.returncode, theirs.stdout)
    assert mine.stderr.splitlines()[-1:] == theirs.stderr.splitlines()[-1:]


def test_sockets_are_refused(script):
    done = warm.run([str(script), "socket"])
    assert done.returncode == 1 and "a socket was opened to" in done.stderr


def test_a_server_may_ask_itself_and_nobody_else(tmp_path):
    path = tmp_path / "ask.py"
    path.write_text(
        "import socket, sys\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "port = server.getsockname()[1]\n"
        "socket.create_connection((sys.argv[1], port), 5).close()\n"
    )
    about = {"env": {warm.LOOPBACK: "1"}}
    assert warm.run([str(path), "127.0.0.1"], **about).returncode == 0
    done = warm.run([str(path), "192.0.2.1"], **about)
    assert done.returncode == 1 and "a socket was opened to" in done.stderr
    assert warm.run([str(path), "127.0.0.1"]).returncode == 1


def test_one_command_leaves_nothing_to_the_next(script):
    for _ in range(2):
        assert warm.run([str(script), "state"]).stdout.endswith("False\n")


def test_what_hangs_is_killed(script, monkeypatch, tmp_path):
    path = tmp_path / "hang.py"
    path.write_text("import time\ntime.sleep(60)", "utf-8")
    monkeypatch.setattr(warm, "SECONDS", 0.2)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.execv(sys.executable, [sys.executable, str(path)])
    assert warm.wait(pid) == -9
