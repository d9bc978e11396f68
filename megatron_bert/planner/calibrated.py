"""Machines that were measured: files that extend the built-in table."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from megatron_bert.command_line.arguments import argument
from megatron_bert.errors import ConfigError
from megatron_bert.files import write_atomically
from megatron_bert.planner.machines import GPUS, Gpu, Machine, Rates, find_machine

Facts = TypeVar("Facts", Gpu, Rates)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """A machine's facts, and the rates that training reaches on it.

    Attributes:
        device: the driver's name for the GPU, or the processor's name.
        gpu: its facts: from the table if it has them, else measured ones.
        rates: measured rates, and built-in ones for what was not measured.
        curves: the measurements, for readers: [size, seconds] each.
    """

    device: str
    gpu: Gpu
    rates: Rates
    curves: Mapping[str, list[list[float]]]

    def save(self, machines: Path) -> Path:
        """Write it into the folder `machines` under its GPU's name; return the file's path.

        Raises:
            ConfigError: as `check_calibration`.
        """
        check_calibration(self.gpu.name, machines)
        path = machines / f"{self.gpu.name}.json"
        try:
            write_atomically(path, json.dumps(asdict(self), indent=2) + "\n")
        except OSError as error:
            raise _no_folder(path, error) from None
        return path


def check_calibration(calibration_name: str, machines: Path) -> None:
    """Make the folder `machines` and try writing to it, before the minute that measuring takes.

    Raises:
        ConfigError: the name is a built-in one or not a valid file name, or the folder cannot be
            written to.
    """
    if calibration_name in GPUS or not re.fullmatch(
        r"[A-Za-z0-9][A-Za-z0-9._-]*", calibration_name
    ):
        raise ConfigError(
            f"{argument('calibration_name', calibration_name)}: give a name of letters, "
            f"digits, - and _ that is none of {', '.join(GPUS)}"
        )
    try:
        machines.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=machines):
            pass
    except OSError as error:
        raise _no_folder(machines, error) from None


def _no_folder(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path}: {error.strerror}; name another folder by {argument('machines')}")


def machines_folder() -> Path:
    """The default folder of calibrations, in the user's own configuration."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "megatron_bert" / "machines"


def calibration_of_device(device: str, folder: Path) -> Calibration | None:
    """The first calibration in a folder that was measured on a device of this (driver's) name.

    A file that cannot be read is skipped with a warning: it may be another machine's.
    """
    for path in sorted(folder.glob("*.json")):
        try:
            calibration = read_calibration(path)
        except ConfigError as error:
            logger.warning("%s", error)
            continue
        if calibration.device == device:
            return calibration
    return None


def machine_by_name(
    gpu: str, machines: Path, nodes_of: int | None = None, network: str | None = None
) -> Machine:
    """A built-in machine or one of the folder `machines`; see `find_machine`.

    Raises:
        ConfigError: a name is unknown; the message lists the known ones.
    """
    if gpu in GPUS:
        return find_machine(gpu, nodes_of, network)
    paths = {path.stem: path for path in sorted(machines.glob("*.json"))}
    if gpu not in paths:
        raise ConfigError(
            f"{argument('gpu', gpu)}: not known; use one of {', '.join([*GPUS, *paths])}, "
            "or measure this machine: tools/plan.py --calibrate NAME"
        )
    return measured_machine(read_calibration(paths[gpu]), nodes_of, network)


def measured_machine(
    calibration: Calibration, nodes_of: int | None = None, network: str | None = None
) -> Machine:
    """The machine of a calibration."""
    per_node = calibration.gpu.per_node if nodes_of is None else nodes_of
    usual = find_machine("cpu" if calibration.gpu.kind == "cpu" else "h100-80gb", per_node, network)
    return Machine(calibration.gpu, usual.network, per_node, calibration.rates)


def read_calibration(path: Path) -> Calibration:
    """Read what `Calibration.save` wrote; missing rates take their built-in values.

    Raises:
        ConfigError: the file is not a calibration.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Calibration(
            device=str(values["device"]),
            gpu=_facts(Gpu, values["gpu"]),
            rates=_facts(Rates, values["rates"]),
            curves=dict(values["curves"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no calibration ({error}); remove it, or write it again by "
            "tools/plan.py --calibrate"
        ) from None


def _facts(kind: type[Facts], values: dict[str, Any]) -> Facts:
    known = {field.name: field.type for field in fields(kind)}
    # A field added since the file was written was not measured, and takes its default.
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    for name in (needed - set(values)) | (set(values) - set(known)):
        raise KeyError(name)
    for name, value in values.items():
        if known[name] != "str" and not (isinstance(value, int | float) and value >= 0):
            raise ValueError(f"{name} = {value!r} is no number of 0 or more")
    return kind(**values)
