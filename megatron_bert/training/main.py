"""The command line of `pretrain_bert.py`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_bert.config.checks import check_config
from megatron_bert.config.errors import Parser
from megatron_bert.config.load import config_dict, dump_config, load_config
from megatron_bert.config.schema import Config
from megatron_bert.distributed.agreement import Ranks
from megatron_bert.distributed.launch import (
    abandon_process_group,
    announced_world_size,
    choose_device,
    end_process_group,
    requested_world_size,
    start_process_group,
)
from megatron_bert.training.auto_layout import with_layout
from megatron_bert.training.dry_run import dry_run
from megatron_bert.training.mirrors.processes import Mirrors
from megatron_bert.training.preflight import (
    check_ranks_agree,
    check_run_directory_is_shared,
    code_facts,
    measure_all_reduce,
)
from megatron_bert.training.roll_call import RollCall
from megatron_bert.training.run_directory import (
    FINISHED,
    RunDirectory,
    read_outcome,
    record_failure,
)
from megatron_bert.training.runtime import keep_freed_memory, set_determinism
from megatron_bert.training.stops import StopRequests
from megatron_bert.training.trainer import Trainer

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None, *, began: float | None = None) -> int:
    """Train, or look at what would be trained; returns the exit code.

    Args:
        arguments: Of the command line; default: the process'.
        began: When the process did, on the monotonic clock; default: now.

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
    if args.dry_run:
        dry_run(config, announced_world_size())
        return 0
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


def train(config: Config, stops: StopRequests, *, max_steps: int | None = None) -> None:
    """Train on the ranks that torchrun started, or on this process alone, from end to end.

    Args:
        config: What `load_config` returned.
        stops: Ends the job before its time, after a step, with a checkpoint.
        max_steps: So many steps are taken, and no more; default: to the curriculum's end.

    Raises:
        UserError: configuration, data or checkpoint cannot be used.
    """
    device = choose_device(config.run.device)
    set_determinism(config, device)
    if device.type == "cpu":
        keep_freed_memory()
    # Around all else: no rank waits while the last metrics are sent.
    with Mirrors() as mirrors:
        start_process_group(device, config.distributed.timeout_seconds)
        try:
            with RollCall() as roll_call:
                _run(config, device, stops, roll_call, mirrors, max_steps)
        except BaseException:
            abandon_process_group()
            if stops.interrupt is not None:
                raise stops.interrupt from None
            raise
        end_process_group()


def _run(
    config: Config,
    device: torch.device,
    stops: StopRequests,
    roll_call: RollCall,
    mirrors: Mirrors,
    max_steps: int | None,
) -> None:
    directory, was_finished = _open_run_directory(config)
    # A process may train more than once.
    with directory or nullcontext():
        with _failure_told(config, stops, roll_call, is_recorded=not was_finished):
            trainer = _prepare(config, device, directory)
            if was_finished:
                # No rank may fail in training, and tell of it, before FINISHED is gone.
                Ranks().on_first(lambda: None if directory is None else directory.start())
        with _failure_told(config, stops, roll_call):
            if directory is not None:
                directory.journal.start(trainer.step, dist.get_world_size())
                mirrors.start(config.log, directory.path, anew=trainer.step == 0)
            began = trainer.step
            end = trainer.run(stops, max_steps)
            # A rank that is gone by now is still named, and the run is not called finished.
            dist.barrier()
        if directory is not None:
            outcome: dict[str, object] = {"step": end.step}
            if end.stop_reason is None:
                directory.finish(outcome)
                if began == end.step:
                    logger.info("no step is left: lengthen the last stage, or give another run.dir")
                logger.info("finished after step %s", f"{end.step:,}")
            else:
                directory.stop({**outcome, "reason": end.stop_reason})
                logger.info(
                    "stopped after step %s: %s; the same command goes on",
                    f"{end.step:,}",
                    end.stop_reason,
                )


def _open_run_directory(config: Config) -> tuple[RunDirectory | None, bool]:
    """Lock the run directory on the first rank, and say whether its run is finished. Collective.

    A finished run stays one until a job of it is about to train: a command that is refused has
    undone nothing. How any other job ended is forgotten here, and told anew.

    Raises:
        UserError: The directory is taken, or cannot be used.
    """
    opened: list[RunDirectory] = []

    def open_it() -> bool:
        directory = RunDirectory(config.run.directory)
        opened.append(directory)
        outcome = read_outcome(directory.path)
        if outcome is not None and outcome.kind == FINISHED:
            return True
        directory.start()
        return False

    was_finished = Ranks().on_first(open_it)
    return (opened[0] if opened else None), was_finished


def _prepare(config: Config, device: torch.device, directory: RunDirectory | None) -> Trainer:
    """Check all that can be checked before the first step, and load what it needs. Collective."""
    check_run_directory_is_shared(config.run.directory)
    check_ranks_agree({**code_facts(), **config_dict(config)})
    # Here, not before: a refusal must replace what an earlier job left in the run directory.
    config = with_layout(config, requested_world_size())
    check_config(config, world_size=requested_world_size())
    speed = measure_all_reduce(device)
    if speed is not None:
        logger.info("%s", speed)
    return Trainer(config, device, directory)


@contextmanager
def _failure_told(
    config: Config, stops: StopRequests, roll_call: RollCall, *, is_recorded: bool = True
) -> Iterator[None]:
    """Tell the other ranks of a failure, and leave FAILED in the run directory.

    Whichever rank it is that fails: torchrun may end the first one.
    """
    try:
        yield
    except BaseException as error:
        rank = dist.get_rank()
        # First of all: calling the roll takes seconds, in which this rank may be ended.
        if is_recorded:
            record_failure(config.run.directory, rank, stops.interrupt or error)
        reason = stops.interrupt or roll_call.explain(error)
        if reason is error:
            raise
        if is_recorded:
            record_failure(config.run.directory, rank, reason)
        raise reason from error
