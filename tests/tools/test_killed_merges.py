"""A merge that is killed, at any moment, leaves no dataset that is made of two."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bert.data.indexed_dataset import open_dataset
from megatron_bert.data.merge import merge_datasets
from megatron_bert.errors import DataError
from tests.core.support import write_documents
from tests.deadlines import DEADLINE_SECONDS
from tests.tools.merge_support import contents, names, write_set, write_word_starts

CHECKOUT = Path(__file__).parents[2]

STOPPED_MIDWAY = """
import signal, sys, threading
from pathlib import Path
from megatron_bert.data import merge

# Tests that run in the background of a script inherit an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

def write_and_wait(*arguments):
    merge_index(*arguments)
    print("begun", flush=True)
    threading.Event().wait()

merge_index, merge.write_joined_index = merge.write_joined_index, write_and_wait
merge.merge_datasets([Path(sys.argv[1])], Path(sys.argv[2]), overwrite=True)
"""


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_merge_leaves_the_old_dataset_as_it_was(
    tmp_path: Path, number: signal.Signals
) -> None:
    write_documents(tmp_path / "a", [[1, 2]])
    write_documents(tmp_path / "merged", [[9]])
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED_MIDWAY, str(tmp_path / "a"), str(tmp_path / "merged")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=CHECKOUT,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(number)
        assert process.wait(timeout=DEADLINE_SECONDS) != 0
    assert contents(tmp_path / "merged") == [[9]]
    left_over = set(names(tmp_path)) - {"a.bin", "a.idx", "merged.bin", "merged.idx"}
    assert all(name.startswith("merged.tmp-") for name in left_over)
    if number == signal.SIGINT:
        assert not left_over


KILLED_AT_A_RENAME = """
import os, signal, sys
from pathlib import Path
from megatron_bert.data.merge import merge_datasets

left = int(sys.argv[3])

def kill_in_time(event, arguments):
    # Of files renamed or removed; os.replace is a rename too.
    global left
    if event in ("os.rename", "os.remove"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill_in_time)
merge_datasets([Path(sys.argv[1])], Path(sys.argv[2]), overwrite=True)
"""


@pytest.mark.faults
def test_a_merge_killed_at_any_rename_leaves_one_whole_dataset_or_none_and_can_be_repeated(
    tmp_path: Path,
) -> None:
    new = write_set(tmp_path / "new", [[1, 2], [3]])
    old = tmp_path / "old"
    write_documents(old, [[9]])
    write_word_starts(old, [1])
    found = []
    for killed_at in range(1, 100):
        folder = tmp_path / f"killed{killed_at}"
        folder.mkdir()
        for path in tmp_path.glob("old.*"):
            shutil.copy(path, folder / path.name.replace("old", "merged"))
        merged = folder / "merged"
        done = subprocess.run(
            [sys.executable, "-c", KILLED_AT_A_RENAME, str(new), str(merged), str(killed_at)],
            capture_output=True,
            timeout=DEADLINE_SECONDS,
            cwd=CHECKOUT,
        )
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        if (folder / "merged.idx").exists():
            is_new = (folder / "merged.json").exists()
            assert contents(merged) == ([[1, 2], [3]] if is_new else [[9]])
            assert (folder / "merged.words").exists() == (not is_new)
            found.append("new" if is_new else "old")
        else:
            with pytest.raises(DataError, match=r"there is no file .*merged\.idx"):
                open_dataset(merged)
            found.append("none")
        merge_datasets([new], merged, overwrite=True)
        assert contents(merged) == [[1, 2], [3]]
        placed = {name for name in names(folder) if ".tmp-" not in name}
        assert placed == {"merged.bin", "merged.idx", "merged.json"}
    assert found == sorted(found, key=["old", "none", "new"].index)
    assert set(found) == {"old", "none", "new"}
