from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bert.data import dataset_writer
from megatron_bert.data.dataset_writer import DatasetWriter
from megatron_bert.data.indexed_dataset import DatasetInfo, open_dataset
from megatron_bert.errors import DataError
from tests.core.support import write_documents

SUFFIXES = (".bin", ".idx", ".json", ".words")
INFO = DatasetInfo("ab" * 32, "a.model", 99, documents=3, tokens=4, sources=())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_writer(prefix: Path, vocab_size: int = 99, **options: Any) -> DatasetWriter:
    lists = ["more", "never committed"]
    return DatasetWriter(prefix, vocab_size, identity={"for": "a test"}, lists=lists, **options)


def add(writer: DatasetWriter, *documents: list[int]) -> None:
    tokens = np.array([token for document in documents for token in document], dtype=np.int32)
    writer.add_documents(tokens, np.array([len(document) for document in documents]))


@pytest.mark.parametrize(("vocab_size", "token_bytes"), [(65_499, 2), (65_500, 4)])
def test_a_finished_dataset_has_the_bytes_that_the_format_describes(
    tmp_path: Path, vocab_size: int, token_bytes: int
) -> None:
    with make_writer(tmp_path / "set", vocab_size) as writer:
        add(writer, [1, 2], [65_498])
        add(writer, [3])
        assert names(tmp_path) == ["set.partial", "set.partial.lock"]
        writer.finish({}, INFO)
    assert names(tmp_path) == ["set.bin", "set.idx", "set.json"]
    write_documents(tmp_path / "expected", [[1, 2], [65_498], [3]], token_bytes)
    for suffix in (".bin", ".idx"):
        expected = (tmp_path / f"expected{suffix}").read_bytes()
        assert (tmp_path / f"set{suffix}").read_bytes() == expected


def test_a_writer_goes_on_from_the_last_commit_of_the_one_before(tmp_path: Path) -> None:
    with make_writer(tmp_path / "set") as writer:
        assert writer.note is None
        add(writer, [1, 2])
        writer.append("more", np.array([7, 8], dtype=np.uint64))
        writer.commit({"done": 1})
        add(writer, [5, 6, 7])
        writer.append("never committed", np.array([9]))
    with make_writer(tmp_path / "set") as writer:
        assert writer.note == {"done": 1}
        assert writer.read("more", np.uint64).tolist() == [7, 8]
        assert writer.read("never committed", np.uint64).tolist() == []
        add(writer, [3])
        writer.finish({}, INFO)
    dataset = open_dataset(tmp_path / "set")
    assert [dataset.document(number).tolist() for number in range(2)] == [[1, 2], [3]]


def test_a_writer_dropped_before_a_commit_leaves_nothing(tmp_path: Path) -> None:
    with make_writer(tmp_path / "set") as writer:
        add(writer, [1, 2])
    assert names(tmp_path) == []


def test_a_refused_restart_keeps_the_earlier_work(tmp_path: Path) -> None:
    with make_writer(tmp_path / "set") as writer:
        add(writer, [1, 2])
        writer.commit({"done": 1})
    write_documents(tmp_path / "set", [[9]])
    with pytest.raises(DataError, match="already there"):
        make_writer(tmp_path / "set", restart=True)
    with make_writer(tmp_path / "set", overwrite=True) as writer:
        assert writer.note == {"done": 1}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk that fills up: no file can grow beyond that (Python ignores SIGXFSZ)."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.faults
