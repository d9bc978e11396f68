"""The index that Python writes is the one the C++ core reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _megatron_bert_core import IndexedDataset

from megatron_bert.data import index_file
from megatron_bert.data.index_file import write_index
from tests.core.support import index_bytes


@pytest.mark.parametrize("token_bytes", [2, 4])
@pytest.mark.parametrize("boundaries", [None, [0, 2, 2, 5, 6]])
def test_the_index_is_the_one_that_the_format_describes(
    tmp_path: Path, token_bytes: int, boundaries: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_file, "_ITEMS_AT_A_TIME", 4)
    lengths = [3, 0, 1, 7, 2, 5]
    given = None if boundaries is None else np.array(boundaries)
    expected_boundaries = boundaries or list(range(7))
    write_index(tmp_path / "a.idx", token_bytes, np.array(lengths, dtype=np.int32), given)
    expected = index_bytes(lengths, expected_boundaries, token_bytes)
    assert (tmp_path / "a.idx").read_bytes() == expected
    (tmp_path / "a.bin").write_bytes(bytes(sum(lengths) * token_bytes))
    assert IndexedDataset(str(tmp_path / "a")).num_tokens == sum(lengths)


def test_an_empty_set_has_an_index_of_42_bytes(tmp_path: Path) -> None:
    write_index(tmp_path / "a.idx", 4, np.empty(0, dtype=np.int32))
    assert (tmp_path / "a.idx").stat().st_size == 42
