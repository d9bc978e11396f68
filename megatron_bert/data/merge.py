"""Joining datasets into one: the work behind tools/merge_datasets.py."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_bert.command_line.arguments import argument
from megatron_bert.data.field_counts import FieldCounts
from megatron_bert.data.index_file import MappedIndices, write_joined_index
from megatron_bert.data.indexed_dataset import (
    DatasetInfo,
    SourceFile,
    check_tokenizer,
    prefix_of,
    write_dataset_info,
)
from megatron_bert.data.merge_parts import MergePart, check_shard_sets, open_part
from megatron_bert.data.placing import StagedDataset, check_name
from megatron_bert.data.shards import in_shard_order
from megatron_bert.data.word_starts import write_joined_word_starts
from megatron_bert.errors import DataError
from megatron_bert.files import StrPath
from megatron_bert.progress_bar import ProgressBar

_BLOCK_BYTES = 1 << 26
# Errors of a filesystem that cannot copy within itself, or not between these two places.
_CANNOT_COPY_INSIDE = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

# Fields that must be equal in all parts, although they may be numbers.
_COMMON_FIELDS = {"tokenizer_hash", "vocab_size", "version"}


@dataclass(frozen=True)
class MergeSummary:
    """What was joined.

    Attributes:
        inputs: prefixes, in the order in which they were joined.
        documents: of the result.
        tokens: of the result.
        without_info: inputs without a `.json`; if there are any, the result has none.
        without_word_starts: inputs without a `.words`; if there are any, the result has none.
    """

    inputs: tuple[Path, ...]
    documents: int
    tokens: int
    without_info: tuple[Path, ...]
    without_word_starts: tuple[Path, ...]


def merge_datasets(
    inputs: Sequence[Path], output_prefix: StrPath, *, overwrite: bool = False
) -> MergeSummary:
    """Join datasets; the files equal those of preprocessing all their texts at once, in order.

    Sequences and documents keep their order and boundaries. Memory is bounded, whatever the sizes.

    Args:
        inputs: prefixes (or `.idx` or `.bin` files), in order. The shards of a set
            (`S-00000-of-00004` and so on) are taken in order of number at the first one's place.
        output_prefix: P of `P.bin`, `P.idx` and, where all inputs have them, `P.json`, `P.words`.
        overwrite: whether an existing dataset is replaced.

    Raises:
        DataError: an input cannot be used or does not match the others, shards are missing, or the
            result cannot be written. Nothing is left behind then.
    """
    prefixes = in_shard_order([prefix_of(path, argument("inputs")) for path in inputs])
    _check_places(prefixes, Path(output_prefix))
    check_name(output_prefix)
    output_prefix = Path(output_prefix)
    parts = [open_part(prefix) for prefix in prefixes]
    check_shard_sets(parts)
    _check_token_types(parts)
    has_words = all(part.word_starts is not None for part in parts)
    if has_words:
        _check_dictionaries(parts)
    info = _merged_info(parts, has_words=has_words)
    with StagedDataset(output_prefix, overwrite=overwrite) as staged, _named(output_prefix):
        suffixes = (".bin", ".idx", ".words") if has_words else (".bin", ".idx")
        staged.check_space(
            sum(part.file(suffix).stat().st_size for part in parts for suffix in suffixes)
        )
        _write_tokens(parts, staged.path(".bin"))
        token_bytes = parts[0].dataset.token_bytes
        indices = MappedIndices([part.file(".idx") for part in parts])
        write_joined_index(staged.path(".idx"), token_bytes, indices)
        if has_words:
            write_joined_word_starts(
                staged.path(".words"),
                [(part.file(".words"), part.dataset.num_tokens) for part in parts],
            )
        if info is not None:
            write_dataset_info(staged.prefix, info)
        for part in parts:
            part.check_unchanged()
        staged.place()
    return MergeSummary(
        inputs=tuple(prefixes),
        documents=sum(part.dataset.num_documents for part in parts),
        tokens=sum(part.dataset.num_tokens for part in parts),
        without_info=tuple(part.prefix for part in parts if part.info is None),
        without_word_starts=tuple(part.prefix for part in parts if part.word_starts is None),
    )


def merge_infos(infos: Sequence[DatasetInfo]) -> DatasetInfo:
    """Describe the dataset that joins the described ones: numbers summed, lists concatenated.

    Raises:
        ValueError: they differ in something that a dataset has one of, such as its tokenizer.
    """
    merged = {
        field.name: _merge_values(field.name, [getattr(info, field.name) for info in infos])
        for field in fields(DatasetInfo)
        # One tokenizer may have had several names, and a merged dataset is not a shard.
        if field.name not in ("tokenizer_name", "shard_set")
    }
    return DatasetInfo(tokenizer_name=infos[0].tokenizer_name, **merged)


def _merge_values(name: str, values: Sequence[Any]) -> Any:
    first = values[0]
    if name == "sources":
        return _join_sources([source for value in values for source in value])
    if name == "fields":
        counts = FieldCounts()
        for value in values:
            counts.merge(FieldCounts.from_json(value))
        return counts.to_json()
    if name not in _COMMON_FIELDS and isinstance(first, int):
        return sum(values)
    for value in values:
        if value != first:
            raise ValueError(f"{name} is {first!r} in one and {value!r} in another")
    return first


def _join_sources(sources: Sequence[SourceFile]) -> tuple[SourceFile, ...]:
    """List the files in order, whole files first.

    The N-way parts of files become whole files again if all of them are there, in order.
    """
    joined = [source for source in sources if source.part is None]
    of_count: dict[str, list[SourceFile]] = {}
    for source in sources:
        if source.part is not None:
            of_count.setdefault(source.part.partition("/")[2], []).append(source)
    for count, parts in of_count.items():
        first = [replace(source, part=None) for source in parts if source.part == f"0/{count}"]
        expected = [
            replace(source, part=f"{number}/{count}")
            for number in range(int(count))
            for source in first
        ]
        joined += first if parts == expected else parts
    return tuple(joined)


def _check_places(prefixes: Sequence[Path], output_prefix: Path) -> None:
    if output_prefix.resolve() in [prefix.resolve() for prefix in prefixes]:
        raise DataError(
            f"{argument('output_prefix')} {output_prefix} is one of the inputs; choose another, so "
            f"that the input stays as it is"
        )


def _check_token_types(parts: Sequence[MergePart]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.dataset.token_bytes != first.dataset.token_bytes:
            raise DataError(
                f"dataset {first.prefix} has tokens of {first.dataset.token_bytes} bytes and "
                f"{part.prefix} of {part.dataset.token_bytes}, so they are not of one tokenizer; "
                f"make one of them anew with the other's (tools/preprocess_data.py --tokenizer)"
            )


def _check_dictionaries(parts: Sequence[MergePart]) -> None:
    """Refuse words that different dictionaries found, or may have found."""
    first = parts[0]
    for part in parts[1:]:
        if part.dictionary != first.dictionary:
            raise DataError(
                f"{_origin_of_words(first)}, but {_origin_of_words(part)}; make one of them anew "
                f"with the other's dictionary, or remove one .words, so that the merged dataset "
                f"has none"
            )


def _origin_of_words(part: MergePart) -> str:
    if part.dictionary is None:
        return f"what found the words of {part.file('.words')} is not known"
    return f"the words of {part.file('.words')} were found by {part.dictionary}"


def _merged_info(parts: Sequence[MergePart], *, has_words: bool) -> DatasetInfo | None:
    """The merged description; None unless every part has one. Existing ones must agree anyway."""
    known = [
        # If the words are not joined, their dictionaries may differ.
        (part.prefix, part.info if has_words else replace(part.info, word_boundaries=None))
        for part in parts
        if part.info is not None
    ]
    if not known:
        return None
    (first_prefix, first), *others = known
    for prefix, info in others:
        name = f"{info.tokenizer_name}, which made {prefix},"
        remedy = "make one of them anew with the other's tokenizer"
        check_tokenizer(first_prefix, first, name, info.tokenizer_hash, remedy)
        try:
            merge_infos([first, info])
        except ValueError as error:
            raise DataError(
                f"datasets {first_prefix} and {prefix} were not made alike ({error}); make one of "
                f"them anew with the other's options"
            ) from error
    return merge_infos([info for _, info in known]) if len(known) == len(parts) else None


@contextmanager
def _named(output_prefix: Path) -> Iterator[None]:
    """Name the dataset in errors that occur while it is written."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"cannot make dataset {output_prefix}: {error}; free space, or mend what else this "
            "says of the host or the datasets, and merge again"
        ) from error


def _write_tokens(parts: Sequence[MergePart], path: Path) -> None:
    total = sum(part.file(".bin").stat().st_size for part in parts)
    with path.open("wb", buffering=0) as target, ProgressBar("merging", total) as progress:
        for part in parts:
            with part.file(".bin").open("rb", buffering=0) as source:
                while _copy_block(source.fileno(), target.fileno()):
                    progress.show(target.tell(), part.prefix.name)
        if target.tell() != total:
            raise OSError(errno.EIO, f"{target.tell()} bytes of {total} were copied")


def _copy_block(source: int, target: int) -> int:
    """Copy some bytes at both files' current positions; return how many, 0 at the source's end."""
    try:
        # On a filesystem that shares blocks between files, no data is copied at all.
        return os.copy_file_range(source, target, _BLOCK_BYTES)
    except OSError as error:
        if error.errno not in _CANNOT_COPY_INSIDE:
            raise
    block = memoryview(os.read(source, _BLOCK_BYTES))
    copied = len(block)
    while block:
        block = block[os.write(target, block) :]
    return copied
