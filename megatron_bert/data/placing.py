"""A dataset's files, which appear together and whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from megatron_bert.closeable import Closeable
from megatron_bert.config.arguments import argument
from megatron_bert.config.errors import DataError
from megatron_bert.config.places import check_place
from megatron_bert.data.indexed_dataset import dataset_file
from megatron_bert.files import StrPath, sync_to_disk, temporary_path

# The index is last to appear and first to go: without it there is no dataset.
_SUFFIXES = (".bin", ".words", ".json", ".idx")


class StagedDataset(Closeable):
    """A place for a dataset's files until they are whole.

    Used as a context manager: files are written under `prefix`, then `place` gives them their
    names. What was not placed is removed at the end.

    Attributes:
        prefix: of the temporary files, beside the final ones.
    """

    def __init__(self, final_prefix: Path, *, overwrite: bool) -> None:
        """Check the place and make its folder.

        Raises:
            DataError: no dataset can be written there, or one is there and `overwrite` is not set.
        """
        make_place(final_prefix)
        if not overwrite:
            check_unused(final_prefix)
        self._final_prefix = final_prefix
        self.prefix = temporary_path(final_prefix)

    def path(self, suffix: str) -> Path:
        """Where to write the file of that suffix."""
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
        """Give the files their names, in place of all files of a dataset that has them.

        A full disk shows while the old dataset is whole. A crash leaves the old dataset, the new
        one, or, between the first name taken and the last one given, none: never parts of both.

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
    """Every file that a dataset of that prefix can have, by suffix."""
    return {suffix: dataset_file(prefix, suffix) for suffix in _SUFFIXES}


def check_name(final_prefix: StrPath) -> None:
    """Refuse a prefix without a name, to which no suffix can be added, or that climbs out.

    Args:
        final_prefix: as the user gave it: a `Path` has lost the slash at the end that tells of a
            folder.

    Raises:
        UserError: there is no name or that of a folder, or a `..` behind one.
    """
    path = Path(final_prefix)
    # Of a name that is too long this says False, and not what an error would.
    is_folder = os.path.isdir(path)  # noqa: PTH112
    if path.name in ("", "..") or is_folder or os.fspath(final_prefix).endswith(os.sep):
        given = final_prefix if os.fspath(final_prefix) else path
        raise DataError(
            f"{argument('output_prefix')} {given}: is a folder; give a name in it, as "
            f"{path / 'train'}"
        )
    check_place(path)


def make_place(final_prefix: Path) -> None:
    """Make the folder of a dataset that is to be written.

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
    """Refuse to write over a dataset when staged files, of which some may be placed, are placed.

    Args:
        prefix: of the staged files.
        final_prefix: of the final ones.
        suffixes: of all staged files, placed already or not.

    Raises:
        DataError: there is a file of that prefix that is not one of those.
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
    """Wait until the disk has a staged dataset's files; their suffixes.

    Args:
        prefix: of the staged files.
        sizes: bytes that files must have, by suffix.

    Raises:
        OSError: the disk failed, or a file has not its bytes.
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
    """Give staged files, which the disk has, their names; call it again if it was cut short.

    Args:
        prefix: of the staged files.
        final_prefix: of the final ones; files of an old dataset are replaced or removed.
        suffixes: of all staged files, placed already or not.

    Raises:
        OSError: the disk failed.
    """
    staged, final = dataset_files(prefix), dataset_files(final_prefix)
    # Once the index is placed all is, and what has these names since may be another's.
    if staged[".idx"].exists():
        final[".idx"].unlink(missing_ok=True)
        # Else a loss of power could bring the old index back beside new tokens.
        sync_to_disk(final_prefix.parent)
        for suffix in _SUFFIXES:
            if staged[suffix].exists():
                staged[suffix].replace(final[suffix])
            elif suffix not in suffixes:
                final[suffix].unlink(missing_ok=True)
    sync_to_disk(final_prefix.parent)
