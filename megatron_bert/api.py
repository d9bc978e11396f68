"""What the command lines do, from Python: for notebooks and single-process scripts.

Everything here is what `pretrain_bert.py` and the tools call; docs/python.md shows it at work.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import NonNegativeInt, PositiveInt

from megatron_bert.command_line.argument_checks import checked
from megatron_bert.config.load import build_config, config_dict, dump_config, load_config
from megatron_bert.config.schema import Config
from megatron_bert.data.batch import Batch
from megatron_bert.data.preprocess import preprocess
from megatron_bert.data.preprocess_options import PreprocessOptions
from megatron_bert.data.row_inspection import show_rows
from megatron_bert.data.row_view import item_lines, page
from megatron_bert.data.step_inspection import StepBatches
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.data.tokenizer_training import train_tokenizer, write_model
from megatron_bert.errors import UserError
from megatron_bert.report.picture import draw_curves
from megatron_bert.report.records import RunRecords
from megatron_bert.run.export import export_model
from megatron_bert.training.job import train as train_on_all_ranks
from megatron_bert.training.stops import STOP_SIGNALS, StopRequests

__all__ = [
    "Batch",
    "Config",
    "PreprocessOptions",
    "RunRecords",
    "Tokenizer",
    "UserError",
    "build_config",
    "config_dict",
    "draw_curves",
    "dump_config",
    "export_model",
    "load_config",
    "preprocess",
    "read_batch",
    "rows_as_html",
    "rows_as_text",
    "train",
    "train_tokenizer",
    "write_model",
]


@checked
def read_batch(config: Config, step: PositiveInt) -> Batch:
    """The rows that a step trains on, in order, of all ranks: tensors `[B, S]` and `[B, M]`.

    Args:
        config: the configuration of the run.
        step: number of the step, from 1.

    Returns:
        All rows of the step, or as many as have 2^20 slots.

    Raises:
        DataError: the run has no such step, or its data cannot be read.
    """
    return next(StepBatches(config, step, step).batches(step))


@checked
def rows_as_text(config: Config, step: PositiveInt, rows: NonNegativeInt = 2) -> str:
    """A step's first rows as the model sees them, as `tools/inspect_data.py --rows` prints them.

    Raises:
        DataError: as `read_batch`.
    """
    items = show_rows(config, step, step, rows)
    return "\n".join(line for item in items for line in item_lines(item, coloured=False))


@checked
def rows_as_html(config: Config, step: PositiveInt, rows: NonNegativeInt = 2) -> str:
    """The same as a page of HTML that needs no other file.

    Raises:
        DataError: as `read_batch`.
    """
    return page(f"Step {step}", show_rows(config, step, step, rows))


@checked
def train(config: Config, max_steps: PositiveInt | None = None) -> RunRecords:
    """Train in this process, as `pretrain_bert.py` does, from where the run's last job ended.

    An interrupt stops it after the current step, with a checkpoint; a second one stops it at once.
    Must be called in the main thread, which alone may listen for signals. Its messages go to
    logging.

    Args:
        config: the configuration of the run; `run.dir` receives its metrics and checkpoints.
        max_steps: steps to take at most, 1 or more; default: all that are left.

    Returns:
        What the run has recorded so far, in all of its jobs.

    Raises:
        UserError: configuration, data or checkpoint cannot be used.
    """
    thread = threading.current_thread()
    if thread is not threading.main_thread():
        raise UserError(
            f"api.train in the thread {thread.name}: only the main thread can listen for signals; "
            "call it in that"
        )
    with _borrowed_hooks() as signals:
        stops = StopRequests(config.run.max_minutes, config.run.deadline, signals=signals)
        train_on_all_ranks(config, stops, max_steps=max_steps)
    return RunRecords.read(config.run.directory)


@contextmanager
def _borrowed_hooks() -> Iterator[list[signal.Signals]]:
    """Restore a notebook's signal handlers and exception hook at the end of the block.

    It needs them to interrupt cells, and to print tracebacks without a rank. Yields the signals
    that may be listened for. A handler that is not Python's, but belongs to a program that embeds
    Python, could not be restored: its signal is left alone.
    """
    found = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    handlers = {number: handler for number, handler in found.items() if handler is not None}
    print_traceback = sys.excepthook
    try:
        yield list(handlers)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.excepthook = print_traceback
