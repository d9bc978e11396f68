from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_bert.data.word_starts import write_joined_word_starts


@pytest.mark.faults
@pytest.mark.parametrize("missing", [1, 50, 4095, 4097])
def test_a_disk_that_fills_up_while_bits_are_joined_is_an_error(
    tmp_path: Path, missing: int
) -> None:
    resource = pytest.importorskip("resource")
    (tmp_path / "a.words").write_bytes(np.full(5000, 0b0101, dtype=np.uint8).tobytes())
    parts = [(tmp_path / "a.words", 39_997)] * 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores SIGXFSZ.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 - missing, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_joined_word_starts(tmp_path / "b.words", parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    write_joined_word_starts(tmp_path / "b.words", parts)
    assert (tmp_path / "b.words").stat().st_size == 10_000
