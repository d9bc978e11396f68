"""The two releases of transformers that the exported code is tested on, and their own tests.

The environment has one release. An older one, with the packages that it needs in older versions,
lies in a folder that a process puts before everything else on its path; what is not there, PyTorch
above all, comes from the environment. Each release's source archive brings the common model tests.

`python tests/huggingface/releases.py` fetches all of it once, into the environment;
`tests/run.sh --peers` does so.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath

REQUIREMENTS = Path(__file__).with_name("older_release.txt")
_STORE = Path(sys.prefix) / "transformers-releases"
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet")


def installed_release() -> str:
    """Version of transformers in the environment, whatever stands before it on the path."""
    found = distributions(name="transformers", path=[sysconfig.get_path("purelib")])
    return next(iter(found)).version


def older_release() -> str:
    """Version of the older transformers."""
    lines = REQUIREMENTS.read_text("utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("transformers=="))


def packages_folder(release: str) -> Path | None:
    """The folder to put first on the path for `release`; None for the environment's.

    Raises:
        FileNotFoundError: it was not fetched.
    """
    if release == installed_release():
        return None
    return _fetched(_STORE / f"{release}-packages")


def archive_tests(release: str) -> Path:
    """Folder `tests` of the source archive of `release`.

    Raises:
        FileNotFoundError: it was not fetched.
    """
    return _fetched(_STORE / f"{release}-tests")


def _fetched(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; run python {Path(__file__)}")
    return folder


def install() -> None:
    """Fetch what is not there yet, or is not what is asked for any more; one caller at a time."""
    _STORE.mkdir(exist_ok=True)
    with (_STORE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _fetch_missing()


def _fetch_missing() -> None:
    older = older_release()
    for release in {installed_release(), older}:
        _once(_STORE / f"{release}-tests", release, lambda at, of=release: _fetch_tests(at, of))
    if older != installed_release():
        wanted = REQUIREMENTS.read_text("utf-8")
        _once(_STORE / f"{older}-packages", wanted, _install_packages)


def _once(folder: Path, stamp: str, make: Callable[[Path], None]) -> None:
    """Make `folder` whole or not at all, unless it is there with this stamp."""
    stamp_file = folder / ".stamp"
    if stamp_file.is_file() and stamp_file.read_text("utf-8") == stamp:
        return
    print(f"Fetching {folder.name} of transformers ...", file=sys.stderr, flush=True)  # noqa: T201
    with tempfile.TemporaryDirectory(dir=_STORE) as scratch:
        made = Path(scratch) / "made"
        make(made)
        (made / ".stamp").write_text(stamp, "utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def _fetch_tests(folder: Path, release: str) -> None:
    with tempfile.TemporaryDirectory(dir=_STORE) as scratch:
        pip = (
            *_PIP,
            "download",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            "transformers",
        )
        subprocess.run([*pip, "--dest", scratch, f"transformers=={release}"], check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        prefix = f"transformers-{release}/tests/"
        with tarfile.open(archive) as tar:
            # Not extractall, whose safe way Python 3.11.2 does not have yet.
            for member in tar:
                if member.isfile() and member.name.startswith(prefix):
                    _extract(tar, member, place_in(folder, member.name.removeprefix(prefix)))


def place_in(folder: Path, name: str) -> Path:
    """Where in `folder` an archive's file goes.

    Raises:
        ValueError: its name leads out of the folder.
    """
    if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
        raise ValueError(f"the archive holds {name!r}, which leads out of {folder}; do not use it")
    return folder / name


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    content = tar.extractfile(member)
    assert content is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    with content, path.open("wb") as file:
        shutil.copyfileobj(content, file)


def _install_packages(folder: Path) -> None:
    pip = (*_PIP, "install", "--no-deps", "--no-compile", "--target", folder)
    subprocess.run([*pip, "--requirement", REQUIREMENTS], check=True)


if __name__ == "__main__":
    install()
