"""The datasets that a merge joins, opened and checked one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _megatron_bert_core import IndexedDataset, WordStarts

from megatron_bert.command_line.arguments import argument
from megatron_bert.data.indexed_dataset import (
    DatasetInfo,
    check_counts,
    dataset_file,
    open_dataset,
    open_word_starts,
    read_dataset_info,
)
from megatron_bert.data.shards import shard_set
from megatron_bert.errors import DataError


@dataclass(frozen=True)
class MergePart:
    """One of the datasets to be joined.

    Attributes:
        prefix: P of its files.
        dataset: `P.bin` and `P.idx`.
        info: `P.json`; None if there is none.
        word_starts: `P.words`; None if there is none.
    """

    prefix: Path
    dataset: IndexedDataset
    info: DatasetInfo | None
    word_starts: WordStarts | None

    def file(self, suffix: str) -> Path:
        """Path of the file with that suffix, which may be absent."""
        return dataset_file(self.prefix, suffix)

    @property
    def dictionary(self) -> str | None:
        """The dictionary that found the words of `P.words`; None if no `P.json` names it."""
        return None if self.info is None else self.info.word_boundaries

    def check_unchanged(self) -> None:
        """Check after the merge that no file changed during it.

        Raises:
            RuntimeError: a file has changed since it was opened.
            DataError: `P.json` can no longer be read.
        """
        self.dataset.check_unchanged()
        if self.word_starts is not None:
            self.word_starts.check_unchanged()
        if read_dataset_info(self.prefix) != self.info:
            raise RuntimeError(f"{self.file('.json')}: was modified while in use")


def open_part(prefix: Path) -> MergePart:
    """Open a dataset that is to be joined to others.

    Raises:
        DataError: it cannot be used, or its files do not belong together.
    """
    dataset = open_dataset(prefix)
    info = read_dataset_info(prefix)
    if info is not None:
        check_counts(prefix, info, dataset, remedy="copy the right .json, or remove it")
    word_starts = open_word_starts(prefix, dataset.num_tokens, remedy="copy it again, or remove it")
    return MergePart(prefix, dataset, info, word_starts)


def check_shard_sets(parts: Sequence[MergePart]) -> None:
    """Refuse shards of one set's name but different inputs: texts would be lost or duplicated.

    Raises:
        DataError: two shards of one set's name were made from different lists of files, or by
            versions that divide the files differently.
    """
    first_of_set: dict[str, MergePart] = {}
    for part in parts:
        name = shard_set(part.prefix)
        if name is None or part.info is None:
            continue
        first = first_of_set.setdefault(name, part)
        assert first.info is not None
        if part.info.shard_set != first.info.shard_set:
            raise DataError(
                f"{first.prefix} and {part.prefix} are not shards of one input: the files of "
                f"{argument('inputs')}, their order or the N of {argument('shard')} K/N differed "
                f"(shard_set in {first.file('.json')} and {part.file('.json')}); make one of "
                f"them anew with the other's"
            )
