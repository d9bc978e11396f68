"""Small datasets and batches for tests."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _megatron_bert_core import BatchAssembler, IndexedDataset, RowPlan
from numpy.typing import NDArray

from megatron_bert.data.index_file import write_index

VOCAB_SIZE = 100
PAD, CLS, SEP, MASK, EOD = range(5)
SPECIAL_IDS = (PAD, CLS, SEP, MASK, EOD)
TYPE_CODES = {2: 8, 4: 4}


def index_bytes(
    lengths: Sequence[int],
    boundaries: Sequence[int],
    token_bytes: int = 4,
    *,
    magic: bytes = b"MMIDIDX\0\0",
    version: int = 1,
    type_code: int | None = None,
    counts: tuple[int, int] | None = None,
    offsets: Sequence[int] | None = None,
) -> bytes:
    """A .idx file, field by field as Megatron-LM's format has them."""
    if offsets is None:
        offsets = [sum(lengths[:number]) * token_bytes for number in range(len(lengths))]
    num_sequences, num_boundaries = counts or (len(lengths), len(boundaries))
    return (
        magic
        + struct.pack("<Q", version)
        + struct.pack("<B", TYPE_CODES[token_bytes] if type_code is None else type_code)
        + struct.pack("<QQ", num_sequences, num_boundaries)
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(offsets)}q", *offsets)
        + struct.pack(f"<{len(boundaries)}q", *boundaries)
    )


def write_sequences(
    prefix: Path,
    sequences: Sequence[Sequence[int]],
    boundaries: Sequence[int],
    token_bytes: int = 4,
) -> None:
    """A dataset whose documents are several sequences, without the writer under test."""
    lengths = [len(sequence) for sequence in sequences]
    Path(f"{prefix}.idx").write_bytes(index_bytes(lengths, boundaries, token_bytes))
    tokens = [token for sequence in sequences for token in sequence]
    code = {2: "H", 4: "i"}[token_bytes]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(tokens)}{code}", *tokens))


def write_documents(
    prefix: Path, documents: Sequence[Sequence[int] | NDArray[np.int32]], token_bytes: int = 4
) -> IndexedDataset:
    arrays = [np.asarray(document, dtype=np.int32) for document in documents]
    tokens = np.concatenate([np.empty(0, dtype=np.int32), *arrays])
    tokens.astype({2: "<u2", 4: "<i4"}[token_bytes]).tofile(f"{prefix}.bin")
    lengths = np.array([len(document) for document in arrays], dtype=np.int32)
    write_index(Path(f"{prefix}.idx"), token_bytes, lengths)
    return IndexedDataset(str(prefix))


def text_documents(
    lengths: Sequence[int], seed: int = 0, vocab_size: int = VOCAB_SIZE
) -> list[NDArray[np.int32]]:
    """Documents of random ids that are not special."""
    random = np.random.default_rng(seed)
    return [
        random.integers(len(SPECIAL_IDS), vocab_size, length, dtype=np.int32) for length in lengths
    ]


def make_assembler(
    datasets: Sequence[IndexedDataset], plan: RowPlan, **changed: object
) -> BatchAssembler:
    empty = np.empty(0, dtype=np.uint8)
    options: dict[str, object] = {
        "cls_id": CLS,
        "sep_id": SEP,
        "mask_id": MASK,
        "pad_id": PAD,
        "vocab_size": VOCAB_SIZE,
        "special_ids": np.array(SPECIAL_IDS, dtype=np.int32),
        "first_class": empty,
        "last_class": empty,
        "starts_word": empty,
        "unit": "token",
        "max_ngram": 3,
        "mask_ratio": 0.8,
        "random_ratio": 0.1,
        "seed": 1,
    }
    stages = plan.stage_of(plan.num_rows - 1)[0] + 1
    probabilities = [changed.pop("probability", 0.15)] * stages
    return BatchAssembler(  # type: ignore[call-overload]
        list(datasets), plan, **{"probabilities": probabilities, **options, **changed}
    )


@dataclass(frozen=True)
class Filled:
    tokens_BS: NDArray[np.int32]
    positions_BS: NDArray[np.int32]
    masked_BM: NDArray[np.int32]
    labels_BM: NDArray[np.int32]
    weights_BM: NDArray[np.float32]
    batch_hash: int

    def arrays(self) -> tuple[NDArray[np.int32], ...]:
        return (self.tokens_BS, self.positions_BS, self.masked_BM, self.labels_BM)


def fill(
    assembler: BatchAssembler, rows: Sequence[int], seq_length: int, masked_slots: int
) -> Filled:
    """Fill arrays that hold garbage, so that what is left unwritten shows."""
    rows_B = np.array(rows, dtype=np.int64)
    tokens_BS = np.full((len(rows), seq_length), -7, dtype=np.int32)
    positions_BS = np.full_like(tokens_BS, -7)
    masked_BM = np.full((len(rows), masked_slots), -7, dtype=np.int32)
    labels_BM = np.full_like(masked_BM, -7)
    weights_BM = np.full((len(rows), masked_slots), np.nan, dtype=np.float32)
    batch_hash = assembler.fill(rows_B, tokens_BS, positions_BS, masked_BM, labels_BM, weights_BM)
    return Filled(tokens_BS, positions_BS, masked_BM, labels_BM, weights_BM, batch_hash)


def unmasked_row(
    datasets: Sequence[IndexedDataset], plan: RowPlan, row: int, seq_length: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Tokens [S] and positions [S] of a row before masking, put together in plain Python."""
    tokens: list[int] = []
    positions: list[int] = []
    for corpus, document, offset, length in plan.segments(row):
        text = datasets[corpus].document(document)[offset : offset + length]
        tokens += [CLS, *text, SEP]
        positions += range(length + 2)
    free = seq_length - len(tokens)
    tokens += [PAD] * free
    positions += range(free)
    return np.array(tokens, dtype=np.int32), np.array(positions, dtype=np.int32)
