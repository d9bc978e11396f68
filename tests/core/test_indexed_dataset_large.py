"""More tokens than 32 bits count, in files that take no room on the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _megatron_bert_core import IndexedDataset, RowPlan, epoch_rows

from megatron_bert.data.index_file import write_index
from tests.core.support import fill, make_assembler

LONGEST = 2**31 - 1
LENGTHS = [LONGEST, 3, LONGEST, 5, 2]
# Documents of one sequence, of one, of two (together beyond 2^31 tokens) and of one.
BOUNDARIES = [0, 1, 2, 4, 5]
MARKS = {LONGEST - 1: 11, LONGEST: 12, LONGEST + 1: 13, sum(LENGTHS[:3]): 14, sum(LENGTHS[:4]): 15}
SEQ_LENGTH = 1 << 20


@pytest.fixture(params=[2, 4], ids=["uint16", "int32"], scope="module")
def large_set(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2^32 tokens and some, all 0 but for MARKS."""
    token_bytes: int = request.param
    prefix = tmp_path_factory.mktemp("large") / "set"
    lengths = np.array(LENGTHS, dtype=np.int32)
    write_index(Path(f"{prefix}.idx"), token_bytes, lengths, np.array(BOUNDARIES))
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(token_bytes * sum(LENGTHS))
        for place, token in MARKS.items():
            file.seek(token_bytes * place)
            file.write(token.to_bytes(token_bytes, "little"))
    return prefix


@pytest.mark.parametrize("mmap", [True, False])
def test_documents_beyond_two_to_the_31_tokens_are_read(large_set: Path, mmap: bool) -> None:
    dataset = IndexedDataset(str(large_set), mmap=mmap)
    assert dataset.num_tokens == sum(LENGTHS) > 2**32
    assert dataset.document_lengths().tolist() == [LONGEST, 3, LONGEST + 5, 2]
    assert dataset.document(1).tolist() == [12, 13, 0]
    assert dataset.document(3).tolist() == [15, 0]


def find_token(plan: RowPlan, document: int, place: int) -> tuple[int, int]:
    """The row and the slot in it that hold a token of a document."""
    for row in range(plan.num_rows):
        slot = 1
        for _, number, offset, length in plan.segments(row):
            if number == document and offset <= place < offset + length:
                return row, slot + place - offset
            slot += length + 2
    raise AssertionError(f"no row holds token {place} of document {document}")


@pytest.mark.parametrize("mmap", [True, False])
def test_rows_deep_inside_a_document_hold_its_tokens(large_set: Path, mmap: bool) -> None:
    dataset = IndexedDataset(str(large_set), mmap=mmap)
    plan = RowPlan([dataset], [1.0], [(SEQ_LENGTH, epoch_rows(dataset, SEQ_LENGTH))], 0)
    row, slot = find_token(plan, document=2, place=LENGTHS[2])
    filled = fill(make_assembler([dataset], plan), [row], SEQ_LENGTH, 8)
    (tokens,), (masked,), (labels,) = filled.tokens_BS, filled.masked_BM, filled.labels_BM
    tokens[masked[0]] = labels[0]
    assert tokens[slot] == 14
