"""A job of a run, from the rendezvous of its ranks to the outcome left in the run directory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist

from megatron_bert.config.checks import check_config
from megatron_bert.config.load import config_dict
from megatron_bert.config.schema import Config
from megatron_bert.distributed.agreement import Ranks
from megatron_bert.distributed.launch import (
    choose_device,
    process_group,
    requested_world_size,
)
from megatron_bert.errors import UserError
from megatron_bert.run.directory import (
    FINISHED,
    RunDirectory,
    read_outcome,
    record_failure,
)
from megatron_bert.run.mirrors.processes import Mirrors
from megatron_bert.training.auto_layout import with_layout
from megatron_bert.training.preflight import (
    check_ranks_agree,
    check_run_directory_is_shared,
    code_facts,
    measure_all_reduce,
)
from megatron_bert.training.roll_call import RollCall
from megatron_bert.training.runtime import keep_freed_memory, set_determinism
from megatron_bert.training.stops import StopRequests
from megatron_bert.training.trainer import Trainer

logger = logging.getLogger(__name__)


def train(config: Config, stops: StopRequests, *, max_steps: int | None = None) -> None:
    """Train on the ranks that torchrun started, or on this process alone, from end to end.

    Args:
        config: What `load_config` returned.
        stops: Requests to end the job early, after a step and with a checkpoint.
        max_steps: The most steps to take; default: all until the curriculum's end.

    Raises:
        UserError: configuration, data or checkpoint cannot be used.
    """
    device = choose_device(config.run.device)
    set_determinism(config, device)
    if device.type == "cpu":
        keep_freed_memory()
    # Outermost, so that no rank waits while the last metrics are sent.
    with Mirrors() as mirrors:
        try:
            timeout = config.distributed.timeout_seconds
            with process_group(device, timeout), RollCall() as roll_call:
                _run(config, device, stops, roll_call, mirrors, max_steps)
        except BaseException:
            if stops.interrupt is not None:
                raise stops.interrupt from None
            raise


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
        try:
            with _failure_told(config, stops, roll_call, is_recorded=not was_finished):
                trainer = _prepare(config, device, directory)
                if was_finished:
                    # FINISHED must be gone before any rank can fail in training and record that.
                    Ranks().on_first(lambda: None if directory is None else directory.start())
        except UserError:
            if directory is not None and dist.get_world_size() == 1:
                directory.remove_if_new()
            raise
        with _failure_told(config, stops, roll_call):
            if directory is not None:
                directory.journal.start(trainer.step, dist.get_world_size())
                mirrors.start(config.log, directory.paths.root, anew=trainer.step == 0)
            began = trainer.step
            end = trainer.run(stops, max_steps)
            # A rank lost by now is still named, and the run is not marked finished.
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

    A finished run stays finished until one of its jobs is about to train, so that a refused command
    changes nothing. Any other outcome of an earlier job is removed here, and this job records its
    own.

    Raises:
        UserError: The directory is taken, or cannot be used.
    """
    opened: list[RunDirectory] = []

    def open_it() -> bool:
        directory = RunDirectory(config.run.directory)
        opened.append(directory)
        outcome = read_outcome(directory.paths.root)
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
    # Not earlier: a refusal must replace the outcome that an earlier job left in the run directory.
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

    Any rank that fails writes it, since torchrun may end the first rank.
    """
    try:
        yield
    except BaseException as error:
        rank = dist.get_rank()
        # Recorded first: calling the roll takes seconds, during which this rank may be ended.
        if is_recorded:
            record_failure(config.run.directory, rank, stops.interrupt or error)
        reason = stops.interrupt or roll_call.explain(error)
        if reason is error:
            raise
        if is_recorded:
            record_failure(config.run.directory, rank, reason)
        raise reason from error
