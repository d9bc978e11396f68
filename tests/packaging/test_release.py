"""What a release needs: one version, a whole source archive, workflows that run what they say."""

from __future__ import annotations

import re
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from scikit_build_core.build import build_sdist

import megatron_bert
from megatron_bert.config.yaml_text import parse_document
from tests.packaging.test_checkout import list_files
from tests.packaging.test_installation import copy_checkout

CHECKOUT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((CHECKOUT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, as `python -m build` makes it of a fresh checkout."""
    folder = tmp_path_factory.mktemp("archive")
    # Here lie environments too, all of which the build would walk through.
    copy_checkout(folder / "checkout")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "checkout")
        return folder / build_sdist(str(folder))


def test_the_version_stands_in_one_place(archive: Path) -> None:
    version = megatron_bert.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(?:\.?(?:a|b|rc|dev)\d+)?", version)
    assert archive.name == f"megatron_bert-{version}.tar.gz"
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    changelog = (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert changelog.split("## ")[1].startswith(version)


def test_the_citation_has_what_readers_of_it_need() -> None:
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)


def test_the_source_archive_holds_all_that_a_wheel_is_made_of(archive: Path) -> None:
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    needed = {
        str(name)
        for name in list_files("--cached")
        if name.parts[0] in ("megatron_bert", "csrc")
        or str(name) in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE")
    }
    assert needed - held == set()
    assert not any(name.startswith(("docs/", ".ci/", ".github/", "runs/")) for name in held)


def _jobs(workflow: Path) -> list[dict[str, Any]]:
    tree, _ = parse_document(workflow.read_text(encoding="utf-8"), workflow.name)
    assert {"name", "on", "jobs"} <= set(tree)
    assert tree["permissions"] == {"contents": "read"}
    for job in tree["jobs"].values():
        assert job["timeout-minutes"] > 0
        assert "permissions" not in job
    return list(tree["jobs"].values())


def _steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in _jobs(workflow) for step in job["steps"]]


def test_the_workflows_run_the_two_commands_the_documentation_and_the_package() -> None:
    commands = {step.get("run") for workflow in WORKFLOWS for step in _steps(workflow)}
    assert {
        "bash examples/quickstart.sh",
        "bash tests/run.sh",
        "mkdocs build --strict",
        "python -m build",
    } <= commands


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_to_a_major_version(workflow: Path) -> None:
    used = [step["uses"] for step in _steps(workflow) if "uses" in step]
    assert used
    assert [action for action in used if not re.fullmatch(r"[\w-]+/[\w-]+@v\d+", action)] == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_no_step_can_read_the_token_of_the_checkout(workflow: Path) -> None:
    for step in _steps(workflow):
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"] == {"persist-credentials": False}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_no_two_jobs_fill_one_cache(workflow: Path) -> None:
    keys = [
        (version, step["with"]["cache-dependency-path"])
        for job in _jobs(workflow)
        for step in job["steps"]
        if "cache" in step.get("with", {})
        for version in job.get("strategy", {"matrix": {}})["matrix"].get(
            "python-version", [step["with"]["python-version"]]
        )
    ]
    assert keys
    assert len(set(keys)) == len(keys)
    for _, files in keys:
        assert all((CHECKOUT / name).is_file() for name in files.split())


def test_the_workflows_use_pythons_that_the_package_takes() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = project["requires-python"].removeprefix(">=3.")
    text = "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    # The oldest of them among others.
    assert min(map(int, re.findall(r'"3\.(\d+)"', text))) == int(oldest)


def test_the_built_wheel_is_installed_and_imported() -> None:
    commands = "\n".join(step.get("run", "") for path in WORKFLOWS for step in _steps(path))
    assert "install -c constraints.txt dist/*.whl" in commands
    assert 'python -c "import megatron_bert.api, _megatron_bert_core"' in commands
