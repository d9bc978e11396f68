"""Measuring in a separate process, and what a process uses."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import ParamSpec, TypeVar

from megatron_bert.errors import DataError

_P = ParamSpec("_P")
_T = TypeVar("_T")

_STATUS = Path("/proc/self/status")
_IO = Path("/proc/self/io")


def run_isolated(function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """Call a function in a new process, whose memory nothing else has touched.

    Args:
        function: a top-level function of a module; its arguments and result must be picklable.
        arguments: its positional arguments.
        named: its keyword arguments.

    Raises:
        DataError: the process was killed, most likely for lack of memory.
    """
    # A forked process would start with its parent's pages.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        try:
            return process.submit(function, *arguments, **named).result()
        except BrokenProcessPool as error:
            raise DataError(
                f"the process that ran {function.__name__} was killed; the machine has too little "
                f"free memory for it (give --quick to measure less), or see the lines above"
            ) from error


def pin_to_one_core() -> None:
    """Keep the calling process on one of the cores it may use."""
    # The last one: the first core of a machine serves most interrupts.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def resident_megabytes() -> float:
    """Memory that the process holds now, including mapped files, in 10^6 bytes."""
    return _status_megabytes("VmRSS")


def peak_resident_megabytes() -> float:
    """The most memory that the process has held since it began, including mapped files.

    Not getrusage's figure, which a new process inherits from the one that started it.
    """
    return _status_megabytes("VmHWM")


def anonymous_megabytes() -> float:
    """Memory that the process allocated, which excludes pages of mapped files."""
    return _status_megabytes("RssAnon")


def bytes_written() -> int:
    """Bytes that the process has handed to write calls since it began, to files of any kind."""
    return _number_after(_IO, "wchar")


def _status_megabytes(field: str) -> float:
    return _number_after(_STATUS, field) * 1024 / 1e6


def _number_after(path: Path, field: str) -> int:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise LookupError(f"{path} has no field {field}")
