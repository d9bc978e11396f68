"""What a job leaves behind however it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from megatron_bert.checkpoint.saver import CheckpointSaver
from megatron_bert.config.schema import Config
from tests.distributed_harness import run_ranks
from tests.training.runs import train


def _train_and_fail_to_close(config: Config) -> list[str]:
    close = CheckpointSaver.close

    def fail(saver: CheckpointSaver) -> None:
        close(saver)
        raise RuntimeError("the saver cannot be closed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointSaver, "close", fail)
        with pytest.raises(RuntimeError, match="the saver cannot be closed"):
            train(config)
    return [thread.name for thread in threading.enumerate()]


def test_what_cannot_be_closed_keeps_nothing_else_open(tiny_run: Callable[..., Config]) -> None:
    (names,) = run_ranks(1, _train_and_fail_to_close, tiny_run())
    assert not [name for name in names if name.startswith("read-ahead")]
