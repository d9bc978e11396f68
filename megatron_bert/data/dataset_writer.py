"""Writing a dataset, in several jobs if need be: each continues where the last one stopped."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bert.command_line.arguments import argument
from megatron_bert.config.arithmetic import ceil_div
from megatron_bert.data.index_file import index_size, write_index
from megatron_bert.data.indexed_dataset import DatasetInfo, write_dataset_info
from megatron_bert.data.partial_work import PartialWork
from megatron_bert.data.placing import (
    check_unused,
    check_unused_by_others,
    dataset_files,
    make_place,
    place_files,
    sync_staged,
)
from megatron_bert.errors import DataError

# Megatron-LM's rule (`DType.optimal_dtype`).
_UINT16_VOCABULARY = 65_500

_TOKENS, _LENGTHS, _WORD_STARTS = "dataset.bin", "lengths", "word_starts"
_LENGTH_TYPE = np.dtype("<i4")
_STARTS_AT_A_TIME = 1 << 23


class DatasetWriter:
    """Appends documents, of one sequence each, to a dataset that appears when it is finished.

    Until then all files are in the folder `P.partial`. Another job can continue from the last
    commit, or from the last rename if the files were already being placed. Used as a context
    manager.

    Attributes:
        partial: the folder.
    """

    def __init__(
        self,
        prefix: Path,
        vocab_size: int,
        *,
        identity: Mapping[str, str],
        lists: Collection[str] = (),
        overwrite: bool = False,
        restart: bool = False,
    ) -> None:
        """Begin, or continue what a job with the same `identity` began.

        Args:
            prefix: P of `P.bin`, `P.idx` and so on.
            vocab_size: ids are below it; with fewer than 65,500 an id takes two bytes, else four.
            identity: what the dataset depends on, by name.
            lists: names of the lists of numbers that `append` may keep beside the dataset.
            overwrite: whether an existing dataset is replaced, at the end.
            restart: whether the work of an earlier job is thrown away.

        Raises:
            DataError: a dataset exists and `overwrite` is not set, the place cannot be written to,
                or an earlier job's work is in use, is damaged or has another identity.
        """
        self._prefix = prefix
        self._token_type = np.dtype("<u2" if vocab_size < _UINT16_VOCABULARY else "<i4")
        self.partial = prefix.with_name(f"{prefix.name}.partial")
        make_place(prefix)
        if restart and not overwrite:
            # Checked first: otherwise the earlier work would be lost for nothing.
            check_unused(prefix)
        staged = [path.name for path in dataset_files(self._staged_prefix).values()]
        names = {_LENGTHS, _WORD_STARTS, *staged, *lists}
        try:
            self._work = PartialWork(self.partial, identity, names=names, restart=restart)
        except OSError as error:
            raise DataError(
                f"cannot write dataset {prefix}: {error}; choose another "
                f"{argument('output_prefix')}"
            ) from error
        try:
            suffixes = self._parse_progress()
            if not overwrite:
                # Some existing files may be those that a killed job has already placed.
                check_unused_by_others(self._staged_prefix, prefix, suffixes)
                if not suffixes:
                    check_unused(prefix)
        except BaseException:
            self._work.__exit__(None, None, None)
            raise

    @property
    def note(self) -> dict[str, Any] | None:
        """The note of the last commit, by this job or an earlier one; None if there is none."""
        return None if self._work.progress is None else self._work.progress["note"]

    @property
    def is_placing(self) -> bool:
        """Whether a job was killed while it renamed the complete files."""
        return self._work.progress is not None and bool(self._work.progress["suffixes"])

    @property
    def num_tokens(self) -> int:
        """Tokens appended."""
        return self._work.size(_TOKENS) // self._token_type.itemsize

    def add_documents(
        self,
        tokens_T: npt.NDArray[np.int32],
        lengths_N: npt.NDArray[np.int64],
        word_starts_T: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Append N documents, whose T tokens are concatenated.

        Args:
            tokens_T: ids, in `[0, vocab_size)`.
            lengths_N: tokens of each document, below 2^31.
            word_starts_T: which tokens begin a word; for all documents of a dataset, or for none.

        Raises:
            OSError: the disk failed; stop using the writer then.
        """
        self._work.append(_TOKENS, tokens_T.astype(self._token_type, copy=False))
        self._work.append(_LENGTHS, lengths_N.astype(_LENGTH_TYPE))
        if word_starts_T is not None:
            self._work.append(_WORD_STARTS, word_starts_T.astype(np.uint8))

    def append(self, name: str, values: npt.NDArray[Any]) -> None:
        """Append to one of the `lists`, kept until the dataset is finished.

        Raises:
            OSError: as `add_documents`.
        """
        self._work.append(name, values)

    def read(self, name: str, kind: npt.DTypeLike) -> npt.NDArray[Any]:
        """Memory-map one of the `lists`, including what earlier jobs appended."""
        return self._work.read(name, kind)

    @property
    def is_commit_due(self) -> bool:
        """Whether enough data or time has accumulated since the last commit."""
        return self._work.is_commit_due

    def commit(self, note: Mapping[str, Any]) -> None:
        """Make everything appended so far durable, with a note (JSON) that describes it.

        Raises:
            OSError: the disk failed; the previous commit still holds.
        """
        self._work.commit({"suffixes": [], "note": note})

    def finish(self, note: Mapping[str, Any], info: DatasetInfo) -> None:
        """Make the dataset from what was appended, and give it its name.

        Raises:
            DataError: the sidecar cannot be written.
            OSError: the disk failed. An existing dataset is intact unless a rename failed.
        """
        self._work.append(_TOKENS, np.empty(0, dtype=self._token_type))
        self.commit(note)
        staged = self._staged_prefix
        files = dataset_files(staged)
        self._write_index(files[".idx"])
        if info.word_boundaries is not None:
            self._write_word_starts(files[".words"])
        write_dataset_info(staged, info)
        num_documents = self._work.size(_LENGTHS) // _LENGTH_TYPE.itemsize
        sizes = {
            ".bin": self._work.size(_TOKENS),
            ".idx": index_size(num_documents, num_documents),
            ".words": ceil_div(self.num_tokens, 8),
        }
        self._work.commit({"suffixes": sync_staged(staged, sizes), "note": note}, last=True)
        self.place()

    def place(self) -> None:
        """Rename the complete files to their final names; also finishes what a killed job began.

        Raises:
            OSError: the disk failed.
        """
        assert self._work.progress is not None
        place_files(self._staged_prefix, self._prefix, self._work.progress["suffixes"])
        self._work.remove()

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None and not self.num_tokens and not self.is_placing:
            self._work.discard()
        self._work.close()

    @property
    def _staged_prefix(self) -> Path:
        return self.partial / "dataset"

    def _parse_progress(self) -> list[str]:
        """Suffixes of the complete files; empty while the files are not complete."""
        if self._work.progress is None:
            return []
        try:
            suffixes, note = self._work.progress["suffixes"], self._work.progress["note"]
            if not isinstance(note, dict) or not set(suffixes) <= set(dataset_files(self._prefix)):
                raise ValueError(f"suffixes {suffixes!r}, note {note!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"the journal in {self.partial} is damaged ({type(error).__name__}: {error}); "
                f"begin anew with {argument('restart', True)}"
            ) from error
        return list(suffixes)

    def _write_index(self, path: Path) -> None:
        lengths_N = self._work.read(_LENGTHS, _LENGTH_TYPE)
        write_index(path, self._token_type.itemsize, lengths_N)

    def _write_word_starts(self, path: Path) -> None:
        """Pack one byte per token into one bit per token, as csrc/word_starts.h describes."""
        starts_T = self._work.read(_WORD_STARTS, np.uint8)
        with path.open("wb") as file:
            for begin in range(0, len(starts_T), _STARTS_AT_A_TIME):
                some = starts_T[begin : begin + _STARTS_AT_A_TIME]
                # Not `tofile`, which loses its buffer without an error when the disk is full.
                file.write(np.packbits(some, bitorder="little").data)
