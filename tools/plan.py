"""Say which layout a run should take on a cluster, how long it takes there, and why."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bert.command_line.parser import Parser
from megatron_bert.command_line.run import run_cli, told_errors
from megatron_bert.errors import ConfigError

with told_errors():
    from megatron_bert.command_line.places import check_no_folder, write_output
    from megatron_bert.config.load import load_config
    from megatron_bert.config.presets import LLM_JP_VOCABULARY
    from megatron_bert.config.remedies import near_divisors, near_multiples
    from megatron_bert.config.schema import Config
    from megatron_bert.pictures import check_name
    from megatron_bert.planner.calibrated import (
        check_calibration,
        machine_by_name,
        machines_folder,
    )
    from megatron_bert.planner.machines import GPUS, Machine, find_network
    from megatron_bert.planner.plan_files import configuration, document, is_written_plan
    from megatron_bert.planner.plots import write_picture
    from megatron_bert.planner.report import describe
    from megatron_bert.planner.search import make_plan
    from megatron_bert.words import counted


def _parser() -> Parser:
    parser = Parser(
        description=__doc__,
        epilog="Opens no data but the tokenizer. What is predicted, from what, and how far "
        "predictions were off: docs/scaling.md.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="keys that replace the file's"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="of the job")
    parser.add_argument(
        "--gpu", metavar="NAME", help=f"their kind: {', '.join(GPUS)}, or one that was calibrated"
    )
    parser.add_argument(
        "--nodes-of", type=int, metavar="N", help="GPUs of a node (default: that kind's usual)"
    )
    parser.add_argument(
        "--network",
        metavar="NAME",
        help="an adapter and how many of them a node has, as ndr200x4 (default: one for each GPU)",
    )
    parser.add_argument(
        "--keep", type=int, default=10, metavar="N", help="layouts shown (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the configuration with the best layout"
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="draw time, memory and the pipeline's timeline as .svg or .png",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document, not a table")
    parser.add_argument(
        "--calibrate",
        metavar="NAME",
        help="plan nothing, but measure this machine (under torchrun messages too; a minute) and "
        "store it under a name that --gpu then takes",
    )
    parser.add_argument(
        "--machines",
        type=Path,
        metavar="FOLDER",
        help=f"of calibrated machines (default: {machines_folder()})",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan and print, or measure."""
    parser = _parser()
    given = parser.parse_intermixed_args(arguments)
    parser.check_purposes(given, _purposes(given))
    folder = given.machines or machines_folder()
    if given.calibrate is not None:
        _calibrate(given.calibrate, folder, given.network)
        return
    for name in ("config", "gpus", "gpu"):
        if getattr(given, name) is None:
            raise ConfigError(f"--{name} is missing; give --config, --gpus and --gpu")
    for name in ("gpus", "keep"):
        if getattr(given, name) < 1:
            raise ConfigError(f"--{name} {getattr(given, name)}: give 1 or more")
    if given.picture is not None:
        check_name(given.picture)
    machine = machine_by_name(given.gpu, folder, given.nodes_of, given.network)
    _check_nodes(given.gpus, machine)
    config = load_config(given.config, given.overrides)
    vocab_size, assumed = _vocabulary(config)
    if given.output is not None:
        _check_output(given.output, given.config)
    plan = make_plan(config, vocab_size, machine, given.gpus, keep=given.keep)
    # The picture first: matplotlib may be missing, and the old plan is then kept.
    if given.picture is not None:
        write_picture(plan, given.picture)
    if given.output is not None:
        write_output(given.output, configuration(plan, plan.best[0].layout))
    if given.json:
        lines = [json.dumps(document(plan, assumed), ensure_ascii=False, indent=2)]
    else:
        lines = list(describe(plan, assumed))
        lines += [f"wrote {path}" for path in (given.output, given.picture) if path is not None]
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _purposes(given: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """What `Parser.check_purposes` asks for."""
    plans = given.calibrate is None
    for name in (
        "--config", "--gpus", "--gpu", "--nodes-of", "--keep", "--output", "--picture", "--json",
        "overrides",
    ):  # fmt: skip
        yield name, plans, f"plan without --calibrate {given.calibrate}"


def _check_nodes(gpus: int, machine: Machine) -> None:
    """Check that a job's nodes are alike, as job scripts need; a single one may have spare GPUs.

    Raises:
        ConfigError: not all nodes of the job would have as many GPUs.
    """
    per_node = machine.gpus_per_node
    if gpus > per_node and gpus % per_node:
        raise ConfigError(
            f"--gpus {gpus}: {counted(gpus // per_node, 'node')} of {per_node} and "
            f"{counted(gpus % per_node, 'GPU')} more, and all nodes of a job need as many; give "
            f"--gpus {near_multiples(gpus, per_node)}, or "
            f"--nodes-of {near_divisors(gpus, per_node)}"
        )


def _vocabulary(config: Config) -> tuple[int, list[str]]:
    """Rows of the embedding table, and what was assumed of them."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size, []
    if Path(config.data.tokenizer).exists():
        # Imported here: a plan with a known vocabulary needs no tokenizer library.
        from megatron_bert.data.vocabulary import padded_vocab_size

        return padded_vocab_size(config), []
    return LLM_JP_VOCABULARY, [
        f"there is no tokenizer {config.data.tokenizer}: a vocabulary of {LLM_JP_VOCABULARY:,} is "
        "assumed, LLM-jp's; model.vocab_size=N plans with another"
    ]


def _calibrate(name: str, folder: Path, network: str | None) -> None:
    """Measure; every rank takes part, the first one writes.

    Raises:
        ConfigError: what is measured could not be stored, or the network is unknown.
    """
    if network is not None:
        find_network(network)
    if os.environ.get("RANK", "0") == "0":
        check_calibration(name, folder)
    # Imported here: planning needs no torch.
    import torch.distributed as dist

    from megatron_bert.benchmark.calibration import calibrate
    from megatron_bert.distributed.launch import choose_device, process_group

    device = choose_device("auto")
    with process_group(device, 600.0):
        is_first = dist.get_rank() == 0
        calibration = calibrate(name, device, _say if is_first else _hush, network)
        if is_first:
            sys.stdout.write(f"wrote {calibration.save(folder)}\n")


def _say(what: str) -> None:
    sys.stderr.write(f"{what} ...\n")


def _hush(_: str) -> None:
    """Say nothing: the first rank does."""


def _check_output(path: Path, config: Path) -> None:
    """Refuse a path whose file is not a plan: only a plan may be replaced.

    Raises:
        UserError: the file is something else, or the path climbs out of a folder that it names.
    """
    check_no_folder(path)
    if not path.exists():
        return
    if path.samefile(config):
        raise ConfigError(f"--output {path} is --config itself; name another file")
    if not is_written_plan(path):
        raise ConfigError(
            f"--output {path}: there is such a file, and no plan wrote it; name another, or remove "
            "it"
        )


if __name__ == "__main__":
    run_cli(main)
