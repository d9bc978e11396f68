"""Datasets on disk: PREFIX.bin and PREFIX.idx (Megatron-LM's format), PREFIX.json and .words."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _megatron_bert_core import IndexedDataset, WordStarts

from megatron_bert.data.field_counts import FieldCounts
from megatron_bert.errors import DataError
from megatron_bert.files import write_atomically

INFO_VERSION = 1


@dataclass(frozen=True)
class SourceFile:
    """A text file that went into a dataset.

    Attributes:
        path: as it was given.
        bytes: its size.
        sha256: of its bytes, in hex; None where it was not computed.
        part: "K/N" if the dataset has only the documents whose running number in the input is K
            modulo N; None: all documents.
    """

    path: str
    bytes: int
    sha256: str | None = None
    part: str | None = None


@dataclass(frozen=True)
class DatasetInfo:
    """What PREFIX.json says: where a dataset comes from.

    Attributes:
        tokenizer_hash: SHA-256 of the tokenizer's file, in hex.
        tokenizer_name: that file's name.
        vocab_size: number of pieces of the tokenizer.
        documents: number of documents.
        tokens: number of tokens.
        sources: the text files, in order.
        skipped_lines: lines left out because they could not be used.
        empty_documents: documents left out because they held no text.
        duplicate_documents: documents left out because their text had occurred before.
        normalization: the Unicode normalization form of the text, or "none".
        fields: documents and tokens by the values of fields, as `FieldCounts.to_json` gives them.
        word_boundaries: the dictionary, with its packages' versions, that found the words of
            PREFIX.words; None if there is no such file.
        shard_set: for a shard, the SHA-256, in hex, of what the shards of one set have in common:
            their number and the whole list of input files. None for a dataset that is not a shard,
            or a shard written by an older version.
        version: of the sidecar's layout.
    """

    tokenizer_hash: str
    tokenizer_name: str
    vocab_size: int
    documents: int
    tokens: int
    sources: tuple[SourceFile, ...]
    skipped_lines: int = 0
    empty_documents: int = 0
    duplicate_documents: int = 0
    normalization: str = "none"
    fields: dict[str, Any] = field(default_factory=dict)
    word_boundaries: str | None = None
    shard_set: str | None = None
    version: int = INFO_VERSION


def dataset_file(prefix: str | Path, suffix: str) -> Path:
    """Path of a dataset's file with a suffix such as `.idx`."""
    # Not Path.with_suffix: a prefix may have dots of its own.
    return Path(f"{prefix}{suffix}")


def prefix_of(path: Path, named_by: str) -> Path:
    """Accept `P.idx` and `P.bin` as P, so that a shell can complete or list a folder's datasets.

    Args:
        path: as the user gave it.
        named_by: the option or argument it was given with, for the error message.

    Raises:
        DataError: the path names no dataset.
    """
    name = path.stem if path.suffix in (".idx", ".bin") else path.name
    if name in ("", "..", ".idx", ".bin"):
        raise DataError(f"{named_by} {path}: names no dataset; give a prefix, as data/train")
    return path.with_name(name)


def open_dataset(prefix: str | Path) -> IndexedDataset:
    """Open PREFIX.bin and PREFIX.idx for reading.

    Raises:
        DataError: a file is missing or damaged, or the two do not belong together.
    """
    try:
        for path in (dataset_file(prefix, ".idx"), dataset_file(prefix, ".bin")):
            if not path.is_file():
                raise DataError(
                    f"dataset {prefix}: there is no file {path}; make the dataset with "
                    f"tools/preprocess_data.py, or correct the prefix"
                )
        return IndexedDataset(str(prefix))
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"dataset {prefix} cannot be used: {error}; copy it again, or make it anew with "
            f"tools/preprocess_data.py"
        ) from error


def read_dataset_info(prefix: str | Path) -> DatasetInfo | None:
    """Read PREFIX.json; None if there is none (a dataset that Megatron-LM wrote).

    Raises:
        DataError: the file cannot be read or is not such a sidecar.
    """
    path = dataset_file(prefix, ".json")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; restore it, or remove it") from error
    try:
        return _parse_info(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{path} does not describe a dataset ({error}); make the dataset anew with "
            f"tools/preprocess_data.py, or remove the file"
        ) from error


def write_dataset_info(prefix: str | Path, info: DatasetInfo) -> None:
    """Write PREFIX.json, whole or not at all.

    Raises:
        DataError: the folder cannot be written to.
    """
    path = dataset_file(prefix, ".json")
    text = json.dumps(asdict(info), ensure_ascii=False, indent=2) + "\n"
    try:
        write_atomically(path, text)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; choose another prefix") from error


def open_word_starts(prefix: str | Path, num_tokens: int, remedy: str) -> WordStarts | None:
    """Open PREFIX.words of a dataset of `num_tokens` tokens; None if there is none.

    Raises:
        DataError: it cannot be read, or is for another number of tokens; with the remedy.
    """
    path = dataset_file(prefix, ".words")
    try:
        return WordStarts(str(path), num_tokens) if path.exists() else None
    except (RuntimeError, OSError) as error:
        raise DataError(f"{error}; {remedy}") from error


def check_counts(
    prefix: str | Path, info: DatasetInfo, dataset: IndexedDataset, remedy: str
) -> None:
    """Refuse a PREFIX.json whose counts differ from those of PREFIX.idx.

    Raises:
        DataError: they differ, so the files are of different datasets; with the remedy.
    """
    if (info.documents, info.tokens) != (dataset.num_documents, dataset.num_tokens):
        raise DataError(
            f"{prefix}.json tells of {info.documents:,} documents and {info.tokens:,} tokens, but "
            f"{prefix}.idx of {dataset.num_documents:,} and {dataset.num_tokens:,}: they are of "
            f"different datasets; {remedy}"
        )


def check_tokenizer(
    prefix: str | Path, info: DatasetInfo, name: str, tokenizer_hash: str, remedy: str
) -> None:
    """Refuse a dataset that was not made with a certain tokenizer.

    Args:
        prefix: of the dataset.
        info: its PREFIX.json.
        name: of the expected tokenizer.
        tokenizer_hash: SHA-256 of its file, in hex.
        remedy: what the message ends with.

    Raises:
        DataError: another tokenizer made the dataset; with the remedy.
    """
    if info.tokenizer_hash != tokenizer_hash:
        raise DataError(
            f"dataset {prefix} was made with tokenizer {info.tokenizer_name} of SHA-256 "
            f"{info.tokenizer_hash}, but {name} has {tokenizer_hash}; {remedy}"
        )


def _parse_info(fields: dict[str, Any]) -> DatasetInfo:
    if fields["version"] != INFO_VERSION:
        raise ValueError(f"version {fields['version']!r}, only {INFO_VERSION} is known")
    if not isinstance(fields["tokenizer_hash"], str):
        raise TypeError("tokenizer_hash is not a string")
    for name in ("vocab_size", "documents", "tokens"):
        if not isinstance(fields[name], int):
            raise TypeError(f"{name} is not a whole number")
    FieldCounts.from_json(fields.get("fields", {}))
    sources = tuple(SourceFile(**source) for source in fields["sources"])
    return DatasetInfo(**{**fields, "sources": sources})
