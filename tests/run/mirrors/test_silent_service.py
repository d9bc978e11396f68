"""A service that does not answer changes no run."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.config.schema import Config
from tests.run.mirrors.support import losses_and_marks, train
from tests.run.mirrors.wandb_stand_in import of_kind, read_told, stand_in, tell_again
from tests.training.runs import steps_of

EXACT = ("loss", "grad_norm", "batch_hash", "consumed_rows")


@pytest.fixture
def silent_service() -> Iterator[str]:
    """Address of a service that accepts and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.faults
def test_a_service_that_never_answers_changes_no_loss_and_delays_no_step(
    tiny_run: Callable[..., Config], tmp_path: Path, silent_service: str
) -> None:
    plain, _ = train(tiny_run("plain"), tmp_path)
    config = tiny_run("silent", log={"wandb": {"mode": "online"}, "tensorboard": True})
    lines, output = train(config, tmp_path, WANDB_BASE_URL=silent_service, WANDB_API_KEY="a" * 40)

    def exact(lines: list[dict[str, Any]]) -> dict[int, list[object]]:
        return {step: [line[key] for key in EXACT] for step, line in steps_of(lines).items()}

    def seconds(lines: list[dict[str, Any]]) -> float:
        return sum(line["step_seconds"] for line in steps_of(lines).values())

    assert exact(lines) == exact(plain)
    assert seconds(lines) < seconds(plain) + 5.0
    assert (config.run.directory / "FINISHED").exists()
    assert "wandb may lack lines of metrics.jsonl" in output
    assert {step for step, *_ in losses_and_marks(config.run.directory)} == set(range(1, 13))


@pytest.mark.faults
def test_a_service_that_stops_answering_holds_no_step_and_the_rest_is_sent_later(
    tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    plain, _ = train(tiny_run("plain"), tmp_path)
    config = tiny_run("cut", log={"wandb": {"mode": "online"}})
    lines, output = train(config, tmp_path, **stand_in(tmp_path), BLOCKS_AT="5")
    assert [line["loss"] for line in lines if "loss" in line] == [
        line["loss"] for line in plain if "loss" in line
    ]
    assert "python -P -m megatron_bert.run.mirrors" in output
    before = {values["at"] for values in of_kind("log", read_told(tmp_path))}
    assert before == {1, 2, 3, 4}
    told, _ = tell_again(tmp_path, config.run.directory)
    assert {values["at"] for values in of_kind("log", told)} == set(range(5, 13))
