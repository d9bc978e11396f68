"""Fine-tune a model on a task of JGLUE and evaluate it, by JGLUE's protocol or a part of it."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bert.command_line.parser import Parser
from megatron_bert.command_line.run import run_cli, told_errors
from megatron_bert.errors import UserError

with told_errors():
    from megatron_bert.command_line.places import check_place
    from megatron_bert.jglue.results import Results, table
    from megatron_bert.jglue.tasks import EPOCHS, LEARNING_RATES, TASKS, Task

_LIBRARIES = ("accelerate", "scipy", "sklearn", "transformers")
# Room for the special tokens, a question and a part of a context.
_SHORTEST_INPUT = 16


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__,
        epilog="Writes results.json into --output after every training. The same command goes "
        "on where a killed one was; other tasks, seeds, learning rates and epochs are added to "
        "what stands there.",
    )
    parser.add_argument(
        "--model",
        required=True,
        type=Path,
        metavar="DIR",
        help="a model with its tokenizer, as convert_checkpoint.py to-hf or save_pretrained writes",
    )
    parser.add_argument("--task", required=True, choices=TASKS, help="of the model card")
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="DIR",
        help="holds train-*.json and valid-*.json of the task, as JGLUE publishes them",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="for results.json, one per model"
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[42],
        metavar="N",
        help="with several, means and standard deviations are told (default: 42)",
    )
    _add_protocol(parser.add_argument_group("protocol (what differs is told in results.json)"))
    _add_computing(parser.add_argument_group("computing"))
    return parser


def _add_protocol(group: argparse._ArgumentGroup) -> None:
    rates = ", ".join(f"{rate:g}" for rate in LEARNING_RATES)
    group.add_argument(
        "--grid",
        action="store_true",
        help=f"learning rates {rates} with {EPOCHS[0]} and {EPOCHS[1]} epochs each, best on valid",
    )
    group.add_argument(
        "--learning-rate",
        nargs="+",
        type=float,
        metavar="X",
        help=f"in place of the grid's (default without --grid: {LEARNING_RATES[0]:g})",
    )
    group.add_argument(
        "--epochs",
        nargs="+",
        type=int,
        metavar="N",
        help=f"in place of the grid's (default without --grid: {EPOCHS[0]})",
    )
    group.add_argument(
        "--batch-size", type=int, metavar="N", help="rows of a step (default: the task's, 32 or 64)"
    )
    group.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of an input (default: the task's, 64 to 512)",
    )
    group.add_argument(
        "--max-train", type=int, metavar="N", help="train on the first N rows, for a trial"
    )
    group.add_argument(
        "--max-valid", type=int, metavar="N", help="evaluate on the first N rows, for a trial"
    )
    group.add_argument(
        "--random-weights",
        action="store_true",
        help="leave the model's weights: what its shape reaches without pretraining",
    )


def _add_computing(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--micro-batch-size",
        type=int,
        metavar="N",
        help="rows at a time, a divisor of the batch size, to save memory (default: all)",
    )
    group.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="bf16: products in BF16, weights in fp32 (default: %(default)s)",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="execute code that lies in --model, if you trust it; this project's own exports and "
        "transformers' architectures need no such leave",
    )


def _check(options: argparse.Namespace) -> None:
    for name, smallest in (
        ("batch_size", 1),
        ("micro_batch_size", 1),
        ("max_train", 1),
        ("max_valid", 1),
        ("max_length", _SHORTEST_INPUT),
    ):
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name.replace('_', '-')} {value}: give at least {smallest}")
    for name, is_usable, meant in (
        ("learning_rate", lambda rate: rate > 0 and math.isfinite(rate), "numbers above 0"),
        ("epochs", lambda epochs: epochs >= 1, "whole numbers above 0"),
        ("seeds", lambda seed: 0 <= seed < 2**32, "whole numbers from 0 to 4294967295"),
    ):
        values = getattr(options, name) or []
        if not all(map(is_usable, values)) or len(set(values)) < len(values):
            raise UserError(
                f"--{name.replace('_', '-')} {' '.join(map(str, values))}: give {meant}, each once"
            )
    check_place(options.output)


def _prepare_process() -> None:
    """Set what the libraries read from the environment when they are loaded.

    Raises:
        UserError: one of them is missing, or a launcher has started several ranks.
    """
    if missing := [name for name in _LIBRARIES if find_spec(name) is None]:
        raise UserError(
            f"packages {', '.join(missing)} cannot be imported; the extra jglue brings what it "
            "needs: pip install -c constraints.txt -e '.[jglue]'"
        )
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise UserError(
            f"WORLD_SIZE = {ranks}: start this tool with python, not with torchrun; one process "
            "and one GPU train a cell, and others may run beside it with an --output of their own"
        )
    # The model is on the disk: nothing is looked up in a hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # With several GPUs, the trainer would make the batch as many times larger.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]


def _summary(results: Results, task: Task, name: str) -> str:
    chosen = results.selected(task)
    lines = [
        f"{task.title}: learning rate {chosen['learning_rate']:g} and {chosen['epochs']} epoch(s), "
        f"by {chosen['by']} over {len(chosen['seeds'])} seed(s)",
        "",
        table(results, name),
        *(f"not JGLUE's protocol: {departure}" for departure in results.departures()),
        *results.notes(),
    ]
    return "".join(f"{line}\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells and print the row."""
    options = _parser().parse_args(arguments)
    _check(options)
    _prepare_process()
    # Imported only now: they take seconds to load, and may be missing.
    from transformers.utils import logging as transformers_logging

    from megatron_bert.jglue.cell import Batches
    from megatron_bert.jglue.grid import GridOptions, run_grid
    from megatron_bert.jglue.models import ModelSource

    logging.basicConfig(format="%(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    task = TASKS[options.task]
    batch_size = options.batch_size or task.batch_size
    micro_size = options.micro_batch_size or batch_size
    if batch_size % micro_size:
        raise UserError(
            f"--micro-batch-size {micro_size}: give a divisor of {batch_size}, the batch"
        )
    results = run_grid(
        GridOptions(
            source=ModelSource(options.model, options.trust_remote_code, options.random_weights),
            task=task,
            data=options.data,
            output=options.output,
            learning_rates=options.learning_rate or LEARNING_RATES[: None if options.grid else 1],
            epochs=options.epochs or EPOCHS[: None if options.grid else 1],
            seeds=options.seeds,
            batches=Batches(batch_size, micro_size, options.precision),
            max_length=options.max_length or task.max_length,
            max_train=options.max_train,
            max_valid=options.max_valid,
        )
    )
    name = options.model.resolve().name + (", random weights" if options.random_weights else "")
    sys.stdout.write(_summary(results, task, name))
    sys.stdout.write(f"wrote {results.path}\n")


if __name__ == "__main__":
    run_cli(main)
