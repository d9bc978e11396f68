"""Putting a dataset's files in place: together and complete, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from megatron_bert.closeable import Closeable
from megatron_bert.command_line.arguments import argument
from megatron_bert.command_line.places import check_place
from megatron_bert.data.indexed_dataset import dataset_file
from megatron_bert.errors import DataError
from megatron_bert.files import StrPath, sync_to_disk, temporary_path

# The index is last to appear and first to go: without it there is no dataset.
_SUFFIXES = (".bin", ".words", ".json", ".idx")


class StagedDataset(Closeable):
    """A place for a dataset's files until they are complete.

    Used as a context manager: files are written under `prefix`, then `place` gives them their
    final names. Files that were not placed are removed at the end.

    Attributes:
        prefix: prefix of the temporary files, which are beside the final ones.
    """

    def __init__(self, final_prefix: Path, *, overwrite: bool) -> None:
        """Check the place and make its folder.

        Raises:
            DataError: no dataset can be written there, or one exists and `overwrite` is not set.
        """
        make_place(final_prefix)
        if not overwrite:
            check_unused(final_prefix)
        self._final_prefix = final_prefix
        self.prefix = temporary_path(final_prefix)

    def path(self, suffix: str) -> Path:
        """Where to write the file with that suffix."""
        return dataset_files(self.prefix)[suffix]

    def check_space(self, needed_bytes: int) -> None:
        """Refuse to begin what the disk cannot hold.

        Raises:
            DataError: the disk has less room than that.
        """
        free = shutil.disk_usage(self._final_prefix.parent).free
        if free < needed_bytes:
            raise DataError(
                f"dataset {self._final_prefix} needs {needed_bytes:,} bytes and its disk has "
                f"{free:,} free; make room, or choose an "
                f"{argument('output_prefix')} on another disk"
            )

    def place(self) -> None:
        """Give the files their final names, replacing all files of an existing dataset.

        A full disk is noticed while the old dataset is still intact. A crash leaves the old
        dataset, the new one or, while files are being renamed, none: never parts of both.

        Raises:
            OSError: the disk failed.
        """
        staged = sync_staged(self.prefix)
        place_files(self.prefix, self._final_prefix, staged)

    def close(self) -> None:
        """Remove what was not placed."""
        for path in dataset_files(self.prefix).values():
            path.unlink(missing_ok=True)


def dataset_files(prefix: Path) -> dict[str, Path]:
    """Paths of all files that a dataset of that prefix can have, by suffix."""
    return {suffix: dataset_file(prefix, suffix) for suffix in _SUFFIXES}


def check_name(final_prefix: StrPath) -> None:
    """Refuse a prefix that is no file name, so that no suffix can be added, or that climbs out.

    Args:
        final_prefix: as the user gave it: a `Path` has lost the trailing slash that marks a folder.

    Raises:
        UserError: there is no name, it is that of a folder, or a `..` follows a name.
    """
    path = Path(final_prefix)
    # Returns False for a name that is too long, instead of raising.
    is_folder = os.path.isdir(path)  # noqa: PTH112
    if path.name in ("", "..") or is_folder or os.fspath(final_prefix).endswith(os.sep):
        given = final_prefix if os.fspath(final_prefix) else path
        raise DataError(
            f"{argument('output_prefix')} {given}: is a folder; give a name in it, as "
            f"{path / 'train'}"
        )
    check_place(path)


def make_place(final_prefix: Path) -> None:
    """Check the prefix of a dataset that is to be written, and make its folder.

    Raises:
        DataError: no dataset can be written there.
    """
    check_name(final_prefix)
    if final_prefix.suffix in _SUFFIXES:
        suffix = final_prefix.suffix
        raise DataError(
            f"{argument('output_prefix')} {final_prefix}: leave off {suffix}; it is added"
        )
    try:
        final_prefix.parent.mkdir(parents=True, exist_ok=True)
        _existing(final_prefix)
    except OSError as error:
        raise DataError(
            f"{argument('output_prefix')} {final_prefix}: cannot make {error.filename}: "
            f"{error.strerror}; choose another"
        ) from error


def check_unused(final_prefix: Path) -> None:
    """Refuse to write over a dataset.

    Raises:
        DataError: there is a file of that prefix.
    """
    _refuse(_existing(final_prefix))


def check_unused_by_others(prefix: Path, final_prefix: Path, suffixes: Collection[str]) -> None:
    """Refuse to place staged files over a dataset; some of them may have been placed already.

    Args:
        prefix: of the staged files.
        final_prefix: of the final ones.
        suffixes: of all staged files, placed already or not.

    Raises:
        DataError: there is a file of the final prefix that is not one of the placed ones.
    """
    staged = dataset_files(prefix)
    if staged[".idx"].exists():
        placed = [suffix for suffix in suffixes if not staged[suffix].exists()]
        _refuse(_existing(final_prefix, but=placed))


def _refuse(existing: list[str]) -> None:
    if existing:
        raise DataError(
            f"files {', '.join(existing)} already there; choose another "
            f"{argument('output_prefix')}, or replace the dataset with "
            f"{argument('overwrite', True)}"
        )


def _existing(prefix: Path, but: Collection[str] = ()) -> list[str]:
    return [
        str(path)
        for suffix, path in dataset_files(prefix).items()
        if suffix not in but and path.exists()
    ]


def sync_staged(prefix: Path, sizes: Mapping[str, int] | None = None) -> list[str]:
    """Sync a staged dataset's files to disk; return their suffixes.

    Args:
        prefix: of the staged files.
        sizes: expected sizes in bytes, by suffix.

    Raises:
        OSError: the disk failed, or a file does not have its expected size.
    """
    staged = {suffix: path for suffix, path in dataset_files(prefix).items() if path.exists()}
    for suffix, path in staged.items():
        sync_to_disk(path)
        found = path.stat().st_size
        if sizes is not None and found != sizes.get(suffix, found):
            text = f"{found:,} bytes were written of {sizes[suffix]:,}"
            raise OSError(errno.EIO, text, str(path))
    return list(staged)


def place_files(prefix: Path, final_prefix: Path, suffixes: Collection[str]) -> None:
    """Give staged files, already synced, their final names; call it again if it was interrupted.

    Args:
        prefix: of the staged files.
        final_prefix: of the final ones; files of an old dataset are replaced or removed.
        suffixes: of all staged files, placed already or not.

    Raises:
        OSError: the disk failed.
    """
    staged, final = dataset_files(prefix), dataset_files(final_prefix)
    # Once the index is placed, everything is; files of these names may be another job's by now.
    if staged[".idx"].exists():
        final[".idx"].unlink(missing_ok=True)
        # Otherwise a power failure could bring the old index back beside new tokens.
        sync_to_disk(final_prefix.parent)
        for suffix in _SUFFIXES:
            if staged[suffix].exists():
                staged[suffix].replace(final[suffix])
            elif suffix not in suffixes:
                final[suffix].unlink(missing_ok=True)
    sync_to_disk(final_prefix.parent)
