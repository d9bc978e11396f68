"""The command line of `pretrain_bert.py`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_bert.command_line.parser import Parser
from megatron_bert.config.load import dump_config, load_config
from megatron_bert.training.stops import StopRequests


def main(arguments: Sequence[str] | None = None, *, began: float | None = None) -> int:
    """Train, or look at what would be trained; returns the exit code.

    Args:
        arguments: Command-line arguments; default: those of the process.
        began: When the process began, on the monotonic clock; default: now.

    Raises:
        UserError: configuration, data or checkpoint cannot be used (exit code 2).
    """
    # Intermixed: overrides may stand on both sides of the options.
    args = _parser().parse_intermixed_args(arguments)
    _set_up_logging()
    config = load_config(args.config, args.overrides)
    if args.print_config:
        sys.stdout.write(dump_config(config))
        return 0
    # Imported here because they load torch, which takes seconds: help and refusals need not wait.
    if args.dry_run:
        from megatron_bert.distributed.launch import announced_world_size
        from megatron_bert.training.dry_run import dry_run

        dry_run(config, announced_world_size())
        return 0
    from megatron_bert.training.job import train

    train(config, StopRequests(config.run.max_minutes, config.run.deadline, began=began))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="pretrain_bert.py",
        description="Pretrain a BERT-type encoder. Start it with torchrun for several ranks, "
        "or with python for one.",
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="keys that replace the file's, e.g. optimizer.lr=1e-4 data.train.0.prefix=data/ja",
    )
    look = parser.add_mutually_exclusive_group()
    look.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and leave"
    )
    look.add_argument(
        "--dry-run",
        action="store_true",
        help="check configuration, tokenizer, data and layout, print the plan and leave",
    )
    return parser


def _set_up_logging() -> None:
    rank = os.environ.get("RANK", "0")
    first = rank == "0"
    logging.basicConfig(
        stream=sys.stdout,
        level=logging.INFO if first else logging.WARNING,
        format="%(message)s" if first else f"[rank {rank}] %(message)s",
    )
