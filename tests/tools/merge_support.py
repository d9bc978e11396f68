"""Datasets with sidecars, for tests of merging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bert.data.indexed_dataset import (
    DatasetInfo,
    SourceFile,
    open_dataset,
    write_dataset_info,
)
from tests.core.support import write_documents

INFO = DatasetInfo(
    tokenizer_hash="ab" * 32,
    tokenizer_name="a.model",
    vocab_size=99,
    documents=2,
    tokens=3,
    sources=(SourceFile("a.jsonl", 12),),
    skipped_lines=1,
    empty_documents=2,
)


def contents(prefix: Path) -> list[list[int]]:
    dataset = open_dataset(prefix)
    return [dataset.document(number).tolist() for number in range(dataset.num_documents)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_set(prefix: Path, documents: Sequence[Sequence[int]], **changes: Any) -> Path:
    """A dataset with a sidecar."""
    dataset = write_documents(prefix, documents)
    counts = {"documents": dataset.num_documents, "tokens": dataset.num_tokens}
    write_dataset_info(prefix, replace(INFO, **counts, **changes))
    return prefix


def write_word_starts(prefix: Path, bits: Sequence[int]) -> None:
    packed = np.packbits(np.array(bits, dtype=np.uint8), bitorder="little")
    Path(f"{prefix}.words").write_bytes(packed.tobytes())
