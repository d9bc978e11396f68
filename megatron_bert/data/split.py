"""Divide documents into a training and a held-out part by the hash of their text.

Copies of a text fall on the same side, and when a corpus grows most documents stay on theirs.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from megatron_bert.command_line.arguments import argument
from megatron_bert.command_line.places import check_no_folder, make_folder
from megatron_bert.data.parsing import LineError, OnError, parse
from megatron_bert.data.text import DocumentReader, iterate_documents
from megatron_bert.errors import DataError
from megatron_bert.files import sync_to_disk, temporary_path


@dataclass(frozen=True)
class SplitCounts:
    """Documents of each part."""

    train: int
    held_out: int


def split_documents(
    reader: DocumentReader,
    train: Path,
    held_out: Path,
    fraction: float,
    *,
    on_error: OnError = "fail",
    overwrite: bool = False,
) -> SplitCounts:
    """Write the documents into two `.jsonl` files.

    Lines of `.jsonl` are copied as they are, with all keys. A document of another kind of file
    becomes `{"text": ...}`, with the reader's `json_key` as the key.

    Args:
        reader: the files; they are read twice.
        train: file for the documents to train on.
        held_out: file for the `fraction` (at least one document) with the smallest hashes.
        fraction: share of the documents to hold out, above 0 and below 1.
        on_error: what to do at a line that cannot be used.
        overwrite: whether existing files are replaced.

    Raises:
        UserError: a line cannot be used, there are fewer than two different documents, the
            fraction is out of range, or a file cannot be written or already exists.
    """
    if not 0.0 < fraction < 1.0:
        raise DataError(
            f"a held-out fraction of {fraction} is not between 0 and 1; give one that is, e.g. 0.05"
        )
    _check_places(reader, train, held_out, overwrite)
    chosen = _smallest_hashes(reader, fraction, on_error)
    partial_train, partial_held_out = temporary_path(train), temporary_path(held_out)
    try:
        with partial_train.open("wb") as to_train, partial_held_out.open("wb") as to_hold_out:
            counts = _divide(reader, chosen, to_train, to_hold_out)
        sync_to_disk(partial_train)
        sync_to_disk(partial_held_out)
        # The larger part last: once it is in place, both are.
        partial_held_out.replace(held_out)
        partial_train.replace(train)
    except OSError as error:
        raise DataError(
            f"cannot write {train} and {held_out}: {error.strerror}; free space, or name others"
        ) from error
    finally:
        for path in (partial_train, partial_held_out):
            with suppress(OSError):
                path.unlink()
    return counts


def _check_places(reader: DocumentReader, train: Path, held_out: Path, overwrite: bool) -> None:
    places = [path.resolve() for path in (train, held_out, *reader.paths)]
    if train.resolve() in places[1:] or held_out.resolve() in places[2:]:
        raise DataError(
            f"{train} and {held_out} must be two files, and none of the input; name others"
        )
    for place in (train, held_out):
        check_no_folder(place)
        if place.suffix != ".jsonl":
            raise DataError(
                f"{place}: lines of JSON are written, and other names are read as other kinds of "
                f"files; give a name that ends in .jsonl, e.g. {_as_jsonl(place)}"
            )
        if place.exists() and not overwrite:
            raise DataError(
                f"{place} exists already, and a model may have been trained on what it leaves out; "
                f"choose another name, or replace it with {argument('overwrite', True)}"
            )
    for place in (train, held_out):
        make_folder(place)


def _as_jsonl(place: Path) -> Path:
    """The name with its suffixes of compression and format replaced by `.jsonl`."""
    if place.suffix in (".gz", ".zst"):
        place = place.with_suffix("")
    return place.with_suffix(".jsonl")


def _smallest_hashes(reader: DocumentReader, fraction: float, on_error: OnError) -> set[int]:
    """Hashes of the texts to hold out."""
    hashes = {_hash(text) for text in iterate_documents(reader, on_error) if text}
    if len(hashes) < 2:
        raise DataError(
            f"{', '.join(map(str, reader.paths))}: {len(hashes)} different document(s), too few "
            "to hold one out; give more text, one document a line"
        )
    count = min(len(hashes) - 1, max(1, round(fraction * len(hashes))))
    return set(heapq.nsmallest(count, hashes))


def _divide(
    reader: DocumentReader, chosen: Set[int], train: BinaryIO, held_out: BinaryIO
) -> SplitCounts:
    """Write each document to its side; `chosen` are the hashes of those to hold out."""
    all_documents = num_held_out = 0
    for document in reader:
        try:
            text = parse(document, reader.json_key).text
        except LineError:
            # Reported when the hashes were computed.
            continue
        if not text:
            continue
        is_held_out = _hash(text) in chosen
        all_documents += 1
        num_held_out += is_held_out
        line = document.data
        if not document.json:
            line = json.dumps({reader.json_key: text}, ensure_ascii=False).encode()
        (held_out if is_held_out else train).write(line + b"\n")
    return SplitCounts(train=all_documents - num_held_out, held_out=num_held_out)


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())
