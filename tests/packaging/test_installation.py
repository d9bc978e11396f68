"""A fresh checkout, and the wheel that `python -m build` makes of it, in empty environments."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from scikit_build_core.build import build_sdist

from tests.deadlines import DEADLINE_SECONDS
from tests.packaging.test_checkout import list_files

pytestmark = pytest.mark.slow  # compiles the data core

CHECKOUT = Path(__file__).resolve().parents[2]
OWN_NAMES = ("megatron_bert", "_megatron_bert", "__editable__", "_editable")
COMMANDS = [
    name
    for name in [
        "pretrain_bert.py",
        *(f"tools/{path.name}" for path in CHECKOUT.glob("tools/*.py")),
    ]
    if (CHECKOUT / name).exists()
]


@dataclass(frozen=True)
class Installation:
    """A checkout and the environment it was installed into."""

    checkout: Path
    site_packages: Path
    python: Path

    def run(self, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run(
            [self.python, *arguments],
            cwd=cwd,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )


def copy_checkout(destination: Path) -> None:
    """Copies what a clone would hold, the uncommitted changes included."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        capture_output=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    for name in filter(None, listing.stdout.decode().split("\0")):
        if (CHECKOUT / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CHECKOUT / name, destination / name)


def link_dependencies(destination: Path) -> None:
    """Shares the running environment's packages, but not the installation under test."""
    destination.mkdir()
    for key in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(key)).iterdir():
            link = destination / entry.name
            if not entry.name.startswith(OWN_NAMES) and not link.exists():
                link.symlink_to(entry)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both installations share: a checkout, its build and the dependencies."""
    folder = tmp_path_factory.mktemp("installation")
    copy_checkout(folder / "作業 場所")
    link_dependencies(folder / "dependencies")
    return folder


@pytest.fixture(scope="module")
def wheel(workshop: Path) -> Path:
    """Made of the source archive, as `python -m build` makes both."""
    checkout, aside = workshop / "作業 場所", workshop / "aside"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        archive = workshop / build_sdist(str(workshop))
    # Unpacked where the checkout lies, so that both installations share a build.
    checkout.rename(aside)
    with tarfile.open(archive) as opened:
        # Python 3.11.2 cannot be asked for it yet, later ones warn where it is not.
        safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        opened.extractall(workshop, **safely)
    (workshop / archive.name.removesuffix(".tar.gz")).rename(checkout)
    run_pip(sys.executable, "wheel", ".", "--wheel-dir", str(workshop), cwd=checkout)
    shutil.rmtree(checkout)
    aside.rename(checkout)
    (made,) = workshop.glob("*.whl")
    return made


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installation(
    request: pytest.FixtureRequest, workshop: Path, wheel: Path
) -> Iterator[Installation]:
    home = workshop / str(request.param)
    checkout = workshop / "作業 場所"
    venv.create(home / "environment", symlinks=True)
    python = home / "environment" / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site_packages = home / "environment" / "lib" / version / "site-packages"
    (site_packages / "dependencies.pth").write_text(f"{workshop / 'dependencies'}\n")
    target = ["--editable", "."] if request.param == "editable" else [str(wheel)]
    run_pip(python, "install", *target, cwd=checkout)
    yield Installation(checkout, site_packages, python)
    shutil.rmtree(home)


def run_pip(python: str | Path, command: str, *arguments: str, cwd: Path) -> None:
    """Builds or installs without a network; unoptimised: what is tested is where files land."""
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    variables = {
        "SKBUILD_BUILD_DIR": str(cwd.parent / "build"),
        "SKBUILD_CMAKE_BUILD_TYPE": "Debug",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    result = subprocess.run(
        [python, "-m", "pip", command, *offline, *arguments],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_wheel_holds_every_file_of_the_package_and_the_data_core(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        held = set(opened.namelist())
    files = {
        str(name)
        for name in list_files("--cached")
        if name.parts[0] == "megatron_bert" and (CHECKOUT / name).is_file()
    }
    assert {"megatron_bert/report/page.css", "megatron_bert/report/page.js"} < files
    assert files - held == set()
    assert {"_megatron_bert_core.pyi"} < {name for name in held if "/" not in name}
    assert any(re.fullmatch(r"_megatron_bert_core\.[^/]*\.so", name) for name in held)


def test_the_data_core_is_installed_at_the_top_level(installation: Installation) -> None:
    result = installation.run(
        "-c",
        "import _megatron_bert_core as core; print(core.__file__)",
        cwd=installation.site_packages.parent,
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parent == installation.site_packages
    assert (installation.site_packages / "_megatron_bert_core.pyi").exists()


def test_every_module_of_the_package_is_importable_from_anywhere(
    installation: Installation,
) -> None:
    package = installation.checkout / "megatron_bert"
    modules = sorted(
        ".".join(path.relative_to(installation.checkout).with_suffix("").parts)
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    )
    assert any(name.startswith("megatron_bert.data.") for name in modules)
    result = installation.run(
        "-c",
        "import importlib.util, sys\n"
        "print([name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])",
        *modules,
        cwd=installation.site_packages.parent,
    )
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs_from_the_checkout(installation: Installation, command: str) -> None:
    result = installation.run(command, "--help", cwd=installation.checkout)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout.lower()


def test_a_command_runs_from_another_folder(installation: Installation) -> None:
    command = installation.checkout / COMMANDS[0]
    result = installation.run(command, "--help", cwd=installation.site_packages)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout.lower()


def test_the_package_runs_from_anywhere(installation: Installation, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "stage": 0, "seq_length": 128, "loss": 9.0}\n'
    )
    code = (
        "from pathlib import Path\n"
        "from megatron_bert.api import RunRecords\n"
        "from megatron_bert.report.page import write_page\n"
        "write_page([RunRecords.read(Path())], Path('page.html'))"
    )
    result = installation.run("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "</html>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    docs = installation.checkout / "docs"
    shutil.copy(docs / "configuration.md", tmp_path)
    command = ["-m", "megatron_bert.config.emit_schema", "--docs", str(tmp_path)]
    result = installation.run(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    written = (tmp_path / "config.schema.json").read_bytes()
    assert written == (docs / "config.schema.json").read_bytes()
