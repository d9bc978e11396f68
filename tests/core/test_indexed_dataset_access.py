"""Mapped or read: the same tokens; and files that change while a dataset is open."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from _megatron_bert_core import IndexedDataset, RowPlan
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bert.data.index_file import write_index
from tests.core.support import fill, make_assembler, text_documents, write_documents
from tests.deadlines import DEADLINE_SECONDS

GIB = 1 << 30


@pytest.mark.parametrize(("token_bytes", "largest"), [(2, 2**16 - 1), (4, 2**31 - 1)])
def test_a_dataset_that_is_not_mapped_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory, token_bytes: int, largest: int
) -> None:
    @settings(max_examples=30, derandomize=True, deadline=None)
    @given(st.lists(st.lists(st.integers(0, largest), max_size=40), max_size=10))
    def check(documents: list[list[int]]) -> None:
        prefix = tmp_path_factory.mktemp("set") / "set"
        mapped = write_documents(prefix, documents, token_bytes)
        read = IndexedDataset(str(prefix), mmap=False)
        assert [read.document(number).tolist() for number in range(len(documents))] == documents
        assert read.document_lengths().tolist() == mapped.document_lengths().tolist()
        assert read.max_token_id() == mapped.max_token_id()
        if any(documents):
            assert (mapped.is_mapped, read.is_mapped) == (True, False)

    check()


@pytest.mark.parametrize("token_bytes", [2, 4])
def test_rows_are_the_same_mapped_or_read(tmp_path: Path, token_bytes: int) -> None:
    documents = text_documents(np.random.default_rng(3).integers(0, 300, 200).tolist())
    write_documents(tmp_path / "set", documents, token_bytes)
    hashes = set()
    for mmap in (True, False):
        dataset = IndexedDataset(str(tmp_path / "set"), mmap=mmap)
        assembler = make_assembler([dataset], RowPlan([dataset], [1.0], [(64, 300)], 5))
        hashes.add(fill(assembler, range(300), 64, 12).batch_hash)
    assert len(hashes) == 1


READ_WITHOUT_ROOM = """
import mmap, resource, sys
from _megatron_bert_core import IndexedDataset

with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29),) * 2)
try:
    with open(sys.argv[1] + ".bin", "rb") as file:
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
except OSError as error:
    print(error.strerror)
dataset = IndexedDataset(sys.argv[1])
print(dataset.is_mapped, dataset.num_tokens)
for number in (0, 2, 4):
    print(*dataset.document(number).tolist())
"""


def test_tokens_are_read_where_the_system_refuses_to_map_them(tmp_path: Path) -> None:
    prefix = tmp_path / "set"
    lengths = [3, GIB - 1, 2, GIB - 1, 2]
    write_index(Path(f"{prefix}.idx"), 4, np.array(lengths, dtype=np.int32))
    with Path(f"{prefix}.bin").open("wb") as file:
        for number in (0, 2, 4):
            file.seek(4 * sum(lengths[:number]))
            file.write(np.array([number, 2**31 - 1], dtype=np.int32).tobytes())
        file.truncate(4 * sum(lengths))
    done = subprocess.run(
        [sys.executable, "-c", READ_WITHOUT_ROOM, str(prefix)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "Cannot allocate memory",
        f"False {sum(lengths)}",
        "0 2147483647 0",
        "2 2147483647",
        "4 2147483647",
    ]


def test_a_file_that_ends_early_while_it_is_read_is_named_with_the_place(tmp_path: Path) -> None:
    write_documents(tmp_path / "set", [[1, 2], [3, 4, 5]])
    dataset = IndexedDataset(str(tmp_path / "set"), mmap=False)
    os.truncate(tmp_path / "set.bin", 12)
    assert dataset.document(0).tolist() == [1, 2]
    with pytest.raises(RuntimeError, match=r"set\.bin: ends at byte 12 of 20"):
        dataset.document(1)


def test_a_read_that_fails_is_named_with_the_place(tmp_path: Path) -> None:
    # A folder opens like a file, and no read of it succeeds.
    (tmp_path / "set.idx").mkdir()
    (tmp_path / "set.bin").write_bytes(b"")
    with pytest.raises(
        RuntimeError, match=r"set\.idx: cannot read \d+ bytes at offset 0: Is a dir"
    ):
        IndexedDataset(str(tmp_path / "set"))


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0" * 4)


def overwrite(path: Path) -> None:
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    # A second write in the same tick of the filesystem's clock would not show.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes() + b"\0" * 4)
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (lambda path: os.truncate(path, 8), r"was truncated from \d+ to 8 bytes"),
    "grown": (grow, r"grew from \d+ to \d+ bytes"),
    "overwritten": (overwrite, "was modified"),
    "replaced": (replace, "was replaced by another file .* resumed run would read the new one"),
    "removed": (Path.unlink, "was removed.*: No such file"),
}


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("suffix", [".idx", ".bin"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_while_in_use_is_named_with_the_change(
    tmp_path: Path, change: str, suffix: str, mmap: bool
) -> None:
    write_documents(tmp_path / "set", [[1, 2], [3, 4, 5]])
    dataset = IndexedDataset(str(tmp_path / "set"), mmap=mmap)
    dataset.check_unchanged()
    make_change, message = CHANGES[change]
    make_change(tmp_path / f"set{suffix}")
    with pytest.raises(RuntimeError, match=rf"set\{suffix}: {message}"):
        dataset.check_unchanged()


def test_a_file_replaced_while_in_use_is_still_read_as_it_was(tmp_path: Path) -> None:
    write_documents(tmp_path / "set", [[1, 2], [3, 4, 5]])
    dataset = IndexedDataset(str(tmp_path / "set"))
    replace(tmp_path / "set.bin")
    replace(tmp_path / "set.idx")
    assert dataset.document(1).tolist() == [3, 4, 5]


def test_an_unchanged_dataset_is_known_from_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path / "set", [[1, 2]])
    monkeypatch.chdir(tmp_path)
    dataset = IndexedDataset("set")
    monkeypatch.chdir("/")
    dataset.check_unchanged()


def test_a_mapped_dataset_keeps_no_descriptor_open(tmp_path: Path) -> None:
    write_documents(tmp_path / "set", [[1, 2]])

    def descriptors() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    before = descriptors()
    kept = [IndexedDataset(str(tmp_path / "set")) for _ in range(10)]
    assert descriptors() == before
    del kept
