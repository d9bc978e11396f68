"""The training run: from a checked configuration to the last checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_bert.checkpoint.manifest import JSON
from megatron_bert.checkpoint.run_state import RunState, trained_state
from megatron_bert.checkpoint.saver import CheckpointSaver
from megatron_bert.checkpoint.store import CheckpointStore
from megatron_bert.config.arithmetic import resolve_vocab_size
from megatron_bert.config.batch_layout import BatchLayout
from megatron_bert.config.checks import check_config
from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.identity import changed_keys
from megatron_bert.config.load import config_dict, dump_config
from megatron_bert.config.profiled_steps import profiled_steps
from megatron_bert.config.schema import Config
from megatron_bert.data.batch import Batch
from megatron_bert.data.source import RowSource, training_source
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.distributed.agreement import Ranks
from megatron_bert.distributed.device_facts import facts_of
from megatron_bert.distributed.launch import new_host_group
from megatron_bert.distributed.topology import Topology
from megatron_bert.model.build import build_model
from megatron_bert.optim.schedule import learning_rate
from megatron_bert.run.directory import RunDirectory
from megatron_bert.run.metrics import MetricsFile, last_losses
from megatron_bert.training.batches import GlobalBatch, ReadAhead
from megatron_bert.training.description import (
    describe_data,
    describe_plan,
    tell_plan,
    tokenizer_warnings,
)
from megatron_bert.training.due import Due
from megatron_bert.training.evaluation import Evaluator
from megatron_bert.training.held_out import HeldOutRows
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.pace import Pace
from megatron_bert.training.preflight import check_ranks_agree
from megatron_bert.training.profile import StepProfiler
from megatron_bert.training.recorder import StepRecorder
from megatron_bert.training.resume import check_continuity, starting_point
from megatron_bert.training.runtime import precision_warnings
from megatron_bert.training.slow_ranks import SlowRankWatch
from megatron_bert.training.spikes import WINDOW as SPIKE_WINDOW
from megatron_bert.training.staging import HostMemory
from megatron_bert.training.state import load_state, local_bytes, save_state
from megatron_bert.training.step import agree, take_step
from megatron_bert.training.stops import StopRequests

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunEnd:
    """How a run ended.

    Attributes:
        step: the last step taken.
        stop_reason: why it stopped early, or None if it is finished.
    """

    step: int
    stop_reason: str | None


class Trainer:
    """One job of a run on this rank; every rank makes one, after the process group started.

    Args:
        config: the checked configuration.
        device: this rank's device.
        directory: the locked run directory on the first rank, None on the others.

    Raises:
        UserError: configuration, data and checkpoint do not fit together, or data is damaged.
    """

    def __init__(
        self, config: Config, device: torch.device, directory: RunDirectory | None
    ) -> None:
        self._config = config
        self._directory = directory
        self._topology = Topology.of(config.parallel, device, config.distributed.timeout_seconds)
        self._tokenizer = Tokenizer.load(Path(config.data.tokenizer))
        vocab_size = resolve_vocab_size(config.model, self._tokenizer.vocab_size)
        check_config(config, world_size=dist.get_world_size(), vocab_size=vocab_size)
        self._curriculum = Curriculum(config)
        self._source, held_out = _open_data(config, self._tokenizer)
        self._evaluator = Evaluator(config, held_out, self._tokenizer, self._topology)
        self._model = build_model(config, vocab_size, self._topology)
        self._optimizer = build_optimizer(config, self._model)
        self._store = CheckpointStore(
            config.run.paths.checkpoints,
            config.checkpoint.keep,
            new_host_group(config.distributed.timeout_seconds),
        )
        self._saver = CheckpointSaver(
            self._store,
            in_background=config.checkpoint.async_,
            max_failures=config.checkpoint.max_failures,
            on_result=None if directory is None else directory.journal.save,
        )
        self._due = Due.of(config, self._curriculum, evaluates=self._evaluator.has_text)
        self._pace = Pace(
            self._curriculum,
            self._due,
            evaluation_slots=held_out.slots,
            bytes_to_save=local_bytes(self._model, self._optimizer),
        )
        self._store.remove_leftovers()
        self._step = self._restore()
        self._recorder = self._begin_recording(vocab_size, held_out)

    def run(self, stops: StopRequests, max_steps: int | None = None) -> RunEnd:
        """Train until the curriculum's end, `max_steps` are taken or a rank is asked to stop."""
        steps = range(self._step + 1, self._total_steps + 1)[:max_steps]
        stop_reason: str | None = None
        # Closed in reverse order, each of them even if another one raises.
        with (
            closing(self._profiler()) as profiler,
            closing(self._recorder),
            closing(self._reader(steps)) as reader,
            closing(self._saver),
        ):
            slow_ranks = SlowRankWatch(self._config.log.interval, self._topology.device)
            for step, batches in zip(steps, slow_ranks.timing(reader), strict=True):
                self._pace.begin(step)
                profiler.begin(step)
                stop_reason = self._take(step, batches, stops, slow_ranks)
                is_last = stop_reason is not None
                if profiler.is_complete(step) or is_last:
                    # Record the step first: that waits for the device with a timeout.
                    self._recorder.flush()
                    with self._recorder.paused(), self._pace.paused():
                        profiler.write()
                if step == steps[-1] and not is_last:
                    stop_reason = f"{len(steps)} steps were asked for"
                self._evaluate_and_save(is_last=stop_reason is not None)
                if is_last:
                    break
            stops.settle()
        return RunEnd(self._step, stop_reason if self._step < self._total_steps else None)

    def _take(
        self, step: int, batches: Sequence[Batch], stops: StopRequests, slow_ranks: SlowRankWatch
    ) -> str | None:
        """Take a step; returns why it is the last one, where a rank was asked to stop."""
        stops.seconds_to_end = self._pace.seconds_to_end(
            self._saver.seconds, saving=self._saver.is_saving
        )
        own_reason, figures = stops.reason, slow_ranks.figures(step)
        agreement = agree(batches, own_reason is not None, self._topology, figures)
        slow_ranks.judge(step, agreement.figures)
        rate = learning_rate(step, self._config, self._curriculum)
        result = take_step(self._model, self._optimizer, batches, agreement.masked_tokens, rate)
        self._step = step
        span = self._curriculum.at(step)
        self._recorder.add(step, span, agreement, rate, result, slow_ranks.last_wait)
        return _why_stopped(own_reason) if agreement.stop else None

    def _reader(self, steps: range) -> ReadAhead:
        return ReadAhead(
            self._source,
            self._topology.data_parallel_rank,
            map(self._global_batch, steps),
            HostMemory.for_device(self._topology.device),
            self._config.data.threads,
        )

    def _profiler(self) -> StepProfiler:
        config = self._config
        return StepProfiler(
            profiled_steps(config),
            config.run.paths.profile,
            self._topology.device,
            self._step,
            config.distributed.timeout_seconds if dist.get_world_size() > 1 else math.inf,
        )

    @property
    def step(self) -> int:
        """Steps taken so far, including those before the checkpoint."""
        return self._step

    @property
    def _total_steps(self) -> int:
        return self._curriculum.total_steps

    def _global_batch(self, step: int) -> GlobalBatch:
        """The rows of a step."""
        span = self._curriculum.at(step)
        layout = BatchLayout.of(
            self._config, span.global_size, span.seq_length, self._topology.data_parallel_size
        )
        return GlobalBatch(span.rows_of(step), span.index, layout)

    def _evaluate_and_save(self, *, is_last: bool) -> None:
        """Do what is due after the step just taken; a job's last step is always saved."""
        step = self._step
        evaluate = self._due.evaluation(step)
        save = is_last or self._due.save(step)
        if not (evaluate or save):
            return
        self._recorder.flush()
        with self._recorder.paused(), self._pace.paused():
            if evaluate:
                span = self._curriculum.at(step)
                with self._pace.evaluation():
                    scores = self._evaluator.evaluate(self._model, span)
                scores["evaluation_seconds"] = self._pace.evaluation_seconds
                self._recorder.write_evaluation(step, span, scores)
            # Last, so that a resumed run does not miss the evaluation's line.
            if save:
                self._recorder.sync()
                save_state(
                    self._saver,
                    step,
                    self._model,
                    self._optimizer,
                    self._state(),
                    is_last=is_last or step == self._total_steps,
                )

    def _state(self) -> dict[str, JSON]:
        """The training state that the checkpoint's manifest holds in addition to the tensors."""
        topology = self._topology
        return trained_state(
            step=self._step,
            consumed_rows=self._curriculum.rows_until(self._step),
            optimizer=self._optimizer.name,
            optimizer_updates=self._optimizer.updates,
            config=config_dict(self._config),
            tokenizer_hash=self._tokenizer.hash,
            data=self._source.fingerprint(),
            topology={
                "pipeline": topology.pipeline_size,
                "data": topology.data_parallel_size,
                "tensor": topology.tensor_parallel.size,
                "keys": self._config.parallel.model_dump(mode="json"),
            },
        )

    def _restore(self) -> int:
        """Load the checkpoint that this job starts from; return its step, 0 for a fresh start."""
        start = starting_point(self._config, self._store)
        if start is None:
            return 0
        state = RunState(start.path, self._store.read_state(start.path))
        check_continuity(start, state, self._config, self._tokenizer, self._source)
        load_state(self._store, start.path, self._model, self._optimizer)
        if self._directory is not None:
            logger.info("resumed from %s", start.path)
            changed = changed_keys(state.config, config_dict(self._config))
            # Each job has its own deadline.
            changed = [key for key in changed if key != "run.deadline"]
            if changed:
                logger.info("changed since then: %s", ", ".join(changed))
            if state.optimizer != self._optimizer.name and not state.is_imported:
                logger.info("the states of %s begin at zero", self._optimizer.name)
        return state.step

    def _begin_recording(self, vocab_size: int, held_out: HeldOutRows) -> StepRecorder:
        """Make the run directory describe this job, from the restored step on, and log the plan."""
        config, world_size, metrics = self._config, dist.get_world_size(), None
        earlier_losses: list[tuple[float, int]] = []
        if self._directory is not None:
            metrics = MetricsFile(self._directory.paths.metrics)
            # Without a checkpoint here, no later job can get back to the steps in that file.
            kept = metrics.truncate_after(self._step, sets_aside=not self._store.folders())
            earlier_losses = last_losses(kept, SPIKE_WINDOW)
            # Only once the checkpoint has been found to fit: a refused job leaves the run as it
            # was.
            self._directory.write_config(dump_config(config))
            facts = facts_of(self._topology.device)
            plan = describe_plan(config, vocab_size, world_size, facts)
            data = describe_data(self._source, held_out)
            warnings = tokenizer_warnings(Path(config.data.tokenizer), self._tokenizer)
            tell_plan([*plan, *data, *warnings, *precision_warnings(config)])
        resumed_from = self._step
        return StepRecorder(
            config,
            self._curriculum,
            vocab_size,
            world_size,
            self._topology.device,
            metrics,
            lambda: self._saver.saved_step or resumed_from,
            earlier_losses,
        )


def _open_data(config: Config, tokenizer: Tokenizer) -> tuple[RowSource, HeldOutRows]:
    """Rows to train on and to evaluate on, which are the same on every rank."""
    source = training_source(config, tokenizer)
    held_out = HeldOutRows.plan(config, tokenizer)
    check_ranks_agree(
        {
            "hash of data.tokenizer": tokenizer.hash,
            "content of data.train": source.fingerprint(),
            "content of held-out text": [
                text.fingerprint() for text in held_out.sources[held_out.fixed]
            ],
        }
    )
    return source, held_out


def _why_stopped(own_reason: str | None) -> str:
    """Return the first rank's reason to stop, else another rank's with its number. Collective."""
    reasons = Ranks().on_all(lambda: own_reason)
    rank, reason = next((rank, why) for rank, why in enumerate(reasons) if why is not None)
    return reason if rank == 0 else f"{reason} on rank {rank}"
