"""The scripts that set themselves up, with stand-ins for Python, pip and the compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]

# What the scripts may use besides Python and a compiler.
MACHINE_TOOLS = (
    *("bash", "cat", "cp", "cut", "dirname", "flock", "grep", "mkdir"),
    *("mv", "paste", "rm", "sed", "sha256sum", "sort", "tail"),
)

# Answers as an environment's interpreter does, and notes what pip is asked to install.
STAND_IN_PYTHON = """#!/bin/bash
case "$*" in
    -VV) echo "Python 3.11.7" ;;
    *"-m venv"*)
        mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python" ;;
    *"pip --version") ;;
    *"pip"*install*)
        printf '%s\\n' "$*" >>"$CALLS"
        [[ $* != *--editable* ]] || printf '%s\\n' "Collecting torch" "  Downloading torch.whl" \
            "Collecting numpy" "  Building editable for megatron-bert: started" \
            "Installing collected packages: numpy, torch"
        while [ $# -gt 0 ]; do
            [ "$1" = --constraint ] && cat "$2" >"$CALLS.constraints"
            shift
        done
        echo "pip: the account of this installation"
        exit "${PIP_STATUS:-0}" ;;
    *'version("torch")'*) exit "${TORCH_STATUS:-1}" ;;
    -c*) echo "${PYTHON_ANSWER:-3.11.7}" ;;
