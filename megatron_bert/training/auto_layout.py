"""`parallel.layout: auto`: the planner's best layout for the ranks that a job finds."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import replace
from pathlib import Path

import torch

from megatron_bert.config.schema import Config
from megatron_bert.data.vocabulary import padded_vocab_size
from megatron_bert.distributed.agreement import Ranks
from megatron_bert.distributed.launch import choose_device
from megatron_bert.errors import ConfigError
from megatron_bert.host import usable_memory
from megatron_bert.planner.calibrated import (
    calibration_of_device,
    machines_folder,
    measured_machine,
)
from megatron_bert.planner.layouts import Layout
from megatron_bert.planner.machines import (
    GIB,
    GPUS,
    Machine,
    Network,
    find_machine,
    find_network,
    gpu_of_device,
)
from megatron_bert.planner.reasons import cautions
from megatron_bert.planner.search import make_plan
from megatron_bert.planner.wording import describe_layout, remarks

logger = logging.getLogger(__name__)

_ADAPTERS = Path("/sys/class/infiniband")


def with_layout(config: Config, world_size: int) -> Config:
    """Return the configuration with a layout filled in; unchanged if `parallel.layout` is `manual`.

    Collective: all ranks get the same layout, chosen for the smallest memory among them. Like every
    key of a layout, the choice may differ from job to job of a run.

    Args:
        config: of the run; `parallel.layout` stays `auto`.
        world_size: ranks of the job.

    Raises:
        ConfigError: the device is missing or unknown to the planner, or no layout fits.
        UserError: the tokenizer, which gives the vocabulary size, cannot be read.
    """
    if config.parallel.layout == "manual":
        return config
    ranks = Ranks()
    device = choose_device(config.run.device)
    machine = min(
        ranks.on_all(lambda: _machine_of(device, config.parallel.network)),
        key=lambda found: found.gpu.memory_gib,
    )

    def choose() -> Layout:
        plan = make_plan(config, padded_vocab_size(config), machine, world_size, keep=1)
        best = plan.best[0]
        logger.info(
            "layout      chosen for %s x %s, network %s: %s (%.1f of %.1f GiB, %.3g s a step, "
            "predicted)",
            f"{world_size:,}",
            machine.gpu.name,
            machine.network.name,
            describe_layout(best.layout),
            best.peak_bytes / GIB,
            machine.usable_bytes / GIB,
            best.stages[0].step.total,
        )
        for remark in remarks(config):
            logger.info("layout      %s", remark)
        for caution in cautions(plan):
            logger.warning("layout      %s", caution)
        return best.layout

    return ranks.on_first(choose).put_into(config)


def _machine_of(device: torch.device, network: str | None) -> Machine:
    """This rank's machine, with the network that is named or else detected on the node."""
    machine = _computing_on(device)
    if network is None:
        found = _network_of_node(_ADAPTERS)
    else:
        found = find_network(network, "parallel.network")
    return machine if found is None else replace(machine, network=found)


def _network_of_node(folder: Path) -> Network | None:
    """The combined bandwidth of a node's network adapters; None if none of them works.

    Args:
        folder: the kernel's folder of adapters; `DEVICE/ports/N/rate` reads, e.g., "200 Gb/sec (4X
            HDR)".
    """
    rates = []
    for path in sorted(folder.glob("*/ports/*/rate")):
        try:
            match = re.match(r"(\d+(?:\.\d+)?) Gb/sec", path.read_text())
            works = "ACTIVE" in path.with_name("state").read_text()
        except OSError:
            continue
        if match is not None and works:
            rates.append(float(match[1]))
    if not rates:
        return None
    return Network("+".join(f"{rate:g}" for rate in rates) + " Gbit/s", sum(rates) / 8)


def _computing_on(device: torch.device) -> Machine:
    """This rank's machine: its actual memory and the usual network, calibrated if possible."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cpu":
        return find_machine("cpu", per_node).with_memory(usable_memory() / per_node / GIB)
    facts = torch.cuda.get_device_properties(device)
    memory = facts.total_memory / GIB
    calibration = calibration_of_device(facts.name, machines_folder())
    if calibration is not None:
        return measured_machine(calibration, per_node).with_memory(memory)
    name = gpu_of_device(facts.name, memory)
    if name is None:
        raise ConfigError(
            f"parallel.layout = auto: nothing is known of {facts.name}, only of {', '.join(GPUS)}; "
            "measure it (tools/plan.py --calibrate NAME), or use parallel.layout=manual and set "
            "the layout's keys"
        )
    return find_machine(name, per_node).with_memory(memory)
