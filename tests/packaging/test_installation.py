"""`pip install .` and `pip install -e .` of a fresh checkout, each into an empty environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module", params=["plain", "editable"])
def installation(request: pytest.FixtureRequest, workshop: Path) -> Iterator[Installation]:
    home = workshop / str(request.param)
    checkout = workshop / "作業 場所"
    venv.create(home / "environment", symlinks=True)
    python = home / "environment" / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site_packages = home / "environment" / "lib" / version / "site-packages"
    (site_packages / "dependencies.pth").write_text(f"{workshop / 'dependencies'}\n")
    pip: list[str | Path] = [python, "-m", "pip", "install", "--no-index", "--no-deps"]
    target = ["--editable", "."] if request.param == "editable" else ["."]
    # Unoptimised, and in one folder: what is tested is where files land.
    build = {
        "SKBUILD_BUILD_DIR": str(workshop / "build"),
        "SKBUILD_CMAKE_BUILD_TYPE": "Debug",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    result = subprocess.run(
        [*pip, "--no-build-isolation", *target],
        cwd=checkout,
        env={**os.environ, **build},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    yield Installation(checkout, site_packages, python)
    shutil.rmtree(home)


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


def test_the_report_is_installed_with_its_style_and_script(
    installation: Installation, tmp_path: Path
) -> None:
    code = (
        "from pathlib import Path; from megatron_bert.report import page;"
        "print(*sorted(path.name for path in Path(page.__file__).parent.glob('page.*')))"
    )
    result = installation.run("-c", code, cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("page.css page.js page.py\n", "")


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
