"""Measure how fast and how large the parts are on this machine."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bert.command_line.parser import Parser
from megatron_bert.command_line.run import run_cli, told_errors

with told_errors():
    from megatron_bert.benchmark.data.measure import FULL, QUICK, DataOptions, measure_data
    from megatron_bert.benchmark.data.table import data_table
    from megatron_bert.config.load import load_config

_CHECKOUT = Path(__file__).resolve().parents[1]
_RECIPE = _CHECKOUT / "examples" / "retrievabert_1.3b.yaml"
_CORPUS = [_CHECKOUT / "examples" / "corpus" / f"{name}.jsonl" for name in ("english", "japanese")]
# What `add_subparsers` returns.
_Kinds: TypeAlias = "argparse._SubParsersAction[Parser]"


def _parser() -> Parser:
    parser = Parser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for add in (_add_data, _add_checkpoint, _add_pipeline, _add_step, _add_kernels, _add_peers):
        add(kinds)
    for kind in kinds.choices.values():
        kind.set_defaults(parser=kind)
        kind.add_argument(
            "--json", action="store_true", help="print one JSON document, not a table"
        )
        kind.add_argument(
            "--quick",
            action="store_true",
            help="a thousandth of the work, to see that everything runs; its figures mean nothing",
        )
    return parser


def _add_data(kinds: _Kinds) -> None:
    parser = kinds.add_parser(
        "data",
        help="the data side: planning a run's rows, assembling and masking them, how full they "
        "are, memory, preprocessing against SentencePiece (some minutes, 2 cores, 2 GB)",
        description="Plan RetrievaBERT's 465 M rows over 200 M documents of made-up lengths; "
        "assemble random rows of 128, 512 and 2048 slots from made-up datasets, single-threaded; "
        "count how full an epoch's rows are; watch the memory; preprocess text with two workers, "
        "and time SentencePiece's own call on the same text.",
        epilog="Takes some minutes. Temporary files (1 GB) go where TMPDIR says. On a machine that "
        "does other work too the figures are lower.",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="MODEL",
        help="SentencePiece .model to preprocess with (default: one trained on the corpus)",
    )
    parser.add_argument(
        "--corpus",
        nargs="+",
        type=Path,
        default=_CORPUS,
        metavar="FILE",
        help=".jsonl or .txt, also as .gz or .zst, or .parquet: 100 MB of text to preprocess; less "
        "is repeated, more is not read (default: the corpus in examples/)",
    )
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="key of the text in .jsonl, its column in .parquet (default: %(default)s)",
    )


def _add_checkpoint(kinds: _Kinds) -> None:
    kinds.add_parser(
        "checkpoint",
        help="saving and loading the training state of a model of 300 M parameters (some minutes, "
        "8 GB of memory, 8 GB of disk)",
        description="Save the weights and moments (fp32, 3.6 GB) of a model of 300 M parameters, "
        "with training waiting and in the background, and load them again; one process.",
        epilog="Checkpoints are written where TMPDIR says, and removed: set it to a folder on the "
        "disk in question.",
    )


def _add_pipeline(kinds: _Kinds) -> None:
    kinds.add_parser(
        "pipeline",
        help="how long the ranks of a pipeline wait for each other, beside what is predicted (a "
        "minute, 4 processes that mostly sleep)",
        description="Time training steps of 4 pipeline ranks and 16 micro-batches, whose stages "
        "sleep for a fixed time in place of computing, under every schedule.",
    )


def _add_step(kinds: _Kinds) -> None:
    parser = kinds.add_parser(
        "step",
        help="training steps: tokens a second, TFLOP/s, MFU, memory, where the time goes (minutes "
        "on a GPU; under torchrun on several)",
        description="Train for some steps on packed rows of made-up articles, or of a dataset, at "
        "several row lengths; a plain matrix product and the model's own are timed beside it.",
    )
    _add_model_options(parser)
    parser.add_argument("--micro-batches", type=_positive, default=4, help="of a step")
    parser.add_argument("--steps", type=_positive, default=5, help="that are timed")


def _add_kernels(kinds: _Kinds) -> None:
    parser = kinds.add_parser(
        "kernels",
        help="the pieces of a step alone, by each kernel that can compute them: attention, norm, "
        "activation, dropout, cross-entropy, AdamW (a minute or so)",
        description="Time what can compute each piece of a training step, at a configuration's "
        "shapes, forward and with backward; what is not here is listed with the reason. On a GPU "
        "each time is that of many calls one after another: pieces that take less than the host "
        "needs to ask for them show the host's time, and small inputs come out of the device's "
        "cache, faster than from memory.",
    )
    _add_model_options(parser)


def _add_peers(kinds: _Kinds) -> None:
    parser = kinds.add_parser(
        "peers",
        help="training steps beside those of transformers' Trainer and of Megatron-core's BERT, on "
        "the same documents (minutes; needs the extra `peers`)",
        description="Train for some steps at a configuration's shapes, here on packed rows, by the "
        "others on padded ones, and compare the tokens of text a second. One process.",
        epilog="Who lacks memory for a micro-batch computes the step's rows in smaller ones, down "
        "to an eighth: steps have the same number of rows.",
    )
    _add_model_options(parser)
    parser.add_argument("--micro-batches", type=_positive, default=1, help="of a step")
    parser.add_argument("--steps", type=_positive, default=5, help="that are timed")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmarks that measure a configuration's model."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="keys that replace the configuration's, e.g. compile.enabled=true",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=_RECIPE,
        metavar="FILE",
        help="model, layout, precision (default: RetrievaBERT-1.3B)",
    )
    parser.add_argument(
        "--data",
        metavar="PREFIX",
        help="a dataset made with the LLM-jp tokenizer v3.0 (default: random tokens)",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=_positive,
        metavar="SLOTS",
        help="of a row, a case each (default: 128 256 512 2048, as far as the model has positions)",
    )
    parser.add_argument(
        "--micro-tokens",
        nargs="+",
        type=_positive,
        metavar="SLOTS",
        help="slots of a micro-batch, a case each (default: the configuration's)",
    )
    parser.add_argument(
        "--dropout",
        nargs="+",
        type=_probability,
        metavar="P",
        help="of hidden states and attention weights, a case each (default: the configuration's)",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number above 0")
    return int(text)


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text}: give a number from 0 to below 1")
    return value


def _say(what: str) -> None:
    sys.stderr.write(f"{what} ...\n")


def _measure_data(given: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    figures = measure_data(
        DataOptions(
            recipe=load_config(_RECIPE),
            corpus=given.corpus,
            json_key=given.json_key,
            tokenizer=given.tokenizer,
            sizes=QUICK if given.quick else FULL,
        ),
        _say,
    )
    return figures.document(), data_table(figures)


def _measure_checkpoint(given: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    # Imported here, because each process that measures the data side loads this file and needs no
    # torch.
    from megatron_bert.benchmark.checkpoint import measure as checkpoint
    from megatron_bert.benchmark.checkpoint.table import checkpoint_table

    work = checkpoint.QUICK if given.quick else checkpoint.FULL
    figures = checkpoint.measure_checkpoint(work, _say)
    return figures.document(), checkpoint_table(figures)


def _measure_pipeline(given: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from megatron_bert.benchmark.pipeline import measure as pipeline
    from megatron_bert.benchmark.pipeline.table import pipeline_table

    work = pipeline.QUICK if given.quick else pipeline.FULL
    figures = pipeline.measure_pipeline(work, _say)
    return figures.document(), pipeline_table(figures)


def _measure_step(given: argparse.Namespace) -> tuple[dict[str, Any], list[str]] | None:
    from megatron_bert.benchmark.step.command import measure_command
    from megatron_bert.benchmark.step.table import step_table

    figures = measure_command(given, _say)
    return None if figures is None else (figures.document(), step_table(figures))


def _measure_kernels(given: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from megatron_bert.benchmark.kernels.command import measure_command
    from megatron_bert.benchmark.kernels.table import kernels_table

    figures = measure_command(given, _say)
    return figures.document(), kernels_table(figures)


def _measure_peers(given: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from megatron_bert.benchmark.peers.command import measure_command
    from megatron_bert.benchmark.peers.table import peers_table

    figures = measure_command(given, _say)
    return figures.document(), peers_table(figures)


_MEASURES = {
    "data": _measure_data,
    "checkpoint": _measure_checkpoint,
    "pipeline": _measure_pipeline,
    "step": _measure_step,
    "kernels": _measure_kernels,
    "peers": _measure_peers,
}


def _purposes(given: argparse.Namespace) -> Iterator[tuple[str, bool, str]]:
    """What `Parser.check_purposes` asks for."""
    without = "measure without --quick, which has a number of its own"
    if given.kind == "kernels":
        yield "--micro-tokens", not given.quick, without
    if given.kind == "step":
        yield "--micro-batches", not given.quick, without
    if given.kind in ("step", "peers"):
        yield "--steps", not given.quick, without


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    logging.basicConfig(format="%(message)s")
    given = _parser().parse_args(arguments)
    given.parser.check_purposes(given, _purposes(given))
    measured = _MEASURES[given.kind](given)
    if measured is None:
        return
    document, lines = measured
    if given.json:
        lines = [json.dumps(document, ensure_ascii=False, indent=2)]
    sys.stdout.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    run_cli(main)
