"""Copies a run's metrics: `python -m megatron_bert.training.mirrors RUN_DIR wandb|tensorboard`."""

from __future__ import annotations

import argparse
import logging
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from megatron_bert.config.load import load_config
from megatron_bert.training.mirrors.following import Bookmark, FollowedFile

_LOOK_SECONDS = 1.0
# After the training's end: a service that does not answer must not hold a job.
END_WITHIN_SECONDS = 30


class Mirror(Protocol):
    """Where metrics are copied to."""

    def write(self, record: dict[str, Any]) -> None:
        """Copy a line of the metrics file."""

    def close(self) -> None:
        """Finish copying."""


def main() -> None:
    """Copy what is there, or with `--follow` whatever comes until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m megatron_bert.training.mirrors")
    parser.add_argument("run_dir", type=Path, help="a run's directory")
    parser.add_argument("to", choices=["wandb", "tensorboard"])
    parser.add_argument(
        "--follow", action="store_true", help="go on until standard input ends; the training's use"
    )
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    if args.follow:
        _leave_signals_to_the_training()
    bookmark = Bookmark(args.run_dir / "logs" / f"{args.to}.json")
    mirror = _open(args.to, args.run_dir, bookmark)
    with FollowedFile(args.run_dir / "metrics.jsonl") as metrics:
        for _ in _looks(follow=args.follow):
            for record in metrics.new_records():
                if bookmark.is_new(record):
                    mirror.write(record)
            bookmark.keep()
    mirror.close()


def _leave_signals_to_the_training() -> None:
    """Go on when a scheduler or a terminal signals the whole job; the training closes the input."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        # No SIG_IGN, which wandb's own processes would inherit.
        signal.signal(number, lambda *_: None)


def _looks(*, follow: bool) -> Iterator[None]:
    """Yield whenever it is time to look at the metrics, the last time when training has ended."""
    # The training writes nothing there: its end, however it comes, makes the input readable.
    while follow and not select.select([sys.stdin], [], [], _LOOK_SECONDS)[0]:
        yield
    if follow:
        signal.alarm(END_WITHIN_SECONDS)
    yield


def _open(to: str, run_dir: Path, bookmark: Bookmark) -> Mirror:
    # Imported here: neither need be installed for the other.
    if to == "wandb":
        from megatron_bert.training.mirrors.to_wandb import WandbMirror

        return WandbMirror(load_config(run_dir / "config.yaml"), run_dir, bookmark)
    from megatron_bert.training.mirrors.to_tensorboard import TensorBoardMirror

    return TensorBoardMirror(run_dir)


if __name__ == "__main__":
    main()