@pytest.mark.parametrize("missing", [1, 50, 1000, 4095, 4097])
@pytest.mark.parametrize("suffix", [".bin", ".idx", ".words", ".json"])
def test_a_disk_that_fills_up_at_any_file_leaves_the_old_dataset_and_the_work(
    tmp_path: Path, suffix: str, missing: int
) -> None:
    # The file is the largest of those that are written while the limit holds.
    length = 3 if suffix == ".idx" else 30_000
    lengths = np.full(90_000 // length, length)
    tokens = np.arange(90_000, dtype=np.int32) % 99
    name = "n" * (20_000 if suffix == ".json" else 1)
    info = replace(INFO, tokenizer_name=name, word_boundaries="mecab")
    with make_writer(tmp_path / "expected") as writer:
        writer.add_documents(tokens, lengths, tokens % 3 == 0)
        writer.finish({}, info)
    expected = {end: (tmp_path / f"expected{end}").read_bytes() for end in SUFFIXES}
    write_documents(tmp_path / "set", [[9]])
    old = {path.name: path.read_bytes() for path in tmp_path.glob("set.*")}
    limit = len(expected[suffix]) - missing

    with make_writer(tmp_path / "set", overwrite=True) as writer:
        if suffix == ".bin":
            writer.commit({})
            with file_size_limit(limit), pytest.raises(OSError, match="too large"):
                writer.add_documents(tokens, lengths, tokens % 3 == 0)
        else:
            writer.add_documents(tokens, lengths, tokens % 3 == 0)
            with file_size_limit(limit), pytest.raises((OSError, DataError)):
                writer.finish({}, info)
    found = {path.name: path.read_bytes() for path in tmp_path.glob("set.*") if path.is_file()}
    assert found == old

    with make_writer(tmp_path / "set", overwrite=True) as writer:
        if suffix == ".bin":
            writer.add_documents(tokens, lengths, tokens % 3 == 0)
        writer.finish({}, info)
    assert {end: (tmp_path / f"set{end}").read_bytes() for end in SUFFIXES} == expected


def test_a_staged_file_that_is_too_short_is_never_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_less(path: Path, *arguments: object) -> None:
        path.write_bytes(bytes(7))

    monkeypatch.setattr(dataset_writer, "write_index", write_less)
    with make_writer(tmp_path / "set") as writer:
        add(writer, [1, 2])
        with pytest.raises(OSError, match="7 bytes were written of 62"):
            writer.finish({}, INFO)
    assert names(tmp_path) == ["set.partial"]


def test_nothing_is_open_that_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps such a file in the folder, which could not be removed then."""
    unlink = Path.unlink

    def rename_if_open(path: Path, missing_ok: bool = False) -> None:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        opened = [link.readlink() for link in links]
        if path in opened or f" {path}\n" in Path("/proc/self/maps").read_text():
            path.rename(path.with_name(f".nfs-{path.name}"))
        else:
            unlink(path, missing_ok)

    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    with make_writer(tmp_path / "set") as writer:
        writer.add_documents(
            np.arange(9, dtype=np.int32), np.array([4, 5]), np.ones(9, dtype=np.bool_)
        )
        writer.append("more", np.arange(3))
        monkeypatch.setattr(Path, "unlink", rename_if_open)
        writer.finish({}, replace(INFO, word_boundaries="mecab"))
    # The lock itself is held while it goes.
    assert [name for name in names(tmp_path) if ".lock" not in name] == [
        f"set{suffix}" for suffix in SUFFIXES
    ]


def test_files_that_appear_in_the_folder_are_left_and_the_job_succeeds(tmp_path: Path) -> None:
    with make_writer(tmp_path / "set") as writer:
        add(writer, [1, 2])
        (writer.partial / ".nfs0001").touch()
        (writer.partial / "notes.txt").touch()
        writer.finish({}, INFO)
    assert names(tmp_path) == ["set.bin", "set.idx", "set.json", "set.partial"]
    assert names(tmp_path / "set.partial") == [".nfs0001", "notes.txt"]


def test_a_folder_that_only_waits_for_nfs_is_used(tmp_path: Path) -> None:
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / ".nfs0001").touch()
    with make_writer(tmp_path / "set") as writer:
        add(writer, [1, 2])
        writer.finish({}, INFO)
    assert names(tmp_path / "set.partial") == [".nfs0001"]


@pytest.mark.parametrize("journal", [None, '{"version": 1, "title": "mine"}'])
@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_of_somebody_elses_is_named_and_left_as_it_is(
    tmp_path: Path, journal: str | None, restart: bool
) -> None:
    folder = tmp_path / "set.partial"
    folder.mkdir()
    for name in ("thesis.tex", "lengths"):
        (folder / name).write_text("all")
    if journal is not None:
        (folder / "journal.json").write_text(journal)
    before = names(folder)
    with pytest.raises(DataError, match=r"set\.partial holds thesis\.tex and is no folder of"):
        make_writer(tmp_path / "set", restart=restart)
    assert names(folder) == before
    assert names(tmp_path) == ["set.partial"]


def test_what_a_job_left_that_died_before_its_first_commit_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "set.partial"
    folder.mkdir()
    for name in ("lengths", "dataset.bin", "journal.json.tmp-0123abcd"):
        (folder / name).write_bytes(b"left")
    (tmp_path / "set.partial.lock").touch()
    with make_writer(tmp_path / "set") as writer:
        add(writer, [1, 2])
        writer.finish({}, INFO)
    assert names(tmp_path) == ["set.bin", "set.idx", "set.json"]
    assert (tmp_path / "set.bin").stat().st_size == 4


class Killed(BaseException):
    """A job's end as if by a kill, in a test's own process."""


def die_while_placing(prefix: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Leave a complete dataset of which no file from that suffix on has its name."""
    replace_file = Path.replace

    def die(path: Path, target: Path) -> Path:
        if path.name == f"dataset{suffix}" and target.parent == prefix.parent:
            raise Killed
        return replace_file(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with make_writer(prefix) as writer:
            add(writer, [1, 2])
            with pytest.raises(Killed):
                writer.finish({}, INFO)


@pytest.mark.parametrize("suffix", [".bin", ".json", ".idx"])
def test_a_dataset_that_appeared_where_a_killed_job_was_placing_needs_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    die_while_placing(tmp_path / "set", monkeypatch, suffix)
    write_documents(tmp_path / "set", [[9]])
    with pytest.raises(DataError, match=r"set\.idx already there.*overwrite=True"):
        make_writer(tmp_path / "set")
    assert open_dataset(tmp_path / "set").document(0).tolist() == [9]
    with make_writer(tmp_path / "set", overwrite=True) as writer:
        assert writer.is_placing


@pytest.mark.parametrize("suffix", [".bin", ".json", ".idx"])
def test_a_killed_jobs_own_files_need_no_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    die_while_placing(tmp_path / "set", monkeypatch, suffix)
    with make_writer(tmp_path / "set") as writer:
        writer.place()
    assert names(tmp_path) == ["set.bin", "set.idx", "set.json"]


@pytest.mark.parametrize(
    "journal",
    [
        "[]",
        '{"version": 1}',
        '{"version": 2, "identity": {}, "files": {}, "progress": {}}',
        '{"version": 1, "identity": ["a"], "files": {}, "progress": {}}',
        '{"version": 1, "identity": {}, "files": {"../set": 1}, "progress": {}}',
        '{"version": 1, "identity": {}, "files": {"lengths": "1"}, "progress": {}}',
        '{"version": 1, "identity": {}, "files": [], "progress": {}}',
        '{"version": 1, "identity": {"for": "a test"}, "files": {}, "progress": null}',
        '{"version": 1, "identity": {"for": "a test"}, "files": {}, "progress": {}}',
        '{"version": 1, "identity": {"for": "a test"}, "files": {}, '
        '"progress": {"suffixes": 3, "note": {}}}',
    ],
)
def test_a_journal_that_says_something_else_is_damaged(tmp_path: Path, journal: str) -> None:
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / "journal.json").write_text(journal)
    with pytest.raises(DataError, match=r"damaged.*restart=True"):
        make_writer(tmp_path / "set")
    assert (tmp_path / "set.partial" / "journal.json").read_text() == journal
    with make_writer(tmp_path / "set", restart=True):
        pass
    assert names(tmp_path) == []
