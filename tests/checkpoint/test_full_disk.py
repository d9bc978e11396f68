"""A disk that is really full: a small tmpfs, where this process may mount one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deadlines import DEADLINE_SECONDS

CHECKOUT = Path(__file__).resolve().parents[2]
DISK_BYTES = 1 << 20
# In a namespace of its own, which takes the mount along when it ends.
NAMESPACE = ("unshare", "--mount", "--map-root-user")
SAVE_TWICE = """
import shutil, sys
from pathlib import Path
import torch
from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.errors import CheckpointError

disk, state_bytes = Path(sys.argv[1]), int(sys.argv[2])
store = CheckpointStore(disk / "checkpoints", keep=2)
first = store.save(1, {"weight": torch.ones(state_bytes // 4)}, {"step": 1})
try:
    store.save(2, {"weight": torch.zeros(state_bytes // 4)}, {"step": 2})
except CheckpointError as error:
    print(error)
print(sorted(path.name for path in store.root.iterdir()))
loaded = {"weight": torch.zeros(state_bytes // 4)}
print(store.newest() == first, store.load(first, loaded), loaded["weight"].min().item())
print(shutil.disk_usage(disk).free)
shutil.rmtree(first)
store.save(3, {"weight": torch.zeros(state_bytes // 4)}, {"step": 3})
print(sorted(path.name for path in store.root.iterdir()))
"""


def _on_a_small_disk(disk: Path, code: str, *arguments: object) -> list[str]:
    mount = f"mount -t tmpfs -o size={DISK_BYTES} tmpfs {disk}"
    tried = subprocess.run([*NAMESPACE, "sh", "-c", mount], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {tried.stderr.strip()}")
    words = [sys.executable, "-c", code, str(disk), *map(str, arguments)]
    done = subprocess.run(
        [*NAMESPACE, "sh", "-c", f'{mount} && exec "$@"', "sh", *words],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.faults
def test_on_a_full_disk_the_checkpoint_before_stays_and_the_message_has_bytes_needed_and_free(
    tmp_path: Path,
) -> None:
    state_bytes = DISK_BYTES * 5 // 8
    message, names, loaded, free, later = _on_a_small_disk(tmp_path, SAVE_TWICE, state_bytes)
    assert f"cannot save {tmp_path / 'checkpoints' / 'step_00000002'}: " in message
    assert "No space left on device" in message
    assert f"The checkpoint needs a little more than {state_bytes:,} bytes" in message
    told_free = int(message.split(" bytes, ")[1].split()[0].replace(",", ""))
    assert told_free < state_bytes
    assert names == "['latest', 'step_00000001']"
    assert loaded == "True {'step': 1} 1.0"
    assert int(free) == told_free, "what was half written counts as taken"
    assert later == "['latest', 'step_00000003']"
