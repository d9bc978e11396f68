"""Runs the tests of the exported code with each release of transformers, in processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

import pytest

from tests.huggingface.releases import installed_release, older_release, packages_folder
from tests.huggingface.skipped_common_tests import SKIPPED

CHECKOUT = Path(__file__).resolve().parents[2]
RELEASES = sorted({older_release(), installed_release()})
COMMON_TESTS = "tests/huggingface/common_model_tests.py"
# They run with the environment's release by themselves.
OWN_TESTS = (
    "test_attention.py",
    "test_heads.py",
    "test_loading_alone.py",
    "test_finetuning.py",
)
ALL_TESTS_SECONDS = 540

pytestmark = [pytest.mark.peers, pytest.mark.timeout(ALL_TESTS_SECONDS + 60)]


@dataclass
class Run:
    """pytest in a process, its output and its report."""

    process: subprocess.Popen[bytes]
    output: Path
    report: Path


def _start(release: str, folder: Path, files: list[str], output: IO[bytes]) -> Run:
    packages = packages_folder(release)
    report = folder / f"{release}.xml"
    command = [sys.executable, "-m", "pytest", *files, f"--junitxml={report}"]
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:warnings",
        "--tb=short",
        "--show-capture=no",
        "-rfE",
    ]
    process = subprocess.Popen(
        [*command, *options, "-o", "addopts=", "-o", "filterwarnings="],
        cwd=CHECKOUT,
        env={
            **os.environ,
            "PYTHONPATH": str(packages or ""),
            "HF_HOME": str(folder / "hub"),
            "HF_HUB_OFFLINE": "1",
        },
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    return Run(process, Path(output.name), report)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """All releases at once, each on a core of its own."""
    folder = tmp_path_factory.mktemp("releases")
    with ExitStack() as stack:
        started = {}
        for release in RELEASES:
            files = [COMMON_TESTS]
            if release != installed_release():
                files += [f"tests/huggingface/{name}" for name in OWN_TESTS]
            output = stack.enter_context((folder / f"{release}.txt").open("wb"))
            started[release] = _start(release, folder, files, output)
            stack.callback(started[release].process.kill)
        yield started


@pytest.mark.parametrize("release", RELEASES)
def test_the_common_model_tests_pass(release: str, runs: dict[str, Run]) -> None:
    run = runs[release]
    run.process.wait(ALL_TESTS_SECONDS)
    assert run.process.returncode == 0, run.output.read_text("utf-8")[-6000:]
    cases = [
        case
        for case in ElementTree.parse(run.report).iter("testcase")
        if "common_model_tests" in case.get("classname", "")
    ]
    passed = [case.get("name", "") for case in cases if case.find("skipped") is None]
    assert "test_save_load" in passed  # the mixin's tests ran
    assert "test_pipeline_fill_mask" in passed
    for case in cases:
        name = case.get("name", "").removeprefix("test_")
        reason = case.find("skipped")
        if reason is not None and not any(re.fullmatch(pattern, name) for pattern in SKIPPED):
            pytest.fail(f"{release}: {name} is skipped and not listed: {reason.get('message')}")
