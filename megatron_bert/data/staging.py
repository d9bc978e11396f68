"""A dataset's files, which appear together and whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import TracebackType

from megatron_bert.config.errors import DataError
from megatron_bert.files import sync_to_disk, temporary_path

# The index is last to appear and first to go: without it there is no dataset.
_SUFFIXES = (".bin", ".words", ".json", ".idx")


class StagedDataset:
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
        if not final_prefix.name:
            raise DataError(f"--output-prefix {final_prefix}: give a name, as data/train")
        if final_prefix.suffix in _SUFFIXES:
            suffix = final_prefix.suffix
            raise DataError(f"--output-prefix {final_prefix}: leave off {suffix}; it is added")
        self._final_prefix = final_prefix
        try:
            existing = [str(path) for path in _files(final_prefix).values() if path.exists()]
            final_prefix.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"--output-prefix {final_prefix}: cannot make {error.filename}: {error.strerror}; "
                f"choose another"
            ) from error
        if existing and not overwrite:
            raise DataError(
                f"{', '.join(existing)} already there; choose another --output-prefix, or replace "
                f"the dataset with --overwrite"
            )
        self.prefix = temporary_path(final_prefix)

    def path(self, suffix: str) -> Path:
        """Where to write the file of that suffix."""
        return _files(self.prefix)[suffix]

    def check_space(self, needed_bytes: int) -> None:
        """Refuse to begin what the disk cannot hold.

        Raises:
            DataError: the disk has less room than that.
        """
        free = shutil.disk_usage(self._final_prefix.parent).free
        if free < needed_bytes:
            raise DataError(
                f"dataset {self._final_prefix} needs {needed_bytes:,} bytes and its disk has "
                f"{free:,} free; make room, or choose an --output-prefix on another disk"
            )

    def place(self) -> None:
        """Give the files their names, in place of all files of a dataset that has them.

        A full disk shows while the old dataset is whole. A crash leaves the old dataset, the new
        one, or none.

        Raises:
            OSError: the disk failed.
        """
        staged, final = _files(self.prefix), _files(self._final_prefix)
        written = [suffix for suffix in _SUFFIXES if staged[suffix].exists()]
        for suffix in written:
            sync_to_disk(staged[suffix])
        for suffix in reversed(_SUFFIXES):
            final[suffix].unlink(missing_ok=True)
        for suffix in written:
            staged[suffix].rename(final[suffix])
        sync_to_disk(self._final_prefix.parent)

    def __enter__(self) -> StagedDataset:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for path in _files(self.prefix).values():
            path.unlink(missing_ok=True)


def _files(prefix: Path) -> dict[str, Path]:
    return {suffix: prefix.with_name(prefix.name + suffix) for suffix in _SUFFIXES}
