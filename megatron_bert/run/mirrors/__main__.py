"""Copies a run's metrics: `python -P -m megatron_bert.run.mirrors RUN_DIR PLACE`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

from megatron_bert.command_line.parser import Parser
from megatron_bert.command_line.run import run_cli
from megatron_bert.config.load import load_config
from megatron_bert.config.run_paths import RunPaths
from megatron_bert.errors import UserError
from megatron_bert.locks import FileInUseError, lock_file
from megatron_bert.run.directory import KILLED, Outcome, read_outcome
from megatron_bert.run.mirrors.following import Bookmark, FollowedFile

_LOOK_SECONDS = 1.0
# How long copying may go on after training has ended: a service that does not answer must not hold
# up a job. Less than torchrun's 30 s between the signal that it sends and the kill.
END_WITHIN_SECONDS = 20.0

logger = logging.getLogger(__name__)


class Mirror(Protocol):
    """Where metrics are copied to."""

    def write(self, record: dict[str, Any], *, begins_stage: bool) -> None:
        """Copy a line of the metrics file; `begins_stage` if it is the first line of its stage."""

    def caught_up(self) -> None:
        """Note that all lines so far were written."""

    def close(self, end: Outcome | None) -> None:
        """Finish copying, and record how the job that wrote the lines ended, if that is known."""


def main() -> None:
    """Copy what is there, or with `--follow` whatever comes until standard input ends.

    Raises:
        UserError: there is no such run, or another process copies its metrics to the same place.
    """
    args = _parser().parse_args()
    logging.basicConfig(format="%(message)s")
    ended = threading.Event()
    if args.follow is not None:
        _leave_signals_to_the_training()
        threading.Thread(target=_end_with_the_training, args=[ended], daemon=True).start()
    else:
        ended.set()
    paths = RunPaths(args.run_dir)
    logs = paths.logs
    if not logs.is_dir():
        raise UserError(f"{args.run_dir}: is no run directory; give the run.dir of a training")
    with _only_one(logs / f"{args.to}.lock", ended):
        bookmark = Bookmark(logs / f"{args.to}.json", anew=args.anew)
        mirror = _open(args.to, args.run_dir, bookmark, args.follow)
        _copy(paths.metrics, bookmark, mirror, ended)
        mirror.close(None if args.follow is None else end_of_job(args.run_dir))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -P -m megatron_bert.run.mirrors")
    parser.add_argument("run_dir", type=Path, help="a run's directory")
    parser.add_argument("to", choices=["wandb", "tensorboard"])
    parser.add_argument(
        "--follow",
        type=int,
        metavar="PID",
        help="go on until standard input ends; the training's use, whose process PID is",
    )
    parser.add_argument(
        "--anew", action="store_true", help="copy from the first line, whatever was copied before"
    )
    return parser


def _copy(path: Path, bookmark: Bookmark, mirror: Mirror, ended: threading.Event) -> None:
    stage: object = None
    with FollowedFile(path) as metrics:
        for _ in _looks(ended):
            for record in metrics.new_records():
                begins_stage = record.get("stage", stage) != stage
                stage = record.get("stage", stage)
                if bookmark.is_new(record):
                    mirror.write(record, begins_stage=begins_stage)
            mirror.caught_up()


def end_of_job(run_dir: Path) -> Outcome:
    """How the training that this process followed has ended."""
    return read_outcome(run_dir) or KILLED


def _leave_signals_to_the_training() -> None:
    """Ignore a scheduler's or terminal's signals to the whole job; training closes the input."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        # Not SIG_IGN, which wandb's own processes would inherit.
        signal.signal(number, lambda *_: None)


def _end_with_the_training(ended: threading.Event) -> None:
    """End the copy when training ends, and the process soon after, whatever it is doing."""
    # The training writes nothing there, so the input ends when the training does, in whatever way.
    sys.stdin.buffer.read()
    ended.set()
    time.sleep(END_WITHIN_SECONDS)
    os._exit(1)


def _only_one(path: Path, ended: threading.Event) -> TextIO:
    """Lock out other copies; wait for that of the run's previous job, which may be ending."""
    while True:
        try:
            return lock_file(path)
        except FileInUseError as error:
            if ended.wait(_LOOK_SECONDS):
                raise UserError(
                    f"the metrics are being copied already ({error}); wait for its end"
                ) from error


def _looks(ended: threading.Event) -> Iterator[None]:
    """Yield whenever it is time to look at the metrics, a last time after training has ended."""
    while not ended.wait(_LOOK_SECONDS):
        yield
    yield


def _open(to: str, run_dir: Path, bookmark: Bookmark, training: int | None) -> Mirror:
    # Imported here, so that neither library need be installed for the other's copy.
    if to == "wandb":
        from megatron_bert.run.mirrors.to_wandb import WandbMirror

        return WandbMirror(load_config(RunPaths(run_dir).config), run_dir, bookmark, training)
    from megatron_bert.run.mirrors.to_tensorboard import TensorBoardMirror

    return TensorBoardMirror(run_dir, bookmark)


if __name__ == "__main__":
    run_cli(main)
