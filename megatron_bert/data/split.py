"""Divide documents into a training and a held-out part by the hash of their text.

A text that stands twice falls on one side, and a longer corpus keeps most documents where they
were.
"""

from __future__ import annotations

import heapq
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megatron_bert.config.errors import DataError
from megatron_bert.config.places import check_place
from megatron_bert.data.parsing import OnError
from megatron_bert.data.text import DocumentReader, iterate_documents, iterate_parsed
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
    """Write the documents into two `.jsonl` files, lines of `.jsonl` as they are, with all keys.

    Of other kinds of files a document becomes `{"text": ...}`, under the reader's `json_key`.

    Args:
        reader: the files; they are read twice.
        train: file of the documents to train on.
        held_out: file of the `fraction` (at least one document) with the smallest hashes.
        fraction: share of the documents to hold out, above 0 and below 1.
        on_error: what to do at a line that cannot be used.
        overwrite: whether files that are there already are replaced.

    Raises:
        UserError: a line cannot be used, there are fewer than two different documents, the
            fraction is out of range, or a file cannot be written or is there already.
    """
    if not 0.0 < fraction < 1.0:
        raise DataError(
            f"a held-out fraction of {fraction} is not between 0 and 1; give one that is, e.g. 0.05"
        )
    places = [path.resolve() for path in (train, held_out, *reader.paths)]
    if train.resolve() in places[1:] or held_out.resolve() in places[2:]:
        raise DataError(
            f"{train} and {held_out} must be two files, and none of the input; name others"
        )
    for place in (train, held_out):
        check_place(place)
        if place.is_dir():
            raise DataError(f"cannot write {place}: it is a folder; name a file in it")
        if place.exists() and not overwrite:
            raise DataError(
                f"{place} exists already, and a model may have been trained on what it leaves out; "
                "choose another name, or replace it with --overwrite"
            )
    hashes = {_hash(text) for text in iterate_documents(reader, on_error) if text}
    if len(hashes) < 2:
        raise DataError(
            f"{', '.join(map(str, reader.paths))}: {len(hashes)} different document(s), too few "
            "to hold one out; give more text, one document a line"
        )
    count = min(len(hashes) - 1, max(1, round(fraction * len(hashes))))
    chosen = set(heapq.nsmallest(count, hashes))
    kept = {False: 0, True: 0}
    staged = {False: temporary_path(train), True: temporary_path(held_out)}
    try:
        with (
            staged[False].open("wb") as train_file,
            staged[True].open("wb") as held_out_file,
        ):
            for document, text in iterate_parsed(reader, on_error):
                if not text:
                    continue
                side = _hash(text) in chosen
                kept[side] += 1
                line = document.data
                if not document.json:
                    line = json.dumps({reader.json_key: text}, ensure_ascii=False).encode()
                (held_out_file if side else train_file).write(line + b"\n")
        for path in staged.values():
            sync_to_disk(path)
        # The larger part last: where it stands, both do.
        staged[True].replace(held_out)
        staged[False].replace(train)
    except OSError as error:
        raise DataError(
            f"cannot write {train} and {held_out}: {error.strerror}; name others"
        ) from error
    finally:
        for path in staged.values():
            with suppress(OSError):
                path.unlink()
    return SplitCounts(train=kept[False], held_out=kept[True])


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())