esac
"""


class Machine:
    """A machine with nothing but stand-ins, and a checkout whose path has blanks and kanji."""

    def __init__(self, folder: Path) -> None:
        self.programs = folder / "bin"
        self.programs.mkdir()
        for name in MACHINE_TOOLS:
            found = shutil.which(name)
            assert found is not None, name
            (self.programs / name).symlink_to(found)
        self.provide("python3", STAND_IN_PYTHON)
        self.provide("c++", "#!/bin/bash\nexit 0\n")
        self.checkout = folder / "作業 場所" / "megatron bert"
        (self.checkout / "tools").mkdir(parents=True)
        (self.checkout / "csrc").mkdir()
        shutil.copy(CHECKOUT / "tools" / "bootstrap.sh", self.checkout / "tools")
        (self.checkout / "constraints.txt").write_text("numpy==2.4.6\ntorch==2.13.0\n")
        for name in ("pyproject.toml", "CMakeLists.txt", "csrc/core.cpp"):
            (self.checkout / name).write_text("")
        self.calls = folder / "calls"
        self.environment = self.checkout / ".venv"

    def provide(self, name: str, script: str) -> None:
        program = self.programs / name
        program.write_text(script)
        program.chmod(0o755)

    def remove(self, name: str) -> None:
        (self.programs / name).unlink()

    def bootstrap(self, *extras: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", '. tools/bootstrap.sh; bootstrap "$@"', "bash", *(extras or ("dev",))],
            cwd=self.checkout,
            env={"PATH": str(self.programs), "CALLS": str(self.calls), **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    def installations(self) -> list[str]:
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [call.split("--editable ")[1] for call in calls if "--editable" in call]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_fresh_checkout_gets_an_environment_of_its_own(machine: Machine) -> None:
    result = machine.bootstrap("dev")
    assert result.returncode == 0, result.stderr
    assert (machine.environment / "bin" / "python").exists()
    assert machine.installations() == [".[dev]"]
    assert "the account" not in result.stdout + result.stderr


def test_a_set_up_tells_what_it_does_a_line_each(machine: Machine) -> None:
    told = machine.bootstrap("dev").stderr.splitlines()
    assert told == [
        f"Making the virtual environment {machine.environment} ...",
        f"Installing megatron-bert[dev] into {machine.environment}: this takes some minutes ...",
        "  fetching what builds the package ...",
        "  fetching packages, PyTorch the largest of them ...",
        "  compiling the C++ core ...",
        "  unpacking what was fetched ...",
    ]
    log = (machine.environment / "megatron-bert-install.log").read_text()
    assert "  Downloading torch.whl\n" in log


def test_what_is_up_to_date_is_not_installed_again(machine: Machine) -> None:
    machine.bootstrap("dev")
    result = machine.bootstrap("dev", PIP_STATUS="1")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert len(machine.installations()) == 1


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "csrc/core.cpp"])
def test_a_changed_source_is_installed_again(machine: Machine, name: str) -> None:
    machine.bootstrap("dev")
    (machine.checkout / name).write_text("# changed\n")
    machine.bootstrap("dev")
    assert len(machine.installations()) == 2


def test_extras_add_up(machine: Machine) -> None:
    machine.bootstrap("examples")
    machine.bootstrap("dev")
    machine.bootstrap("examples")
    assert machine.installations() == [".[examples]", ".[dev,examples]"]


def test_a_failed_installation_shows_its_account_and_is_tried_again(machine: Machine) -> None:
    failed = machine.bootstrap("dev", PIP_STATUS="1")
    assert failed.returncode == 1
    assert "the account of this installation" in failed.stderr
    assert "error: the installation into" in failed.stderr
    assert machine.bootstrap("dev").returncode == 0
    assert machine.installations() == [".[dev]"]


def test_an_active_environment_is_used_and_its_torch_kept(machine: Machine, tmp_path: Path) -> None:
    active = tmp_path / "active"
    (active / "bin").mkdir(parents=True)
    shutil.copy(machine.programs / "python3", active / "bin" / "python")
    result = machine.bootstrap("dev", VIRTUAL_ENV=str(active), TORCH_STATUS="0")
    assert result.returncode == 0, result.stderr
    assert not machine.environment.exists()
    constraints = machine.calls.with_name("calls.constraints").read_text()
    assert constraints == "numpy==2.4.6\n"


def test_an_environment_without_torch_gets_the_tested_one(machine: Machine) -> None:
    machine.bootstrap("dev")
    assert "torch==2.13.0" in machine.calls.with_name("calls.constraints").read_text()


def test_an_active_environment_that_is_gone_is_named(machine: Machine, tmp_path: Path) -> None:
    result = machine.bootstrap("dev", VIRTUAL_ENV=str(tmp_path / "gone"))
    assert result.returncode == 1
    assert f"error: the active environment {tmp_path / 'gone'} has no bin/python" in result.stderr


def test_a_python_too_old_is_named_with_its_version(machine: Machine) -> None:
    result = machine.bootstrap("dev", PYTHON_ANSWER="3.9.2 old")
    assert result.returncode == 1
    assert "Python 3.11 or newer is needed" in result.stderr
    assert "python3, version 3.9.2" in result.stderr
    assert "apt-get install python3.11 python3.11-venv python3.11-dev" in result.stderr


def test_a_newer_python_beside_an_old_one_is_found(machine: Machine) -> None:
    machine.provide("python3", "#!/bin/bash\necho 3.9.2 old\n")
    machine.provide("python3.12", STAND_IN_PYTHON)
    assert machine.bootstrap("dev").returncode == 0


def test_a_machine_without_python_says_what_to_install(machine: Machine) -> None:
    machine.remove("python3")
    result = machine.bootstrap("dev")
    assert result.returncode == 1
    assert "none was found; install one" in result.stderr


def test_missing_parts_of_python_are_named_as_packages(machine: Machine) -> None:
    result = machine.bootstrap("dev", PYTHON_ANSWER="3.12.1 venv dev")
    assert result.returncode == 1
    assert "apt-get install python3.12-venv python3.12-dev" in result.stderr


def test_a_missing_compiler_is_named_as_a_package(machine: Machine) -> None:
    machine.remove("c++")
    result = machine.bootstrap("dev")
    assert result.returncode == 1
    assert "none was found; install one: apt-get install g++" in result.stderr
    assert machine.installations() == []


def test_a_disk_without_room_is_named_with_what_is_needed_and_free(machine: Machine) -> None:
    machine.provide("df", "#!/bin/bash\necho Filesystem\necho disk 9000 8100 900 90% /\n")
    result = machine.bootstrap("dev")
    assert result.returncode == 1
    assert "needs about 1500 MB" in result.stderr
    assert "has 900 MB free" in result.stderr
    assert machine.installations() == []


def test_a_compiler_too_old_for_the_sources_is_refused(machine: Machine) -> None:
    machine.provide("c++", "#!/bin/bash\nexit 1\n")
    result = machine.bootstrap("dev")
    assert result.returncode == 1
    assert "c++ cannot compile C++20; install g++ 11 or newer" in result.stderr


@pytest.mark.parametrize(
    ("version", "fetched"), [(None, True), ("3.18.4", True), ("3.21.0", False), ("4.1.0", False)]
)
def test_cmake_is_fetched_only_where_the_machine_has_no_good_one(
    machine: Machine, version: str | None, fetched: bool
) -> None:
    if version is not None:
        machine.provide("cmake", f"#!/bin/bash\necho 'cmake version {version}'\n")
    machine.bootstrap("dev")
    assert ("pybind11 cmake" in machine.calls.read_text()) == fetched


def run_tests_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(CHECKOUT / "tests" / "run.sh"), *arguments],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_unknown_flag_of_the_test_command_is_refused_with_its_usage() -> None:
    result = run_tests_script("--slwo")
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown flag --slwo")
    assert "usage: bash tests/run.sh" in result.stderr


def test_the_test_command_explains_its_flags() -> None:
    result = run_tests_script("--help")
    assert result.returncode == 0
    for flag in ("--slow", "--faults", "--peers", "--browser", "--schedulers", "--gpu", "--all"):
        assert flag in result.stdout
