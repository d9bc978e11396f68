from __future__ import annotations

from pathlib import Path
from typing import TextIO

import numpy as np
import pytest

from megatron_bert import locks
from megatron_bert.data.partial_work import PartialWork
from megatron_bert.errors import DataError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_letting_go_of_a_removed_folder_leaves_a_new_one_of_that_name_alone(
    tmp_path: Path,
) -> None:
    with PartialWork(tmp_path / "work", {}, names=[], restart=False) as work:
        work.remove()
        (tmp_path / "work").mkdir()
    assert names(tmp_path) == ["work"]


def test_a_job_that_waits_for_the_lock_of_one_that_leaves_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin() -> PartialWork:
        return PartialWork(tmp_path / "work", {}, names=["a"], restart=False)

    first = begin()
    hold = locks._hold

    def leave_and_hold(stream: TextIO) -> None:
        # The second has opened the lock by now, and the first removes it.
        monkeypatch.setattr(locks, "_hold", hold)
        first.remove()
        with pytest.raises(DataError, match="in use by a live job"):
            begin()
        first.__exit__(None, None, None)
        hold(stream)

    monkeypatch.setattr(locks, "_hold", leave_and_hold)
    with begin() as second:
        second.append("a", np.arange(3))
        with pytest.raises(DataError, match="in use by a live job"):
            begin()
        second.commit({})
        assert names(tmp_path) == ["work", "work.lock"]
        assert names(tmp_path / "work") == ["a", "journal.json"]
    assert names(tmp_path) == ["work"]
