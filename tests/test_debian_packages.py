"""What a suite lacks is installed, after one more look at what there is, or named as it skips."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import debian_packages
from tests.debian_packages import need_programs

LISTS_ARE_OLD = '[ "$1" = update ] && : >"$DIR/updated"; [ -e "$DIR/updated" ] || fail old lists'
NO_NETWORK = 'fail "no network for $1"'
SILENT = '[ "$1" != update ] || exec sleep 600; fail no package'


@pytest.fixture
def apt_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[], str]]:
    """Has apt-get do as a line of shell says; gives what reads back which commands it got."""

    def stand_in(does: str) -> Callable[[], str]:
        script = tmp_path / "apt-get"
        script.write_text(
            "#!/bin/sh\n"
            f"DIR='{tmp_path}'\n"
            'fail() { echo "$*" >&2; exit 100; }\n'
            'while [ "$1" = -o ]; do shift 2; done\n'
            'echo "$1" >>"$DIR/commands"\n'
            f"{does}\n"
        )
        script.chmod(0o755)
        return lambda: (tmp_path / "commands").read_text()

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return stand_in


def reason_of_skip() -> str:
    with pytest.raises(pytest.skip.Exception) as skipped:
        need_programs(["no-such-browser"], ["a-browser"])
    return str(skipped.value)


def test_lists_of_packages_are_renewed_once_where_an_installation_fails(
    apt_get: Callable[[str], Callable[[], str]],
) -> None:
    commands = apt_get(LISTS_ARE_OLD)
    need_programs(["no-such-browser"], ["a-browser"])
    assert commands().split() == ["install", "update", "install"]
    need_programs(["no-such-browser"], ["a-browser"])
    assert commands().split() == ["install", "update", "install", "install"]


def test_the_reason_of_a_skip_says_what_is_missing_and_each_thing_that_failed(
    apt_get: Callable[[str], Callable[[], str]],
) -> None:
    commands = apt_get(NO_NETWORK)
    assert reason_of_skip() == (
        "no-such-browser: not installed, and cannot be: `apt-get update` ended with exit code 100: "
        "no network for update; then `apt-get install -y --no-install-recommends a-browser` ended "
        "with exit code 100: no network for install"
    )
    assert commands().split() == ["install", "update", "install"]


def test_a_server_that_is_silent_is_not_waited_for(
    apt_get: Callable[[str], Callable[[], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    apt_get(SILENT)
    monkeypatch.setattr(debian_packages, "_UPDATE_SECONDS", 0.2)
    assert "`apt-get update` did not end within 0.2 s; then `apt-get install" in reason_of_skip()


def test_what_is_there_is_not_installed(apt_get: Callable[[str], Callable[[], str]]) -> None:
    apt_get("fail")
    need_programs(["sh"], ["dash"])


def test_without_root_nothing_is_tried(
    apt_get: Callable[[str], Callable[[], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    apt_get("fail")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert reason_of_skip() == "no-such-browser: not installed, and installing takes root"
